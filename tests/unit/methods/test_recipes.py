"""Recipes: what is read, and that every mistake is one line that names what exists."""

import inspect
from importlib import import_module

import pytest

from refllm.methods.recipes import (
    FAMILIES,
    MODEL_FAMILIES,
    RUNTIME_FAMILIES,
    WEIGHT_FAMILIES,
    RecipeError,
    _convert,
    knobs,
    methods,
    parse,
)


def read(recipe):
    return [(stage.family, stage.method, stage.knobs, stage.only) for stage in parse(recipe)]


def test_stages_knobs_and_types():
    assert read("rtn:bits=3,group=32,symmetric=yes,scale_dtype=float32") == [
        ("quant", "rtn", {"bits": 3, "group_size": 32, "symmetric": True, "scale_dtype": "float32"}, None)
    ]
    assert read("wanda:pattern=2:4+rtn:bits=4") == [
        ("prune", "wanda", {"pattern": "2:4"}, None),
        ("quant", "rtn", {"bits": 4}, None),
    ]
    assert read("svd:ratio=0.5,rank=none,only=mlp.up") == [("lowrank", "svd", {"ratio": 0.5, "rank": None}, "mlp.up")]
    assert read("wanda:sparsity=1") == [("prune", "wanda", {"sparsity": 1.0}, None)]
    assert type(parse("wanda:sparsity=1")[0].knobs["sparsity"]) is float


def test_spaces_and_short_forms():
    assert read(" rtn : bits = 4 , group = -1 + svd ") == read("rtn:bits=4,group_size=-1+svd:")
    assert parse("") == parse("none") == parse("  ") == []


def test_every_family_and_every_name_is_reachable_once():
    names = [name for family in FAMILIES for name in import_module(f"refllm.methods.{family}").__all__]
    assert len(names) == len(set(names)) == len(methods())
    assert set(FAMILIES) == {*MODEL_FAMILIES, *WEIGHT_FAMILIES, *RUNTIME_FAMILIES}
    for name, (family, function) in methods().items():
        (stage,) = parse(name)
        assert (stage.method, stage.family, stage.function, stage.knobs) == (name, family, function, {})


@pytest.mark.parametrize("name", sorted(methods()))
def test_every_knob_takes_its_own_default_back(name):
    """So no knob's annotation is one that a recipe cannot read."""
    for knob in knobs(methods()[name][1]).values():
        assert _convert(str(knob.default), knob, name) == knob.default


@pytest.mark.parametrize("name", sorted(methods()))
def test_what_the_caller_passes_is_no_knob(name):
    """Parameters without a default come from the model or the layer, and no recipe may set them."""
    for knob in knobs(methods()[name][1]).values():
        assert knob.default is not inspect.Parameter.empty, f"{name}: {knob.name} must be given by its family's caller"


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("gpqt:bits=4", r"unknown method 'gpqt' in recipe 'gpqt:bits=4'; did you mean gptq\?; known: .*rtn.*wanda"),
        ("rtn+", "unknown method ''"),
        ("+rtn", "unknown method ''"),
        ("none+rtn", r"none, the uncompressed model, stands alone; leave it out of the recipe 'none\+rtn'"),
        ("rtn + none", "stands alone"),
        ("none:bits=4", "stands alone"),
        ("RTN", "unknown method 'RTN'"),
        (
            "rtn:bit=4",
            r"unknown key 'bit' for method 'rtn'; did you mean bits\?; known: bits, group \(or group_size\), .*",
        ),
        ("rtn:stats=1", "unknown key 'stats'"),
        ("streaming:grop=3", "unknown key 'grop' for method 'streaming'; known:"),  # it has no groups
        ("kivi:only=mlp", "unknown key 'only' for method 'kivi'"),
        ("flash:scale=2", "unknown key 'scale' for method 'flash'"),
        ("speculative:draft_model=tiny", "unknown key 'draft_model'"),
        ("rtn:bits", r"'bits' in recipe 'rtn:bits' is not key=value"),
        ("rtn:bits=4,bits=3", "key 'bits' stands twice"),
        ("rtn:group=4,group_size=3", "key 'group_size' stands twice"),
        ("rtn:only=mlp,only=attn", "key 'only' stands twice"),
        ("rtn:only=", "only= in recipe 'rtn:only=' is empty"),
        ("rtn:bits=four", "rtn: bits must be int, got 'four'"),
        ("rtn:bits=4.0", "rtn: bits must be int, got '4.0'"),
        ("rtn:bits=", "rtn: bits must be int, got ''"),
        ("rtn:bits=none", "rtn: bits must be int, got 'none'"),
        ("rtn:symmetric=maybe", "rtn: symmetric must be bool, got 'maybe'"),
        ("wanda:sparsity=half", "wanda: sparsity must be float or None, got 'half'"),
        ("rtn:bits=4;group=2", "rtn: bits must be int"),
    ],
)
def test_mistakes_are_one_line(recipe, message):
    with pytest.raises(RecipeError, match=message) as caught:
        parse(recipe)
    assert "\n" not in str(caught.value)


def test_annotations_are_read_as_written():
    def method(W, stats, *, a: int | None = None, b: "float" = 1.0, c=True, d: str | int = "x", e: list = ()):
        """For inspection only."""

    own = knobs(method)
    text = inspect.Parameter("p", inspect.Parameter.KEYWORD_ONLY, annotation=str)
    assert list(own) == ["a", "b", "c", "d"]  # no text becomes a list
    assert _convert("none", own["a"], "m") is None and _convert("3", own["a"], "m") == 3
    assert _convert("3", own["b"], "m") == 3.0 and _convert(" x", text, "m") == " x"
    assert _convert("no", own["c"], "m") is False and _convert("1", own["c"], "m") is True
    assert _convert("3", own["d"], "m") == "3"  # the first type that takes it
