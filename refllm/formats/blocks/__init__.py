"""GGUF block formats: rows of numbers <-> blocks of bytes.

A row is cut into blocks of 32 to 256 numbers; each block carries its own scales. Every format is a `BlockFormat`: a
layout (where the bits lie) and two functions of arrays (what the numbers mean, and how they are chosen).
"""

from refllm.formats.blocks.base import BlockFormat as BlockFormat
from refllm.formats.blocks.base import Terms as Terms
from refllm.formats.blocks.kquants import Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, Q8_K
from refllm.formats.blocks.lookup import IQ4_NL, IQ4_XS, MXFP4, NVFP4
from refllm.formats.blocks.simple import Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q8_1
from refllm.formats.blocks.ternary import Q1_0, Q2_0, TQ1_0, TQ2_0

BLOCKS = {
    form.name: form
    for form in (
        *(Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q8_1, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, Q8_K),
        *(IQ4_NL, IQ4_XS, TQ1_0, TQ2_0, MXFP4, NVFP4, Q1_0, Q2_0),
    )
}
