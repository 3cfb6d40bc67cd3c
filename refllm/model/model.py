"""Model: what `refllm.load` and `refllm.compress` return, and how it is to be run."""

from collections.abc import Callable
from dataclasses import dataclass, field

from refllm.kernels.packed.activations import Rounding
from refllm.model.config import ModelConfig


@dataclass(frozen=True)
class Runtime:
    """The run-time stages of a recipe; the defaults are the plain forward pass.

    Parameters
    ----------
    attend : callable, optional
        Same call as `refllm.kernels.attention.attend`.
    cache_policy : callable, optional
        `policy(layer) -> store`, see `refllm.model.cache`.
    activations : "float32", "int8", "int4" or Rounding
        How `refllm.kernels.packed.matmul` treats the activations of packed weights.
    generate : callable, optional
        Same call as `refllm.model.sample.generate_ids`: speculative decoding and its kin.
    """

    attend: Callable | None = None
    cache_policy: Callable | None = None
    activations: str | Rounding = "float32"
    generate: Callable | None = None


@dataclass(frozen=True)
class Model:
    """A decoder with its weights.

    Parameters
    ----------
    config : ModelConfig
    weights : dict
        Hugging Face names to [out, in] arrays or packed records (`refllm.kernels.packed.records`).
    tokenizer : refllm.formats.tokenizer.Tokenizer, optional
        None where the source carries none.
    name : str
        For tables and messages.
    runtime : Runtime
    recipe : str
        The recipe that made it; "" for an uncompressed model.
    tables : dict
        Arrays that run-time methods have learned of the model, METHOD.NAME: codebooks of a cache, say. They are stored
        with the model, and count as its bytes.
    """

    config: ModelConfig
    weights: dict
    tokenizer: object | None = None
    name: str = ""
    runtime: Runtime = field(default_factory=Runtime)
    recipe: str = ""
    tables: dict = field(default_factory=dict)
