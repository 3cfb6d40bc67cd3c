"""Peak memory is that of this process and grows with it; Progress writes to terminals only."""

import io
import os
import subprocess
import sys
from pathlib import Path

from refllm.formats.process import child_environment, thread_variables
from refllm.formats.progress import Progress

PEAK = """
import numpy as np
from refllm.formats.process import peak_rss_bytes
before = peak_rss_bytes()
assert 5e6 < before < 1e9, before  # bytes, neither KiB nor pages
block = np.ones(before + (64 << 20), np.uint8)  # above the peak so far
assert peak_rss_bytes() >= before + (32 << 20)
del block
assert peak_rss_bytes() >= before + (32 << 20)  # a peak does not fall
"""


def test_peak_memory_sees_what_was_allocated():
    subprocess.run([sys.executable, "-c", PEAK], env=child_environment(), check=True)


def test_thread_variables_are_texts_of_one_number():
    found = thread_variables(3)
    assert set(found.values()) == {"3"} and {"OPENBLAS_NUM_THREADS", "REFLLM_THREADS"} <= set(found)
    assert not set(found) & {"PATH", "HOME"} and isinstance(os.environ.get("PATH", ""), str)


def test_a_child_finds_this_refllm(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    found = child_environment(2)
    first, second = found["PYTHONPATH"].split(os.pathsep)
    assert (Path(first) / "refllm" / "__init__.py").is_file() and second == "elsewhere"
    assert found["REFLLM_THREADS"] == found["OPENBLAS_NUM_THREADS"] == "2"
    assert "OPENBLAS_NUM_THREADS" not in child_environment()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_written_over_and_wiped():
    stream = Terminal()
    with Progress(stream) as progress:
        progress.show("12 of 20")
        progress.show("13")
    assert stream.getvalue() == "\r12 of 20\r13      \r" + "  " + "\r"


def test_progress_is_silent_without_a_terminal():
    stream = io.StringIO()
    with Progress(stream) as progress:
        progress.show("12 of 20")
    assert stream.getvalue() == ""
