"""This process and its children: how many threads they may use, how much memory this one has taken."""

import os
import sys
from pathlib import Path


def thread_variables(threads: int) -> dict[str, str]:
    """Environment that holds NumPy's libraries and refllm's kernels to so many threads; read when they are imported.

    Examples
    --------
    >>> thread_variables(1)["OPENBLAS_NUM_THREADS"]
    '1'
    """
    names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
    return dict.fromkeys((*names, "NUMBA_NUM_THREADS", "REFLLM_THREADS"), str(threads))


def child_environment(threads: int | None = None) -> dict[str, str]:
    """Environment of a Python process that is to find the refllm that runs here, installed or not.

    Parameters
    ----------
    threads : int, optional
        Of NumPy and of the kernels; None leaves both to themselves.
    """
    environment = {**os.environ, **(thread_variables(threads) if threads else {})}
    here = str(Path(__file__).resolve().parents[2])
    return environment | {"PYTHONPATH": os.pathsep.join(filter(None, (here, environment.get("PYTHONPATH"))))}


def peak_rss_bytes() -> int | None:
    """Largest resident memory of this process so far, in bytes: VmHWM (Linux), ru_maxrss (macOS), PeakWorkingSetSize.

    Linux's ru_maxrss is not used: a child inherits its parent's. None where the system does not tell.
    """
    if sys.platform.startswith("linux"):
        try:
            with open("/proc/self/status", encoding="ascii", errors="replace") as file:
                line = next(line for line in file if line.startswith("VmHWM:"))
            return int(line.split()[1]) * 1024  # "VmHWM:   12345 kB"
        except (OSError, StopIteration, ValueError):
            return None
    if sys.platform == "win32":
        return _windows_peak()
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB on the BSDs


def _windows_peak() -> int | None:
    import ctypes

    class Counters(ctypes.Structure):
        _fields_ = [
            ("cb", ctypes.c_uint32),
            ("PageFaultCount", ctypes.c_uint32),
            *((name, ctypes.c_size_t) for name in ("PeakWorkingSetSize", "WorkingSetSize")),
            *((f"other{i}", ctypes.c_size_t) for i in range(6)),
        ]

    counters = Counters(cb=ctypes.sizeof(Counters))
    kernel = ctypes.WinDLL("kernel32", use_last_error=True)
    kernel.GetCurrentProcess.restype = ctypes.c_void_p
    kernel.K32GetProcessMemoryInfo.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint32]
    done = kernel.K32GetProcessMemoryInfo(kernel.GetCurrentProcess(), ctypes.byref(counters), counters.cb)
    return counters.PeakWorkingSetSize if done else None
