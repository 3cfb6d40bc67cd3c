"""Known mistakes: what each is (catalogue.py), and what each makes of a case.

A predictor is a function(Given) -> iterator of Hypothesis; it says nothing about ops it does not know.

    arrays.py         the order of bits and elements, signs, factors: of any op
    choices.py        a param or a convention taken for another one: of any op
    grids.py          quant.rtn
    floats.py         small floats, microscaling, NVFP4
    gguf.py           GGUF blocks
    checkpoints.py    gptq, awq, compressed-tensors, bitsandbytes, BitNet, MatMulNBits, swizzled scales
    small_numbers.py  integers, lists of values, stochastic rounding
    attention.py      attention, rotary embedding, caches, speculative decoding
"""

from refllm.evaluate.golden.mistakes import arrays, attention, checkpoints, choices, floats, gguf, grids, small_numbers
from refllm.evaluate.golden.mistakes.catalogue import MISTAKES as MISTAKES

PREDICTORS = (
    grids.predict,
    floats.predict,
    small_numbers.predict,
    gguf.predict,
    checkpoints.predict,
    attention.predict,
    choices.predict,
    choices.shifted_weights,
    arrays.predict,
)
