"""PyTorch's ways to multiply by a matrix on a CPU: dynamic int8, packed int4, float32."""

import warnings
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from refllm.evaluate.bench.peers import Peer
from refllm.evaluate.bench.peers.onnxruntime import BLOCK, block_codes
from refllm.evaluate.bench.products import Product, Task, code_bits


class Torch(Peer):
    """torch.

    Parameters
    ----------
    threads : int
    """

    name = "torch"

    def __init__(self, threads: int):
        super().__init__(threads)
        import torch

        torch.set_num_threads(threads)
        self.api = torch

    def products(self, types: Sequence[str]) -> list[Callable[[Task], Product]]:
        """int8 always (whoever has int4 weights may run them as int8), int4 beside 4-bit types, float32 always."""
        ways = [self._int8, self._int4, self._float32]
        bits = {code_bits(name) for name in types}
        return [partial(self._product, build=way) for way in ways if way != self._int4 or 4 in bits]

    def _product(self, task: Task, build: Callable) -> Product:
        """Builders return the type, the detail, bytes of a weight, fresh() -> weight, multiply(weight), expected."""
        type_name, detail, nbytes, fresh, multiply, expected = build(task)
        weights, found = [fresh() for _ in range(task.copies(nbytes))], {}

        def run():
            with self.api.inference_mode():
                for i, weight in enumerate(weights):
                    y = multiply(weight)
                    if i == 0:
                        found["y"] = y

        output = lambda: found["y"].float().numpy()
        return Product(self.name, type_name, detail, nbytes, len(weights), run, output, expected)

    def _float32(self, task: Task):
        torch = self.api
        W, x = torch.from_numpy(task.W), torch.from_numpy(task.x)
        multiply = lambda weight: torch.nn.functional.linear(x, weight)
        return "float32", "", task.W.nbytes, W.clone, multiply, task.x @ task.W.T

    def _int8(self, task: Task):
        """What torch.ao.quantization.quantize_dynamic makes of a linear: a scale a row, activations rounded at once."""
        torch = self.api
        scale = np.abs(task.W).max(axis=1) / np.float32(127)
        zero = torch.zeros(len(scale), dtype=torch.long)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated in favour of torchao, which has no faster int8 linear here
            W = torch.quantize_per_channel(
                torch.from_numpy(task.W), torch.from_numpy(scale).double(), zero, 0, torch.qint8
            )
        x = torch.from_numpy(task.x)
        fresh = lambda: torch.ops.quantized.linear_prepack(W, None)
        # Activations of 7 bits, as there: with 8, on a processor without VNNI, sums of two products are cut off.
        multiply = lambda weight: torch.ops.quantized.linear_dynamic(x, weight, True)
        expected = task.x @ W.dequantize().numpy().T
        return "int8", "int8", task.W.size + scale.nbytes, fresh, multiply, expected

    def _int4(self, task: Task):
        """torch.ops.aten._weight_int4pack_mm_for_cpu: groups of 32, scales and activations in bfloat16."""
        torch = self.api
        codes, scale = block_codes(task.W, 4)
        both = np.stack([scale.T, np.zeros_like(scale.T)], axis=-1)  # scale and zero: (groups, out, 2)
        factors = torch.from_numpy(both).bfloat16().contiguous()
        codes_t, x = torch.from_numpy(codes.astype(np.int32)), torch.from_numpy(task.x).bfloat16()
        fresh = lambda: (torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_t, 1), factors.clone())
        multiply = lambda weight: torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight[0], BLOCK, weight[1])
        dense = (codes.astype(np.float32) - 8) * np.repeat(factors[..., 0].float().numpy().T, BLOCK, axis=1)
        return "int4", "bfloat16", codes.size // 2 + 2 * factors.numel(), fresh, multiply, task.x @ dense.T
