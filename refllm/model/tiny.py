"""The bundled model: its tokenizer, its training data and the recipe that ties them to the training engine.

`train_from_recipe(recipe, folder)` is what `refllm train RECIPE FOLDER` runs. It writes a folder in Hugging Face layout
(config.json, model.safetensors, tokenizer.json), the training log and, while it runs, checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from refllm.formats.files import atomic_write, read_json
from refllm.formats.tensors import write_safetensors
from refllm.kernels.autograd import Tensor
from refllm.kernels.optimizers import Optimizer, Schedule
from refllm.kernels.rope import Rope
from refllm.model.config import ModelConfig
from refllm.model.differentiable import NextToken, head_name, hidden_states, initial_weights
from refllm.model.model import Model
from refllm.model.probe import full_report, measure
from refllm.model.train import train
from refllm.model.world import World

BOS, EOS = "<bos>", "<eos>"


def build_tokenizer(world: World, stories: int = 1500):
    """Byte-level BPE in which every word of the world is one token.

    Parameters
    ----------
    world : World
    stories : int
        Stories of 511 tokens to learn from, beside the list of words.

    Returns
    -------
    tokenizers.Tokenizer
        A leading space is added to every text, so the first word is the same token as later ones; <bos> is put in front
        when special tokens are asked for.

    Raises
    ------
    ValueError
        If a word of the world did not become one token.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    words = " ".join(token.strip() for token in world.vocabulary)
    texts = (world.story(f"tokenizer {i}", 511).text for i in range(stories))
    tokenizer.train_from_iterator([*texts, *[words] * 300], trainer)
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bos)])
    token_index(tokenizer, world)
    return tokenizer


def token_index(tokenizer, world: World) -> dict[str, int]:
    """Token of the world (" lamp", ".") -> id. Raises ValueError if one is not a single token."""
    index = {}
    for token in world.vocabulary:
        # Punctuation follows a word; the space that the tokenizer puts in front would change it.
        text, skip = (token, 0) if token[0] == " " else (" is" + token, 1)
        ids = tokenizer.encode(text, add_special_tokens=False).ids[skip:]
        if len(ids) != 1:
            raise ValueError(f"the tokenizer splits {token!r} into {len(ids)} tokens; the story world needs one")
        index[token] = ids[0]
    return index


