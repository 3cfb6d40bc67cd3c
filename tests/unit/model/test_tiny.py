"""The recipe, its batches and the folder it makes: readable by refllm and by the tokenizers package."""

import json
from dataclasses import replace

import numpy as np
import pytest

from refllm.formats.files import data_path
from refllm.model import load
from refllm.model.llama import forward
from refllm.model.tiny import (
    Recipe,
    StoryBatches,
    build_tokenizer,
    held_out,
    token_index,
    train_from_recipe,
    write_texts,
)
from refllm.model.world import World

WORLD = World()


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(WORLD, stories=20)


@pytest.fixture(scope="module")
def recipe():
    return Recipe.read(data_path("tiny/recipe.json"))


def changed(recipe, **values):
    return Recipe({**recipe.raw, **values})


def test_every_word_is_one_token_and_text_survives(tokenizer):
    index = token_index(tokenizer, WORLD)
    assert sorted(index) == list(WORLD.vocabulary) and len(set(index.values())) == len(index)
    story = WORLD.story("x", 300)
    ids = tokenizer.encode(story.text, add_special_tokens=False).ids
    assert ids == [index[token] for token in story.tokens]
    assert tokenizer.decode(ids) == " " + story.text
    assert tokenizer.encode(story.text).ids == [tokenizer.token_to_id("<bos>"), *ids]


def test_any_bytes_survive(tokenizer):
    text = " Zoë paid 3.50 €\n\tfor “tea” 茶 \x00"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


def test_tokenizer_is_reproducible(tokenizer):
    assert build_tokenizer(WORLD, stories=20).to_str() == tokenizer.to_str()


def test_a_word_that_is_split_is_refused(tokenizer):
    with pytest.raises(ValueError, match="splits ' Zanzibar'"):
        token_index(tokenizer, replace(WORLD, towns=("Zanzibar",)))


def test_batches_do_not_depend_on_the_number_of_parts(tokenizer, recipe):
    batches = StoryBatches(recipe, WORLD, token_index(tokenizer, WORLD), 0)
    whole = batches(3, 0, 1)
    halves = [batches(3, part, 2) for part in range(2)]
    for both, *parts in zip(whole, *halves, strict=True):
        assert np.array_equal(both, np.concatenate(parts))
    ids, targets, weights = whole
    stage = recipe.stage(3)
    assert ids.shape == targets.shape == (stage["rows"], stage["length"])
    assert (ids[:, 0] == 0).all() and np.array_equal(ids[:, 1:], targets[:, :-1])
    assert not np.array_equal(targets, batches(4, 0, 1)[1])
    # The emphasis lies on what the story marks as determined.
    story = WORLD.story(f"train {recipe.raw['seed']} 3 0", stage["length"] + WORLD.longest_turn)
    marked = set()
    for span in story.spans:  # every word of a song; of an answer or a sum the value, which stands before the full stop
        marked |= set(range(span.start, span.stop)) if span.kind == "song" else {span.stop - 2}
    marked &= set(range(stage["length"]))
    assert set(np.flatnonzero(weights[0] == stage["emphasis"])) == marked and set(weights[0]) == {1, stage["emphasis"]}
    with pytest.raises(ValueError, match="do not divide"):
        batches(3, 0, 7)


def test_held_out_stories_are_not_training_stories(tokenizer, recipe):
    batches = StoryBatches(recipe, WORLD, token_index(tokenizer, WORLD), 0)
    first = {tuple(row[:60]) for step in range(20) for row in batches(step, 0, 1)[1]}
    index = token_index(tokenizer, WORLD)
    assert not first & {tuple(index[t] for t in story.tokens[:60]) for story in held_out(WORLD, 50)}


def test_bundled_texts_are_what_the_generator_writes(tmp_path):
    write_texts(tmp_path)
    for name in ("calib.txt", "eval.txt"):
        assert (tmp_path / name).read_bytes() == data_path(f"tiny/{name}").read_bytes()
    assert not set((tmp_path / "calib.txt").read_text().split("\n\n")) & set(
        (tmp_path / "eval.txt").read_text().split("\n\n")
    )


def test_stages_and_token_counts(recipe):
    short = changed(
        recipe,
        stages=[
            {"length": 8, "rows": 2, "steps": 3, "emphasis": 2.0},
            {"length": 16, "rows": 4, "steps": 5, "emphasis": 2.0},
        ],
    )
    assert short.steps == 8
    assert [short.stage(step)["length"] for step in (0, 2, 3, 7)] == [8, 8, 16, 16]
    assert [short.tokens(step) for step in (0, 2, 3, 8)] == [0, 32, 48, 48 + 320]
    with pytest.raises(ValueError, match="beyond"):
        short.stage(8)


