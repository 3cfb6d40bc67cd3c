"""What the quantised checkpoint layouts share: strict keys, lists of modules, arrays of a module, integer records."""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from refllm.formats.checkpoints import Grouped, Stored
from refllm.formats.checkpoints.base import group_index
from refllm.formats.errors import FormatError
from refllm.formats.tensors import StoredTensor
from refllm.kernels.grids import PER_CHANNEL, PER_TENSOR, AffineGrid, SymmetricGrid
from refllm.kernels.packed.records import IntWeight, Record, Reordered

HEAD = "lm_head"


class Settings(NamedTuple):
    """A quantization_config that was understood.

    Parameters
    ----------
    values : dict
        The checked keys that say how weights are stored.
    plain : function (module name) -> bool or None
        Whether the module is kept in floats; None: the tensors tell.
    conventions : dict of str -> str
        For `refllm inspect`.
    """

    values: dict
    plain: Callable[[str], bool | None]
    conventions: dict[str, str]


class Packed(NamedTuple):
    """A model's records in the tensors of a layout.

    config : quantization_config
    tensors : name -> array, for every module
    dtypes : dtype by tensor name where the array does not say it (F8_E4M3 codes)
    """

    config: dict
    tensors: dict[str, np.ndarray]
    dtypes: dict[str, str]


def check_keys(config: dict, known: Mapping[str, Callable[[object], bool]], harmless: tuple[str, ...]) -> None:
    """Every key must be known, with a value that is understood, or harmless.

    Raises
    ------
    ValueError
    """
    unknown = sorted(key for key in config if key not in known and key not in harmless)
    if unknown:
        raise ValueError(f"keys that are not understood: {', '.join(map(str, unknown))}")
    for key, accepts in known.items():
        if key in config and not accepts(config[key]):
            raise ValueError(f"{key} = {config[key]!r:.80} is not supported")


def one_of(*values: object) -> Callable[[object], bool]:
    """A check for check_keys: the value is one of these, of the same type."""
    return lambda value: any(value is v or (type(value) is type(v) and value == v) for v in values)


def names_or_none(value: object) -> bool:
    """A check for check_keys: a list of texts, or null."""
    return value is None or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def is_flag(value: object) -> bool:
    """A check for check_keys."""
    return isinstance(value, bool)


def is_count(value: object) -> bool:
    """A check for check_keys: an integer from 1."""
    return type(value) is int and value >= 1


def is_block(value: object) -> bool:
    """A check for check_keys: two positive sizes."""
    return isinstance(value, list) and len(value) == 2 and all(map(is_count, value))


def either(config: dict, *keys: str):
    """The value of whichever of these spellings the config has; two that differ are an error."""
    found = {key: config[key] for key in keys if config.get(key) is not None}
    if len({repr(value) for value in found.values()}) > 1:
        raise ValueError(f"{' and '.join(f'{key} = {value!r}' for key, value in found.items())} contradict each other")
    return next(iter(found.values()), None)


def skipped_by(patterns: list[str] | None) -> Callable[[str], bool | None]:
    """The rule of transformers' `modules_to_not_convert`: a prefix or pattern that ends at a dot, or an ending.

    The head is left to the tensors unless a pattern names it.
    """
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    try:
        compiled = [(re.compile(f"(?:{pattern}){boundary}"), pattern) for pattern in patterns or ()]
    except re.error as error:
        raise ValueError(f"a name of modules to leave alone is no pattern: {error}") from None

    def plain(module: str) -> bool | None:
        if any(pattern.match(module) or module.endswith(text) for pattern, text in compiled):
            return True
        return None if module == HEAD else False

    return plain


def arrays(tensors: Mapping[str, StoredTensor], form: Stored) -> dict[str, np.ndarray]:
    """The tensors of one module as arrays: floats as floats (BF16 widened), the rest as stored.

    Raises
    ------
    ValueError
        A dtype that the layout does not have there (E5M2 codes where E4M3 are meant, say).
    """
    wanted = {tensor.name: tensor.dtype for tensor in form.tensors}
    found = {}
    for name, tensor in tensors.items():
        dtype = wanted.get(name)
        if dtype in ("U8", "I8", "I32", "F8_E4M3") and tensor.dtype not in (dtype, dtype.replace("I32", "U32")):
            raise ValueError(f"{name} must be {dtype}, got {tensor.dtype}")
        if tensor.dtype == "F16":
            found[name] = tensor.stored()
        elif tensor.dtype in ("BF16", "F32", "F64"):
            found[name] = tensor.floats()
        else:
            found[name] = tensor.stored()
    return found


