"""The compiled forward pass: what the texts of kernels/packed need of a model, gathered once for each cache.

    decode_step   one token, layer after layer, to the logits
    prefill       many tokens to the hidden states, which `llama.head` makes logits of

`compiled_for(model, cache)` gives both, or None where the readable forward pass has to do it: weights in float64 or
without a kernel, branches that are built otherwise than a Llama's, a method's own attention or cache, a batch,
REFLLM_KERNELS=numpy. Both give the same numbers up to the rounding of float32 sums. With rounded activations these sums
are taken in the same steps and all others in float64, so both give the same bits but where a float64 sum in another
order rounds to another float32.
"""

import numpy as np

from refllm.formats.files import forget_pages
from refllm.kernels.packed import ACTIVATIONS, BITS, as_run, backend, has_codes, rows
from refllm.kernels.packed.base import is_record
from refllm.kernels.packed.inputs import StaticInputs
from refllm.kernels.packed.quantized import GGUFBlocks, IntWeight
from refllm.kernels.packed.rotated import Rotated
from refllm.kernels.packed.sparse import LowRank, Sum
from refllm.kernels.packed.threads import MINIMUM_WORK, thread_count
from refllm.kernels.rope import cos_sin
from refllm.model.cache import KVCache
from refllm.model.compiled_caches import cache_kind
from refllm.model.model import Model

LINEARS = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
FIELDS = tuple(name.split(".")[1] for name in LINEARS)  # their names in a layer's record
TURNED = ("self_attn.o_proj.weight", "mlp.down_proj.weight")  # those whose inputs may be turned
EMBEDDING = "model.embed_tokens.weight"
AHEAD = 128  # positions whose rotations are computed at once
FORGET = 16  # tokens after which rows of the embedding are let go: with each, a system maps 64 KB of the file
CHUNK = 576  # tokens of a prompt at once: their activations take a few megabytes


def compiled_for(model: Model, cache: KVCache | None, tokens: int) -> "Compiled | None":
    """The compiled forward pass of a model through a cache, or None.

    Parameters
    ----------
    model : Model
    cache : KVCache or None
        Of one sequence; may have seen any number of tokens. None: many tokens get one that is forgotten afterwards.
    tokens : int
        How many are to come. Many need every part of every linear packed: for float32 ones BLAS is the faster way.
    """
    if model.config.special:
        return None
    if backend() != "numba" or model.runtime.attend is not None or (cache is None and tokens == 1):
        return None
    if model.runtime.activations not in ACTIVATIONS:
        return None
    if tokens > 1 and not all(is_record(part) for name in _linears(model) for part in _parts(model.weights[name])):
        return None
    if cache is None:
        cache = KVCache(model.config.num_layers, model.config.context_length)
        cache.batch = 1
    if cache.batch != 1:
        return None
    if cache.compiled is None or cache.compiled[0] is not model:
        cache.compiled = model, Compiled(model, cache) if _takes(model, cache) else None
    made = cache.compiled[1]
    return made if made is not None and made.stored.takes(tokens) else None


def _linears(model: Model) -> list[str]:
    """The names of all linears of all layers."""
    layers = range(model.config.num_layers)
    return [f"model.layers.{layer}.{name}_proj.weight" for layer in layers for name in LINEARS]


def _head(model: Model) -> str:
    """The name of the weight that makes logits."""
    return EMBEDDING if model.config.tied_embeddings else "lm_head.weight"


def _products(weight) -> tuple:
    """The products of a linear, as plan.LINEAR has them: main, other, before; None for those it does not have.

    Of a Rotated, what it holds: its inputs are turned before.
    """
    weight = weight.weight if isinstance(weight, Rotated) else weight
    main, other, before = weight, None, None
    if isinstance(weight, LowRank):
        main, other = None, weight
    elif isinstance(weight, Sum):
        main, other = weight.terms
        if isinstance(main, LowRank):
            main, other = other, main
    if isinstance(other, LowRank):
        other, before = other.factors
    return main, other, before


def _parts(weight) -> list:
    """The products that a linear has."""
    return [part for part in _products(weight) if part is not None]


def _rank(weight) -> int:
    """Numbers between the two products of a factored linear, 0 if it has none."""
    before = _products(weight)[2]
    return 0 if before is None else before.shape[0]


def _widths(config) -> dict[str, int]:
    """The columns of each buffer."""
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "x": config.hidden_size,
        "q": heads,
        "k": kv_heads,
        "v": kv_heads,
        "mixed": heads,
        "gate": config.intermediate_size,
        "up": config.intermediate_size,
        "branch": config.hidden_size,
    }


