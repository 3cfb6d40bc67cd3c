"""Compile Numba kernels once per machine: lazily, into a folder of the user's own that cannot be stale.

Numba's own cache notices a changed kernel but not a changed helper in another file, keeps its files beside the
sources, and stops on a damaged file. So the folder's name carries everything the machine code depends on (refllm,
Numba and LLVM versions, a hash of every source file here, the processor and its features), every file in it has a
checksum beside it, and a file without a matching one is thrown away before Numba sees it. Cache files are pickles:
the folder is used only if it belongs to this user and nobody else may write to it. When there is no usable folder,
kernels are compiled in each process.
"""

import hashlib
import os
import threading
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from secrets import token_hex

import llvmlite
import llvmlite.binding as llvm
import numba
from numba.core.caching import FunctionCache
from numba.core.ccallback import CFunc
from numba.core.runtime import rtsys
from numba.extending import register_jitable

from refllm import __version__
from refllm.formats.files import cache_dir
from refllm.formats.progress import Progress

_lock = threading.RLock()
_compilations = 0


def _target() -> str:
    """The processor Numba compiles for."""
    name = numba.config.CPU_NAME or llvm.get_host_cpu_name()
    features = numba.config.CPU_FEATURES or llvm.get_host_cpu_features().flatten()
    return f"{name}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


def source_hash() -> str:
    """A hash of every Python file beside this one."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


@cache
def kernel_folder() -> Path | None:
    """Where compiled kernels are kept; None if there is no safe place."""
    versions = f"{__version__}-numba{numba.__version__}-llvmlite{llvmlite.__version__}"
    folder = cache_dir() / "kernels" / f"{versions}-{source_hash()}-{_target()}"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not _is_private(folder) or not os.access(folder, os.W_OK):
            return None
        discard_unsigned(folder)
    except OSError:
        return None
    return folder


def _is_private(folder: Path) -> bool:
    if not hasattr(os, "getuid"):
        return True  # Windows: the profile folder is the user's own
    status = folder.stat()
    return status.st_uid == os.getuid() and not status.st_mode & 0o022


def _checksum(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def discard_unsigned(folder: Path) -> int:
    """Remove every cache file that its checksum does not vouch for, and return how many went."""
    removed = 0
    for path in [*folder.rglob("*.nbi"), *folder.rglob("*.nbc")]:
        checksum = _checksum(path)
        good = checksum.exists() and checksum.read_text() == hashlib.sha256(path.read_bytes()).hexdigest()
        if not good:
            path.unlink(missing_ok=True)
            checksum.unlink(missing_ok=True)
            removed += 1
    return removed


def _sign(folder: Path) -> None:
    """Write the checksum of every cache file whose checksum is missing or older."""
    for path in [*folder.rglob("*.nbi"), *folder.rglob("*.nbc")]:
        try:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
            temporary.write_text(digest)
            temporary.replace(_checksum(path))
        except OSError:  # another process threw it away, or the disk is full: it stays unsigned
            continue


@contextmanager
def _announced(name: str, kept: Path | None):
    """A line on a terminal while a kernel is compiled; before the first, once per process, one that says why."""
    global _compilations
    _compilations += 1
    with Progress() as progress:
        if _compilations == 1 and progress.active:
            until = f"kept in {kept.parent}" if kept else "for this process only: its cache folder cannot be used"
            print(f"refllm: compiling kernels for this processor, {until}", file=progress.stream)
        progress.show(f"kernel {_compilations}: {name}")
        yield


class _NamedCache(FunctionCache):
    """Numba's cache, but for what its key hashes and what a load imports."""

    def _index_key(self, signature, codegen):
        """Numba's, but for the hash of what a text's closure holds: words among it hash differently in every process.

        The folder's name says it instead: all sources, and the key that the caller gives each text made from others.
        """
        return signature, codegen.magic_tuple()

    def load_overload(self, sig, target_context):
        """Numba's, but for `target_context.refresh()`: it imports the whole compiler and SciPy's linear algebra.

        That is 60 MB and a third of a second, which nothing needs unless it compiles (who compiles calls it itself).
        Machine code needs the runtime.
        """
        rtsys.initialize(target_context)
        with self._guard_against_spurious_io_errors():
            return self._load_overload(sig, target_context)


def jitable(function: Callable | None = None, **options) -> Callable:
    """Numba's `register_jitable` for a part of kernels, without ways in from Python and C, which nobody takes.

    Each of those would be compiled with a copy of the part: a tenth of a kernel's time.

    A part that stays a function of its own is known to the linker by its name, among the parts of all kernels that a
    process loads. Numba numbers names by process, so that two parts of one text (made for other numbers of heads, say)
    that were compiled in different processes may share a name, and one would be called for the other. Hence a name that
    nobody else has.
    """
    if function is None:
        return partial(jitable, **options)
    if function.__closure__:
        function.__qualname__ += "_" + token_hex(8)
    return register_jitable(no_cpython_wrapper=True, no_cfunc_wrapper=True, **options)(function)


def compile_kernel(function: Callable, signature, key: str = "") -> Callable:
    """Compile one function for one signature, or load it from the cache.

    Parameters
    ----------
    function : callable
        Numba text. Never fastmath: sums keep their order.
    signature : Numba signature
    key : str
        Distinguishes kernels made from one text: names the value of every free variable.

    Returns
    -------
    callable
        Runs without the interpreter lock.
    """
    return _compiled(numba.njit(nogil=True, no_cfunc_wrapper=True, **_OPTIONS)(function), signature, key)


def compile_address(function: Callable, signature, key: str = "") -> int:
    """The same as a C function that other kernels call by its address; it stays loaded for the life of the process."""
    made = _compiled(CFunc(function, (signature.args, signature.return_type), {}, _OPTIONS), signature, key)
    _functions.append(made)
    return made.address


OPTIMIZE = 2  # LLVM's level: the third takes longer and makes none of these kernels faster
_OPTIONS = {"error_model": "numpy", "boundscheck": False, "fastmath": False}
_functions: list[CFunc] = []


def _compiled(made, signature, key: str):
    """Compile a dispatcher or C function, with Numba's cache in the folder of this text and key if there is one."""
    function = made.__wrapped__
    function.__qualname__ += key  # no two kernels of a process have one name (see `jitable`)

    def compile_it():
        if isinstance(made, CFunc):
            made.compile()
        else:
            made.compile(signature)
            made.disable_compile()  # or a Python float as argument would bring a second version, in float64

    with _lock:
        folder = kernel_folder()
        mine = None if folder is None else folder / f"{function.__name__}{key}"
        kept = mine is not None and any(mine.rglob("*.nbc"))
        elsewhere, level = numba.config.CACHE_DIR, numba.config.OPT
        uncached = made._cache
        try:
            numba.config.OPT = type(level)(min(level, OPTIMIZE))
            if mine is not None:
                numba.config.CACHE_DIR = str(mine)
                made._cache = _NamedCache(function)
            with nullcontext() if kept else _announced(function.__name__ + key, mine):
                compile_it()
            if mine is not None:
                _sign(mine)
        except (OSError, RuntimeError):  # a full or read-only disk: do without the cache
            made._cache = uncached
            with _announced(function.__name__ + key, None):
                compile_it()
        finally:
            numba.config.CACHE_DIR, numba.config.OPT = elsewhere, level
    return made
