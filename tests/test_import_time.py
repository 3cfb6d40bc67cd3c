"""`import refllm` adds at most 50 ms to NumPy's own import: processor time, so that a busy machine does not count."""

import statistics
import subprocess
import sys
from pathlib import Path

LIMIT_MS = 50


def added_milliseconds(module: str, runs: int = 5) -> float:
    """Median over fresh interpreters of what importing `module` costs once NumPy is there."""
    code = (
        f"import time, numpy; start = time.process_time(); import {module}; print(1000 * (time.process_time() - start))"
    )
    times = []
    for _ in range(runs):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True
        )
        times.append(float(done.stdout))
    return statistics.median(times)


def test_import_is_cheap_beside_numpy():
    assert added_milliseconds("refllm") <= LIMIT_MS


def test_the_measurement_sees_a_heavy_import():
    assert added_milliseconds("hypothesis.extra.numpy", runs=1) > LIMIT_MS
