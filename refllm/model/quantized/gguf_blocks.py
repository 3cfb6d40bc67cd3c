"""Records -> GGUF blocks, where some type of block holds exactly the same numbers."""

import numpy as np

from refllm.formats.blocks import BLOCKS
from refllm.kernels.packed.records import CodeWeight, GGUFBlocks, IntWeight, Record
from refllm.model.quantized.base import describe, half_scales

SYMMETRIC = {4: "Q4_0", 5: "Q5_0", 8: "Q8_0"}
AFFINE = {4: "Q4_1", 5: "Q5_1"}


def storable(record: Record) -> GGUFBlocks:
    """The blocks with the numbers of a record.

    An integer grid fits where its groups are multiples of 32: symmetric with 4, 5 or 8 bits; with zero points (4 or 5
    bits) only if scale times zero point happens to be a float16 everywhere, since blocks store that product.

    Raises
    ------
    ValueError
        No type of block holds them.
    """
    if isinstance(record, GGUFBlocks):
        return record
    if isinstance(record, CodeWeight) and getattr(record.scale, "table", None) == "E8M0" and record.table == "FP4_E2M1":
        if (record.block_rows, record.block_columns) == (1, 32) and record.scale.scale is None:
            return _blocks("MXFP4", record.shape, e=record.scale.unpacked().reshape(-1, 1), q=record.unpacked())
    if not isinstance(record, IntWeight):
        raise ValueError(f"it is stored as {describe(record)}; GGUF blocks hold integers and E2M1 only")
    type_name = (SYMMETRIC if record.zero_point is None else AFFINE).get(record.bits)
    if type_name is None:
        raise ValueError(f"it is stored as {describe(record)}; {', '.join(SYMMETRIC.values())} hold 4, 5 and 8 bits")
    width = record.columns if record.group_size <= 0 else record.group_size
    if width % 32:
        raise ValueError(f"blocks have 32 columns, its groups {width}")
    out, columns = record.shape
    scale, zero_point = record.scales()
    spread = lambda array: np.broadcast_to(np.repeat(array, width // 32, axis=1), (out, columns // 32)).reshape(-1, 1)
    d, codes = spread(half_scales(scale)), record.unpacked()
    if type_name == "Q8_0":
        return _blocks(type_name, record.shape, d=d, q=(codes.astype(np.int16) - 128).astype(np.int8))
    if record.zero_point is None:
        return _blocks(type_name, record.shape, d=d, q=codes)
    try:
        minimum = half_scales(-scale.astype(np.float32) * zero_point)
    except ValueError:
        raise ValueError(f"{type_name} stores scale times zero point as float16, which would change it") from None
    return _blocks(type_name, record.shape, d=d, m=spread(minimum), q=codes)


def _blocks(type_name: str, shape: tuple[int, int], **fields: np.ndarray) -> GGUFBlocks:
    fields["q"] = fields["q"].reshape(-1, 32)
    data = BLOCKS[type_name].layout.pack(**fields)
    return GGUFBlocks(data.reshape(shape[0], -1), type_name, shape[1])
