"""llama.cpp, in this process, through llama-cpp-python's low-level functions and the ggml libraries it ships."""

import ctypes
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

import numpy as np

from refllm.evaluate.bench.peers import Peer
from refllm.evaluate.bench.peers.ggml import Ggml, Products
from refllm.evaluate.bench.products import Product, Task
from refllm.formats.blocks import BLOCKS


@cache
def _library():
    """The module, and the callback that swallows its log: kept as long as the process lives, C has a pointer to it."""
    import llama_cpp

    silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silence, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp, silence


class LlamaCpp(Peer):
    """llama.cpp.

    Parameters
    ----------
    threads : int
    """

    name = "llama.cpp"

    def __init__(self, threads: int):
        super().__init__(threads)
        self.api, _ = _library()
        self.ggml = Ggml(self.api.llama_cpp._lib, Path(self.api.__file__).parent / "lib")

    def products(self, types: Sequence[str]) -> list[Callable[[Task], Product]]:
        """ggml's product with the very blocks that refllm multiplies, repacked where llama.cpp would."""
        return [partial(self._product, type_name=name) for name in types if self._knows(name)]

    def _knows(self, type_name: str) -> bool:
        return type_name in BLOCKS and self.ggml.knows(BLOCKS[type_name].type_id, type_name)

    def _product(self, task: Task, type_name: str) -> Product:
        weight = task.stored(type_name)
        copies = task.copies(weight.nbytes)
        products = Products(self.ggml, BLOCKS[type_name].type_id, [weight.data] * copies, task.x, task.threads)
        detail = "repacked" if "REPACK" in products.layout else "" if products.layout == "CPU" else products.layout
        return Product(
            self.name,
            type_name,
            detail,
            weight.nbytes,
            copies,
            products.run,
            products.output,
            task.x @ weight.dense().T,
        )

    def open_model(self, path, context: int) -> "LlamaModel":
        """A GGUF file, mapped into memory as llama.cpp does by default, all on the CPU."""
        return LlamaModel(self.api, path, self.threads, context)

    def file_type(self, name: str) -> int:
        """llama.cpp's number of a mixture of types: Q4_0, Q4_K_M ..."""
        prefix = "LLAMA_FTYPE_MOSTLY_"
        if not hasattr(self.api, prefix + name):
            known = sorted(field.removeprefix(prefix) for field in dir(self.api) if field.startswith(prefix))
            raise ValueError(f"llama.cpp knows no file type {name!r}; known: {', '.join(known)}")
        return getattr(self.api, prefix + name)

    def quantize_file(self, source: Path, target: Path, file_type: int) -> None:
        """llama-quantize --allow-requantize; the target appears when it is complete."""
        setting = self.api.llama_model_quantize_default_params()
        setting.ftype, setting.nthread, setting.allow_requantize = file_type, self.threads, True
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            status = self.api.llama_model_quantize(str(source).encode(), str(temporary).encode(), ctypes.byref(setting))
            if status:
                raise ValueError(f"llama.cpp could not quantise {source} (status {status})")
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)

    def encoder(self, type_name: str) -> Callable[[np.ndarray], np.ndarray] | None:
        """ggml_quantize_chunk on slices of rows, one a thread, as llama-quantize calls it."""
        if not self._knows(type_name) or self.ggml.quantize_requires_imatrix(BLOCKS[type_name].type_id):
            return None
        form = BLOCKS[type_name]

        def encode(W: np.ndarray) -> np.ndarray:
            W = np.ascontiguousarray(W, np.float32)
            rows, columns = W.shape
            out = np.empty((rows, columns // form.block_size * form.bytes_per_block), np.uint8)
            bounds = [rows * i // self.threads for i in range(self.threads + 1)]

            def part(first, last):
                self.ggml.quantize_chunk(
                    form.type_id, W.ctypes.data, out.ctypes.data, first * columns, last - first, columns, None
                )

            with ThreadPoolExecutor(self.threads) as pool:
                list(pool.map(part, bounds[:-1], bounds[1:]))
            return out

        return encode


class LlamaModel:
    """An open model: the interface of `refllm.evaluate.bench.models`."""

    program, detail = "llama.cpp", ""

    def __init__(self, api, path, threads: int, context: int):
        self.api = api
        model = api.llama_model_default_params()
        model.n_gpu_layers = 0
        model.load_mode = api.LLAMA_LOAD_MODE_MMAP
        self._model = api.llama_model_load_from_file(str(path).encode(), model)
        if not self._model:
            raise ValueError(f"llama.cpp cannot load {path}")
        setting = api.llama_context_default_params()
        setting.n_ctx, setting.n_batch, setting.n_ubatch = context, context, min(512, context)
        setting.n_threads = setting.n_threads_batch = threads
        setting.no_perf = True
        self._context = api.llama_init_from_model(self._model, setting)
        if not self._context:
            raise ValueError(f"llama.cpp cannot make a context of {context} tokens for {path}")
        self._vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))

    def start(self, ids: np.ndarray) -> None:
        """Forget everything and read these tokens; logits of the last."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self._context), True)
        self._decode(ids)

    def step(self, token: int) -> None:
        """Read one more token."""
        self._decode((token,))

    def _decode(self, ids) -> None:
        tokens = (self.api.llama_token * len(ids))(*(int(i) for i in ids))
        if self.api.llama_decode(self._context, self.api.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError("llama.cpp could not decode")
        self.api.llama_synchronize(self._context)

    def logits(self) -> np.ndarray:
        """Of the last token, (V,) float32."""
        pointer = self.api.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(pointer, (self._vocab_size,)).copy()

    def close(self) -> None:
        """Give the memory back."""
        self.api.llama_free(self._context)
        self.api.llama_model_free(self._model)
