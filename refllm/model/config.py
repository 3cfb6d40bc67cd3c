"""ModelConfig: everything the forward pass must know, nothing defaulted silently.

The fields are the union of what Llama 1-3, SmolLM2, Mistral, Qwen2, Qwen3 and Gemma 3 need; an architecture is a set of
values, not a subclass. `formats` hands over raw dictionaries, `model/load.py` turns them into this.
"""

from dataclasses import dataclass, field

from refllm.kernels.rope import Rope

_COUNTS = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "intermediate_size",
    "context_length",
)


@dataclass(frozen=True)
class ModelConfig:
    """One decoder-only transformer.

    In the letters of docs/shapes.md: V = vocab_size, d = hidden_size, H = num_heads, Hk = num_kv_heads, D = head_dim.
    """

    architecture: str  # llama, mistral, qwen2, qwen3, gemma3
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    context_length: int  # positions the model was made for
    norm_eps: float
    rope: Rope
    tied_embeddings: bool
    activation: str = "silu"  # silu or gelu_tanh
    attention_bias: bool = False  # bias on q, k, v
    output_bias: bool = False  # bias on o
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over head_dim on q and k, before the rotation
    norm_offset: float = 0.0  # Gemma multiplies by (1 + w): 1.0
    post_norms: bool = False  # Gemma: a norm on each branch's output too
    embedding_scale: float = 1.0  # Gemma: sqrt(d)
    attention_scale: float | None = None  # None = head_dim ** -0.5
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] = field(default=())  # per layer; () = none slides
    rope_local: Rope | None = None  # of the sliding layers, where it differs (Gemma 3)
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        for name in _COUNTS:
            value = getattr(self, name)
            if type(value) is not int or value <= 0:  # bool is an int, too
                raise ValueError(f"config {name} must be a positive integer, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for the rotary embedding, got {self.head_dim}")
        if self.activation not in ("silu", "gelu_tanh"):
            raise ValueError(f"activation must be silu or gelu_tanh, got {self.activation!r}")
        if self.sliding_layers and len(self.sliding_layers) != self.num_layers:
            raise ValueError(f"sliding_layers names {len(self.sliding_layers)} layers, the model has {self.num_layers}")
        if any(self.sliding_layers) and self.sliding_window is None:
            raise ValueError("sliding_layers are set but sliding_window is not")
        if self.sliding_window is not None and not self.sliding_layers:
            raise ValueError("sliding_window is set but sliding_layers do not say which layers slide")
        for name in ("sliding_window", "attention_scale", "attention_softcap", "logit_softcap"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"config {name} must be positive or None, got {value!r}")
        if not self.norm_eps >= 0:
            raise ValueError(f"config norm_eps must not be negative, got {self.norm_eps!r}")

    @property
    def score_scale(self) -> float:
        """What attention scores are multiplied by: head_dim ** -0.5 unless the architecture says otherwise (Gemma)."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    def window(self, layer: int) -> int | None:
        """Keys a query of this layer sees, itself included; None = all before it."""
        return self.sliding_window if self.sliding_layers and self.sliding_layers[layer] else None

    def layer_rope(self, layer: int) -> Rope:
        """The rotary embedding of this layer."""
        return self.rope_local if self.rope_local is not None and self.window(layer) is not None else self.rope
