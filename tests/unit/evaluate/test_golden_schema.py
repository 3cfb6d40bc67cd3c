"""The small JSON-Schema checker: every keyword it knows accepts and rejects what it should, and it knows its limits."""

import json

import pytest

from refllm.evaluate.golden.build import render
from refllm.evaluate.golden.schema import schema_errors
from tests.golden_tiny import SCHEMA, spec

GOLDEN = json.loads(SCHEMA)


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "integer"}, [0, -3, 2.0], [True, 1.5, "1", None, float("inf")]),
        ({"type": "number"}, [0, 1.5], [False, "1"]),
        ({"type": ["string", "boolean"]}, ["", True], [1, None, []]),
        ({"type": "object"}, [{}], [[], "x"]),
        ({"const": 1}, [1, 1.0], [True, 2, "1"]),
        ({"const": [1, {"a": 2}]}, [[1, {"a": 2}]], [[True, {"a": 2}], [1], [1, {"b": 2}]]),
        ({"enum": ["a", 2]}, ["a", 2], ["b", True]),
        ({"pattern": "^[0-9a-f]{4}$"}, ["00af", 7], ["00AF", "00af0", "00af\n"]),
        ({"minimum": 1, "maximum": 3}, [1, 3, "x", True], [0, 3.5]),
        ({"minItems": 1, "maxItems": 2}, [[1], [1, 2], "abc"], [[], [1, 2, 3]]),
        ({"uniqueItems": True}, [[1, True, "1"], 3], [[1, 1.0], [[], []]]),
        ({"required": ["a"]}, [{"a": None}, 3], [{}]),
        (
            {"properties": {"a": {"type": "string"}}, "additionalProperties": False},
            [{"a": ""}, {}],
            [{"a": 1}, {"b": ""}],
        ),
        ({"additionalProperties": {"type": "string"}}, [{"x": "y"}], [{"x": 1}]),
        ({"items": {"type": "integer"}}, [[1, 2], "abc"], [[1, "2"]]),
        ({"allOf": [{"minimum": 1}, {"maximum": 2}]}, [1, 2], [0, 3]),
        ({"oneOf": [{"required": ["a"]}, {"required": ["b"]}]}, [{"a": 1}, {"b": 1}], [{}, {"a": 1, "b": 1}]),
        (
            {"if": {"properties": {"a": {"const": 1}}}, "then": {"required": ["b"]}, "else": {"required": ["c"]}},
            [{"a": 1, "b": 0}, {"a": 2, "c": 0}],
            [{"a": 1, "c": 0}, {"a": 2, "b": 0}, {}],
        ),
        ({"$ref": "#/$defs/t", "$defs": {"t": {"type": "string"}}}, ["x"], [1]),
    ],
)
def test_keywords(schema, good, bad):
    assert [value for value in good if list(schema_errors(value, schema))] == []
    assert [value for value in bad if not list(schema_errors(value, schema))] == []


def test_an_unknown_keyword_is_refused():
    with pytest.raises(ValueError, match="'multipleOf', which this checker does not know"):
        list(schema_errors(4, {"multipleOf": 2}))


def test_a_rendered_suite_fits_and_errors_name_the_place():
    manifest = json.loads(render(spec())["demo/double.json"])
    assert list(schema_errors(manifest, GOLDEN)) == []
    manifest["groups"][0]["cases"][1]["id"] = 0
    manifest["groups"][0]["cases"][0]["inputs"]["x"]["shape"] = [-1]
    del manifest["groups"][0]["cases"][2]["error"]
    assert sorted(schema_errors(manifest, GOLDEN)) == [
        "groups/0/cases/0/inputs/x/shape/0: must be at least 0, got -1",
        "groups/0/cases/1/id: must be at least 1, got 0",
        "groups/0/cases/2: lacks error",
    ]
