"""A checker for the part of JSON Schema (draft 2020-12) that data/golden/golden-v1.schema.json uses.

Small on purpose: a keyword it does not know is an error of the schema, never silently ignored.
"""

import re
from collections.abc import Iterator

_TYPES = {
    "object": lambda v: isinstance(v, dict),
    "array": lambda v: isinstance(v, list),
    "string": lambda v: isinstance(v, str),
    "boolean": lambda v: isinstance(v, bool),
    "integer": lambda v: _is_number(v) and float(v).is_integer(),
    "number": lambda v: _is_number(v),
}
_SAYS_NOTHING = {"$schema", "$id", "$defs", "title", "description", "default"}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _same(a: object, b: object) -> bool:
    """JSON equality: 1 is 1.0 but not true."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return a == b


def schema_errors(value: object, schema: dict, root: dict | None = None, path: str = "") -> Iterator[str]:
    """Every place where a JSON value does not fit a schema.

    Parameters
    ----------
    value : parsed JSON
    schema : dict
    root : dict, optional
        The whole schema, for `$ref`; the schema itself when absent.
    path : str
        Where `value` lies, for the messages.

    Yields
    ------
    str
        "groups/0/cases/3/id: must be at least 1, got 0"

    Raises
    ------
    ValueError
        The schema uses a keyword this checker does not know.

    Examples
    --------
    >>> list(schema_errors({"id": 0}, {"properties": {"id": {"minimum": 1}}}))
    ['id: must be at least 1, got 0']
    """
    root = schema if root is None else root
    for keyword, rule in schema.items():
        if keyword in _SAYS_NOTHING or keyword in ("then", "else"):
            continue
        if keyword in _INNER:
            yield from _INNER[keyword](value, rule, schema, root, path)
        elif keyword in _PLAIN:
            message = _PLAIN[keyword](value, rule)
            if message:
                yield f"{path or '(top)'}: {message}"
        else:
            raise ValueError(f"the schema uses {keyword!r}, which this checker does not know")


def _type(value, rule):
    wanted = [rule] if isinstance(rule, str) else rule
    return (
        None if any(_TYPES[name](value) for name in wanted) else f"must be {' or '.join(wanted)}, got {_short(value)}"
    )


def _enum(value, rule):
    return (
        None
        if any(_same(value, r) for r in rule)
        else f"must be one of {', '.join(map(str, rule))}, got {_short(value)}"
    )


def _const(value, rule):
    return None if _same(value, rule) else f"must be {rule!r}, got {_short(value)}"


def _pattern(value, rule):
    # `$` of the schema's dialect is the very end; Python's would let a line break follow.
    fits = not isinstance(value, str) or re.search(re.sub(r"\$$", r"\\Z", rule), value)
    return None if fits else f"must match {rule}, got {_short(value)}"


def _required(value, rule):
    missing = [name for name in rule if name not in value] if isinstance(value, dict) else []
    return f"lacks {', '.join(missing)}" if missing else None


def _minimum(value, rule):
    return f"must be at least {rule}, got {value}" if _is_number(value) and value < rule else None


def _maximum(value, rule):
    return f"must be at most {rule}, got {value}" if _is_number(value) and value > rule else None


def _min_items(value, rule):
    return (
        f"must have at least {rule} items, has {len(value)}" if isinstance(value, list) and len(value) < rule else None
    )


def _max_items(value, rule):
    return (
        f"must have at most {rule} items, has {len(value)}" if isinstance(value, list) and len(value) > rule else None
    )


def _unique_items(value, rule):
    if not rule or not isinstance(value, list):
        return None
    twice = [a for i, a in enumerate(value) if any(_same(a, b) for b in value[:i])]
    return f"holds {_short(twice[0])} twice" if twice else None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _join(path: str, key: object) -> str:
    return f"{path}/{key}" if path else str(key)


def _properties(value, rule, schema, root, path):
    if isinstance(value, dict):
        for key in rule.keys() & value.keys():
            yield from schema_errors(value[key], rule[key], root, _join(path, key))


def _additional(value, rule, schema, root, path):
    for key in value.keys() - schema.get("properties", {}).keys() if isinstance(value, dict) else ():
        if rule is False:
            yield f"{path or '(top)'}: does not allow {key!r}"
        elif rule is not True:
            yield from schema_errors(value[key], rule, root, _join(path, key))


def _items(value, rule, schema, root, path):
    for i, item in enumerate(value if isinstance(value, list) else ()):
        yield from schema_errors(item, rule, root, _join(path, i))


def _ref(value, rule, schema, root, path):
    yield from schema_errors(value, root["$defs"][rule.removeprefix("#/$defs/")], root, path)


def _all_of(value, rule, schema, root, path):
    for part in rule:
        yield from schema_errors(value, part, root, path)


def _one_of(value, rule, schema, root, path):
    fits = sum(not any(schema_errors(value, part, root, path)) for part in rule)
    if fits != 1:
        forms = [part.get("required", part) for part in rule]
        yield f"{path or '(top)'}: must have exactly one of the forms {forms}, fits {fits}"


def _if(value, rule, schema, root, path):
    branch = "else" if any(schema_errors(value, rule, root, path)) else "then"
    yield from schema_errors(value, schema.get(branch, {}), root, path)


_PLAIN = {
    "type": _type, "enum": _enum, "const": _const, "pattern": _pattern, "required": _required, "minimum": _minimum,
    "maximum": _maximum, "minItems": _min_items, "maxItems": _max_items, "uniqueItems": _unique_items,
}  # fmt: skip
_INNER = {
    "properties": _properties, "additionalProperties": _additional, "items": _items, "$ref": _ref, "allOf": _all_of,
    "oneOf": _one_of, "if": _if,
}  # fmt: skip
