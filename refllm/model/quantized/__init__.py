"""Quantised checkpoints in Hugging Face layout: which tensors are a module's, and the record they make; and back.

    gptq, awq, compressed-tensors, bitsandbytes, fp8        one module each

Nothing is guessed. A key of quantization_config that is not known is an error, and so is a module that the config calls
quantised but the file holds as floats, or the other way round.
"""

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from refllm.formats.errors import FormatError
from refllm.formats.tensors import StoredTensor
from refllm.kernels.packed.records import Record
from refllm.model.quantized import awq, bitsandbytes, compressed_tensors, fp8, gguf_blocks, gptq
from refllm.model.quantized.base import HEAD, Packed, Settings

METHODS: dict[str, ModuleType] = {
    "gptq": gptq,
    "awq": awq,
    "compressed-tensors": compressed_tensors,
    "bitsandbytes": bitsandbytes,
    "fp8": fp8,
}


def read_settings(config: object, path: Path) -> tuple[str, Settings]:
    """Method and settings of a quantization_config.

    Raises
    ------
    FormatError
        An unknown method, a key that is not understood, a value that is not supported.
    """
    if not isinstance(config, dict):
        raise FormatError(f"quantization_config must be an object, got {config!r:.80}", path=path)
    method = config.get("quant_method")
    if not isinstance(method, str) or method not in METHODS:
        raise FormatError(
            f"quantised checkpoint: quant_method must be one of {', '.join(METHODS)}, got {method!r}", path=path
        )
    try:
        return method, METHODS[method].read(config)
    except ValueError as error:
        raise FormatError(f"quantization_config ({method}): {error}", path=path) from None


def take_records(config: object, tensors: dict[str, StoredTensor], modules: list[str], path: Path) -> dict[str, Record]:
    """The records of all quantised modules; their tensors are removed from `tensors`.

    Parameters
    ----------
    config : object
        quantization_config as read.
    tensors : dict of name -> StoredTensor
        What is left are the tensors that are not quantised.
    modules : list of str
        Names of the linears the model has, without ".weight".
    path : Path
        Of the config, for messages.

    Returns
    -------
    dict of weight name -> record

    Raises
    ------
    FormatError
        In one line, naming the key, module or tensor.
    """
    method, settings = read_settings(config, path)
    own = METHODS[method]
    records: dict[str, Record] = {}
    for module in modules:
        found = _tensors_of(module, tensors, own.SUFFIXES)
        is_plain = set(found) == {"weight"} and found["weight"].dtype in ("F64", "F32", "F16", "BF16")
        plain = settings.plain(module)
        if plain or (plain is None and is_plain):
            if not is_plain and found:
                raise FormatError(
                    f"the config leaves {module} in floats, but there are {_some(module, found)}", path=path
                )
            continue
        if is_plain:
            raise FormatError(
                f"the config says {module} is quantised, but its weight is {found['weight'].dtype}", path=path
            )
        if extra := set(found) - set(own.SUFFIXES):
            raise FormatError(f"{module} is stored twice: {_some(module, found)} beside its {extra.pop()}", path=path)
        try:
            records[f"{module}.weight"] = own.load(settings.values, found, module)
        except ValueError as error:
            raise FormatError(f"{module}: {error}", path=path) from None
        for name in found:
            del tensors[f"{module}.{name}"]
    return records


def _tensors_of(module: str, tensors: Mapping[str, StoredTensor], suffixes: tuple[str, ...]) -> dict[str, StoredTensor]:
    wanted = ((name, tensors.get(f"{module}.{name}")) for name in dict.fromkeys((*suffixes, "weight")))
    return {name: tensor for name, tensor in wanted if tensor is not None}


def _some(module: str, names: Mapping[str, object]) -> str:
    return ", ".join(f"{module}.{name}" for name in sorted(names)[:3])


def pack(method: str, records: Mapping[str, Record], plain: list[str], floats: str) -> Packed:
    """Records in the tensors of a layout, and the quantization_config that describes them.

    Parameters
    ----------
    method : str
        One of METHODS.
    records : mapping of module name -> record
    plain : list of str
        Names of the linears that stay floats.
    floats : str
        The type of the model's other tensors: F32, BF16 or F16.

    Raises
    ------
    ValueError
        Naming the first tensor that the layout cannot store, why, and the formats that can.
    """
    own = METHODS[method]
    if not records:
        raise ValueError(f"no linear is packed, there is nothing to store as {method}")
    for module, record in records.items():
        try:
            own.storable(record)
        except ValueError as error:
            raise ValueError(f"{module}.weight cannot be stored as {method}: {error}; {fitting(record)} can") from None
    try:
        return own.pack(records, plain, floats)
    except ValueError as error:
        raise ValueError(f"cannot store as {method}: {error}") from None


def fitting(record: Record) -> str:
    """The formats that can store a record, for messages; refllm's own always can."""
    names = ["native"]
    for name, own in (METHODS | {"gguf": gguf_blocks}).items():
        try:
            own.storable(record)
        except ValueError:
            continue
        names.append(name)
    return ", ".join(names)


__all__ = ["HEAD", "METHODS", "Packed", "Settings", "fitting", "pack", "read_settings", "take_records"]
