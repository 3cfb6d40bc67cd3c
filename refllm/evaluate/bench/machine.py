"""What the numbers were measured on."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("numpy", "numba", "llvmlite")


def describe() -> dict:
    """Processor, number of processors, system, and versions of Python, refllm and the packages that compute.

    Examples
    --------
    >>> sorted(describe())
    ['cpu', 'cpus', 'python', 'system', 'versions']
    """
    return {
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: found for name in ("refllm", *PACKAGES) if (found := _version(name)) is not None},
    }


def cpu_name(path: str = "/proc/cpuinfo") -> str:
    """The processor's name for people, and LLVM's name of its kind where that can be asked."""
    name = platform.processor() or platform.machine()
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            name = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), name)
    except OSError:
        pass
    try:
        import llvmlite.binding as llvm

        return f"{name} ({llvm.get_host_cpu_name()})"
    except ImportError:
        return name


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
