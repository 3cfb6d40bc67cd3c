"""The arrays that Hugging Face checkpoints and other engines store <-> codes, scales and zero points.

Every format has `X_pack(codes, scale, ...) -> dict of tensors`, `X_unpack(tensors, ...)` and
`X_dequantize(tensors, ...) -> (out, in) float32`. Names of tensors are those behind the module's name in the file.
E4M3 and E8M0 tensors are uint8 codes, since NumPy has no type for them. `STORED` describes every tensor.
"""

from refllm.formats.checkpoints import (
    awq,
    awq_gemv,
    bitnet,
    bitsandbytes,
    compressed_floats,
    compressed_tensors,
    fp8_block,
    gpt_oss,
    gptq,
    onnx,
    sparse,
    swizzle,
)
from refllm.formats.checkpoints.awq import awq_dequantize as awq_dequantize
from refllm.formats.checkpoints.awq import awq_pack as awq_pack
from refllm.formats.checkpoints.awq import awq_unpack as awq_unpack
from refllm.formats.checkpoints.awq_gemv import awq_gemv_dequantize as awq_gemv_dequantize
from refllm.formats.checkpoints.awq_gemv import awq_gemv_pack as awq_gemv_pack
from refllm.formats.checkpoints.awq_gemv import awq_gemv_unpack as awq_gemv_unpack
from refllm.formats.checkpoints.base import Grouped as Grouped
from refllm.formats.checkpoints.bitnet import bitnet_dequantize as bitnet_dequantize
from refllm.formats.checkpoints.bitnet import bitnet_pack as bitnet_pack
from refllm.formats.checkpoints.bitnet import bitnet_unpack as bitnet_unpack
from refllm.formats.checkpoints.bitnet import i2_s_dequantize as i2_s_dequantize
from refllm.formats.checkpoints.bitnet import i2_s_pack as i2_s_pack
from refllm.formats.checkpoints.bitnet import i2_s_unpack as i2_s_unpack
from refllm.formats.checkpoints.bitsandbytes import bitsandbytes_dequantize as bitsandbytes_dequantize
from refllm.formats.checkpoints.bitsandbytes import bitsandbytes_pack as bitsandbytes_pack
from refllm.formats.checkpoints.bitsandbytes import bitsandbytes_unpack as bitsandbytes_unpack
from refllm.formats.checkpoints.bitsandbytes import int8_dequantize as int8_dequantize
from refllm.formats.checkpoints.bitsandbytes import int8_pack as int8_pack
from refllm.formats.checkpoints.bitsandbytes import int8_unpack as int8_unpack
from refllm.formats.checkpoints.compressed_floats import float_quantized_dequantize as float_quantized_dequantize
from refllm.formats.checkpoints.compressed_floats import float_quantized_pack as float_quantized_pack
from refllm.formats.checkpoints.compressed_floats import float_quantized_unpack as float_quantized_unpack
from refllm.formats.checkpoints.compressed_floats import mxfp4_dequantize as mxfp4_dequantize
from refllm.formats.checkpoints.compressed_floats import mxfp4_pack as mxfp4_pack
from refllm.formats.checkpoints.compressed_floats import mxfp4_unpack as mxfp4_unpack
from refllm.formats.checkpoints.compressed_floats import nvfp4_dequantize as nvfp4_dequantize
from refllm.formats.checkpoints.compressed_floats import nvfp4_pack as nvfp4_pack
from refllm.formats.checkpoints.compressed_floats import nvfp4_unpack as nvfp4_unpack
from refllm.formats.checkpoints.compressed_tensors import (
    compressed_tensors_dequantize as compressed_tensors_dequantize,
)
from refllm.formats.checkpoints.compressed_tensors import compressed_tensors_pack as compressed_tensors_pack
from refllm.formats.checkpoints.compressed_tensors import compressed_tensors_unpack as compressed_tensors_unpack
from refllm.formats.checkpoints.describe import Stored as Stored
from refllm.formats.checkpoints.describe import Tensor as Tensor
from refllm.formats.checkpoints.fp8_block import fp8_block_dequantize as fp8_block_dequantize
from refllm.formats.checkpoints.fp8_block import fp8_block_pack as fp8_block_pack
from refllm.formats.checkpoints.fp8_block import fp8_block_unpack as fp8_block_unpack
from refllm.formats.checkpoints.gpt_oss import gpt_oss_dequantize as gpt_oss_dequantize
from refllm.formats.checkpoints.gpt_oss import gpt_oss_pack as gpt_oss_pack
from refllm.formats.checkpoints.gpt_oss import gpt_oss_unpack as gpt_oss_unpack
from refllm.formats.checkpoints.gptq import gptq_dequantize as gptq_dequantize
from refllm.formats.checkpoints.gptq import gptq_pack as gptq_pack
from refllm.formats.checkpoints.gptq import gptq_unpack as gptq_unpack
from refllm.formats.checkpoints.onnx import matmul_nbits_dequantize as matmul_nbits_dequantize
from refllm.formats.checkpoints.onnx import matmul_nbits_pack as matmul_nbits_pack
from refllm.formats.checkpoints.onnx import matmul_nbits_unpack as matmul_nbits_unpack
from refllm.formats.checkpoints.sparse import bitmask_pack as bitmask_pack
from refllm.formats.checkpoints.sparse import bitmask_unpack as bitmask_unpack
from refllm.formats.checkpoints.sparse import csr_pack as csr_pack
from refllm.formats.checkpoints.sparse import csr_unpack as csr_unpack
from refllm.formats.checkpoints.sparse import sparse24_dense as sparse24_dense
from refllm.formats.checkpoints.sparse import sparse24_pack as sparse24_pack
from refllm.formats.checkpoints.sparse import sparse24_unpack as sparse24_unpack
from refllm.formats.checkpoints.swizzle import swizzle_scales as swizzle_scales
from refllm.formats.checkpoints.swizzle import unswizzle_scales as unswizzle_scales

STORED = tuple(
    form
    for module in (
        gptq,
        awq,
        awq_gemv,
        compressed_tensors,
        compressed_floats,
        bitsandbytes,
        fp8_block,
        gpt_oss,
        bitnet,
        onnx,
        sparse,
        swizzle,
    )
    for form in module.STORED
)
