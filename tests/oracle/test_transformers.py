"""The forward pass against transformers: tiny random models saved by save_pretrained, loaded by refllm, same logits.

float32, eager attention, weights of standard deviation 0.2 (the default 0.02 gives logits that hide errors), norm gains
and biases randomised too (their initial 1 and 0 hide offsets). transformers is no float64 oracle: it computes norms,
angles and softmax in float32 whatever the model's type. Run with `pytest -m oracle -s` to see the measured ratios.
"""

from importlib.util import find_spec

import numpy as np
import pytest

from refllm.kernels.rope import Rope
from refllm.model.cache import new_cache
from refllm.model.config import ModelConfig
from refllm.model.llama import forward
from refllm.model.load import densify, load
from refllm.model.model import Model
from refllm.model.sample import generate_ids

MISSING = [name for name in ("torch", "transformers") if find_spec(name) is None]
pytestmark = [
    pytest.mark.oracle,
    pytest.mark.skipif(bool(MISSING), reason=f"pip install '.[oracles]' brings what is missing: {', '.join(MISSING)}"),
    # Warnings of torch and transformers about themselves are not ours to mend.
    pytest.mark.filterwarnings("default"),
]

BOUND = 1e-4  # of the largest logit
TOKENS = 45

COMMON = dict(
    vocab_size=99,
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    intermediate_size=80,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    initializer_range=0.2,
    tie_word_embeddings=False,
)


IDS = np.random.default_rng(0).integers(0, COMMON["vocab_size"], (2, TOKENS))


def plain(theta):
    return {"rope_type": "default", "rope_theta": theta}


# Original contexts and factors are small so that every branch of a scaling lies inside D/2 pairs and 45 positions.
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
YARN = dict(rope_type="yarn", rope_theta=500.0, factor=4.0, original_max_position_embeddings=64, beta_fast=8.0)
GEMMA3 = dict(
    head_dim=20,
    query_pre_attn_scalar=24,
    sliding_window=6,
    layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    rope_parameters={
        "sliding_attention": plain(1e4),
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    },
    tie_word_embeddings=True,
    rms_norm_eps=1e-6,
)

# One dense layer, then experts; yarn as DeepSeek has it, cos and sin untouched and the scores scaled, and otherwise.
DEEPSEEK = dict(
    num_key_value_heads=6,
    kv_lora_rank=20,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=10,
    n_routed_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=24,
    first_k_dense_replace=1,
    n_group=4,
    topk_group=2,
)
V3 = DEEPSEEK | dict(
    q_lora_rank=28, n_shared_experts=2, routed_scaling_factor=2.5, rope_parameters=plain(1e4), num_mtp_layers=0
)
V2 = DEEPSEEK | dict(q_lora_rank=None, n_shared_experts=1, rope_parameters=plain(1e4))
MSCALE = YARN | dict(mscale=1.0, mscale_all_dim=1.0)

