"""The kernel cache: used again, never stale, never trusted when damaged or foreign; and targets but this machine."""

import os
import subprocess
import sys

import pytest

from refllm.kernels.packed import compile as compiling

PROGRAM = """
import sys
import numpy as np
from refllm.kernels.grids import SymmetricGrid
from refllm.kernels.packed import matmul, reference
from refllm.kernels.packed.records import IntWeight
W = np.random.default_rng(0).standard_normal((5, 40)).astype(np.float32)
grid = SymmetricGrid(4, -1)
scale, _ = grid.fit(W)
weight = IntWeight.pack(grid, grid.encode(W, scale), scale, None)
for activations, text in (("float32", reference.matmul_float), ("int8", reference.matmul_int8))[: int(sys.argv[1])]:
    y = matmul(W[:1], weight, activations)
    assert np.allclose(y, text(W[:1], weight), rtol=1e-5, atol=1e-5), activations
print("numba.np.linalg" in sys.modules)
"""


def run(cache, products=2, **variables):
    """PROGRAM in a process of its own; `products` = 1 leaves int8 out. Returns if Numba's compiler was imported."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("NUMBA_", "REFLLM_"))}
    environment = keep | {"REFLLM_CACHE": str(cache), "PYTHONPATH": os.pathsep.join(sys.path)} | variables
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(products)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and not done.stderr, done.stderr  # not a terminal: silent
    return done.stdout == "True\n"


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """A cache folder that one process has filled."""
    folder = tmp_path_factory.mktemp("cache")
    assert run(folder)
    return folder


def files(folder):
    return {p: p.read_bytes() for p in folder.rglob("*.nb?")}


def test_a_second_process_compiles_nothing(warm):
    before = {p: p.stat().st_mtime_ns for p in files(warm)}
    assert len(before) == 6  # index and code of two products and of the layout of activations
    assert all(compiling._checksum(p).exists() for p in before)
    assert not run(warm)
    assert {p: p.stat().st_mtime_ns for p in files(warm)} == before


def test_damaged_files_are_thrown_away(warm):
    damages = [
        lambda b: b[: len(b) // 2],
        lambda b: b"\x80\x04" + bytes(len(b)),
        lambda b: b[:-1] + b"!",
        lambda b: b"",
    ]
    for i, (path, content) in enumerate(sorted(files(warm).items())):
        path.write_bytes(damages[i % 4](content))
    damaged = files(warm)
    run(warm)
    assert len(files(warm)) == 6 and all(files(warm)[p] != damaged[p] for p in damaged)


def test_files_without_a_checksum_are_thrown_away(tmp_path):
    good, bad, lone = tmp_path / "a.nbc", tmp_path / "b.nbi", tmp_path / "c.nbc"
    for path in (good, bad, lone):
        path.write_bytes(b"code")
    compiling._sign(tmp_path)
    bad.write_bytes(b"other")
    compiling._checksum(lone).unlink()
    assert compiling.discard_unsigned(tmp_path) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.nbc", "a.nbc.sha256"]


def test_a_folder_that_cannot_be_written_is_done_without(tmp_path):
    (tmp_path / "file").write_text("in the way")
    run(tmp_path / "file", products=1)


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="POSIX permissions")
def test_a_folder_others_may_write_to_is_not_used(tmp_path):
    assert compiling._is_private(tmp_path)
    tmp_path.chmod(0o777)
    assert not compiling._is_private(tmp_path)


def test_the_folder_names_all_that_machine_code_depends_on(monkeypatch, tmp_path):
    monkeypatch.setenv("REFLLM_CACHE", str(tmp_path))
    compiling.kernel_folder.cache_clear()
    name = compiling.kernel_folder().name
    assert compiling.source_hash() in name and compiling._target() in name and compiling.numba.__version__ in name
    monkeypatch.setattr(compiling, "source_hash", lambda: "another")
    compiling.kernel_folder.cache_clear()
    assert compiling.kernel_folder().name != name
    monkeypatch.undo()
    compiling.kernel_folder.cache_clear()


def test_a_processor_without_any_extension(tmp_path):
    """Numba's generic target has no FMA, no float16 conversion, no byte product: the portable words run."""
    run(tmp_path, NUMBA_CPU_NAME="generic")


_ONE_OF_THREE = """
import sys
import numpy as np
from refllm.kernels.packed.kv_attention import attend_packed
for heads in map(int, sys.argv[1:]):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(shape, np.float32) for shape in ((heads, 16), (1, 21, 16), (1, 21, 16)))
    nothing = (None, None, None)
    y = attend_packed(q, (*nothing, k), (*nothing, v), bits=2, group=16, residual=32, scale=0.5)
    shares = np.exp(0.5 * q @ k[0].T)
    assert np.abs(y - shares @ v[0] / shares.sum(axis=1, keepdims=True)).max() < 1e-5, heads
"""


def test_kernels_of_one_text_from_several_processes_do_not_take_each_others_parts(tmp_path):
    """Parts are linked by name, and Numba numbers names by process."""
    for heads in (["1"], ["3"], ["1", "3"]):
        done = subprocess.run(
            [sys.executable, "-c", _ONE_OF_THREE, *heads],
            env=os.environ | {"REFLLM_CACHE": str(tmp_path), "NUMBA_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-500:]
