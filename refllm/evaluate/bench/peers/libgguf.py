"""libgguf: ggml's encoders of GGUF blocks as a package of their own."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from refllm.evaluate.bench.peers import Peer
from refllm.formats.blocks import BLOCKS


class LibGguf(Peer):
    """libgguf.

    Parameters
    ----------
    threads : int
    """

    name = "libgguf"

    def __init__(self, threads: int):
        super().__init__(threads)
        import libgguf

        self.api = libgguf

    def encoder(self, type_name: str) -> Callable[[np.ndarray], np.ndarray] | None:
        """libgguf.quantize_rows on slices of rows, one a thread."""
        type_id = BLOCKS[type_name].type_id if type_name in BLOCKS else None
        if type_id not in self.api._SUPPORTED_QUANTIZED_QTYPES or self.api.quantize_requires_imatrix(type_id):
            return None

        def encode(W: np.ndarray) -> np.ndarray:
            with ThreadPoolExecutor(self.threads) as pool:
                parts = pool.map(lambda rows: self.api.quantize_rows(rows, type_id), np.array_split(W, self.threads))
            return np.concatenate([np.asarray(part, np.uint8) for part in parts])

        return encode
