"""The flags of the suites of checkpoint formats: which mistake a failing case points at."""

from refllm.evaluate.golden.suites.rtn_notes import note

COMMON = {
    "NibbleOrder": note(
        "LAYOUT",
        "Which code lies in which bits of a word or byte: low first (GPTQ, compressed-tensors, ONNX Runtime, gpt-oss), "
        "high nibble first (bitsandbytes), 0 2 4 6 1 3 5 7 (AWQ), or strided (I2_S).",
        "Weights load cleanly and the model writes garbage.",
        "mit-han-lab/llm-awq/issues/91",
        "casper-hansen/AutoAWQ/issues/566",
        "amd/Quark/pull/30",
    ),
    "BitStream": note(
        "LAYOUT",
        "Codes of 3, 5, 6 and 7 bits are one stream of bits over the words, low bits first: a code may lie in two "
        "words.",
        "Every code after the first that straddles two words is wrong.",
        "ModelCloud/GPTQModel/pull/1218",
        "intel/auto-round/pull/264",
    ),
    "SignBit": note(
        "OVERFLOW",
        "The top bit of a signed word is a bit of a code: shift without sign, or mask after shifting.",
        "The last code of a word is too large or negative.",
    ),
    "Transposed": note(
        "LAYOUT",
        "Along which axis codes and zero points are packed, and whether the matrix is stored as [in, out] or [out, "
        "in].",
        "A non-square weight has the wrong shape, a square one silently the wrong values.",
    ),
    "GroupBoundary": note(
        "LAYOUT",
        "Scales and zero points of neighbouring groups differ by factors: each code needs those of its own group.",
        "Scales have a plausible shape and belong to other weights.",
    ),
    "ZeroPoint": note(
        "OFF_BY_ONE",
        "How zero points are stored: minus one in GPTQ v1, as they are in v2, AWQ and ONNX Runtime; both ends of the "
        "range.",
        "Every weight is off by one scale: '!!!!' instead of text.",
        "vllm-project/vllm/pull/26092",
        "ModelCloud/GPTQModel/issues/2350",
        "microsoft/onnxruntime/pull/24828",
    ),
    "Symmetric": note(
        "OFF_BY_ONE",
        "Without zero points the grid is symmetric around 2^(bits-1).",
        "Positive and negative weights trade places, or all are off by one scale.",
        "amd/Quark/issues/20",
    ),
    "UnsignedSubtract": note(
        "OVERFLOW",
        "code - zero point is negative for half of the weights: widen the codes before subtracting.",
        "Negative weights become large positive ones.",
    ),
    "Random": note("BASIC", "Random codes and scales."),
    "OutOfRange": note("MALFORMED", "A code or zero point that needs more bits than it has is rejected, not cut off."),
    "BadShape": note("SHAPE", "Tensors whose shapes contradict each other are rejected."),
    "BadParams": note("MALFORMED", "A width or a format that does not exist is rejected."),
    "ActOrder": note(
        "ORDER",
        "g_idx names the group of each input column; after act-order it is not sorted, and groups may have any size.",
        "Weights get scales of other groups; without act-order nothing shows.",
    ),
    "GroupNotDividing": note("SHAPE", "Without g_idx the groups must divide the columns."),
    "NonFinite": note("NON_FINITE", "A scale with NaN or an infinity is rejected."),
    "ScaleOverflow": note("OVERFLOW", "A scale that float16 cannot hold is rejected, not stored as an infinity."),
    "ScaleRounding": note("ROUNDING", "Scales round to float16 once, to nearest, ties to even; subnormals are kept."),
    "WidthNotDividing": note(
        "SHAPE", "Codes that do not fill whole words or blocks are rejected, never padded silently."
    ),
}


def notes(used: str, **own: dict) -> dict:
    """Some of the common notes, by name, and a suite's own."""
    return {name: COMMON[name] for name in used.split()} | own


