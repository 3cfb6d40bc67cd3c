"""ggml's own products, through the shared libraries that llama-cpp-python ships.

What llama.cpp does when it loads a model is done here with single matrices: the weight goes into the first buffer type
of the CPU that takes it, and those that repack (interleave rows for the processor's vector registers) come first. A
turn is one graph of products, as a decode step is.
"""

import ctypes
import sys
from ctypes import CFUNCTYPE, POINTER, Structure, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import numpy as np

F32, TYPES = 0, 43  # enum ggml_type; ggml looks a larger number up behind the end of its table
CPU_DEVICE = 0  # enum ggml_backend_dev_type
LIBRARIES = ("ggml-base", "ggml-cpu", "ggml")


class _InitParams(Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


# name: (result, arguments)
_FUNCTIONS = {
    "ggml_init": (c_void_p, [_InitParams]),
    "ggml_free": (None, [c_void_p]),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_mul_mat": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_new_graph_custom": (c_void_p, [c_void_p, c_size_t, c_bool]),
    "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
    "ggml_tensor_overhead": (c_size_t, []),
    "ggml_graph_overhead_custom": (c_size_t, [c_size_t, c_bool]),
    "ggml_type_name": (c_char_p, [c_int]),
    "ggml_nbytes": (c_size_t, [c_void_p]),
    "ggml_quantize_chunk": (c_size_t, [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, POINTER(c_float)]),
    "ggml_quantize_requires_imatrix": (c_bool, [c_int]),
    "ggml_version": (c_char_p, []),
    "ggml_backend_dev_by_type": (c_void_p, [c_int]),
    "ggml_backend_dev_init": (c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_dev_backend_reg": (c_void_p, [c_void_p]),
    "ggml_backend_dev_buffer_type": (c_void_p, [c_void_p]),
    "ggml_backend_dev_supports_op": (c_bool, [c_void_p, c_void_p]),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_buft_name": (c_char_p, [c_void_p]),
    "ggml_backend_buffer_free": (None, [c_void_p]),
    "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_tensor_get": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_graph_compute": (c_int, [c_void_p, c_void_p]),
    "ggml_backend_free": (None, [c_void_p]),
}  # fmt: skip


class Ggml:
    """The functions of ggml that are needed.

    Parameters
    ----------
    libllama : ctypes.CDLL
        llama-cpp-python's. Its own ggml is asked for, by way of its dependencies: the package holds each library under
        several names, and opening one of them by path may load a second ggml with a state of its own.
    folder : path
        Where the libraries lie; Windows does not look a function up in dependencies, but knows libraries by name.
    """

    def __init__(self, libllama: ctypes.CDLL, folder: Path):
        names = LIBRARIES if sys.platform == "win32" else ()
        self._libraries = [libllama, *(ctypes.CDLL(str(_library(Path(folder), name))) for name in names)]
        for name, (result, arguments) in _FUNCTIONS.items():
            setattr(self, name.removeprefix("ggml_"), self._function(name, result, arguments))
        self.device = self.backend_dev_by_type(CPU_DEVICE)

    def _function(self, name: str, result, arguments: list):
        for library in self._libraries:
            function = getattr(library, name, None)
            if function is not None:
                function.restype, function.argtypes = result, arguments
                return function
        raise OSError(f"ggml has no function {name}: refllm knows the one of llama-cpp-python 0.3.36")

    def of_device(self, name: str, prototype):
        """An optional function of the CPU's backend; None where it has none of this name."""
        address = self.backend_reg_get_proc_address(self.backend_dev_backend_reg(self.device), name.encode())
        return prototype(address) if address else None

    def buffer_types(self) -> list[int]:
        """Buffer types of the CPU in the order in which llama.cpp tries them: those that repack, then the plain one."""
        extra = self.of_device("ggml_backend_dev_get_extra_bufts", CFUNCTYPE(POINTER(c_void_p), c_void_p))
        found, array = [], extra(self.device) if extra is not None else None
        while array and array[len(found)]:
            found.append(array[len(found)])
        return [*found, self.backend_dev_buffer_type(self.device)]

    def knows(self, type_id: int, name: str) -> bool:
        """Whether this ggml has the type under the number that refllm gives it."""
        return type_id < TYPES and (self.type_name(type_id) or b"").decode().lower() == name.lower()

    def context(self, tensors: int, graph: int = 0) -> int:
        """A context for the descriptions of so many tensors, without their data, and of a graph."""
        size = (tensors + 1) * self.tensor_overhead()
        return self.init(_InitParams(size + (self.graph_overhead_custom(graph, False) if graph else 0), None, True))


def _library(folder: Path, name: str) -> Path:
    names = [f"{prefix}{name}.dll" for prefix in ("", "lib")]
    for file in names:
        if (folder / file).is_file():
            return folder / file
    raise OSError(f"{folder} holds none of {', '.join(names)}: llama-cpp-python must be built with shared libraries")


class Products:
    """y_i = x W_i^T for several stored matrices, as one graph.

    Parameters
    ----------
    ggml : Ggml
    type_id : int
        enum ggml_type of the weights; the number GGUF uses, too.
    weights : list of (out, row_bytes) uint8
        GGUF blocks, all of one shape.
    x : (tokens, in) float32
    threads : int

    Attributes
    ----------
    layout : str
        Name of the buffer type that holds the weights: CPU_REPACK, CPU ...
    """

    def __init__(self, ggml: Ggml, type_id: int, weights: list[np.ndarray], x: np.ndarray, threads: int):
        self._ggml, self._rows, self._tokens = ggml, len(weights[0]), len(x)
        self._contexts, self._buffers, self._backend = [], [], ggml.backend_dev_init(ggml.device, None)
        ggml.of_device("ggml_backend_set_n_threads", CFUNCTYPE(None, c_void_p, c_int))(self._backend, threads)
        shape = x.shape[1], self._rows
        place = _first_that_takes(ggml, type_id, shape)
        self.layout = ggml.backend_buft_name(place).decode()
        tensors = self._weights(place, type_id, shape, weights)
        self._graph, inputs, self._outputs = self._products(tensors, x.shape)
        self._set(inputs, np.ascontiguousarray(x, np.float32))

    def _weights(self, place: int, type_id: int, shape: tuple[int, int], weights: list[np.ndarray]) -> list[int]:
        context = self._context(len(weights))
        tensors = [self._ggml.new_tensor_2d(context, type_id, *shape) for _ in weights]
        self._allocate(context, place)
        for tensor, weight in zip(tensors, weights, strict=True):
            self._set(tensor, np.ascontiguousarray(weight))  # here ggml repacks
        return tensors

    def _products(self, weights: list[int], shape: tuple[int, int]):
        ggml = self._ggml
        context = self._context(len(weights) + 1, graph=len(weights) + 8)
        inputs = ggml.new_tensor_2d(context, F32, shape[1], shape[0])
        outputs = [ggml.mul_mat(context, weight, inputs) for weight in weights]
        self._allocate(context, ggml.backend_dev_buffer_type(ggml.device))
        graph = ggml.new_graph_custom(context, len(weights) + 8, False)
        for output in outputs:
            ggml.build_forward_expand(graph, output)
        return graph, inputs, outputs

    def _context(self, tensors: int, graph: int = 0) -> int:
        self._contexts.append(self._ggml.context(tensors, graph))
        return self._contexts[-1]

    def _allocate(self, context: int, place: int) -> None:
        buffer = self._ggml.backend_alloc_ctx_tensors_from_buft(context, place)
        if not buffer:
            raise MemoryError("ggml could not allocate its tensors")
        self._buffers.append(buffer)

    def _set(self, tensor: int, array: np.ndarray) -> None:
        if self._ggml.nbytes(tensor) != array.nbytes:
            raise ValueError(f"ggml expects {self._ggml.nbytes(tensor)} bytes, got {array.nbytes}")
        self._ggml.backend_tensor_set(tensor, array.ctypes.data, 0, array.nbytes)

    def run(self) -> None:
        """Compute all products."""
        status = self._ggml.backend_graph_compute(self._backend, self._graph)
        if status:
            raise RuntimeError(f"ggml could not compute the graph (status {status})")

    def output(self, index: int = 0) -> np.ndarray:
        """The product with one of the weights, (tokens, out) float32, as the last run left it."""
        y = np.empty((self._tokens, self._rows), np.float32)
        self._ggml.backend_tensor_get(self._outputs[index], y.ctypes.data, 0, y.nbytes)
        return y

    def close(self) -> None:
        """Give the memory back."""
        for buffer in self._buffers:
            self._ggml.backend_buffer_free(buffer)
        for context in self._contexts:
            self._ggml.free(context)
        if self._backend:
            self._ggml.backend_free(self._backend)
        self._buffers, self._contexts, self._backend = [], [], None

    def __del__(self):
        if getattr(self, "_contexts", None):
            self.close()


def _first_that_takes(ggml: Ggml, type_id: int, shape: tuple[int, int]) -> int:
    """The buffer type in which llama.cpp would keep a weight of this type and shape: the first that can multiply it."""
    for place in ggml.buffer_types():
        context = ggml.context(3)
        weight = ggml.new_tensor_2d(context, type_id, *shape)
        buffer = ggml.backend_alloc_ctx_tensors_from_buft(context, place)  # from here on it is known where it lies
        product = ggml.mul_mat(context, weight, ggml.new_tensor_2d(context, F32, shape[0], 512))
        takes = bool(buffer) and ggml.backend_dev_supports_op(ggml.device, product)
        if buffer:
            ggml.backend_buffer_free(buffer)
        ggml.free(context)
        if takes:
            return place
    raise ValueError(f"ggml cannot multiply weights of {shape[1]} rows and {shape[0]} columns of this type on this CPU")
