"""Single words of the SIMD vocabulary."""

import numpy as np
from numba import njit

from refllm.kernels.packed import simd


def test_both_half_conversions_are_exact_for_every_finite_number():
    @njit
    def convert(bits, fast, portable):
        for i in range(len(bits)):
            fast[i] = simd.half_to_float(bits[i])
            portable[i] = simd.half_to_float_portable(bits[i])

    halves = np.arange(1 << 16, dtype=np.uint16)
    halves = halves[np.isfinite(halves.view(np.float16))]
    expected = halves.view(np.float16).astype(np.float32).view(np.uint32)
    fast, portable = np.empty((2, len(halves)), np.float32)
    convert(halves, fast, portable)
    assert np.array_equal(fast.view(np.uint32), expected)  # subnormals and the sign of zero included
    assert np.array_equal(portable.view(np.uint32), expected)


def test_target_features_follow_numbas_setting(monkeypatch):
    monkeypatch.setattr(simd.config, "CPU_FEATURES", "+sse2,-avx")
    simd.target_features.cache_clear()
    assert simd.target_features() == {"+sse2", "-avx"}
    monkeypatch.undo()
    simd.target_features.cache_clear()
    assert simd.target_features()
