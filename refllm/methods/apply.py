"""compress: a recipe applied to a model; load: a model with the run-time stages of its recipe bound.

Stages run in the order of the recipe. Model stages (transforms, methods that look at a whole block) take the model and
return another. Neighbouring weight stages walk the layers together, with calibration inputs collected once per layer,
earlier layers already compressed; each linear is handed to them in turn and its packed record takes its place, and
finishing stages are handed that record and the weight it stands for. Run-time stages (activations, cache, attention,
generation) are bound to the model's `runtime`.

A packing method with a keyword-only parameter `fisher` is also handed the mean squared gradients of the loss on the
calibration text (refllm.model.fisher). They belong to a weight and not to its inputs, so they are no part of Stats;
they are computed once for all layers, at the weights before the first of the neighbouring stages, and the method must
do without them (fisher=None) where it is called directly, and where a weight is stored turned.

A run-time method may have to learn something of the model (which heads look far back, say). Its function then has an
attribute `prepare`: prepare(model, **knobs) -> knobs to add. `compress` asks once, after all other stages, and writes
the answer into the recipe, which is stored with the model: what is loaded knows it already. A `prepare` with a
parameter `ids` is handed the calibration text too, and needs it as long as one of the knobs is "search".

What it has to learn may be arrays (codebooks of a cache). Its function then has an attribute `learn`: learn(model, ids,
**knobs) -> dict of arrays, asked for in the same way, and a keyword-only parameter `tables`, to which they are handed.
They are kept in the model's `tables` and stored with it.
"""

import inspect
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import groupby

import numpy as np

from refllm.formats.errors import FormatError
from refllm.kernels.packed.records import LowRank, Rotated, Sparse24, SparseBitmask, is_record
from refllm.kernels.stats import Stats
from refllm.methods.recipes import (
    FINISH,
    MODEL_FAMILIES,
    RUNTIME_FAMILIES,
    WEIGHT_FAMILIES,
    RecipeError,
    Stage,
    knobs,
    parse,
)
from refllm.methods.record import Report, report
from refllm.model import load as loading
from refllm.model.cache import new_cache
from refllm.model.fisher import fisher_diagonal
from refllm.model.model import Model
from refllm.model.sample import generate_ids
from refllm.model.walk import first_layer, layer_linears, walk

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_TRIED = 1 << 20  # numbers of the largest stand-in that `check` hands to a method
_TRIED_TOKENS = 64  # of the calibration text
_FLOAT_PARTS = (Sparse24, SparseBitmask, LowRank)  # records that store floats, which a further stage can take


def load(source, **options) -> Model:
    """Load a model: a built-in name (`tiny`, `smollm2`), a Hugging Face folder, a .gguf file, or what `compress` saved.

    Parameters
    ----------
    source : str or path
    **options
        `dtype` and `dense`, see `refllm.model.load.load`.

    Returns
    -------
    Model

    Raises
    ------
    FormatError, ValueError, FileNotFoundError
        In one line: what was expected, what came, how to mend it.
    """
    model = loading.load(source, **options)
    try:
        stages = parse(model.recipe)
        model = _bind_runtime(model, stages)
    except RecipeError as error:
        raise FormatError(f"the stored recipe is not understood: {error}", path=source) from error
    if any(map(_learns, stages)):
        try:  # whether its tables fit shows when stores are made of them
            new_cache(model)
        except ValueError as error:
            raise FormatError(f"the stored tables do not fit: {error}", path=source) from error
    return model


def compress(
    model: Model,
    recipe: str,
    calibration=None,
    *,
    on_report: Callable[[Report], None] | None = None,
) -> Model:
    """Apply a recipe and return a new model that stores, saves and runs packed.

    Parameters
    ----------
    model : Model
    recipe : str
        See `refllm.methods.recipes`.
    calibration : (T,) integer ids, optional
        Needed by methods that look at activations; also gives `on_report` the output errors.
    on_report : callable, optional
        Called with the Report of every weight as it is done: progress, and the source of tables.

    Returns
    -------
    Model
        Shares the weights that no stage touched.

    Raises
    ------
    RecipeError
        An unknown method or key, two stages that take the same place at run time.
    ValueError
        Missing calibration, a weight that a method cannot take (its name stands in the message).

    Examples
    --------
    >>> small = compress(load("tiny"), "rtn:bits=4,group=64")
    >>> type(small.weights["model.layers.0.mlp.up_proj.weight"]).__name__
    'IntWeight'
    """
    stages = parse(recipe)
    _check_runtime(stages, recipe)
    _check_calibration(stages, calibration)
    stored, model = model.weights, _decoded(model) if any(map(_is_whole, stages)) else model
    floats = model.weights
    for whole, group in groupby((s for s in stages if s.family not in RUNTIME_FAMILIES), _is_whole):
        if whole:
            for stage in group:
                model = _change_model(model, stage, calibration, on_report)
        else:
            model = _change_weights(model, list(group), calibration, on_report)
    if floats is not stored:  # what no stage has touched is stored as it came
        model = replace(model, weights={k: stored[k] if floats.get(k) is w else w for k, w in model.weights.items()})
    stages, recipe = _prepared(model, stages, recipe, calibration)
    recipes = "+".join(filter(None, (model.recipe, recipe if stages else "")))
    return _bind_runtime(replace(model, recipe=recipes, tables=_learned(model, stages, calibration)), stages)