CASES = {
    "llama": ("llama", dict(rope_parameters=plain(1e4))),
    "llama-llama3": ("llama", dict(rope_parameters=LLAMA3)),
    "llama-linear": ("llama", dict(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0})),
    "llama-yarn": ("llama", dict(rope_parameters=YARN)),
    "llama-yarn-attention-factor": ("llama", dict(rope_parameters=YARN | {"attention_factor": 0.7})),
    "llama-biases": ("llama", dict(rope_parameters=plain(1e4), attention_bias=True, mlp_bias=True)),
    "llama-multi-query": ("llama", dict(rope_parameters=plain(1e4), num_key_value_heads=1)),
    "smollm2": ("llama", dict(rope_parameters=plain(1e5), tie_word_embeddings=True, num_key_value_heads=3)),
    "mistral": ("mistral", dict(rope_parameters=plain(1e4), sliding_window=7)),
    "mistral-full": ("mistral", dict(rope_parameters=plain(1e6), sliding_window=None)),
    "qwen2": ("qwen2", dict(rope_parameters=plain(1e6))),
    "qwen2-sliding": (
        "qwen2",
        dict(rope_parameters=plain(1e6), use_sliding_window=True, sliding_window=5, max_window_layers=1),
    ),
    "qwen3": ("qwen3", dict(rope_parameters=plain(1e6), head_dim=12, rms_norm_eps=1e-6)),
    "qwen3-yarn": ("qwen3", dict(rope_parameters=YARN, head_dim=12, tie_word_embeddings=True)),
    "gemma3": ("gemma3_text", GEMMA3),
    "deepseek-v3": ("deepseek_v3", V3),
    "deepseek-v3-yarn": ("deepseek_v3", V3 | dict(rope_parameters=MSCALE)),
    "deepseek-v3-mscales": ("deepseek_v3", V3 | dict(rope_parameters=MSCALE | dict(mscale=0.707))),
    "deepseek-v3-half-split": ("deepseek_v3", V3 | dict(rope_interleave=False, attention_bias=True)),
    "deepseek-v3-not-normed": ("deepseek_v3", V3 | dict(norm_topk_prob=False, q_lora_rank=None)),
    "deepseek-v2-lite": ("deepseek_v2", V2 | dict(topk_method="greedy")),
    "deepseek-v2": (
        "deepseek_v2",
        V2
        | dict(topk_method="group_limited_greedy", q_lora_rank=28, routed_scaling_factor=16.0, rope_parameters=MSCALE),
    ),
    "gemma3-logit-softcap": ("gemma3_text", GEMMA3 | dict(final_logit_softcapping=5.0)),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """Name, the model loaded by refllm, its ids, and the logits of transformers in one call and token by token."""
    peer = random_peer(*CASES[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    peer.save_pretrained(folder)
    whole = run(peer, IDS).logits.numpy()
    cache, steps = None, []
    for t in range(TOKENS):
        out = run(peer, IDS[:, t : t + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits.numpy())
    return request.param, load(folder), IDS, whole, np.concatenate(steps, axis=1)


def random_peer(kind, values, seed=0):
    """A seeded model of transformers; norm gains and biases are moved off their initial values, too."""
    import torch  # here, so that collecting this file costs nothing in the default run
    import transformers

    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(kind, **(COMMON | values))
    peer = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in [*peer.named_parameters(), *peer.named_buffers()]:
            if parameter.ndim == 1 and "inv_freq" not in name:  # DeepSeek's bias of the router is a buffer
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return peer


def run(peer, ids, **options):
    import torch

    with torch.no_grad():
        return peer(torch.tensor(ids), **options)


def ratio(name, what, got, expected):
    value = float(np.abs(got - expected).max() / np.abs(expected).max())
    print(f"{name:28s} {what:24s} max|diff| / max|logit| = {value:.2e}   max|logit| = {np.abs(expected).max():.2f}")
    return value


def test_one_call(case):
    name, model, ids, whole, _ = case
    got = forward(model, ids)
    assert got.dtype == np.float32
    assert np.abs(whole).max() > 1  # logits large enough to show an error
    assert ratio(name, "one call", got, whole) <= BOUND


def test_token_by_token(case):
    name, model, ids, _, steps = case
    cache = new_cache(model)
    got = np.concatenate([forward(model, ids[:, t : t + 1], cache=cache) for t in range(TOKENS)], axis=1)
    assert ratio(name, "token by token", got, steps) <= BOUND


def test_chunked_prefill(case):
    name, model, ids, whole, _ = case
    cache, got = new_cache(model), []
    for start, end in ((0, 20), (20, 33), (33, 34), (34, TOKENS)):
        got.append(forward(model, ids[:, start:end], cache=cache))
    assert ratio(name, "20 + 13 + 1 + 11 tokens", np.concatenate(got, axis=1), whole) <= BOUND


def test_float64_pass_agrees_too(case):
    """Our own float64 pass is the truth that both float32 passes must lie near."""
    name, model, ids, whole, _ = case
    exact = forward(densify(model, "float64"), ids)
    assert exact.dtype == np.float64
    assert ratio(name, "transformers vs float64", whole, exact) <= BOUND


def test_attention_softcap():
    """Gemma 2 is the architecture that caps scores (transformers' Gemma 3 ignores the key); config built by hand."""
    values = dict(
        head_dim=20,
        query_pre_attn_scalar=24,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters=plain(1e4),
        tie_word_embeddings=True,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=5.0,
    )
    peer = random_peer("gemma2", values)
    config = ModelConfig(
        architecture="gemma3",
        vocab_size=COMMON["vocab_size"],
        hidden_size=COMMON["hidden_size"],
        num_layers=3,
        num_heads=6,
        num_kv_heads=2,
        head_dim=20,
        intermediate_size=COMMON["intermediate_size"],
        context_length=256,
        norm_eps=1e-5,
        rope=Rope(1e4),
        tied_embeddings=True,
        activation="gelu_tanh",
        norm_offset=1.0,
        post_norms=True,
        embedding_scale=COMMON["hidden_size"] ** 0.5,
        attention_scale=24**-0.5,
        attention_softcap=2.0,
        logit_softcap=5.0,
        sliding_window=6,
        sliding_layers=(True, False, True),
    )
    weights = {name: w.numpy() for name, w in peer.state_dict().items() if name != "lm_head.weight"}
    expected = run(peer, IDS).logits.numpy()
    assert ratio("gemma2 (by hand)", "one call", forward(Model(config, weights), IDS), expected) <= BOUND


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_greedy_text(kind, tmp_path):
    """generate() of both, 40 tokens from a prompt of 5."""
    import torch

    peer = random_peer(*CASES[kind], seed=1)
    peer.save_pretrained(tmp_path)
    prompt = [3, 14, 15, 92, 65]
    expected = peer.generate(
        torch.tensor([prompt]), max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert list(generate_ids(load(tmp_path), prompt, 40, stop_ids=())) == expected[0, 5:].tolist()
