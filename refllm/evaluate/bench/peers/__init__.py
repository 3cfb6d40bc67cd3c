"""Other programs that do the same work, each behind one small interface. None is imported before it is asked for.

    peer.products(types)      builders of its products that answer to weights of these types   (bench kernels)
    peer.open_model(path)     a GGUF file, ready to read and write tokens                      (bench decode, prefill)
    peer.encoder(type_name)   W -> bytes of GGUF blocks                                        (bench quantize)

A peer that cannot do one of them says so in `PEERS`, and the names are checked before anything runs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import numpy as np

from refllm.evaluate.bench.products import Product, Task


@dataclass(frozen=True)
class Entry:
    """Where a peer comes from, and what it can do.

    Parameters
    ----------
    packages : tuple of str
        Distributions as pip knows them; the first carries the version that is reported.
    modules : tuple of str
        What they are imported as.
    does : tuple of str
        Of kernels, decode, prefill, quantize.
    adapter : str
        Module of this package and class in it.
    """

    packages: tuple[str, ...]
    modules: tuple[str, ...]
    does: tuple[str, ...]
    adapter: str


PEERS = {
    "llama.cpp": Entry(
        ("llama-cpp-python",), ("llama_cpp",), ("kernels", "decode", "prefill", "quantize"), "llama_cpp.LlamaCpp"
    ),
    "onnxruntime": Entry(("onnxruntime", "onnx"), ("onnxruntime", "onnx"), ("kernels",), "onnxruntime.OnnxRuntime"),
    "torch": Entry(("torch",), ("torch",), ("kernels",), "torch.Torch"),
    "libgguf": Entry(("libgguf",), ("libgguf",), ("quantize",), "libgguf.LibGguf"),
}


class Peer:
    """What the adapters have in common.

    Parameters
    ----------
    threads : int
    """

    name: str

    def __init__(self, threads: int):
        self.threads = threads

    @property
    def version(self) -> str:
        """Of the package it comes from."""
        return version(PEERS[self.name].packages[0])

    def products(self, types: Sequence[str]) -> list[Callable[[Task], Product]]:
        """Builders of the products that are to be compared with weights of these types."""
        return []

    def open_model(self, path, context: int):
        """A GGUF file with room for so many tokens, see `refllm.evaluate.bench.models`."""
        raise NotImplementedError

    def encoder(self, type_name: str) -> Callable[[np.ndarray], np.ndarray] | None:
        """What encodes a matrix (out, in) float32 as GGUF blocks (out, row_bytes) uint8; None for an unknown type."""
        raise NotImplementedError


def check_peers(names: Sequence[str], what: str) -> list[str]:
    """The names, each once; `all` stands for those that are installed and can do it.

    Parameters
    ----------
    names : sequence of str
    what : str
        kernels, decode, prefill or quantize.

    Raises
    ------
    ValueError
        An unknown name, a peer that cannot do it or is not installed; the message says how to install it.
    """
    able = [name for name, entry in PEERS.items() if what in entry.does]
    asked = []
    for name in names:
        asked += [peer for peer in able if not missing_packages(peer)] if name == "all" else [name]
    for name in asked:
        if name not in PEERS:
            raise ValueError(f"unknown peer {name!r}; known: {', '.join(PEERS)}, all")
        if name not in able:
            raise ValueError(f"{name} is no peer of bench {what}; peers of it: {', '.join(able)}")
        if missing := missing_packages(name):
            raise ValueError(
                f"peer {name}: the package {missing[0]} is not installed; "
                "install the peers with: pip install 'refllm[peers]' (see docs/benchmarks.md)"
            )
    return list(dict.fromkeys(asked))


def missing_packages(name: str) -> list[str]:
    """Packages of a peer that are not installed. Nothing is imported."""
    entry = PEERS[name]
    return [package for package, module in zip(entry.packages, entry.modules, strict=True) if find_spec(module) is None]


def open_peer(name: str, threads: int) -> Peer:
    """Import a peer and set its threads."""
    module, _, cls = PEERS[name].adapter.rpartition(".")
    try:
        return getattr(import_module(f"{__name__}.{module}"), cls)(threads)
    except (ImportError, OSError, PackageNotFoundError) as error:
        raise ValueError(f"peer {name} is installed but cannot be loaded: {error}") from error
