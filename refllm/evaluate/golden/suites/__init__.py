"""Generators of the golden suites, each independent of the code it judges.

A generator module has `suite() -> SuiteSpec`. It computes expected values with Python integers and fractions, one
number at a time, rounding exactly where the definition rounds; it must not call the NumPy code of refllm.
"""

from refllm.evaluate.golden.suites import flash, kivi, magnitude, rtn, rtn_matmul, speculative, svd, wanda

GENERATORS = (
    rtn.suite,
    rtn_matmul.suite,
    magnitude.suite,
    wanda.suite,
    svd.suite,
    kivi.suite,
    flash.suite,
    speculative.suite,
)
