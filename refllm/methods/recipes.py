"""Recipes: `method[:key=value,...]` stages joined by `+`, resolved to functions by name.

    rtn:bits=4,group=64            wanda:pattern=2:4+rtn:bits=4            awq:bits=4+kivi:bits=2

A family's `__init__.py` lists its methods; a method's keyword-only parameters are its knobs, their annotations the
types. Nothing is registered anywhere else.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module

from refllm.formats.names import meant

# Families in the order of the taxonomy, with what a stage of each changes: a whole model, one weight after another (the
# last of them take a weight that is packed), or one place of `model.runtime`.
MODEL_FAMILIES = ("transform", "blockwise")
FINISH = "finish"
WEIGHT_FAMILIES = ("quant", "prune", "lowrank", FINISH)
RUNTIME_FAMILIES = {
    "activations": "activations", "kvcache": "cache_policy", "attention": "attend", "runtime": "generate",
}  # fmt: skip
FAMILIES = (*MODEL_FAMILIES, *WEIGHT_FAMILIES, *RUNTIME_FAMILIES)

_SHORT_KEYS = {"group": "group_size"}
_TEXT_TYPES = {"int", "float", "bool", "str"}
# Keyword-only parameters that the caller of a family's function fills in, not the recipe.
_CALL_PARAMETERS = {"scale", "window", "softcap", "stop_ids", "on_prefill", "rng", "on_report", "tables"}


class RecipeError(ValueError):
    """A recipe that names an unknown method or key, or a value of the wrong type."""


@dataclass(frozen=True)
class Stage:
    """One stage of a recipe.

    Parameters
    ----------
    method : str
    family : str
    function : callable
    knobs : dict
        Keyword arguments for the function.
    only : str or None
        Glob on weight names (weight methods); None means the linears of all layers.
    """

    method: str
    family: str
    function: Callable
    knobs: dict
    only: str | None = None


@cache
def methods() -> dict[str, tuple[str, Callable]]:
    """Every method that a recipe can name: name -> (family, function)."""
    found = {}
    for family in FAMILIES:
        module = import_module(f"refllm.methods.{family}")
        for name in module.__all__:
            found[name] = (family, getattr(module, name))
    return found


def knobs(function: Callable) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of a method that a recipe may set: those that text can be turned into."""
    parameters = inspect.signature(function).parameters.values()
    own = (p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in _CALL_PARAMETERS)
    return {p.name: p for p in own if _TEXT_TYPES & set(_types(p))}


def key_names(function: Callable) -> list[str]:
    """The knobs as messages show them: the key that recipes are written with, and the parameter where that differs."""
    short = {name: key for key, name in _SHORT_KEYS.items()}
    return [f"{short[name]} (or {name})" if name in short else name for name in knobs(function)]


def key_defaults(function: Callable) -> list[str]:
    """The knobs with what they are where a recipe is silent, as it would write them: `bits=4`.

    A bare key has no fixed default: what is taken then depends on the model or on other knobs.
    """
    short = {name: key for key, name in _SHORT_KEYS.items()}
    text = lambda value: "" if value is None else f"={str(value).lower() if isinstance(value, bool) else value}"
    return [short.get(name, name) + text(parameter.default) for name, parameter in knobs(function).items()]


def parse(recipe: str) -> list[Stage]:
    """Parse and check a recipe; "" and "none" give no stage, the uncompressed model.

    Raises
    ------
    RecipeError
        In one line, with the names that exist.

    Examples
    --------
    >>> [(stage.method, stage.knobs) for stage in parse("rtn:bits=4,group=64")]
    [('rtn', {'bits': 4, 'group_size': 64})]
    """
    if recipe.strip() in ("", "none"):
        return []
    return [_stage(text.strip(), recipe) for text in recipe.split("+")]


def _stage(text: str, recipe: str) -> Stage:
    name, _, rest = text.partition(":")
    name = name.strip()
    if name == "none":
        raise RecipeError(f"none, the uncompressed model, stands alone; leave it out of the recipe {recipe!r}")
    if name not in methods():
        known = sorted(methods())
        near = meant(name, known)
        raise RecipeError(f"unknown method {name!r} in recipe {recipe!r}{near}; known: {', '.join(known)}")
    family, function = methods()[name]
    allowed = knobs(function)
    values, only = {}, None
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        key = _SHORT_KEYS.get(key.strip(), key.strip())
        if not equals:
            raise RecipeError(f"{item!r} in recipe {recipe!r} is not key=value")
        if key in values or (key == "only" and only is not None):
            raise RecipeError(f"key {key!r} stands twice in recipe {recipe!r}")
        if key == "only" and family in WEIGHT_FAMILIES:
            only = value.strip()
            if not only:
                raise RecipeError(f"only= in recipe {recipe!r} is empty; give a part of a weight's name, such as mlp")
        elif key in allowed:
            values[key] = _convert(value.strip(), allowed[key], name)
        else:
            extra = ["only"] if family in WEIGHT_FAMILIES else []
            known = [*key_names(function), *extra]
            short = [key for key, name in _SHORT_KEYS.items() if name in allowed]
            near = meant(key, [*allowed, *short, *extra])
            raise RecipeError(f"unknown key {key!r} for method {name!r}{near}; known: {', '.join(known) or 'none'}")
    return Stage(name, family, function, values, only)


def _convert(text: str, parameter: inspect.Parameter, method: str):
    """A knob's text as its annotated type: the first of int, float, bool, str in the annotation that takes it."""
    wanted = _types(parameter)
    for type_name in wanted:
        if type_name == "bool" and text.lower() in ("true", "false", "yes", "no", "1", "0"):
            return text.lower() in ("true", "yes", "1")
        if type_name == "None" and text.lower() == "none":
            return None
        if type_name == "str":
            return text
        if type_name in ("int", "float"):
            try:
                return {"int": int, "float": float}[type_name](text)
            except ValueError:
                continue
    raise RecipeError(f"{method}: {parameter.name} must be {' or '.join(wanted)}, got {text!r}")


def _types(parameter: inspect.Parameter) -> list[str]:
    """The names in a parameter's annotation: `int | None` gives ["int", "None"]."""
    annotation = parameter.annotation
    if annotation is parameter.empty:
        annotation = type(parameter.default)
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return [name.strip() for name in text.split("|")]