def _takes(model: Model, cache: KVCache) -> bool:
    """Whether every store and every weight has a place in the compiled texts."""
    from refllm.kernels.packed.tiled import form_of

    if cache_kind(cache) is None:
        return False
    most = max(_widths(model.config).values())
    for name, weight in model.weights.items():
        if name == EMBEDDING and not model.config.tied_embeddings:
            continue  # only rows of it are read
        if isinstance(weight, Rotated) and not name.endswith(TURNED):
            return False
        for part in _parts(weight):
            part, bits, _ = _inputs(part, model.runtime.activations)
            if not is_record(part):
                if part.dtype != np.float32:
                    return False
            elif (form := form_of(part)) is None or (bits and not form.has_integers):
                return False
        if _rank(weight) > most:  # beyond every width: there is no room for it
            return False
    return True


def _inputs(part, activations: str) -> tuple:
    """What a product multiplies, the bits of its inputs (0: floats), and their scale if it was found in calibration."""
    if isinstance(part, StaticInputs) and part.zero_point is None and isinstance(part.weight, IntWeight):
        if part.bits in BITS.values():
            return part.weight, part.bits, part.scale.item()
    part, activations = as_run(part, activations)
    rounded = activations in BITS and is_record(part) and has_codes(part)
    return part, BITS[activations] if rounded else 0, 0


