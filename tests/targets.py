"""Programs that run in a process of their own whose kernels are compiled for another processor than this one."""

import os
import subprocess
import sys

import pytest

from refllm.kernels.packed import simd

AVX2 = "+sse,+sse2,+sse3,+ssse3,+sse4.1,+sse4.2,+popcnt,+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+cmov,+cx8,+fxsr,+mmx"
AVX = AVX2.replace("+avx2,", "-avx2,")
GENERIC = None  # what Numba takes for granted: no FMA, no float16 conversion, no byte products


def run_for(features: str | None, program: str) -> None:
    """Run a program for a processor with AVX2, AVX or neither; whatever goes wrong there fails here.

    Where this processor has AVX2 and nothing wider, its own kernels are those for AVX2: they are compiled anyway.
    """
    have = simd.target_features()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("NUMBA_")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    if features is GENERIC:
        environment["NUMBA_CPU_NAME"] = "generic"
    elif "+avx2" not in have:
        pytest.skip("this machine does not run AVX2 code")
    elif features == AVX or have & {"+avx512f", "+avxvnni"}:
        environment |= {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": features}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