GPTQ = notes(
    "NibbleOrder BitStream SignBit Transposed GroupBoundary ZeroPoint Symmetric UnsignedSubtract ActOrder "
    "ScaleRounding "
    "Random OutOfRange BadShape BadParams GroupNotDividing NonFinite ScaleOverflow WidthNotDividing",
    ZeroPointZero=note(
        "OFF_BY_ONE",
        "v1 stores zero point - 1, so 0 cannot be stored: packing rejects it. Reading 2^bits - 1, a program may reject "
        "the file, take it for a wrapped 0 (declare full_zero=zero) or for 2^bits (full_zero=plus_one).",
        "-1 spills over all zero points of the word; thousands of weights wrong, NaN perplexity.",
        "ModelCloud/GPTQModel/issues/2350",
    ),
)
AWQ = notes(
    "NibbleOrder SignBit Transposed GroupBoundary ZeroPoint Symmetric UnsignedSubtract ScaleRounding Random OutOfRange "
    "BadShape GroupNotDividing NonFinite ScaleOverflow WidthNotDividing"
)
COMPRESSED = notes(
    "NibbleOrder BitStream SignBit Transposed GroupBoundary Symmetric UnsignedSubtract ActOrder Random OutOfRange "
    "BadShape "
    "BadParams GroupNotDividing NonFinite WidthNotDividing",
    ZeroPoint=COMMON["ZeroPoint"],
    OddSize=note(
        "SHAPE",
        "A row begins with a word of its own, the spare bits of its last word are zero; weight_shape tells the "
        "columns.",
        "Rows after the first are shifted, or the last columns are lost.",
    ),
    OffsetBinary=note(
        "LAYOUT",
        "Packed codes have 2^(bits-1) added; those of int-quantized are two's complement, one an int8.",
        "Positive and negative weights trade places.",
        "vllm-project/llm-compressor/issues/1613",
    ),
    ReciprocalScale=note(
        "ORDER",
        "weight_global_scale divides: effective scale = E4M3 scale / global scale, rounded, then the product.",
        "Weights too large by the square of the global scale.",
        "modular/modular/issues/6600",
    ),
    FusedLayers=note(
        "LAYOUT",
        "Weights that are fused keep the global scale of each: one for all is right only if they were quantised so.",
        "Gate or up is off by the quotient of the scales, and the model is only a little worse.",
        "vllm-project/vllm/pull/47515",
        "NVIDIA/TensorRT-LLM/pull/14199",
    ),
    BlockSize=note("LAYOUT", "NVFP4 has a scale per 16 columns, MXFP4 one per 32."),
    FloatCodes=note("BASIC", "Every code of E2M1, and E4M3 with its NaN."),
    E8m0Scale=note(
        "NON_FINITE",
        "E8M0 code 0 is 2^-127, 255 NaN. Declare scale_255=infinite if yours is an infinity, as compressed-tensors' "
        "own.",
        "Subnormal scales flushed to zero.",
    ),
)
BITSANDBYTES = notes(
    "NibbleOrder GroupBoundary Random OutOfRange BadShape BadParams NonFinite",
    BlocksAcrossRows=note(
        "LAYOUT",
        "Blocks run over the row-major weight: one may begin in a row and end in the next; the last may be short.",
        "Right only where the block size divides the columns.",
    ),
    OddSize=note("SHAPE", "An odd number of codes: the last low nibble is filled with the code of zero, and ignored."),
    Tables=note(
        "BASIC",
        "NF4's values, and FP4's, which are not E2M1: codes 1 to 7 are 1/192, 2/3, 1, 1/3, 1/2, 1/6, 1/4. Code 8 is "
        "+0.",
        "Wrong weights that look plausible.",
        "bitsandbytes-foundation/bitsandbytes/issues/543",
    ),
    DoubleQuant=note(
        "ORDER",
        "absmax = nested_quant_map[code] nested_absmax + nested_offset, in blocks of 256, each operation in float32.",
        "Scales without their offset: small or negative.",
    ),
    DynamicMap=note("BASIC", "The 256 values of the dynamic map, sorted; nearest value, the lower one of two."),
    State=note(
        "MALFORMED",
        "The JSON text is what bitsandbytes writes, key by key; one that lacks a key or contradicts the tensors is "
        "rejected.",
    ),
    RowScale=note(
        "OFF_BY_ONE",
        "int8: w = (code SCB) (1/127), SCB being the row's largest magnitude itself.",
        "Weights too large by 127.",
    ),
)
MISC = notes(
    "NibbleOrder GroupBoundary ZeroPoint Symmetric UnsignedSubtract Random OutOfRange BadShape BadParams NonFinite "
    "WidthNotDividing",
    FloatCodes=note("BASIC", "Codes of E4M3 with its NaN, and of E2M1."),
    SquareBlocks=note(
        "LAYOUT",
        "Block-FP8: one scale per 128 rows and 128 columns, the last blocks smaller; weight_scale_inv multiplies.",
        "Weights divided by their scale, or scaled by that of another block.",
    ),
    E8m0Scale=note(
        "NON_FINITE",
        "E8M0 code 0 is 2^-127, 255 NaN. Declare scale_255=power if yours is 2^128, as gpt-oss's own reader.",
    ),
    Strides=note(
        "LAYOUT",
        "I2_S: 128 codes are 32 bytes, byte j holding codes j, j + 32, j + 64, j + 96 from the high bits down; ARM "
        "builds "
        "write 64 codes in 16 bytes. Behind the codes a float32 scale and 28 bytes of padding.",
        "Consecutive codes read from one byte: noise.",
        "microsoft/BitNet/issues/412",
        "microsoft/BitNet/issues/585",
    ),
    Quarters=note(
        "LAYOUT", "BitNet of Hugging Face: a byte holds four rows a quarter of the matrix apart, low bits first."
    ),
    Reciprocal=note("ORDER", "BitNet's weight_scale divides."),
    ShortBlock=note(
        "SHAPE", "in need not be a multiple of block_size: the last block is stored in full, filled with 0."
    ),
    ZeroPointPacking=note(
        "LAYOUT",
        "Zero points are packed along the blocks of a row, each row on a byte of its own, however few there are.",
        "The zero points of odd blocks are lost or those of another row.",
        "microsoft/onnxruntime/pull/24828",
    ),
    PairOrder=note(
        "LAYOUT", "2:4: the lower column of a pair in the low two bits, groups of four from the low nibble up."
    ),
    BitOrder=note("LAYOUT", "Bitmask: column 8 k + j is bit j of byte k; each row begins with a byte of its own."),
    RowOffsets=note("LAYOUT", "Where the values of each row begin; CSR has one entry more, the end."),
    TileOrder=note(
        "LAYOUT",
        "Scales swizzled in tiles of 128 x 4: row r, column c at byte 16 (r % 32) + 4 (r // 32) + c, tiles row by row.",
        "Scales of other blocks: garbage.",
        "NVIDIA/cudnn-frontend/issues/221",
    ),
    TilePadding=note(
        "SHAPE", "Scales are padded with zeros to whole tiles, and the padding is dropped on the way back."
    ),
)