def check_groups(groups: int, columns: int, group_size: int) -> None:
    """Raise ValueError unless this many groups follow from the group size of the config (-1: one)."""
    expected = 1 if group_size == -1 else -(-columns // group_size)
    if groups != expected:
        raise ValueError(
            f"group_size {group_size} of {columns} inputs makes {expected} groups, the scales have {groups}"
        )


def record_of(grouped: Grouped, bits: int, symmetric: bool) -> Record:
    """Codes, scales and zero points -> IntWeight, in a Reordered where the groups are not consecutive columns.

    Parameters
    ----------
    grouped : Grouped
    bits : int
    symmetric : bool
        What the config says: zero points must then be 2^(bits-1), and are not stored.

    Raises
    ------
    ValueError
        Zero points that contradict the config; groups of unequal sizes.
    """
    codes, scale, zero_point, g_idx = grouped
    columns, groups = codes.shape[1], scale.shape[1]
    if zero_point is not None and symmetric:
        if (zero_point != 1 << (bits - 1)).any():
            odd = int(zero_point[zero_point != 1 << (bits - 1)][0])
            raise ValueError(f"the config says symmetric, but a zero point is {odd}, not {1 << (bits - 1)}")
        zero_point = None
    order = None
    if g_idx is not None:
        counts = np.bincount(g_idx, minlength=groups)
        if (counts != counts[0]).any():
            raise ValueError(f"groups must be equally long; g_idx gives them {counts.min()} to {counts.max()} columns")
        if not np.array_equal(g_idx, group_index(columns, groups)):
            order = np.argsort(g_idx, kind="stable").astype(np.int32)
            codes = codes[:, order]
    group_size = PER_CHANNEL if groups == 1 else columns // groups
    grid = (SymmetricGrid if zero_point is None else AffineGrid)(bits, group_size)
    record = IntWeight.pack(grid, codes, np.ascontiguousarray(scale), zero_point)
    return record if order is None else Reordered(record, order)


class Integers(NamedTuple):
    """An integer record taken apart: what gptq, awq and pack-quantized store."""

    grouped: Grouped
    bits: int
    group_size: int
    symmetric: bool


def integers_of(record: Record) -> Integers:
    """The inverse of `record_of`: g_idx is given only where columns are reordered.

    Raises
    ------
    ValueError
        Another kind of record.
    """
    inner = record.weight if isinstance(record, Reordered) else record
    if not isinstance(inner, IntWeight):
        raise ValueError(f"it is stored as {describe(record)}, not as integer codes")
    codes, (scale, zero_point) = inner.unpacked(), inner.scales()
    if inner.group_size == PER_TENSOR:
        scale, zero_point = (np.repeat(array, len(codes), axis=0) for array in (scale, zero_point))
    zero = None if inner.zero_point is None else zero_point.astype(np.uint8)
    g_idx = None
    if isinstance(record, Reordered):
        g_idx = np.empty(inner.columns, np.int32)
        g_idx[record.order] = group_index(inner.columns, scale.shape[1])
        original = np.empty_like(codes)
        original[:, record.order] = codes
        codes = original
    group_size = PER_CHANNEL if inner.group_size == PER_TENSOR else inner.group_size
    return Integers(Grouped(codes, scale, zero, g_idx), inner.bits, group_size, zero is None)


def half_scales(scale: np.ndarray) -> np.ndarray:
    """Scales as float16.

    Raises
    ------
    ValueError
        One would change.
    """
    with np.errstate(over="ignore"):
        half = scale.astype(np.float16)
    if not np.array_equal(half.astype(np.float32), scale):
        raise ValueError(f"scales are stored as float16, these are {scale.dtype} and would change")
    return half


def same_settings(found: Mapping[str, tuple], names: tuple[str, ...]) -> tuple:
    """The one setting of all modules, for layouts whose config has one for the whole model.

    Raises
    ------
    ValueError
        Naming the first module that differs.
    """
    (first, wanted), *others = found.items()
    for module, setting in others:
        if setting != wanted:
            text = lambda values: ", ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
            raise ValueError(
                f"{module}.weight has {text(setting)}, {first}.weight {text(wanted)}; one setting is needed"
            )
    return wanted


def describe(record: Record) -> str:
    """A record in a few words, for error messages."""
    if isinstance(record, Reordered):
        return f"{describe(record.weight)}, reordered"
    if isinstance(record, IntWeight):
        kind = "symmetric" if record.zero_point is None else "with zero points"
        return f"{record.bits}-bit integers {kind}, group {record.group_size}"
    text = {
        "gguf": "GGUF blocks",
        "sparse24": "2:4 sparse values",
        "bitmask": "sparse values",
        "lowrank": "two factors",
    }
    return f"{record.table} codes" if record.kind == "codes" else text.get(record.kind, record.kind)


def reading(path: object, module: str, error: ValueError) -> FormatError:
    """The error of one module, with its place."""
    return FormatError(f"{module}: {error}", path=path)
