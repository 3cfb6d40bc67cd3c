"""compare: one row a recipe, size and speed and quality side by side, all measured and nothing estimated.

The parent process applies the recipes one by one and stores each model as `refllm compress` would. Every model is
then loaded and run by a process of its own (`refllm.evaluate.worker`), so that its peak memory is its own, too. The
base model runs first and leaves its log-probabilities in a temporary file, which the others are compared with.

    size      stored bytes of all weights
    memory    peak resident memory of a process that loads the model, reads a prompt and generates; the measurement of
              quality comes after and does not count. Python, NumPy and Numba are part of it.
    speed     medians of greedy generation, batch 1, a warm-up excluded
    quality   perplexity, KL and top-1 agreement over the same positions: by the protocol document where the text is
              given as documents (as the bundled stories are), else by the protocol gptq. A cache that compresses a
              prompt reads half of each window as one.
    recall    of tasks: the share of questions answered, and the bytes of the cache then (`refllm.evaluate.recall`)
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from refllm.evaluate.first_run import compile_for_all, run_once
from refllm.evaluate.kept import fingerprint, keep_row, kept_rows
from refllm.evaluate.measure import sizes
from refllm.evaluate.perplexity import check_window, plan
from refllm.evaluate.recall import ITEMS, prompts, questions, share_found
from refllm.formats.process import child_environment
from refllm.kernels.packed.threads import thread_count
from refllm.methods.apply import check, compress, needs_calibration
from refllm.methods.recipes import parse
from refllm.model.model import Model
from refllm.model.native import save_native

DEFAULT_WINDOW = 512
DEFAULT_TOKENS = 4096
CALIBRATION_TOKENS = 4096
# One recipe of every family and the classic contrasts: bits against groups, masks against ranks, weights against cache.
DEFAULT_RECIPES = (
    "none",
    "rtn:bits=8",
    "rtn:bits=4,group=32",
    "rtn:bits=4",
    "rtn:bits=3,group=32",
    "rtn:bits=2,group=16",
    "awq:bits=3,group=32",
    "magnitude:sparsity=0.5",
    "wanda:sparsity=0.5",
    "wanda:pattern=2:4",
    "wanda:pattern=2:4+rtn:bits=4,group=32",
    "kquants",
    "svd:ratio=0.5",
    "rtn:bits=8,symmetric=true,group=-1+dynamic",
    "smoothquant+rtn:bits=8,symmetric=true,group=-1+static",
    "kivi:bits=4",
    "kivi:bits=2",
    "flash",
    "speculative",
    "rtn:bits=4,group=32+kivi:bits=2",
)


@dataclass(frozen=True)
class Setting:
    """What every recipe of a comparison is measured on.

    Parameters
    ----------
    ids : (N,) integers
        The text; quality is measured on its whole windows, or on its documents.
    calibration : (M,) integers or None
        For recipes that need it; disjoint from `ids`.
    window : int
    prompt_tokens, new_tokens, repeats : int
        Of the measurement of speed: the first tokens of the text are the prompt.
    activations : "float32", "int8" or "int4"
    threads : int or None
        Of NumPy and the kernels in the measuring processes; None leaves both to themselves.
    starts : tuple of int
        Where each document begins in `ids`; () for a plain stream of tokens.
    tasks : tuple of str
        Of refllm.evaluate.recall: facts, passkey, or files.
    items : int
        Questions of each task, at most.
    """

    ids: np.ndarray
    calibration: np.ndarray | None
    window: int
    prompt_tokens: int
    new_tokens: int = 48
    repeats: int = 3
    activations: str = "float32"
    threads: int | None = None
    starts: tuple[int, ...] = ()
    tasks: tuple[str, ...] = ()
    items: int = ITEMS

    @property
    def prompt(self) -> np.ndarray:
        """The tokens that are read before new ones are written."""
        return self.ids[: self.prompt_tokens]

    @property
    def protocol(self) -> str:
        """document or gptq, see refllm.evaluate.perplexity."""
        return "document" if self.starts else "gptq"


def as_text(ids: np.ndarray, starts: Sequence[int]) -> np.ndarray | list[np.ndarray]:
    """What `plan` takes: the stream itself, or its documents."""
    return np.split(ids, starts[1:]) if len(starts) else ids


def setting(
    model: Model,
    text,
    calibration=None,
    *,
    max_tokens: int = DEFAULT_TOKENS,
    window: int | None = None,
    **fields,
) -> Setting:
    """Cut a text into what is evaluated and what calibrates.

    Parameters
    ----------
    text : (N,) integers, or a list of documents, each a list of integers
        The first `max_tokens` are evaluated, of documents the whole ones among them (where the first document alone is
        longer, its begin); without `calibration`, up to 4096 tokens that follow them calibrate.
    calibration : (M,) integers, optional
    window : int, optional
        None takes 512, or the context or the text where that is shorter.

    Raises
    ------
    ValueError
        A text that is too short, a window that does not fit the model.
    """
    ids, starts, end = _cut(text, max_tokens)
    evaluated = ids[:end]
    if len(evaluated) < 2:
        raise ValueError(f"the text has {len(evaluated)} tokens; at least 2 are needed")
    if window is None:
        window = min(DEFAULT_WINDOW, model.config.context_length, len(evaluated))
    check_window(model, window)
    plan(model, as_text(evaluated, starts), "document" if starts else "gptq", window)  # complain before anything runs
    if calibration is None:
        calibration = ids[end : end + CALIBRATION_TOKENS]
    calibration = np.asarray(calibration)
    new_tokens = min(Setting.new_tokens, max(2, model.config.context_length // 4))
    prompt = max(1, min(256, len(evaluated), model.config.context_length - new_tokens))
    return Setting(
        evaluated,
        calibration if len(calibration) else None,
        window,
        prompt,
        new_tokens=new_tokens,
        starts=starts,
        **fields,
    )


def _cut(text, max_tokens: int) -> tuple[np.ndarray, tuple[int, ...], int]:
    """All ids, where the evaluated documents begin (() for a stream), and where the evaluated part ends."""
    if not len(text) or np.ndim(text[0]) == 0:
        return np.asarray(text), (), max_tokens
    ends = np.cumsum([len(document) for document in text])
    count = max(1, int(np.searchsorted(ends, max_tokens, side="right")))
    starts = (0, *(int(end) for end in ends[: count - 1]))
    return np.concatenate([np.asarray(document) for document in text]), starts, min(int(ends[count - 1]), max_tokens)


def compare(
    model: Model,
    recipes: Sequence[str],
    setting: Setting,
    on_recipe: Callable[[int, int, str], None] | None = None,
    on_failed: Callable[[str, str], None] | None = None,
    resume: str | Path | None = None,
) -> dict:
    """Measure every recipe; those that the methods refuse are found first, before anything is measured.

    Parameters
    ----------
    model : Model
        The base: what the recipes are applied to, and what KL and agreement refer to.
    recipes : sequence of str
        "none" is the base itself.
    setting : Setting
    on_recipe : callable, optional
        Called as on_recipe(number, all, recipe) before each recipe.
    on_failed : callable, optional
        Called as on_failed(recipe, reason) as soon as it is known that a recipe cannot be measured.
    resume : path, optional
        Rows are kept in this file as they are measured, and what it has already is not measured again
        (`refllm.evaluate.kept`).

    Returns
    -------
    dict
        rows (with tasks: recall {task: share} and cache_bytes {stored_bytes_per_token, ...}), failed ([{recipe,
        reason}]: recipes this model or text cannot take), protocol, window, tokens_scored,
        prompt_tokens, new_tokens, activations, threads, base_perplexity, base_dtype (type in which the base's
        log-probabilities were kept).

    Raises
    ------
    RecipeError
        An unknown method or key, before anything is measured.
    ValueError
        No recipe is left to measure; every reason is in the message.
    RuntimeError
        A measuring process failed; its last line is in the message.
    """
    failed: list[dict] = []
    asked = {task: questions(task, setting.items) for task in setting.tasks}
    if asked and model.tokenizer is None:
        raise ValueError("tasks need a model with a tokenizer")

    def leave_out(recipe: str, error: ValueError) -> None:
        failed.append({"recipe": recipe, "reason": str(error)})
        if on_failed is not None:
            on_failed(recipe, str(error))

    given = {task: prompts(model, of_task) for task, of_task in asked.items()}
    keep, rows = (lambda row: None), {}
    if resume is not None:
        measured_by = replace(setting, threads=setting.threads or thread_count())
        of = fingerprint(model, measured_by, [given, repr(asked)])
        keep, rows = partial(keep_row, resume, of), kept_rows(resume, of)
    recipes = list(dict.fromkeys(recipes))
    refused = _refused(model, [recipe for recipe in recipes if recipe not in rows], setting)
    if refused and len(refused) == len(recipes):
        raise ValueError("; ".join(f"{recipe}: {error}" for recipe, error in refused.items()))
    for recipe, error in refused.items():
        leave_out(recipe, error)
    missing = [recipe for recipe in recipes if recipe not in rows and recipe not in refused]
    if missing or "none" not in rows:
        for row in _measured(model, missing, setting, given, leave_out, on_recipe):
            row = _with_recall(row, asked, model.tokenizer)
            if row["recipe"] not in rows:
                keep(row)
                rows[row["recipe"]] = row
    base_row = rows["none"]
    extra = {"tokens_scored", "base_dtype"}
    return {
        "rows": [{k: v for k, v in rows[r].items() if k not in extra} for r in recipes if r in rows],
        "failed": failed,
        "protocol": setting.protocol,
        "window": setting.window,
        "tokens_scored": base_row["tokens_scored"],
        "prompt_tokens": setting.prompt_tokens,
        "new_tokens": setting.new_tokens,
        "activations": setting.activations,
        "threads": setting.threads or thread_count(),
        "base_perplexity": base_row["perplexity"],
        "base_dtype": base_row["base_dtype"],
    }


def _measured(model: Model, recipes, setting: Setting, given: dict, leave_out, on_recipe) -> Iterator[dict]:
    """Rows of the base, whose log-probabilities the others need, and of each recipe that can be measured."""
    with tempfile.TemporaryDirectory(prefix="refllm-", ignore_cleanup_errors=True) as folder:
        folder = Path(folder)
        np.save(folder / "ids.npy", setting.ids)
        (folder / "tasks.json").write_text(json.dumps(given), encoding="utf-8")
        # No tokenizer: the processes get ids, and loading one would count in their memory.
        base = replace(model, tokenizer=None)
        run_once(base, setting.prompt, setting.activations, write=2)
        yield _measure(base, "none", setting, folder, is_base=True)
        for done, recipe in enumerate(recipes, 1):
            if on_recipe is not None:
                on_recipe(done, len(recipes), recipe)
            if recipe == "none":
                continue
            try:
                small = compress(base, recipe, setting.calibration if needs_calibration(recipe) else None)
                run_once(small, setting.prompt, setting.activations, write=2)
                row = _measure(small, recipe, setting, folder)
            except ValueError as error:  # a scale beyond its type, say: the other rows are worth having
                leave_out(recipe, error)
                continue
            yield row


def _with_recall(row: dict, asked: dict, tokenizer) -> dict:
    """The row with the share of answers found in place of what was written."""
    row = dict(row)
    answers = row.pop("answers", {})
    if not answers:
        return row
    row["recall"] = {task: share_found(tokenizer, asked[task], found["written"]) for task, found in answers.items()}
    names = [name for name in next(iter(answers.values())) if name != "written"]
    row["cache_bytes"] = {name: float(np.mean([found[name] for found in answers.values()])) for name in names}
    return row


def _refused(model: Model, recipes: Sequence[str], setting: Setting) -> dict[str, ValueError]:
    """The recipes that this model or setting cannot take, and why. They run here first, so kernels come before."""
    for recipe in recipes:
        parse(recipe)  # a typing error ends everything
    compile_for_all(replace(model, tokenizer=None), recipes, setting.prompt, setting.activations)
    refused = {}
    for recipe in recipes:
        try:
            check(model, recipe, setting.calibration)
        except ValueError as error:
            refused[recipe] = error
    return refused


def family(recipe: str) -> str:
    """Families of a recipe's stages, each once, joined by +; "base" for the uncompressed model.

    Examples
    --------
    >>> family("wanda:pattern=2:4+rtn:bits=4+kivi:bits=2"), family("none")
    ('prune+quant+kvcache', 'base')
    """
    return "+".join(dict.fromkeys(stage.family for stage in parse(recipe))) or "base"


def _measure(model: Model, recipe: str, setting: Setting, folder: Path, is_base: bool = False) -> dict:
    """Store a model, have a process of its own measure it, and put the row together."""
    save_native(model, folder / "model", overwrite=True)
    job = {
        "folder": str(folder / "model"),
        "ids": str(folder / "ids.npy"),
        "base": str(folder / "base"),
        "tasks": str(folder / "tasks.json"),
        "is_base": is_base,
        "protocol": setting.protocol,
        "starts": setting.starts,
        "window": setting.window,
        "prompt_tokens": setting.prompt_tokens,
        "new_tokens": setting.new_tokens,
        "repeats": setting.repeats,
        "activations": setting.activations,
    }
    measured = _run_worker(job, setting.threads)
    size = sizes(model)
    return {
        "recipe": recipe,
        "family": family(recipe),
        "bits_per_weight": size.bits_per_weight,
        "linear_bits_per_weight": size.linear_bits_per_weight,
        "weight_bytes": size.weight_bytes,
        **measured,
    }


def _run_worker(job: dict, threads: int | None) -> dict:
    command = [sys.executable, "-m", "refllm.evaluate.worker"]
    done = subprocess.run(
        command,
        input=json.dumps(job),
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=child_environment(threads),
        check=False,
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        raise RuntimeError(f"the measuring process failed: {lines[-1]}")
    answer = json.loads(done.stdout.splitlines()[-1])
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer
