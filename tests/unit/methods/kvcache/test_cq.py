"""cq: codebooks by the definition, codes that are nearest, attention that meets codes, and what they cost."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import refllm
from refllm.evaluate.measure import sizes
from refllm.formats.bits import pack_bits
from refllm.formats.errors import FormatError
from refllm.kernels.attention import attend
from refllm.kernels.kmeans import kmeans
from refllm.kernels.kmeans_1d import near_best_1d, nearest_1d
from refllm.kernels.rope import cos_sin, rotate
from refllm.methods.apply import check, needs_calibration
from refllm.methods.finish.vqllm import codebook_product, gather_product, histogram, hit_rates, traffic, vqllm
from refllm.methods.kvcache._books import as_weight, decode, encode, mix_codes, table_scores
from refllm.methods.kvcache.cq import cq, learn_books
from refllm.model.cache import new_cache
from refllm.model.cached import cached_values
from refllm.model.llama import forward
from refllm.model.native import save_native
from tests.models import random_model
from tests.strategies import PROPERTY, SEEDS

IDS = np.random.default_rng(0).integers(0, 64, 60)
FEW = settings(PROPERTY, max_examples=25)


def tables_of(books_k, books_v, layer=0):
    return {f"{layer}.k_books": np.float16(books_k), f"{layer}.v_books": np.float16(books_v)}


def random_books(rng, heads=2, parts=4, bits=3, channels=2):
    return rng.normal(size=(heads, parts, 1 << bits, channels)).astype(np.float16)


# --- learning and coding against slow twins -------------------------------------------------------------------------


def squared(a, b):
    return sum((Fraction(float(x)) - Fraction(float(y))) ** 2 for x, y in zip(a, b, strict=True))


def nearest_slowly(x, book):
    return min(range(len(book)), key=lambda n: (squared(x, book[n]), n))


@FEW
@given(SEEDS, st.integers(1, 3), st.integers(1, 3))
def test_codes_are_those_of_a_search_in_fractions_and_ties_take_the_lower(seed, channels, bits):
    """Small whole numbers: ties and vectors that are there twice abound."""
    rng = np.random.default_rng(seed)
    x = rng.integers(-2, 3, (2, 5, 2 * channels)).astype(np.float32) * np.float32(rng.choice([1, -0.5]))
    books = rng.integers(-2, 3, (2, 2, 1 << bits, channels)).astype(np.float16)
    codes = encode(x, books)
    for head, token, part in np.ndindex(codes.shape):
        own = x[head, token, part * channels : (part + 1) * channels]
        assert codes[head, token, part] == nearest_slowly(own, books[head, part])
        piece = decode(codes, books)[head, token, part * channels : (part + 1) * channels]
        np.testing.assert_array_equal(piece, books[head, part, codes[head, token, part]])


def lloyd_slowly(X, weights, centres, iterations):
    """Weighted k-means from given centres, in fractions; empty ones move to the farthest points."""
    X = [[Fraction(float(v)) for v in x] for x in X]
    weights = [Fraction(float(w)) for w in weights]
    centres = [[Fraction(float(v)) for v in c] for c in centres]
    assign = lambda: [min(range(len(centres)), key=lambda n: (squared(x, centres[n]), n)) for x in X]
    codes = assign()
    for _ in range(iterations):
        far = [w * squared(x, centres[n]) for x, w, n in zip(X, weights, codes, strict=True)]
        for n in range(len(centres)):
            mine = [(w, x) for w, x, code in zip(weights, X, codes, strict=True) if code == n]
            total = sum(w for w, _ in mine)
            if total:
                centres[n] = [sum(w * x[j] for w, x in mine) / total for j in range(len(X[0]))]
            elif max(far) > 0:
                at = far.index(max(far))
                centres[n], far[at] = X[at], 0
        before, codes = codes, assign()
        if codes == before:
            break
    return centres


@FEW
@given(SEEDS, st.integers(0, 4))
def test_codebooks_are_those_of_a_naive_lloyd_in_fractions(seed, iterations):
    """From the same seeds; numbers of 6 bits and whole weights, so that float64 decides as fractions do."""
    rng = np.random.default_rng(seed)
    x = rng.integers(-32, 32, (1, 9, 4)).astype(np.float32) / 8
    weight = rng.integers(0, 4, (1, 9, 4)).astype(np.float32)
    found = learn_books(x, weight, 2, 2, iterations, (seed,))
    for part in range(2):
        X, w = x[0, :, 2 * part : 2 * part + 2], weight[0, :, 2 * part : 2 * part + 2].sum(axis=1)
        start, _ = kmeans(X, 4, np.random.default_rng([seed, part]), w, iterations=0)
        book = np.float16([[float(v) for v in c] for c in lloyd_slowly(X, w, start, iterations)])
        uses = [sum(nearest_slowly(row, book) == n for row in X) for n in range(4)]
        order = sorted(range(4), key=lambda n: (-uses[n], n))
        np.testing.assert_array_equal(found[0, part], book[order])


def test_fewer_tokens_than_vectors_come_back_as_they_are():
    x = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float16)
    books = learn_books(x.astype(np.float32), None, 4, 4, 25, (0,))
    codes = encode(x.astype(np.float32), books)
    np.testing.assert_array_equal(decode(codes, books), x)
    assert codes.max() < 5  # what is there twice stands at the end


@pytest.mark.parametrize("channels", [1, 4])
def test_values_without_channels_have_no_codebooks(channels):
    """As where keys serve as values (mfa)."""
    assert learn_books(np.zeros((1, 5, 0)), None, channels, 2, 3, (0,)).shape == (1, 0, 4, channels)
    tables = tables_of(np.zeros((1, 1, 4, 4)), np.zeros((1, 0, 4, 4)))
    store = cq(0, channels=4, bits=2, tables=tables)
    for start in (0, 3):
        _, V, _ = store.extend(np.ones((1, 1, 3, 4)), np.ones((1, 1, 3, 0)), np.arange(start, start + 3))
    assert V.shape == (1, 1, 6, 0) and store.nbytes == 6


# --- the card's properties ------------------------------------------------------------------------------------------


@FEW
@given(SEEDS, st.integers(1, 3))
def test_one_channel_is_a_table_of_numbers_for_each_channel(seed, bits):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(1, 120, 2))
    weight = rng.random((1, 120, 2))
    books = learn_books(x, weight, 1, bits, 0, (seed,))
    codes = encode(x, books)
    for channel in range(2):
        row, w = x[..., channel], weight[..., channel]
        table = near_best_1d(row, w, 1 << bits).astype(np.float16)
        np.testing.assert_array_equal(np.sort(books[0, channel, :, 0]), table[0])
        np.testing.assert_array_equal(decode(codes, books)[0, :, channel], table[0][nearest_1d(row, table)[0]])


def entropy(codes):
    """Bits, of rows of codes."""
    share = np.unique(codes, axis=0, return_counts=True)[1] / len(codes)
    return -(share * np.log2(share)).sum()


@FEW
@given(SEEDS, st.floats(0.6, 0.99))
def test_codes_of_correlated_channels_hold_less_together_than_apart(seed, rho):
    x = correlated(seed, rho, 2000)
    codes = encode(x, learn_books(x, None, 1, 2, 20, (seed,)))[0]
    joint, apart = entropy(codes), sum(entropy(codes[:, i : i + 1]) for i in range(2))
    gaussian = -0.5 * np.log2(1 - rho**2)  # what two such channels tell of each other, without codes
    assert joint < apart - 0.1 and apart - joint < gaussian + 0.1


def correlated(seed, rho, tokens):
    rng = np.random.default_rng(seed)
    return rng.multivariate_normal([0, 0], [[1, rho], [rho, 1]], (1, tokens))


@FEW
@given(SEEDS, st.floats(0.5, 0.99))
def test_coupled_codes_of_as_many_bits_err_less(seed, rho):
    """Two channels, two bits each: on tokens that nothing was learned of."""
    seen, new = correlated(seed, rho, 2000), correlated(seed + 1, rho, 2000)
    error = []
    for channels, bits in ((1, 2), (2, 4)):
        books = learn_books(seen, None, channels, bits, 30, (seed,))
        error.append(((decode(encode(new, books), books) - new) ** 2).mean())
    assert error[1] < error[0]


@FEW
@given(SEEDS, st.integers(-30, 30))
def test_only_proportions_of_sensitivities_matter(seed, power):
    rng = np.random.default_rng(seed)
    x, weight = rng.normal(size=(2, 40, 8)).astype(np.float32), rng.random((2, 40, 8)).astype(np.float32)
    one, other = (learn_books(x, w, 4, 2, 9, (seed,)) for w in (weight, weight * np.float32(2.0**power)))
    np.testing.assert_array_equal(one, other)


def test_the_loud_are_heard_and_those_that_nobody_minds_count_alike():
    x = np.concatenate([np.zeros((1, 30, 2)), np.full((1, 1, 2), 5.0), np.full((1, 1, 2), 7.0)], axis=1)
    weight = np.ones(x.shape)
    weight[0, -1] = 1e9
    assert 7.0 in learn_books(x, weight, 2, 1, 20, (0,)) and 7.0 not in learn_books(x, None, 2, 1, 20, (0,))
    np.testing.assert_array_equal(learn_books(x, 0 * weight, 2, 1, 20, (0,)), learn_books(x, None, 2, 1, 20, (0,)))


# --- VQ-LLM: order, hits, traffic, two flows of data ----------------------------------------------------------------


def test_vectors_stand_in_the_order_of_use_and_names_do_not_matter():
    rng = np.random.default_rng(0)
    x = rng.standard_t(3, size=(2, 300, 8))
    books = learn_books(x, None, 4, 4, 10, (0,))
    codes = encode(x, books)
    for head in range(2):
        record = as_weight(codes[head], books[head])
        uses = histogram(record)[:, 0]
        assert (np.diff(uses, axis=-1) <= 0).all() and uses.sum() == codes[head].size
        shuffled = rng.permutation(16)
        renamed = as_weight(np.argsort(shuffled)[codes[head]], books[head][:, shuffled])
        assert (
            renamed.dense().tobytes() == record.dense().tobytes() == decode(codes, books)[head].astype("f4").tobytes()
        )
        assert vqllm(renamed, None).dense().tobytes() == record.dense().tobytes()
        for registers, shared in ((16, 32), (0, 1000), (64, 0)):
            hits, unsorted = hit_rates(record, registers, shared), hit_rates(renamed, registers, shared)
            counts = np.array(hits) * codes[head].size
            np.testing.assert_allclose(counts, np.rint(counts), atol=1e-9)
            assert np.rint(counts).sum() == codes[head].size  # every access is served once
            assert hits[0] >= unsorted[0] and hits[2] <= unsorted[2]


@st.composite
def coded_heads(draw):
    rng = np.random.default_rng(draw(SEEDS))
    lead = draw(st.sampled_from([(), (2,), (2, 1)]))
    heads, group, parts, channels = (draw(st.integers(1, 3)) for _ in range(4))
    bits, tokens = draw(st.integers(1, 9)), draw(st.integers(1, 7))
    books = random_books(rng, heads, parts, bits, channels)
    codes = rng.integers(0, 1 << bits, (*lead, heads, tokens, parts)).astype(np.uint16)
    return rng.normal(size=(*lead, heads, group, parts * channels)), codes, books


@FEW
@given(coded_heads(), SEEDS)
def test_both_flows_of_data_give_one_result(heads, seed):
    """Codebook by codebook, and token by token; keys also by the functions for weights."""
    q, codes, books = heads
    tokens = decode(codes, books).astype(np.float64)
    np.testing.assert_allclose(table_scores(q, codes, books), q @ tokens.swapaxes(-1, -2), atol=1e-9)
    weights = np.random.default_rng(seed).random((*q.shape[:-1], codes.shape[-2]))
    np.testing.assert_allclose(mix_codes(weights, codes, books), weights @ tokens, atol=1e-9)
    first = (0,) * (q.ndim - 3)
    record = as_weight(codes[first][0], books[0])
    for product in (gather_product, codebook_product):
        np.testing.assert_allclose(product(q[first][0], record), table_scores(q, codes, books)[first][0], atol=1e-6)


class Fetched:
    """A codebook array that counts the bytes taken from it."""

    def __init__(self, array):
        self.array, self.shape, self.moved = array, array.shape, 0

    def __getitem__(self, at):
        part = self.array[at]
        self.moved += part.nbytes
        return part


def test_bytes_that_the_two_flows_move_are_those_of_the_formulas():
    """Tiles of 5 of 12 tokens each fetch all codebooks; codebook by codebook each is fetched once."""
    rng = np.random.default_rng(0)
    m, n, c, tokens = 4, 8, 2, 12
    books = random_books(rng, 1, m, 3, c)
    codes = rng.integers(0, n, (1, tokens, m))
    q = rng.normal(size=(1, 3, m * c))
    by_codebook, by_token = Fetched(books), Fetched(books)
    scores = table_scores(q, codes, by_codebook)
    tiles = [codes[:, i : i + 5] for i in range(0, tokens, 5)]
    np.testing.assert_allclose(
        scores, np.concatenate([q @ decode(t, by_token[:]).swapaxes(-1, -2) for t in tiles], -1), atol=1e-9
    )
    partial = [table_scores(q[..., c * p : c * p + c], codes[..., p : p + 1], books[:, p : p + 1]) for p in range(m)]
    np.testing.assert_allclose(sum(partial), scores, atol=1e-12)
    expected = traffic(as_weight(codes[0], books[0]), row_blocks=3, tokens=3)
    book = n * c * 2
    assert by_token.moved == expected["rows_first"] == 3 * m * book
    assert by_codebook.moved == m * book
    summed = 2 * sum(p.astype(np.float32).nbytes for p in partial)  # written, and read again
    assert by_codebook.moved + summed == expected["codebooks_first"]
    values = Fetched(books)
    mix_codes(rng.random((1, 3, tokens)), codes, values)
    assert values.moved == m * book  # and there is nothing to add up: a part of the output belongs to one codebook


@pytest.mark.parametrize("knobs", [dict(), dict(recent=3), dict(sinks=2, recent=4)])
@pytest.mark.parametrize("how", [dict(), dict(window=6), dict(softcap=2.0)])
def test_attention_over_codes_is_attention_over_what_they_stand_for(knobs, how):
    rng = np.random.default_rng(1)
    tables = tables_of(random_books(rng), random_books(rng))
    coded, decoded = (cq(0, channels=2, bits=3, pre_rope=False, **knobs, tables=tables) for _ in range(2))
    coded.rollback = decoded.rollback = 1
    start = 0
    for stop in (9, 10, 11, 14, 15):
        k, v = rng.normal(size=(2, 2, 2, stop - start, 8)).astype(np.float32)
        q = rng.normal(size=(2, 6, stop - start, 8)).astype(np.float32)
        at = np.arange(start, stop)
        out = coded.attend(q, k, v, at, scale=0.4, **how)
        expected = attend(q, *decoded.extend(k, v, at)[:2], at, np.arange(stop), scale=0.4, **how)
        assert out.dtype == np.float32
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
        assert coded.parts().keys() == decoded.parts().keys() and coded.nbytes == decoded.nbytes
        start = stop


def test_only_rotated_keys_are_met_in_codes(monkeypatch):
    rng = np.random.default_rng(2)
    tables = tables_of(random_books(rng), random_books(rng))
    assert not hasattr(cq(0, channels=2, bits=3, tables=tables), "attend")
    store = cq(0, channels=2, bits=3, pre_rope=False, tables=tables)
    assert not store.pre_rope
    k, q = rng.normal(size=(1, 2, 5, 8)), rng.normal(size=(1, 4, 1, 8))
    store.extend(k, k, np.arange(5))
    monkeypatch.setattr(type(store), "_decode", lambda *_: pytest.fail("a token was decoded"))
    assert np.isfinite(store.attend(q, k[..., :1, :], k[..., :1, :], np.array([5]), scale=1.0)).all()


# --- the store ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "tokens"), [(3, 7), (4, 8), (10, 5)])
def test_bytes_are_packed_codes_and_tokens_in_full(bits, tokens):
    rng = np.random.default_rng(3)
    books = random_books(rng, 2, 3, bits, 2), random_books(rng, 2, 3, bits, 2)
    store = cq(0, channels=2, bits=bits, sinks=1, recent=2, tables=tables_of(*books))
    k, v = rng.normal(size=(2, 1, 2, tokens, 6)).astype(np.float32)
    store.extend(k, v, np.arange(tokens))
    parts = store.parts()
    for side, x, book in (("k", k, books[0]), ("v", v, books[1])):
        codes = encode(x[..., 1:-2, :], book)
        np.testing.assert_array_equal(parts[f"{side}_codes"], pack_bits(codes, bits))
        np.testing.assert_array_equal(store.codes(side), codes)
    assert store.nbytes == 2 * 2 * ((tokens - 3) * -(-3 * bits // 8) + 3 * 6 * 4)
    K, V, _ = store.extend(k[..., :1, :], v[..., :1, :], np.array([tokens]))
    for seen, x, book in ((K, k, books[0]), (V, v, books[1])):
        np.testing.assert_array_equal(seen[..., :1, :], x[..., :1, :])  # the sink, to the bit
        np.testing.assert_array_equal(seen[..., tokens - 2 : tokens, :], x[..., -2:, :])  # the last ones
        np.testing.assert_array_equal(seen[..., 1 : tokens - 2, :], decode(encode(x[..., 1:-2, :], book), book))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "cq needs codebooks, which are learned of a text"),
        (lambda t: {"0.k_books": t["0.k_books"]}, "no table 0.v_books"),
        (lambda t: t | {"0.v_books": t["0.v_books"].astype("f4")}, r"0.v_books must be float16 \(heads, parts, 8, 2\)"),
        (lambda t: t | {"0.k_books": t["0.k_books"][..., :4, :]}, r"0.k_books must be .* got float16 \(2, 4, 4, 2\)"),
        (lambda t: t | {"0.k_books": t["0.k_books"] * np.float16(np.nan)}, "0.k_books holds NaN"),
        (lambda t: t | {"0.k_books": t["0.k_books"][:1]}, r"as many heads on both sides, got \[1, 2\]"),
    ],
)
def test_tables_that_do_not_fit_are_refused(change, message):
    rng = np.random.default_rng(4)
    tables = tables_of(random_books(rng), random_books(rng))
    with pytest.raises(ValueError, match=message):
        cq(0, channels=2, bits=3, tables=None if change is None else change(tables))


def test_tokens_of_another_shape_are_refused_and_leave_no_trace():
    rng = np.random.default_rng(5)
    store = cq(0, channels=2, bits=3, tables=tables_of(random_books(rng), random_books(rng, parts=3)))
    k, v = rng.normal(size=(1, 2, 4, 8)), rng.normal(size=(1, 2, 4, 6))
    store.extend(k, v, np.arange(4))
    before = store.nbytes
    for bad_k, bad_v, message in (
        (k, k, "2 heads of 6 channels for a value, got 2 of 8"),
        (k[:, :1], v[:, :1], "2 heads of 8 channels for a key, got 1 of 8"),
        (k * np.nan, v, "finite"),
        (k * 1e6, v, "at most 65504"),
    ):
        with pytest.raises(ValueError, match=message):
            store.extend(bad_k, bad_v, np.arange(4, 8))
    assert store.nbytes == before and store.length == 4


@pytest.mark.parametrize("knobs", [dict(channels=0), dict(bits=0), dict(bits=13), dict(iterations=-1)])
def test_bad_knobs(knobs):
    for make in (lambda: cq(0, **knobs), lambda: cq.learn(random_model(), IDS, **knobs)):
        with pytest.raises(ValueError, match="cq needs channels from 1 on, bits 1 to 12"):
            make()
    with pytest.raises(ValueError, match="keeps 0 or more tokens in full, got recent -1"):
        rng = np.random.default_rng(0)
        cq(0, channels=2, bits=3, recent=-1, tables=tables_of(random_books(rng), random_books(rng)))


# --- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pre_rope", [True, False])
def test_codebooks_are_learned_of_what_the_cache_is_handed(pre_rope):
    model = random_model()
    tables = cq.learn(model, IDS, channels=2, bits=2, pre_rope=pre_rope, fisher=False, sinks=3, iterations=4, seed=7)
    assert sorted(tables) == ["0.k_books", "0.v_books", "1.k_books", "1.v_books"]
    for layer, (K, V) in enumerate(cached_values(model, IDS, pre_rope=pre_rope)):
        for number, (side, x) in enumerate((("k", K), ("v", V))):
            expected = learn_books(x[0, :, 3:], None, 2, 2, 4, (7, layer, number))
            np.testing.assert_array_equal(tables[f"{layer}.{side}_books"], expected)


def test_a_model_whose_codebooks_hold_all_its_tokens_is_moved_by_float16_only():
    """As many vectors as tokens, on both sides of the rotation: codes lose nothing, so logits hardly move."""
    model = random_model()
    exact = forward(model, IDS[:30])[29]
    for pre_rope in ("yes", "no"):
        small = refllm.compress(model, f"cq:channels=4,bits=5,pre_rope={pre_rope}", IDS[:30])
        cache = new_cache(small)
        forward(small, IDS[:29], cache=cache)
        np.testing.assert_allclose(forward(small, IDS[29:30], cache=cache)[0], exact, atol=5e-3)


def test_keys_before_the_rotation_are_rotated_at_their_positions():
    model = random_model(dtype=np.float64)
    small = refllm.compress(model, "cq:channels=4,bits=3,fisher=no", IDS)
    seen = []

    def spy(q, k, v, q_positions, k_positions, **rule):
        seen.append(k)
        return attend(q, k, v, q_positions, k_positions, **rule)

    cache = new_cache(small)
    forward(small, IDS[:20], cache=cache)
    forward(small, IDS[20:21], cache=cache, attend=spy)
    store = cache.stores[0]
    plain = decode(store.codes("k"), store.books["k"]).astype(np.float64)[..., :20, :]
    expected = rotate(plain, *cos_sin(model.config.rope, 8, np.arange(20), np.float64))
    np.testing.assert_array_equal(seen[0][..., :20, :], expected)


def test_architectures_without_gradients_say_so_and_work_without_them():
    for architecture, channels in (("qwen3", 5), ("gemma3", 4), ("deepseek_v2", 1)):  # widths 10, 8, and 4 beside 12
        model = random_model(architecture)
        with pytest.raises(ValueError, match="fisher=false: "):
            refllm.compress(model, f"cq:channels={channels},bits=2", IDS)
        small = refllm.compress(model, f"cq:channels={channels},bits=2,fisher=false,iterations=2", IDS)
        assert np.isfinite(forward(small, IDS[:9], cache=new_cache(small))).all()


def test_what_cannot_be_learned_is_said_in_one_line():
    model = random_model()
    with pytest.raises(ValueError, match=r"learn the codebooks 0\.k: channels=3 do not divide the head dimension 8"):
        refllm.compress(model, "cq:channels=3,bits=2", IDS)
    with pytest.raises(ValueError, match="learns of the tokens behind the sinks: 60 of windows of 60 tokens"):
        refllm.compress(model, "cq:channels=2,bits=2,sinks=60", IDS)
    with pytest.raises(ValueError, match="cq needs calibration tokens"):
        refllm.compress(model, "cq")


def test_a_recipe_is_checked_stored_loaded_and_run(tmp_path):
    recipe = "cq:channels=4,bits=6,iterations=2"
    assert needs_calibration(recipe)
    model = refllm.load("tiny")
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, 150)
    check(model, "cq:iterations=1", ids)  # 256 vectors of 64 tokens
    small = refllm.compress(model, recipe, ids)
    books = 4 * 2 * 2 * 8 * 64 * 4 * 2  # layers, sides, heads, parts, vectors, channels, bytes
    assert sizes(small).weight_bytes - sizes(model).weight_bytes == books
    save_native(small, tmp_path / "m")
    models = small, refllm.load(tmp_path / "m")
    caches = [new_cache(m) for m in models]
    for part in (ids[:60], ids[60:61]):
        np.testing.assert_array_equal(*(forward(m, part, cache=c) for m, c in zip(models, caches, strict=True)))
    assert caches[0].nbytes == 4 * 2 * 2 * 61 * 6
    for name, damaged in (("cut", small.tables["cq.1.k_books"][:, :, :9]), ("gone", None)):
        tables = {key: x for key, x in (small.tables | {"cq.1.k_books": damaged}).items() if x is not None}
        save_native(replace(small, tables=tables), tmp_path / name)
        with pytest.raises(FormatError, match=r"stored tables do not fit: cq .*1\.k_books"):
            refllm.load(tmp_path / name)
