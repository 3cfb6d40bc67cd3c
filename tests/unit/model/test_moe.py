"""refllm.model.moe: the router and the branch against loops over tokens, groups and experts."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refllm.kernels.nn import silu
from refllm.model.config import Experts
from refllm.model.moe import mlp_branch, route
from refllm.model.walk import walk
from tests.models import LATENT, random_model


def slow_route(experts, logits, bias):
    """{expert: weight} of one token, from sorted lists."""
    if experts.scoring == "sigmoid":
        score = [1 / (1 + math.exp(-z)) for z in logits]
    else:
        total = sum(math.exp(z) for z in logits)
        score = [math.exp(z) / total for z in logits]
    ranked = [
        s + (0 if bias is None else b) for s, b in zip(score, [0] * len(score) if bias is None else bias, strict=True)
    ]
    size = experts.count // experts.groups
    group_of = lambda g: range(g * size, (g + 1) * size)
    best = 2 if experts.scoring == "sigmoid" else 1
    worth = lambda g: sum(sorted((ranked[i] for i in group_of(g)), reverse=True)[:best])
    open_groups = range(experts.groups)
    if experts.groups > 1:
        open_groups = sorted(open_groups, key=lambda g: (-worth(g), g))[: experts.active_groups]
    candidates = [i for g in open_groups for i in group_of(g)]
    chosen = sorted(candidates, key=lambda i: (-ranked[i], i))[: experts.active]
    total = sum(score[i] for i in chosen) if experts.normalised else 1
    return {i: score[i] / total * experts.scaling for i in chosen}


@st.composite
def routers(draw):
    scoring = draw(st.sampled_from(["sigmoid", "softmax"]))
    groups = draw(st.integers(1, 4))
    size = draw(st.integers(2, 4))
    active_groups = draw(st.integers(1, groups))
    return Experts(
        count=groups * size,
        active=draw(st.integers(1, size * active_groups)),
        intermediate_size=1,
        groups=groups,
        active_groups=active_groups,
        scoring=scoring,
        normalised=draw(st.booleans()),
        scaling=draw(st.sampled_from([1.0, 2.5])),
    )


@settings(max_examples=80, deadline=None)
@given(routers(), st.integers(0, 2**31), st.booleans())
def test_route_equals_the_slow_twin(experts, seed, with_bias):
    rng = np.random.default_rng(seed)
    logits, bias = rng.normal(size=(5, experts.count)), rng.normal(size=experts.count) if with_bias else None
    chosen, weight = route(experts, logits, bias)
    for t in range(5):
        expected = slow_route(experts, logits[t], bias)
        assert chosen[t].tolist() == list(expected)
        np.testing.assert_allclose(weight[t], list(expected.values()), rtol=1e-12)


def test_the_bias_steers_the_choice_and_is_no_part_of_the_weight():
    experts = Experts(count=3, active=1, intermediate_size=1, normalised=False)
    chosen, weight = route(experts, np.zeros((1, 3)), np.array([0.0, 0.0, 5.0]))
    assert chosen.tolist() == [[2]] and weight.tolist() == [[0.5]]


def test_equal_scores_go_to_the_lower_number_and_huge_logits_are_finite():
    experts = Experts(count=4, active=2, intermediate_size=1)
    for logits in (np.zeros((1, 4)), np.full((1, 4), -1e4), np.full((1, 4), 1e4)):
        chosen, weight = route(experts, logits)
        assert chosen.tolist() == [[0, 1]] and np.isfinite(weight).all()


@pytest.mark.parametrize("architecture", LATENT)
def test_branch_equals_the_slow_twin(architecture):
    model = random_model(architecture, np.float64)
    experts, w = model.config.experts, lambda name: model.weights[f"model.layers.1.mlp.{name}"]
    x = np.random.default_rng(0).normal(size=(2, 7, 32))
    bias = model.weights.get("model.layers.1.mlp.gate.e_score_correction_bias")

    def one(name, z):
        gate, up, down = (w(f"{name}.{which}_proj.weight") for which in ("gate", "up", "down"))
        return down @ (silu(gate @ z) * (up @ z))

    seen = set()
    for row, z in zip(mlp_branch(model, 1, x).reshape(14, 32), x.reshape(14, 32), strict=True):
        weights = slow_route(experts, w("gate.weight") @ z, bias)
        seen |= set(weights)
        expected = sum(weight * one(f"experts.{i}", z) for i, weight in weights.items()) + one("shared_experts", z)
        np.testing.assert_allclose(row, expected, rtol=1e-10, atol=1e-12)
    assert len(seen) > experts.active


def test_without_shared_experts():
    experts = replace(random_model("deepseek_v3").config.experts, shared=0)
    model = random_model("deepseek_v3", experts=experts)
    assert mlp_branch(model, 1, np.ones((1, 2, 32), np.float32)).shape == (1, 2, 32)


def test_an_expert_sees_its_tokens_in_calibration_or_all_where_it_got_none():
    model, ids = random_model("deepseek_v3"), np.arange(6)
    *_, (_, stats) = walk(model, ids)
    name = "model.layers.1.mlp.{}.gate_proj.weight".format
    everything = stats[name("shared_experts")].X
    logits = everything @ model.weights["model.layers.1.mlp.gate.weight"].T
    chosen, _ = route(model.config.experts, logits, model.weights["model.layers.1.mlp.gate.e_score_correction_bias"])
    counts = [np.count_nonzero(chosen == i) for i in range(8)]
    assert 0 in counts and 0 < min(filter(None, counts)) < 6
    for i, count in enumerate(counts):
        own = everything[(chosen == i).any(axis=1)] if count else everything
        np.testing.assert_array_equal(stats[name(f"experts.{i}")].X, own)
        assert stats[name(f"experts.{i}").replace("gate", "down")].X.shape == (len(own), 24)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(scoring="tanh"), "scored by sigmoid or softmax"),
        (dict(groups=3), "8 experts in 3 groups"),
        (dict(active_groups=5), "8 experts in 4 groups of which 5 are chosen"),
        (dict(groups=8, active_groups=8), "two best experts, got 8 experts in 8"),
        (dict(active=5), "5 experts a token cannot be chosen"),
        (dict(scaling=0.0), "scaling > 0"),
        (dict(count=0), "count must be a positive integer"),
    ],
)
def test_bad_experts_are_one_clear_line(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(random_model("deepseek_v3").config.experts, **changes)
