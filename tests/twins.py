"""Slow independent twins: the same mathematics in loops and float64, written from the papers, for tests to judge by.

Nothing here imports the code under test, and the shapes of the computation differ on purpose: one token, one head, one
pair at a time; rotations are products of complex numbers.
"""

import cmath
import math

import numpy as np


def slow_attend(q, k, v, q_positions, k_positions, *, scale, window=None, softcap=None):
    """softmax(scale q k^T) v of one sequence, key by key. q (H, T, D), k (Hk, S, D), v (Hk, S, Dv) -> (H, T, Dv)."""
    heads, tokens, _ = q.shape
    kv_heads, keys, _ = k.shape
    out = np.zeros((heads, tokens, v.shape[-1]))
    for h in range(heads):
        kv = h // (heads // kv_heads)
        for t in range(tokens):
            weights = {}
            for s in range(keys):
                distance = int(q_positions[t]) - int(k_positions[s])
                if distance < 0 or (window is not None and distance > window - 1):
                    continue
                score = scale * sum(float(a) * float(b) for a, b in zip(q[h, t], k[kv, s], strict=True))
                if softcap is not None:
                    score = softcap * math.tanh(score / softcap)
                weights[s] = score
            if weights:
                top = max(weights.values())
                weights = {s: math.exp(score - top) for s, score in weights.items()}
                total = sum(weights.values())
                for s, weight in weights.items():
                    out[h, t] += weight / total * v[kv, s]
    return out


def slow_logits(model, ids):
    """Logits (T, V) of one sequence in float64, token by token, from a model with dense weights."""
    config = model.config
    weights = {name: np.asarray(w, np.float64) for name, w in model.weights.items()}
    embedding = weights["model.embed_tokens.weight"]
    states = [embedding[i] * config.embedding_scale for i in ids]
    for layer in range(config.num_layers):
        states = _slow_block(config, weights, layer, states)
    out_matrix = embedding if config.tied_embeddings else weights["lm_head.weight"]
    logits = np.stack([out_matrix @ _norm(config, weights["model.norm.weight"], h) for h in states])
    if config.logit_softcap is not None:
        logits = config.logit_softcap * np.tanh(logits / config.logit_softcap)
    return logits


def _slow_block(config, weights, layer, states):
    get = lambda name: weights[f"model.layers.{layer}.{name}"]
    head_dim = config.head_dim
    slides = bool(config.sliding_layers) and config.sliding_layers[layer]
    rope = config.rope_local if slides and config.rope_local is not None else config.rope
    angles, stretch = _angles(rope, head_dim)

    def linear(name, x):
        bias = weights.get(f"model.layers.{layer}.{name}.bias", 0.0)
        return get(name + ".weight") @ x + bias

    def project(name, x, heads, position=None):
        """One vector per head, normed and turned where the architecture says so."""
        y = linear(f"self_attn.{name}_proj", x).reshape(heads, head_dim)
        if name == "v":
            return y
        if config.qk_norm:
            y = np.stack([_norm(config, get(f"self_attn.{name}_norm.weight"), head) for head in y])
        return np.stack([_turn(head, position, angles, stretch) for head in y])

    before = "pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm"
    normed = [_norm(config, get("input_layernorm.weight"), x) for x in states]
    q = np.stack([project("q", x, config.num_heads, p) for p, x in enumerate(normed)], axis=1)
    k = np.stack([project("k", x, config.num_kv_heads, p) for p, x in enumerate(normed)], axis=1)
    v = np.stack([project("v", x, config.num_kv_heads) for x in normed], axis=1)
    positions = range(len(states))
    scale = 1 / math.sqrt(head_dim) if config.attention_scale is None else config.attention_scale
    window = config.sliding_window if slides else None
    mixed = slow_attend(q, k, v, positions, positions, scale=scale, window=window, softcap=config.attention_softcap)
    result = []
    for t, x in enumerate(states):
        branch = linear("self_attn.o_proj", np.concatenate([mixed[h, t] for h in range(config.num_heads)]))
        if config.post_norms:
            branch = _norm(config, get("post_attention_layernorm.weight"), branch)
        x = x + branch
        h = _norm(config, get(before + ".weight"), x)
        gate, up = linear("mlp.gate_proj", h), linear("mlp.up_proj", h)
        gate = np.array([_silu(z) if config.activation == "silu" else _gelu(z) for z in gate])
        branch = linear("mlp.down_proj", gate * up)
        if config.post_norms:
            branch = _norm(config, get("post_feedforward_layernorm.weight"), branch)
        result.append(x + branch)
    return result


def _norm(config, gain, x):
    return x * (gain + config.norm_offset) / math.sqrt(sum(float(a) ** 2 for a in x) / len(x) + config.norm_eps)


def _silu(z):
    return z / (1 + math.exp(-z))


def _gelu(z):
    return 0.5 * z * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def _angles(rope, head_dim):
    """Radians per position of each pair, and what cos and sin are multiplied by."""
    result = []
    stretch = 1.0
    for i in range(head_dim // 2):
        angle = rope.theta ** (-2 * i / head_dim)
        if rope.freq_divisors is not None:
            angle /= rope.freq_divisors[i]
        elif rope.scaling == "linear":
            angle /= rope.factor
        elif rope.scaling == "llama3":
            wavelength = 2 * math.pi / angle
            if wavelength > rope.original_context / rope.low_freq_factor:
                angle /= rope.factor
            elif wavelength >= rope.original_context / rope.high_freq_factor:
                smooth = rope.original_context / wavelength - rope.low_freq_factor
                smooth /= rope.high_freq_factor - rope.low_freq_factor
                angle = (1 - smooth) * angle / rope.factor + smooth * angle
        elif rope.scaling == "yarn":
            bounds = [
                head_dim * math.log(rope.original_context / (2 * math.pi * turns)) / (2 * math.log(rope.theta))
                for turns in (rope.beta_fast, rope.beta_slow)
            ]
            low, high = max(math.floor(bounds[0]), 0), min(math.ceil(bounds[1]), head_dim - 1)
            if low == high:
                high += 0.001
            ramp = min(max((i - low) / (high - low), 0), 1)
            angle = angle / rope.factor * ramp + angle * (1 - ramp)
            stretch = 0.1 * math.log(rope.factor) + 1 if rope.attention_factor is None else rope.attention_factor
        result.append(angle)
    return result, stretch


def _turn(x, position, angles, stretch):
    """Half-split pairs as complex numbers x_i + j x_{i+D/2}, turned by position * angle_i."""
    half = len(x) // 2
    turned = [complex(x[i], x[i + half]) * cmath.rect(stretch, position * angles[i]) for i in range(half)]
    return np.array([z.real for z in turned] + [z.imag for z in turned])