@dataclass(frozen=True)
class Recipe:
    """A training recipe, as read from JSON (`data/tiny/recipe.json` is one)."""

    raw: Mapping

    @classmethod
    def read(cls, path) -> Recipe:
        """Read and check a recipe file. Raises ValueError naming unknown and missing keys."""
        raw = read_json(path)
        known = {
            "name",
            "model",
            "seed",
            "stages",
            "optimizer",
            "schedule",
            "processes",
            "measure_every",
            "checkpoint_every",
        }
        keys = {"length", "rows", "steps", "emphasis"}
        if strange := [stage for stage in raw.get("stages", ()) if set(stage) != keys]:
            raise ValueError(f"{path}: a stage has the keys {sorted(keys)}, got {strange[0]}")
        if set(raw) != known:
            wrong = f"unknown {sorted(set(raw) - known)}, missing {sorted(known - set(raw))}"
            raise ValueError(f"{path}: a training recipe has exactly the keys {sorted(known)}; {wrong}")
        recipe = cls(raw)
        try:
            recipe.config(1, 0, 0), recipe.schedule(), recipe.optimizer()
        except (TypeError, KeyError, ValueError) as error:  # an unknown or missing field, a value out of range
            raise ValueError(f"{path}: {str(error).replace('.__init__()', '')}") from None
        return recipe

    @property
    def steps(self) -> int:
        """Steps of all stages."""
        return sum(stage["steps"] for stage in self.raw["stages"])

    def config(self, vocab_size: int, bos: int, eos: int) -> ModelConfig:
        """The model's shape; bos and eos are token ids."""
        shape = dict(self.raw["model"])
        rope = Rope(theta=shape.pop("rope_theta"))
        return ModelConfig(
            architecture="llama",
            vocab_size=vocab_size,
            rope=rope,
            tied_embeddings=True,
            bos_token_id=bos,
            eos_token_ids=(eos,),
            **shape,
        )

    def schedule(self) -> Schedule:
        """Learning-rate schedule over all stages."""
        return Schedule(steps=self.steps, **self.raw["schedule"])

    def optimizer(self) -> Optimizer:
        """Optimizer; lists of JSON become tuples."""
        return Optimizer(**{k: tuple(v) if isinstance(v, list) else v for k, v in self.raw["optimizer"].items()})

    def stage(self, step: int) -> Mapping:
        """The stage {length, rows, steps, emphasis} that this step belongs to."""
        for stage in self.raw["stages"]:
            if step < stage["steps"]:
                return stage
            step -= stage["steps"]
        raise ValueError(f"step {step} lies beyond the recipe's {self.steps} steps")

    def tokens(self, step: int) -> int:
        """Training tokens of the steps before this one."""
        done = 0
        for stage in self.raw["stages"]:
            part = min(step, stage["steps"])
            done += part * stage["rows"] * stage["length"]
            step -= part
        return done

    def history(self, step: int) -> str:
        """Digest of all that steps 0..step-1 depended on; what comes later may change."""
        schedule, stages, left = self.schedule(), [], step
        for stage in self.raw["stages"]:
            stages.append((stage["length"], stage["rows"], stage["emphasis"], min(left, stage["steps"])))
            left -= stages[-1][-1]
        rates = [schedule.factor(i) for i in range(step)]
        past = [self.raw["model"], self.raw["seed"], self.raw["optimizer"], [s for s in stages if s[-1]], rates]
        return hashlib.sha256(json.dumps(past, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class StoryBatches:
    """Batches of fresh stories. Called with (step, part, parts); returns ids, targets, weights, each [rows / parts, T].

    Row r of a step is a story of its own seed, cut after T tokens, whatever the number of parts. Values of answers,
    results of sums and words of known songs count `emphasis` times in the loss: the past determines them, but they are
    few, and until a model can recall them their gradient is drowned by that of choices nobody can predict.
    """

    recipe: Recipe
    world: World
    index: Mapping[str, int]
    bos: int

    def __call__(self, step: int, part: int, parts: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        stage = self.recipe.stage(step)
        rows, length = stage["rows"], stage["length"]
        if rows % parts:
            raise ValueError(f"a stage has {rows} rows, which do not divide among {parts} processes")
        mine = range(rows * part // parts, rows * (part + 1) // parts)
        targets, weights = np.empty((len(mine), length), np.int64), np.ones((len(mine), length), np.float32)
        for i, row in enumerate(mine):
            seed = f"train {self.recipe.raw['seed']} {step} {row}"
            story = self.world.story(seed, length + self.world.longest_turn)
            targets[i] = [self.index[token] for token in story.tokens[:length]]
            for span in story.spans:
                first, last = (span.start, span.stop) if span.kind == "song" else (span.stop - 2, span.stop - 1)
                weights[i, first:last] = stage["emphasis"]
        ids = np.empty_like(targets)
        ids[:, 0], ids[:, 1:] = self.bos, targets[:, :-1]
        return ids, targets, weights


def held_out(world: World, count: int, length: int = 511, name: str = "held out") -> list:
    """Stories that training never sees: their seeds start with another word."""
    return [world.story(f"{name} {i}", length) for i in range(count)]


def write_texts(folder, world: World | None = None, stories: int = 64) -> None:
    """Write calib.txt and eval.txt: held-out stories of at most 511 tokens, one a line, with blank lines between."""
    world = world or World()
    for name in ("calib", "eval"):
        texts = [story.text for story in held_out(world, stories, name=name)]
        with atomic_write(Path(folder) / f"{name}.txt", "w") as file:
            file.write("\n\n".join(texts) + "\n")


def training_logits(weights: Mapping[str, np.ndarray], config: ModelConfig) -> Callable:
    """ids [B, T] -> logits [B, T, V] by the training forward pass, nothing recorded."""
    params = {name: Tensor(weight) for name, weight in weights.items()}

    def logits_of(ids):
        hidden = hidden_states(params, config, ids).data
        return (hidden @ params[head_name(config)].data.T).reshape(*ids.shape, -1)

    return logits_of


def train_from_recipe(
    recipe_path,
    out_dir,
    resume: bool = True,
    log: Callable[[str], None] | None = None,
    *,
    measure_stories: int = 48,
    report_stories: int = 160,
    report_questions: int = 300,
) -> Path:
    """Train a model of the story world from scratch.

    Parameters
    ----------
    recipe_path : path
        JSON, see `data/tiny/recipe.json`.
    out_dir : path
        Gets config.json, model.safetensors, tokenizer.json, training_log.jsonl, checkpoint.safetensors.
    resume : bool
        Go on from the checkpoint in `out_dir` if there is one; the bits are those of an uninterrupted run.
    log : callable, optional
        Called with one line of text after every measurement.
    measure_stories : int
        Held-out stories of the measurements on the way.
    report_stories, report_questions : int
        The report at the end: stories of its perplexity, least number of questions per group and distance bin.

    Returns
    -------
    Path of the folder
    """
    recipe, out = Recipe.read(recipe_path), Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "checkpoint.safetensors"
    if not resume:
        checkpoint.unlink(missing_ok=True)
    world = World()
    tokenizer = build_tokenizer(world)
    with atomic_write(out / "tokenizer.json", "w") as file:
        file.write(tokenizer.to_str(pretty=True) + "\n")
    index = token_index(tokenizer, world)
    config = recipe.config(tokenizer.get_vocab_size(), tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS))
    logger = _Logger(recipe, config, index, held_out(world, measure_stories), out / "training_log.jsonl", log)
    weights = train(
        initial_weights(config, recipe.raw["seed"]),
        NextToken(config),
        StoryBatches(recipe, world, index, config.bos_token_id),
        optimizer=recipe.optimizer(),
        schedule=recipe.schedule(),
        processes=recipe.raw["processes"],
        checkpoint=checkpoint,
        checkpoint_every=recipe.raw["checkpoint_every"],
        history=recipe.history,
        report=logger,
        report_every=math.gcd(20, recipe.raw["measure_every"]),
    )
    save_folder(weights, config, out)
    found = full_report(Model(config, weights), index, world, needed=report_questions, plain=report_stories)
    logger.write(recipe.steps, found)
    return out


class _Logger:
    """Writes a line of the training log whenever a measurement is due."""

    def __init__(self, recipe, config, index, stories, path, log):
        self.recipe, self.config, self.index, self.stories, self.path, self.log = (
            recipe,
            config,
            index,
            stories,
            path,
            log,
        )
        self.losses: list[float] = []

    def __call__(self, step: int, losses: list[float], weights: Mapping[str, np.ndarray]) -> None:
        self.losses += losses
        if step % self.recipe.raw["measure_every"] and step != self.recipe.steps:
            return
        bos = self.config.bos_token_id
        found = measure(training_logits(weights, self.config), self.stories, self.index, bos)
        self.write(step, {"train_loss": round(float(np.mean(self.losses)), 4)} | found)
        self.losses = []

    def write(self, step: int, found: Mapping) -> None:
        """Append an entry; entries of a future that a resumed run has forgotten go."""
        entry = {"step": step, "tokens_seen": self.recipe.tokens(step)} | found
        before = self.path.read_text("utf-8").splitlines() if self.path.exists() else []
        kept = [line for line in before if self._precedes(json.loads(line), entry)]
        with atomic_write(self.path, "w") as file:
            file.write("\n".join([*kept, json.dumps(entry)]) + "\n")
        if self.log is not None:
            self.log(summary(entry))

    @staticmethod
    def _precedes(old: Mapping, new: Mapping) -> bool:
        return old["step"] < new["step"] or (old["step"] == new["step"] and "heads" in new and "heads" not in old)


def summary(entry: Mapping) -> str:
    """One line of a training log entry for people."""
    part = lambda shares: "/".join(f"{100 * share[0]:.0f}" for share in shares.values())
    one = lambda share: f"{100 * share[0]:.0f}" if share else "-"
    return (
        f"step {entry['step']} tokens {entry['tokens_seen'] / 1e6:.2f}M loss {entry['loss']:.4f} "
        f"floor {entry['floor']:.4f} ratio {entry['ratio']:.3f} objects {part(entry['recall']['objects'])} "
        f"people {part(entry['recall']['people'])} songs {one(entry['songs'])} sums {one(entry['sums'])}"
    )


def save_folder(weights: Mapping[str, np.ndarray], config: ModelConfig, folder: Path) -> None:
    """Write config.json and model.safetensors as Hugging Face's LlamaForCausalLM reads them."""
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta,
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_ids[0],
        "torch_dtype": "float32",
    }
    with atomic_write(folder / "config.json", "w") as file:
        file.write(json.dumps(fields, indent=2) + "\n")
    write_safetensors(folder / "model.safetensors", dict(weights), {"format": "pt"})