class Compiled:
    """Addresses of everything a token meets, and the arrays they point into."""

    def __init__(self, model: Model, cache: KVCache):
        from refllm.kernels.packed.fast import decoder
        from refllm.kernels.packed.plan import HEAD
        from refllm.kernels.packed.team import new_meeting
        from refllm.kernels.packed.token_attention import MOST

        self.model, self.cache = model, cache
        config = model.config
        self._kept = []  # whatever an address points to
        self._work = sum(int(np.prod(model.weights[name].shape)) for name in _linears(model))
        self._most = _padded(max(_widths(config).values()))
        self._meeting = self._address(new_meeting())
        self._x, self._buffers = self._new_buffers(1)
        self._logits = np.zeros(_padded(config.vocab_size), np.float32)
        self._buffers["logits"] = self._address(self._logits)
        self._attention, self._attention_for = np.zeros(MOST + 1, np.int64), set()
        self._buffers["attend"] = self._attention.ctypes.data
        ropes = dict.fromkeys(config.layer_rope(layer) for layer in range(config.num_layers))
        self._ahead: dict = {}  # rope -> position of the first, and its table
        self._rotations = {rope: np.zeros((2, CHUNK, config.head_dim // 2), np.float32) for rope in ropes}
        self._layers = np.concatenate([self._layer(layer) for layer in range(config.num_layers)])
        self._head = np.zeros(1, HEAD)
        self._head["norm"], self._head["linear"] = self._gain("model.norm.weight"), self._linear(_head(model), 1)
        embedding = model.weights[EMBEDDING]
        self._decode_row = decoder(embedding) if is_record(embedding) else None
        self._many: tuple | None = None  # what prefill needs beside: tokens, x, buffers, layers
        self.stored = cache_kind(cache)(cache.stores, config)
        self._own = np.empty(0, np.uint8)
        gelu = int(config.activation == "gelu_tanh")
        self._sizes = (
            config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim, config.intermediate_size, gelu,
        )  # fmt: skip
        self._numbers = tuple(map(float, (config.norm_eps, config.score_scale, config.attention_softcap or 0)))

    def decode(self, token: int) -> np.ndarray:
        """Logits (V,) float32, before any soft-cap, of the token that follows what the cache has seen."""
        from refllm.kernels.packed import decode_step as text

        position = self.cache.length
        self._prepare(position, 1)
        self._make_attention(self._threads(1))
        self._embed(np.array([token]), self._x)
        arguments = self._sizes, self._numbers, self._layers, (self._head, self._buffers)
        each = text.own_bytes(self._most, self.model.config.head_dim, self.stored.room, self.stored.side)
        self._run(text.step_kernel(), arguments, each, (position,), 1)
        self._finish(position, 1)
        return self._logits[: self.model.config.vocab_size].copy()

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        """Hidden states (T, d) float32 of T tokens that follow what the cache has seen."""
        out = np.empty((len(ids), self.model.config.hidden_size), np.float32)
        for start in range(0, len(ids), CHUNK):
            out[start : start + CHUNK] = self._prefill_chunk(ids[start : start + CHUNK])
        return out

    def _prefill_chunk(self, ids: np.ndarray) -> np.ndarray:
        from refllm.kernels.packed import prefill as text
        from refllm.kernels.packed.laid_out import TOKENS

        config, position, tokens = self.model.config, self.cache.length, len(ids)
        if self._many is None or self._many[0] < tokens:
            self._many = self._make_many(-(-tokens // TOKENS) * TOKENS)
        _, x, buffers, layers = self._many
        self._prepare(position, tokens)
        for name in ("keys", "values", "room", "value_room"):
            layers[name] = self._layers[name]
        self._embed(ids, x)
        arguments = self._sizes, self._numbers, layers, buffers
        each = text.own_bytes(self._most, config.head_dim, config.num_heads // config.num_kv_heads)
        self._run(text.prefill_kernel(), arguments, each, (position, tokens), tokens)
        self._finish(position, tokens)
        return x[:tokens, : config.hidden_size]

    def _embed(self, ids: np.ndarray, x: np.ndarray) -> None:
        """Token vectors into the first columns of x."""
        hidden, embedding = x[: len(ids), : self.model.config.hidden_size], self.model.weights[EMBEDDING]
        if self._decode_row is not None and len(ids) == 1:
            self._decode_row(int(ids[0]), int(ids[0]) + 1, hidden)
        else:
            hidden[:] = rows(embedding, ids)
        if isinstance(embedding, GGUFBlocks) and (len(ids) > 1 or self.cache.length % FORGET == 0):
            forget_pages(embedding.data)
        if self.model.config.embedding_scale != 1:
            hidden *= np.float32(self.model.config.embedding_scale)

    def _make_attention(self, threads: int) -> None:
        """Kernels of attention for as many heads together as so many threads meet."""
        if threads in self._attention_for:
            return
        from refllm.kernels.packed.token_attention import needed

        heads = self.model.config.num_heads
        self.stored.kernels(self._attention, needed(heads, heads // self.model.config.num_kv_heads, threads))
        self._attention_for.add(threads)

    def _make_many(self, tokens: int) -> tuple:
        """Buffers for so many tokens, and the layers' records with the kernels for many."""
        from refllm.kernels.packed import prefill as text
        from refllm.kernels.packed.laid_out import TOKENS

        x, buffers = self._new_buffers(tokens)
        buffers["laid"] = self._address(np.empty(text.laid_bytes(self._most, tokens), np.uint8))
        names = _linears(self.model)
        most = max(_rank(self.model.weights[name]) for name in names)
        between = self._address(np.zeros((tokens, _padded(most)), np.float32))
        layers = self._layers.copy()
        for i, name in enumerate(names):
            layer, which = divmod(i, len(LINEARS))
            layers[FIELDS[which]][layer] = self._linear(name, TOKENS, between)
        return tokens, x, buffers, layers

    def _new_buffers(self, tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """X, and the addresses of all buffers: rows padded to blocks, as many as fill the panels of products."""
        from refllm.kernels.packed.laid_out import TOKENS, lay_out_address
        from refllm.kernels.packed.plan import BUFFERS

        buffers = np.zeros(1, BUFFERS)
        names = _linears(self.model) + ([_head(self.model)] if tokens == 1 else [])
        sums = [weight.shape[0] for name in names if isinstance(weight := self.model.weights[name], Sum)]
        widths = _widths(self.model.config) | {"extra": max(sums, default=0)}
        arrays = {name: np.zeros((tokens, _padded(width)), np.float32) for name, width in widths.items()}
        for name, array in arrays.items():
            buffers[name] = self._address(array)
        buffers["lay_out"] = lay_out_address(1 if tokens == 1 else TOKENS)
        buffers["meeting"] = self._meeting
        return arrays["x"], buffers

    def _prepare(self, position: int, tokens: int) -> None:
        """Rotations of the next tokens, and what the layers have to know of their stores."""
        for rope, rotation in self._rotations.items():
            rotation[:, :tokens] = self._angles(rope, position, tokens)
        self.stored.prepare(self._layers, position, tokens)

    def _angles(self, rope, position: int, tokens: int) -> np.ndarray:
        """cos and sin (2, tokens, head_dim / 2) of the next tokens, from a table of some more than were asked for."""
        first, table = self._ahead.get(rope, (0, np.empty((2, 0, 0))))
        if not first <= position <= position + tokens <= first + table.shape[1]:
            first, positions = position, np.arange(position, position + max(tokens, AHEAD))
            table = np.stack(cos_sin(rope, self.model.config.head_dim, positions, np.float32))
            self._ahead[rope] = first, table
        return table[:, position - first : position - first + tokens]

    def _threads(self, tokens: int) -> int:
        """As many as may be used, as long as each has enough to do."""
        return min(thread_count(), max(1, self._work * tokens // MINIMUM_WORK))

    def _run(self, kernel, arguments: tuple, each: int, rest: tuple, tokens: int) -> None:
        """The kernel on a team; every member gets `each` bytes of its own."""
        from refllm.kernels.packed.team import run_team

        threads = self._threads(tokens)
        if self._own.size < each * threads:
            self._own = np.empty(each * threads, np.uint8)
        own = self._own.ctypes.data
        run_team(lambda thread, threads: kernel(thread, threads, *arguments, own, each, *rest), threads)

    def _finish(self, position: int, tokens: int) -> None:
        """Count the new tokens."""
        self.stored.finish(position, tokens)
        self.cache.length = position + tokens

    def _layer(self, layer: int) -> np.ndarray:
        from refllm.kernels.packed.plan import LAYER

        config, prefix = self.model.config, f"model.layers.{layer}."
        gain = lambda name: self._gain(f"{prefix}{name}.weight")
        made = np.zeros(1, LAYER)
        for field, name in zip(FIELDS, LINEARS, strict=True):
            made[field] = self._linear(f"{prefix}{name}_proj.weight", 1)
        made["input_norm"] = gain("input_layernorm")
        if config.qk_norm:
            made["q_norm"], made["k_norm"] = gain("self_attn.q_norm"), gain("self_attn.k_norm")
        if config.post_norms:
            made["attention_norm"] = gain("post_attention_layernorm")
            made["mlp_norm"] = gain("pre_feedforward_layernorm")
            made["output_norm"] = gain("post_feedforward_layernorm")
        else:
            made["mlp_norm"] = gain("post_attention_layernorm")
        made["cos"], made["sin"] = (part.ctypes.data for part in self._rotations[config.layer_rope(layer)])
        made["window"] = config.window(layer) or 0
        return made

    def _gain(self, name: str) -> int:
        """Address of a norm's gain, its offset added."""
        gain = self.model.weights[name] + np.float32(self.model.config.norm_offset)
        return self._address(np.ascontiguousarray(gain, np.float32))

    def _linear(self, name: str, n: int, between: int = 0) -> np.ndarray:
        """The record of one linear, its kernels for n tokens. between : its address; 0: a row of its own, for one."""
        from refllm.kernels.packed.plan import LINEAR
        from refllm.kernels.packed.tiling import ROWS
        from refllm.kernels.packed.turn_kernels import turn_matrix

        weight, made = self.model.weights[name], np.zeros(1, LINEAR)
        for field, part in zip(("main", "other", "before"), _products(weight), strict=True):
            if part is not None:
                made[field] = self._product(part, n)
        if rank := _rank(weight):
            made["rank"], made["between"] = rank, between or self._address(np.zeros(_padded(rank), np.float32))
        made["tiles"] = tiles = -(-weight.shape[0] // ROWS)
        bias = self.model.weights.get(name.removesuffix("weight") + "bias")
        if bias is not None:
            made["bias"] = self._address(np.pad(bias, (0, tiles * ROWS - len(bias))))
        if isinstance(weight, Rotated):
            matrix = turn_matrix(weight.shape[1] // weight.inner)
            made["turn"], made["base"], made["inner"] = self._address(matrix), len(matrix), weight.inner
        return made

    def _product(self, weight, n: int) -> tuple[int, int, int, int]:
        """The numbers of one product: table, kernel (for n tokens), kind of activations, tiles."""
        from refllm.kernels.packed.decode_step import dense_address
        from refllm.kernels.packed.laid_out import FLOAT, laid_kind, rounded_kind
        from refllm.kernels.packed.reference import activation_block
        from refllm.kernels.packed.tile_kernels import product_address
        from refllm.kernels.packed.tiled import tiles_of
        from refllm.kernels.packed.tiling import ROWS

        weight, bits, scale = _inputs(weight, self.model.runtime.activations)
        tiles = -(-weight.shape[0] // ROWS)
        if not is_record(weight):
            weight = np.require(weight, np.float32, ["C", "A"])
            table = np.array([self._address(weight), *weight.shape, weight.strides[0]], np.int64)
            return self._address(table), dense_address(), FLOAT, tiles
        made, kind = tiles_of(weight), FLOAT
        if bits:
            kind = rounded_kind(activation_block(weight), bits)
        self._kept.append(made)
        kernel = product_address(made.form, kind, n, alone=self._threads(1) == 1)
        return self._address(made.table), kernel, laid_kind(made.form, kind, scale), tiles

    def _address(self, array: np.ndarray) -> int:
        """Where an array lies; it is kept as long as this step."""
        self._kept.append(array)
        return array.ctypes.data


def _padded(width: int) -> int:
    """A width as a multiple of 32: products write whole tiles and read whole blocks."""
    return -(-width // 32) * 32