def _learned(model: Model, stages: list[Stage], calibration) -> dict[str, np.ndarray]:
    """The model's tables, and what the run-time methods among the stages learn of it."""
    tables = dict(model.tables)
    for stage in stages:
        if _learns(stage):
            found = stage.function.learn(model, calibration, **stage.knobs)
            tables |= {f"{stage.method}.{name}": array for name, array in found.items()}
    return tables


def _learns(stage: Stage) -> bool:
    return hasattr(stage.function, "learn")


def _prepared(model: Model | None, stages: list[Stage], recipe: str = "", calibration=None) -> tuple[list[Stage], str]:
    """Stages and recipe with the knobs that run-time methods find by looking at the model; stand-ins without one."""
    texts, done = recipe.split("+"), []
    for place, stage in enumerate(stages):
        prepare = getattr(stage.function, "prepare", None)
        more = {"ids": calibration} if _prepares_with_ids(stage) else {}
        found = {} if prepare is None else prepare(model, **stage.knobs, **more)
        if found and recipe:
            name, _, items = texts[place].partition(":")
            items = [item for item in filter(None, items.split(",")) if item.partition("=")[0].strip() not in found]
            texts[place] = name + ":" + ",".join([*items, *(f"{key}={value}" for key, value in found.items())])
        done.append(replace(stage, knobs=stage.knobs | found))
    return done, "+".join(texts)


def _prepares_with_ids(stage: Stage) -> bool:
    prepare = getattr(stage.function, "prepare", None)
    return prepare is not None and "ids" in inspect.signature(prepare).parameters


def _is_whole(stage: Stage) -> bool:
    return stage.family in MODEL_FAMILIES


def _decoded(model: Model) -> Model:
    """Floats in place of the codes that a model came with (of a GGUF file, say): nothing can be moved into codes."""
    return replace(model, weights={name: _floats(weight, keep=()) for name, weight in model.weights.items()})


def _change_model(model: Model, stage: Stage, calibration, on_report) -> Model:
    try:
        return stage.function(model, calibration, on_report=on_report, **stage.knobs)
    except ValueError as error:
        raise ValueError(f"{stage.method}: {error}") from error


def _change_weights(model: Model, stages: list[Stage], calibration, on_report) -> Model:
    """Neighbouring weight stages, one linear after another."""
    model = replace(model, weights=dict(model.weights))
    plan = _plan(model, stages)
    sensitive = [name for name, todo in plan.items() if any(_takes_fisher(stage.function) for stage in todo)]
    fisher = fisher_diagonal(model, calibration, sensitive) if sensitive else {}
    if calibration is None:
        for name, todo in plan.items():
            _compress_weight(model, name, todo, None, on_report)
        return model
    if EMBEDDING in plan:  # before the walk, so that the layers see what it has become
        _compress_weight(model, EMBEDDING, plan[EMBEDDING], None, on_report)
    for layer, stats in walk(model, calibration):
        for name in layer_linears(layer, model.config):
            if name in plan:
                _compress_weight(model, name, plan[name], stats[name], on_report, fisher.pop(name, None))
    if HEAD in plan:
        _compress_weight(model, HEAD, plan[HEAD], None, on_report)
    return model