def test_history_knows_the_past_and_not_the_future(recipe):
    stages = [
        {"length": 8, "rows": 2, "steps": 3, "emphasis": 2.0},
        {"length": 16, "rows": 4, "steps": 50, "emphasis": 2.0},
    ]
    schedule = {"warmup": 2, "decay_from": 40, "final": 0.05, "shape": "linear"}
    base = changed(recipe, stages=stages, schedule=schedule)
    longer = changed(
        base, stages=[stages[0], {**stages[1], "steps": 90, "emphasis": 2.0}], schedule={**schedule, "decay_from": 60}
    )
    assert base.history(10) == longer.history(10)
    assert base.history(45) != longer.history(45)  # the decay had begun in one of them
    assert base.history(10) != changed(base, seed=2).history(10)
    assert base.history(10) != changed(base, stages=[{**stages[0], "rows": 4}, stages[1]]).history(10)
    assert base.history(10) != base.history(11)


def test_unknown_recipe_keys_are_named(tmp_path, recipe):
    path = tmp_path / "r.json"
    path.write_text(json.dumps({**recipe.raw, "stages": [{"length": 8, "rows": 2, "step": 3}]}))
    with pytest.raises(ValueError, match="emphasis"):
        Recipe.read(path)
    path.write_text(json.dumps({**recipe.raw, "batchsize": 3}))
    with pytest.raises(ValueError, match="batchsize"):
        Recipe.read(path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"optimizer": {"rate": 1e-3, "speed": 3}}, "speed"),
        ({"schedule": {"warmup": 50, "decay_from": 10}}, "warmup"),
        ({"model": {"hidden_size": 8, "rope_theta": 1e4}}, "num_layers"),
        ({"model": {"hidden_size": 8}}, "rope_theta"),
        ({"stages": [{"length": 8, "rows": 2, "steps": 3000, "emphasis": 1, "moons": 2}]}, "moons"),
    ],
)
def test_unknown_and_impossible_values_are_named(tmp_path, recipe, changes, message):
    path = tmp_path / "r.json"
    path.write_text(json.dumps({**recipe.raw, **changes}))
    with pytest.raises(ValueError, match=message) as caught:
        Recipe.read(path)
    assert "\n" not in str(caught.value)


def test_train_resume_and_load(tmp_path, recipe, tokenizer, monkeypatch):
    monkeypatch.setattr("refllm.model.tiny.build_tokenizer", lambda world: tokenizer)  # made of fewer stories: faster
    shape = {**recipe.raw["model"], "hidden_size": 16, "num_layers": 1, "head_dim": 4, "intermediate_size": 24}
    small = {
        **recipe.raw,
        "model": shape,
        "stages": [{"length": 32, "rows": 2, "steps": 20, "emphasis": 2.0}],
        "schedule": {"warmup": 2, "decay_from": 15, "final": 0.1, "shape": "linear"},
        "processes": 1,
        "measure_every": 20,
        "checkpoint_every": 20,
    }
    path, lines = tmp_path / "recipe.json", []
    path.write_text(json.dumps(small))
    quick = dict(measure_stories=2, report_stories=2, report_questions=0)
    out = train_from_recipe(path, tmp_path / "out", log=lines.append, **quick)
    model = load.load(out)
    assert model.config.num_layers == 1 and model.tokenizer.bos_token_id == model.config.bos_token_id == 0
    ids = model.tokenizer.encode("The lamp is at Hilltop.")
    assert ids[0] == 0 and len(ids) == 7 and np.isfinite(forward(model, ids)).all()
    assert len(lines) == 2
    entries = [json.loads(line) for line in (out / "training_log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [20, 20] and entries[0]["tokens_seen"] == 1280
    assert "heads" in entries[1]
    # Finished: the same again from the checkpoint. A longer recipe goes on; one whose past differs is refused.
    weights = (out / "model.safetensors").read_bytes()
    train_from_recipe(path, out, **quick)
    assert (out / "model.safetensors").read_bytes() == weights
    small["schedule"]["decay_from"] = 16
    path.write_text(json.dumps(small))
    with pytest.raises(ValueError, match="another recipe"):
        train_from_recipe(path, out)
