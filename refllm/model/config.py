"""ModelConfig: everything the forward pass must know, nothing defaulted silently.

The fields are the union of what Llama 1-3, SmolLM2, Mistral, Qwen2, Qwen3, Gemma 3, DeepSeek-V2 and V3 need; an
architecture is a set of values, not a subclass. Branches that are built otherwise than a Llama's bring a dataclass of
their own: `Latent`, `Factored`, `LowRankKV`, `Experts`. `formats` hands over raw dictionaries, `model/load.py` turns
them into this.
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
class Latent:
    """Multi-head latent attention (`refllm.model.mla`): keys and values of all heads come from one latent."""

    q_rank: int | None  # width of the queries' own latent; None: queries straight from the hidden state
    kv_rank: int  # width of the latent that is cached
    nope_dim: int  # of a head's key, without positions; comes out of the latent
    rope_dim: int  # of the key that carries the position, one for all heads
    value_dim: int
    interleaved: bool = True  # the layout of the pairs that turn together
    norm_eps: float = 1e-6  # of the norms of both latents

    def __post_init__(self):
        own = () if self.q_rank is None else ("q_rank",)
        _check_counts(self, "kv_rank", "nope_dim", "rope_dim", "value_dim", *own)
        if self.rope_dim % 2:
            raise ValueError(f"rope_dim must be even for the rotary embedding, got {self.rope_dim}")


@dataclass(frozen=True)
class Factored:
    """Multi-matrix factorization attention (`refllm.model.mfa`): one wide key-value head, factored queries."""

    query_rank: int  # what all query heads share before their own matrices
    query_norm: bool = False  # an RMSNorm over it
    reuse_keys: bool = False  # values are made from keys, which alone are cached (MFA-KR)

    def __post_init__(self):
        _check_counts(self, "query_rank")


@dataclass(frozen=True)
class LowRankKV:
    """Keys and values as latents of low rank (`refllm.model.palu`), one for each group of key-value heads."""

    groups: int
    key_ranks: tuple[int, ...]  # of one group, layer by layer
    value_ranks: tuple[int, ...]

    def __post_init__(self):
        _check_counts(self, "groups")
        for rank in (*self.key_ranks, *self.value_ranks):
            if type(rank) is not int or rank <= 0:
                raise ValueError(f"ranks of keys and values must be positive integers, got {rank!r}")


@dataclass(frozen=True)
class Experts:
    """A mixture of experts (`refllm.model.moe`) in place of the feed-forward branch, from `first_layer` on."""

    count: int
    active: int  # chosen for each token
    intermediate_size: int  # of one expert
    shared: int = 0  # experts that every token meets, stored as one of `shared` times the width
    first_layer: int = 0  # layers before it have a plain feed-forward branch
    groups: int = 1  # of neighbouring experts
    active_groups: int = 1  # groups that a token may choose from
    scoring: str = "sigmoid"  # with a bias that only steers the choice (V3), or softmax (V2)
    normalised: bool = True  # the weights of the chosen ones add up to `scaling`
    scaling: float = 1.0

    def __post_init__(self):
        _check_counts(self, "count", "active", "intermediate_size", "groups", "active_groups")
        if self.scoring not in ("sigmoid", "softmax"):
            raise ValueError(f"experts are scored by sigmoid or softmax, got {self.scoring!r}")
        if self.count % self.groups or self.active_groups > self.groups:
            raise ValueError(
                f"{self.count} experts in {self.groups} groups of which {self.active_groups} are chosen: groups must "
                "be of one size, and not fewer than are chosen"
            )
        if self.scoring == "sigmoid" and self.count // self.groups < 2:
            raise ValueError(f"a group is scored by its two best experts, got {self.count} experts in {self.groups}")
        if self.active > self.count // self.groups * self.active_groups:
            raise ValueError(
                f"{self.active} experts a token cannot be chosen from {self.active_groups} groups of "
                f"{self.count // self.groups}"
            )
        if self.shared < 0 or self.first_layer < 0 or not self.scaling > 0:
            given = f"{self.shared}, {self.first_layer}, {self.scaling}"
            raise ValueError(f"experts need shared >= 0, first_layer >= 0 and scaling > 0, got {given}")


def _check_counts(config, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if type(value) is not int or value <= 0:  # bool is an int, too
            raise ValueError(f"config {name} must be a positive integer, got {value!r}")


@dataclass(frozen=True)
class ModelConfig:
    """One decoder-only transformer.

    In the letters of docs/shapes.md: V = vocab_size, d = hidden_size, H = num_heads, Hk = num_kv_heads, D = head_dim.
    """

    architecture: str  # llama, mistral, qwen2, qwen3, gemma3, deepseek_v2, deepseek_v3
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
    latent: Latent | None = None  # head_dim is then that of a query, num_kv_heads 1: the latent has no heads
    experts: Experts | None = None
    factored: Factored | None = None
    low_rank_kv: LowRankKV | None = None

    def __post_init__(self):
        _check_counts(self, *_COUNTS)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        if self.head_dim % 2 and self.latent is None:
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
        if self.latent is not None:
            parts = self.latent.nope_dim + self.latent.rope_dim
            if self.head_dim != parts or self.num_kv_heads != 1:
                raise ValueError(
                    f"latent attention has one key-value head and head_dim = nope_dim + rope_dim = {parts}, got "
                    f"{self.num_kv_heads} and {self.head_dim}"
                )
        if self.factored is not None and (self.num_kv_heads != 1 or self.qk_norm):
            raise ValueError(f"factored attention has one key-value head and norms no keys, got {self.num_kv_heads}")
        if (low := self.low_rank_kv) is not None:
            if self.num_kv_heads % low.groups:
                raise ValueError(f"{self.num_kv_heads} key-value heads do not form {low.groups} groups of one size")
            if not len(low.key_ranks) == len(low.value_ranks) == self.num_layers:
                given = f"{len(low.key_ranks)} and {len(low.value_ranks)}"
                raise ValueError(
                    f"ranks of keys and values are given for {given} layers, the model has {self.num_layers}"
                )
        if sum(part is not None for part in (self.latent, self.factored, self.low_rank_kv)) > 1:
            raise ValueError("latent, factored and low_rank_kv attention exclude each other")
        if not self.norm_eps >= 0:
            raise ValueError(f"config norm_eps must not be negative, got {self.norm_eps!r}")

    @property
    def special(self) -> str | None:
        """What its layers have in place of the seven linears of a Llama layer; None: nothing."""
        parts = {
            "latent attention": self.latent,
            "factored attention": self.factored,
            "low-rank keys and values": self.low_rank_kv,
            "experts": self.experts,
        }
        return " and ".join(name for name, part in parts.items() if part is not None) or None

    def has_experts(self, layer: int) -> bool:
        """Whether the feed-forward branch of this layer is a mixture of experts."""
        return self.experts is not None and layer >= self.experts.first_layer

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