def check(model: Model, recipe: str, calibration=None) -> None:
    """Refuse at once what `compress`, or the first run of its result, would refuse after a while.

    The methods themselves judge: model stages take the first layer and the first tokens, weight stages try random
    matrices in place of the smallest weight of every width, and run-time stages generate two tokens with the
    uncompressed model. Weights of more than a million numbers are not tried, so that this stays a matter of a moment.

    Parameters
    ----------
    model, recipe, calibration :
        As in `compress`.

    Raises
    ------
    RecipeError, ValueError
        As `compress`, and what a run-time method says of its knobs.
    """
    stages = parse(recipe)
    _check_runtime(stages, recipe)
    _check_calibration(stages, calibration)
    start = None if calibration is None else np.asarray(calibration)[..., :_TRIED_TOKENS]
    stub = None
    for stage in filter(_is_whole, stages):
        stub = _change_model(stub or _decoded(first_layer(model)), stage, start, None)
    weight_stages = [stage for stage in stages if stage.family in WEIGHT_FAMILIES]
    if weight_stages:
        rng = np.random.default_rng(0)
        for name, todo in _smallest_of_every_width(model, _plan(model, weight_stages)).items():
            out, columns = model.weights[name].shape
            W = (
                model.weights[name]
                if todo[0].family == FINISH
                else rng.standard_normal((out, columns), np.float32) / 50
            )
            stand_in = replace(model, weights={name: W})
            blind = calibration is None or name in (EMBEDDING, HEAD)
            stats = None if blind else Stats(rng.standard_normal((16, columns), np.float32))
            _compress_weight(stand_in, name, todo, stats, None)
    if any(stage.family in RUNTIME_FAMILIES for stage in stages):
        stages = _prepared(None, stages)[0]
        if any(map(_learns, stages)):
            model = first_layer(model)
            model = replace(model, tables=_learned(model, stages, start))
        for _ in generate_ids(_bind_runtime(model, stages), [0], 2, stop_ids=()):
            pass


def _smallest_of_every_width(model: Model, plan: dict[str, list[Stage]]) -> dict[str, list[Stage]]:
    """One weight for each number of columns and list of stages. Weights that keep their form are left out."""
    chosen: dict[tuple, str] = {}
    for name, todo in plan.items():
        out, columns = model.weights[name].shape
        if out * columns > _TRIED or isinstance(model.weights[name], _FLOAT_PARTS):
            continue
        key = (columns, *map(id, todo))
        if key not in chosen or out < model.weights[chosen[key]].shape[0]:
            chosen[key] = name
    return {name: plan[name] for name in chosen.values()}


def _check_runtime(stages: list[Stage], recipe: str) -> None:
    """Each run-time family has one place; a second stage would silently replace the first."""
    for family in RUNTIME_FAMILIES:
        same = [stage.method for stage in stages if stage.family == family]
        if len(same) > 1:
            raise RecipeError(f"recipe {recipe!r} has {len(same)} {family} stages ({', '.join(same)}); keep one")


def _bind_runtime(model: Model, stages: list[Stage]) -> Model:
    runtime = model.runtime
    for stage in stages:
        if stage.family in RUNTIME_FAMILIES:
            bound = partial(stage.function, **stage.knobs)
            if _learns(stage):
                mine = stage.method + "."
                tables = {n.removeprefix(mine): array for n, array in model.tables.items() if n.startswith(mine)}
                bound = partial(bound, tables=tables)
            if stage.family == "activations":  # a value, not a call: kernels must know it beforehand
                bound = bound()
            runtime = replace(runtime, **{RUNTIME_FAMILIES[stage.family]: bound})
    return replace(model, runtime=runtime)


def with_activations(model: Model, activations: str) -> Model:
    """The model with the inputs of packed weights rounded so, unless its recipe says how they are."""
    if model.runtime.activations != "float32":
        return model
    return replace(model, runtime=replace(model.runtime, activations=activations))


def _needs_calibration(function: Callable) -> bool:
    """A method whose parameter `stats` or `ids` has no default cannot do without calibration."""
    parameters = inspect.signature(function).parameters
    return (parameters.get("stats") or parameters["ids"]).default is inspect.Parameter.empty


def _takes_fisher(function: Callable) -> bool:
    return "fisher" in inspect.signature(function).parameters


def needs_calibration(recipe: str) -> bool:
    """Whether a method of this recipe looks at activations; without one the walk over the text can be saved.

    Examples
    --------
    >>> needs_calibration("rtn:bits=4"), needs_calibration("wanda+kivi")
    (False, True)
    >>> needs_calibration("olive"), needs_calibration("olive:inputs=true")
    (False, True)
    """
    return any(map(_is_needy, parse(recipe)))


def _is_needy(stage: Stage) -> bool:
    """Methods that can do without calibration need it for an importance matrix, or for a knob that they name."""
    if _learns(stage):
        return True
    if stage.family in RUNTIME_FAMILIES:
        values = {name: knob.default for name, knob in knobs(stage.function).items()} | stage.knobs
        return _prepares_with_ids(stage) and "search" in values.values()
    knob = getattr(stage.function, "needs_text", "imatrix")
    return _needs_calibration(stage.function) or stage.knobs.get(knob, False)


