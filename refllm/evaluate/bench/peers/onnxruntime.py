"""ONNX Runtime's MatMulNBits: codes in blocks of 32 with one scale each.

Every copy of the weight has other values (its rows turned round by one): ONNX Runtime merges initialisers that are
equal, and would meet the copy in its cache.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from refllm.evaluate.bench.peers import Peer
from refllm.evaluate.bench.products import Product, Task, code_bits

BLOCK = 32
ACCURACY = {"int8": 4, "float32": 0}  # accuracy_level: activations rounded to 8 bits, or kept


class OnnxRuntime(Peer):
    """onnxruntime.

    Parameters
    ----------
    threads : int
    """

    name = "onnxruntime"

    def __init__(self, threads: int):
        super().__init__(threads)
        import onnx
        import onnxruntime

        self.onnx, self.api = onnx, onnxruntime

    def products(self, types: Sequence[str]) -> list[Callable[[Task], Product]]:
        """4 bits and 8 bits with int8 activations, 4 bits with float32 ones, as far as the types have them."""
        bits = {code_bits(name) for name in types}
        ways = [(4, "int8"), (4, "float32"), (8, "int8")]
        return [partial(self._product, bits=b, activations=a) for b, a in ways if b in bits]

    def _product(self, task: Task, bits: int, activations: str) -> Product:
        codes, scale = block_codes(task.W, bits)
        nbytes = codes.size * bits // 8 + scale.nbytes
        copies = task.copies(nbytes)
        session = self._session(codes, scale, bits, activations, copies)
        found = {}

        def run():
            found["y"] = session.run(None, {"x": task.x})[0]

        dense = (codes.astype(np.float32) - 2 ** (bits - 1)) * np.repeat(scale, BLOCK, axis=1)
        return Product(self.name, f"int{bits}", activations, nbytes, copies, run, lambda: found["y"], task.x @ dense.T)

    def _session(self, codes: np.ndarray, scale: np.ndarray, bits: int, activations: str, copies: int):
        helper, array = self.onnx.helper, self.onnx.numpy_helper.from_array
        rows, columns = codes.shape
        stored = codes[:, 0::2] | codes[:, 1::2] << 4 if bits == 4 else codes
        stored = stored.reshape(rows, columns // BLOCK, BLOCK * bits // 8)
        sizes = {"K": columns, "N": rows, "bits": bits, "block_size": BLOCK, "accuracy_level": ACCURACY[activations]}
        nodes, weights, outputs = [], [], []
        for i in range(copies):
            weights += [array(np.roll(stored, i, axis=0), f"w{i}"), array(np.roll(scale, i, axis=0), f"s{i}")]
            nodes.append(
                helper.make_node("MatMulNBits", ["x", f"w{i}", f"s{i}"], [f"y{i}"], domain="com.microsoft", **sizes)
            )
            outputs.append(helper.make_tensor_value_info(f"y{i}", self.onnx.TensorProto.FLOAT, ["tokens", rows]))
        x = helper.make_tensor_value_info("x", self.onnx.TensorProto.FLOAT, ["tokens", columns])
        graph = helper.make_graph(nodes, "products", [x], outputs, weights)
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
        options = self.api.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        options.log_severity_level = 3
        return self.api.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def block_codes(W: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Round to the nearest in blocks of 32 columns: codes with the offset 2^(bits-1) in them, and scales.

    Parameters
    ----------
    W : (out, in) float32
        in is a multiple of 32.

    Returns
    -------
    codes : (out, in) uint8
    scale : (out, in / 32) float32
    """
    blocks = W.reshape(len(W), -1, BLOCK)
    scale = np.abs(blocks).max(axis=-1) / np.float32(2 ** (bits - 1) - 1)
    codes = np.rint(blocks / np.where(scale == 0, 1, scale)[..., None]) + 2 ** (bits - 1)
    return codes.astype(np.uint8).reshape(W.shape), scale
