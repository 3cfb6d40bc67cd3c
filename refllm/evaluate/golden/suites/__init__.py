"""Generators of the golden suites, each independent of the code it judges.

A generator module has `suite() -> SuiteSpec`. It computes expected values with Python integers and fractions, one
number at a time, rounding exactly where the definition rounds; it must not call the NumPy code of refllm.
"""

from refllm.evaluate.golden.suites import (
    blockwise,
    checkpoint_bitsandbytes,
    checkpoint_compressed,
    checkpoint_gptq,
    checkpoint_misc,
    flash,
    gguf,
    gptq,
    kivi,
    magnitude,
    microscale,
    quarot,
    rope,
    rtn,
    rtn_matmul,
    small_floats,
    small_numbers,
    speculative,
    stochastic,
    svd,
    wanda,
)

GENERATORS = (
    rtn.suite,
    rtn_matmul.suite,
    blockwise.suite,
    gptq.suite,
    magnitude.suite,
    wanda.suite,
    svd.suite,
    quarot.suite,
    kivi.suite,
    flash.suite,
    speculative.suite,
    rope.suite,
    rope.permute_suite,
    small_floats.suite,
    small_floats.decode_suite,
    small_numbers.suite,
    small_numbers.decode_suite,
    stochastic.suite,
    microscale.suite,
    microscale.nvfp4_suite,
    gguf.suite,
    gguf.decode_suite,
    checkpoint_gptq.gptq_suite,
    checkpoint_gptq.awq_suite,
    checkpoint_compressed.suite,
    checkpoint_bitsandbytes.suite,
    checkpoint_misc.suite,
)