def _check_calibration(stages: list[Stage], calibration) -> None:
    needy = [stage.method for stage in stages if _is_needy(stage)]
    if needy and calibration is None:
        raise ValueError(f"{needy[0]} needs calibration tokens: give --calibration FILE (in Python: calibration=ids)")


def _plan(model: Model, stages: list[Stage]) -> dict[str, list[Stage]]:
    """Which stages each weight goes through; a pattern that matches nothing is an error."""
    linears = [name for layer in range(model.config.num_layers) for name in layer_linears(layer, model.config)]
    others = [name for name in (EMBEDDING, HEAD) if name in model.weights]
    plan: dict[str, list[Stage]] = {}
    for stage in stages:
        chosen = linears
        if stage.only is not None:
            chosen = [n for n in linears + others if fnmatchcase(n, f"*{stage.only}*")]
            if not chosen:
                raise ValueError(f"only={stage.only} matches no weight; names look like {linears[0]}")
            blind = [n for n in others if n in chosen and _needs_calibration(stage.function)]
            if blind:
                raise ValueError(f"{stage.method} needs calibration inputs, which {blind[0]} does not have")
        for name in chosen:
            plan.setdefault(name, []).append(stage)
    return plan


def _compress_weight(model, name, stages, stats, on_report, fisher=None) -> None:
    original = model.weights[name]
    dense = _dense(original)
    record = original if stages[0].family == FINISH else _floats(original, keep=_FLOAT_PARTS)
    for stage in stages:
        try:
            record = _apply(record, dense, stats, stage, fisher)
        except ValueError as error:
            raise ValueError(f"{stage.method} cannot compress {name} {dense.shape}: {error}") from error
    model.weights[name] = record
    if on_report is not None:
        on_report(report(name, dense, record, stats))


def _apply(record, dense: np.ndarray, stats: Stats | None, stage: Stage, fisher: np.ndarray | None = None):
    """One stage to a weight, or to what is inside a record."""
    if isinstance(record, Rotated):  # what is stored meets turned inputs, and a method is to see these
        turned = None if stats is None else Stats(record.turned(stats.X))
        return replace(record, weight=_apply(record.weight, record.turned(dense), turned, stage))
    if stage.family == FINISH:
        return _finish(record, dense, stats, stage)
    if is_record(record):
        return _inside(record, stage)
    more = {"fisher": fisher} if _takes_fisher(stage.function) else {}
    return stage.function(record, stats, **stage.knobs, **more)


def _finish(record, dense: np.ndarray, stats, stage: Stage):
    if not is_record(record):
        raise ValueError("it follows a stage that packs, such as rtn; the weight is an array of floats")
    return stage.function(record, dense, stats, **stage.knobs)


def _inside(record, stage: Stage):
    """Apply a further stage to the float arrays of a record: sparse values, low-rank factors.

    The values of a bitmask record are one long row; they are handed over as [out, kept per row] where every row keeps
    the same number, so that a group of a quantizer stays inside one row of the weight.
    """
    floats = {}
    if isinstance(record, _FLOAT_PARTS):
        floats = {name: getattr(record, name) for name in record.stored}
        floats = {n: x for n, x in floats.items() if not is_record(x) and x.dtype.kind == "f"}
    if not floats:
        raise ValueError(f"the weight is already packed as {record.kind}, whose parts cannot be compressed further")
    if _needs_calibration(stage.function):
        raise ValueError(f"it needs calibration inputs, which the parts of a {record.kind} record do not have")
    done = {}
    for name, x in floats.items():
        x = x.astype(np.float32)
        if x.ndim == 1:
            rows = record.shape[0]
            x = x.reshape(rows if x.size % rows == 0 else 1, -1)
        try:
            done[name] = stage.function(x, None, **stage.knobs)
        except ValueError as error:
            raise ValueError(f"its part {name} {x.shape}: {error}") from error
    return replace(record, **done)


def _dense(weight) -> np.ndarray:
    return weight if isinstance(weight, np.ndarray) else weight.dense()


def _floats(weight, keep: tuple[type, ...]):
    """Codes (of a GGUF file, say) decoded, to be coded anew. Records in `keep`, and turned inputs, keep their form."""
    if isinstance(weight, Rotated):
        return replace(weight, weight=_floats(weight.weight, keep))
    return weight if isinstance(weight, keep) else _dense(weight)
