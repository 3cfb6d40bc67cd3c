"""Number formats and microscaling against other software: every bit pattern and over a million numbers each.

Where an oracle is known to differ, the test says for which numbers and what it gives there, and asserts exactly that.
"""

from dataclasses import replace
from importlib.metadata import version
from itertools import product

import numpy as np
import pytest

from refllm.formats.dtypes import E8M0, FORMATS, FP4_BNB, NF4, TF32
from refllm.formats.microscale import MX_FORMATS, NVFP4

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]

ML_DTYPES = {
    "FP16": "float16", "BF16": "bfloat16", "FP8_E4M3FN": "float8_e4m3fn", "FP8_E5M2": "float8_e5m2",
    "FP8_E4M3FNUZ": "float8_e4m3fnuz", "FP8_E5M2FNUZ": "float8_e5m2fnuz", "FP6_E2M3": "float6_e2m3fn",
    "FP6_E3M2": "float6_e3m2fn", "FP4_E2M1": "float4_e2m1fn", "E8M0": "float8_e8m0fnu",
}  # fmt: skip
TORCH = {
    "FP16": "float16", "BF16": "bfloat16", "FP8_E4M3FN": "float8_e4m3fn", "FP8_E5M2": "float8_e5m2",
    "FP8_E4M3FNUZ": "float8_e4m3fnuz", "FP8_E5M2FNUZ": "float8_e5m2fnuz", "E8M0": "float8_e8m0fnu",
}  # fmt: skip
GFLOAT = {
    "FP16": "binary16", "BF16": "bfloat16", "FP8_E4M3FN": "ocp_e4m3", "FP8_E5M2": "ocp_e5m2", "FP6_E2M3": "ocp_e2m3",
    "FP6_E3M2": "ocp_e3m2", "FP4_E2M1": "ocp_e2m1",
}  # fmt: skip
TORCHAO = {
    "MXFP8_E4M3": "float8_e4m3fn", "MXFP8_E5M2": "float8_e5m2", "MXFP6_E2M3": "fp6_e2m3", "MXFP6_E3M2": "fp6_e3m2",
    "MXFP4": "float4_e2m1fn_x2",
}  # fmt: skip


def all_codes(form):
    return np.arange(1 << form.bits).astype(form.code_dtype)


def numbers(form):
    """float32: 2^20 random bit patterns, 2^20 normal ones, where the format's numbers meet, and their neighbours."""
    rng = np.random.default_rng(20)
    patterns = rng.integers(0, 1 << 32, 1 << 20, dtype=np.uint32).view(np.float32)
    normal = rng.standard_normal(1 << 20, dtype=np.float32) * np.exp2(rng.integers(-20, 20, 1 << 20)).astype(np.float32)
    values = form.decode(all_codes(form)).astype(np.float64)
    values = np.unique(values[np.isfinite(values)])
    with np.errstate(over="ignore"):
        middles = np.concatenate([values, (values[1:] + values[:-1]) / 2]).astype(np.float32)
    beside = [np.nextafter(middles, np.float32(end)) for end in (-np.inf, np.inf)]
    edges = np.float32([0, -0.0, np.inf, -np.inf, np.nan, -np.nan, form.max * 1.03125, -form.max * 1.125])
    return np.concatenate([patterns, normal, middles, *beside, edges])


def count_different(ours, theirs):
    """How many codes differ, and where."""
    different = ours != theirs
    return int(different.sum()), different


def e8m0_exception(x, ours):
    """2^-127 < x < 1.5 2^-127 gives code 1, although 2^-127, code 0, is nearer."""
    inside = (np.abs(x) > 2.0**-127) & (np.abs(x) < 1.5 * 2.0**-127)
    return np.where(inside & (ours == 0), 1, ours)


@pytest.mark.parametrize("name", ML_DTYPES)
def test_ml_dtypes(name, agreement):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    form = FORMATS[name]
    theirs = np.dtype(getattr(np if name == "FP16" else ml_dtypes, ML_DTYPES[name]))
    codes = all_codes(form)
    decoded = codes.view(theirs).astype(np.float32)
    np.testing.assert_array_equal(form.decode(codes), decoded)
    real = ~np.isnan(decoded)
    np.testing.assert_array_equal(np.signbit(form.decode(codes)[real]), np.signbit(decoded[real]))
    finite = form.specials == "finite"
    for dtype in (np.float32, np.float64):
        with np.errstate(all="ignore"):
            x = numbers(form).astype(dtype)
            expected = x.astype(theirs).view(form.code_dtype)
        note = f"encode {np.dtype(dtype)}, decode"
        policy = {"nan": "negative_zero"} if finite else {"ties": "away"} if form is E8M0 else {}
        ours = form.encode(x, "saturate" if finite else "ieee", **policy)
        predicted, nan = ours, np.isnan(x)
        if finite:  # a NaN becomes 0 with the sign turned round
            predicted = np.where(nan & np.signbit(x), 0, ours)
            note += "; NaN -> zero of the other sign"
        if form is E8M0:
            predicted = e8m0_exception(x, ours)
            note += "; ties away, 2^-127 < x < 1.5 2^-127 -> 1"
        if name == "FP16":  # numpy keeps bits of a NaN
            expected = np.where(nan, predicted, expected)
        different, _ = count_different(ours, expected)
        oracle = "numpy" if name == "FP16" else "ml_dtypes"
        agreement(oracle, version(oracle), name, x.size + codes.size, different, note)
        np.testing.assert_array_equal(predicted, expected)


@pytest.mark.parametrize("name", ["INT2", "INT4"])
def test_ml_dtypes_integers_truncate_and_wrap(name, agreement):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    form = FORMATS[name]
    x = np.random.default_rng(21).standard_normal(1 << 20).astype(np.float32) * 20
    theirs = x.astype(getattr(ml_dtypes, name.lower())).astype(np.float32)
    ours = form.decode(form.encode(x, "wrap", rounding="toward_zero"))
    agreement("ml_dtypes", ml_dtypes.__version__, name, x.size, (ours != theirs).sum(), "truncates and wraps")
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", TORCH)
def test_torch(name, agreement):
    torch = pytest.importorskip("torch")
    form, theirs = FORMATS[name], getattr(torch, TORCH[name])
    container = torch.uint8 if form.bits == 8 else torch.uint16
    codes = all_codes(form)
    np.testing.assert_array_equal(form.decode(codes), torch.from_numpy(codes).view(theirs).float().numpy())
    x = numbers(form)
    expected = torch.from_numpy(x).to(theirs).view(container).numpy()
    note = "saturates, infinities too" if name == "FP8_E4M3FN" else "overflow as ieee"
    ours = form.encode(x, "satfinite" if name == "FP8_E4M3FN" else "ieee", ties="even")
    predicted = ours
    if form is E8M0:  # the sign is dropped, -0 and 0 are code 0, ties away
        ours = form.encode(x, "ieee", ties="away", negative="magnitude")
        ours = np.where(x == 0, 0, ours)
        predicted = e8m0_exception(x, ours)
        note = "sign dropped, 0 -> 0, ties away, 2^-127 < x < 1.5 2^-127 -> 1"
    nan = np.isnan(x)
    assert np.isnan(form.decode(expected[nan])).all() and np.isnan(form.decode(ours[nan])).all()
    different, _ = count_different(ours[~nan], expected[~nan])
    agreement("torch", torch.__version__, name, x.size + codes.size, different, f"{note}; any NaN is a NaN")
    np.testing.assert_array_equal(predicted[~nan], expected[~nan])


def gfloat_format(name):
    formats = pytest.importorskip("gfloat.formats")
    if name == "TF32":
        return replace(formats.format_info_bfloat16, name=name, k=19, precision=11, num_high_nans=1023)
    if name == "UE4M3":
        return replace(formats.format_info_ocp_e4m3, name=name, k=7, is_signed=False, has_nz=False)
    return getattr(formats, f"format_info_{GFLOAT[name]}")


@pytest.mark.parametrize("name", [*GFLOAT, "TF32", "UE4M3"])
def test_gfloat(name, agreement):
    gfloat = pytest.importorskip("gfloat")
    form, theirs = FORMATS[name], gfloat_format(name)
    codes = all_codes(form)
    np.testing.assert_array_equal(form.decode(codes), gfloat.decode_ndarray(theirs, codes.astype(np.int64)))
    rng = np.random.default_rng(22)
    with np.errstate(all="ignore"):
        x = rng.standard_normal(1 << 21) if form is TF32 else numbers(form).astype(np.float64)
        x = x[::2] * (1 + rng.integers(-1, 2, (x.size + 1) // 2) * 2.0**-45)  # numbers that float32 does not have
    if form.specials == "finite":
        x = x[np.isfinite(x)]
    x = x if form.signed else np.abs(x)
    modes = {"even": gfloat.RoundMode.TiesToEven, "away": gfloat.RoundMode.TiesToAway}
    for rule, saturate in product((*modes, "toward_zero"), (True, False)):
        if form.specials == "finite" and not saturate:
            continue
        mode = modes.get(rule, gfloat.RoundMode.TowardZero)
        knobs = {"ties": rule} if rule in modes else {"rounding": rule}
        with np.errstate(all="ignore"):
            expected = gfloat.round_ndarray(theirs, x, mode, saturate)
        ours = form.decode(form.encode(x, "satfinite" if saturate else "ieee", **knobs)).astype(np.float64)
        same = (ours == expected) & (np.signbit(ours) == np.signbit(expected)) | (np.isnan(ours) & np.isnan(expected))
        note = f"{rule}, {'satfinite' if saturate else 'ieee'}, float64"
        agreement("gfloat", version("gfloat"), name, x.size + codes.size, (~same).sum(), note)
        assert same.all(), (x[~same][:5], ours[~same][:5], expected[~same][:5])


@pytest.mark.parametrize("form", [NF4, FP4_BNB], ids=lambda form: form.name)
def test_bitsandbytes(form, agreement):
    torch, functional = pytest.importorskip("torch"), pytest.importorskip("bitsandbytes.functional")
    kind = {"NF4": "nf4", "FP4_BNB": "fp4"}[form.name]
    table = functional.get_4bit_type(kind, device="cpu").numpy()
    assert form.values.tobytes() == table.tobytes()
    rng = np.random.default_rng(23)
    x = rng.uniform(-1, 1, (1 << 15, 64)).astype(np.float32)
    values = np.unique(form.values)
    middles = (values[1:] + values[:-1]) / np.float32(2)
    beside = [np.nextafter(middles, np.float32(end)) for end in (-2, 2)]
    edges = np.concatenate([middles, *beside, values, [-0.0]]).astype(np.float32)
    x[: edges.size, 1] = edges
    x[:, 0] = 1  # the largest magnitude: no scaling
    packed, state = functional.quantize_4bit(torch.from_numpy(x), blocksize=64, quant_type=kind)
    assert (state.absmax.numpy() == 1).all()
    packed = packed.numpy().reshape(-1)
    theirs = np.stack([packed >> 4, packed & 15], -1).reshape(x.shape)
    ours = form.encode(x)
    predicted, note = ours, "codes, table; ties to the lower value"
    if form is FP4_BNB:  # its second zero
        predicted = np.where((ours == 0) & (x > 0), 8, ours)
        note += "; 0 < x rounds to code 8, which is 0 too"
    agreement("bitsandbytes", version("bitsandbytes"), form.name, x.size + 16, (ours != theirs).sum(), note)
    np.testing.assert_array_equal(predicted, theirs)
    np.testing.assert_array_equal(form.decode(ours), form.decode(theirs))


def blocks_of_all_sizes(size=32):
    """(8192, 128) float32: normal numbers times powers of two, and blocks whose largest number is an edge."""
    rng = np.random.default_rng(24)
    x = rng.standard_normal((8192, 128 // size, size), dtype=np.float32)
    with np.errstate(all="ignore"):
        x[:6000] *= np.exp2(rng.integers(-100, 100, (6000, 128 // size, 1)).astype(np.float32))
        x[6000:6200] *= np.exp2(rng.integers(-149, -100, (200, 128 // size, 1)).astype(np.float32))
        # Largest numbers at, below and above (1, 1.25 ... 1.9375) 2^k and the largest elements.
        edges = [m for part in (*np.arange(16, 32) / 16, 448 / 256, 57344 / 32768) for m in
                 (np.nextafter(np.float32(part), np.float32(end)) for end in (0, part, 9))]  # fmt: skip
        block = x[6200:8000].reshape(-1, size)
        top = np.resize(np.float32(edges), len(block)) * np.exp2(rng.integers(-90, 90, len(block)).astype(np.float32))
        block *= (np.abs(top) / np.abs(block).max(-1) / 2)[:, None]
        block[:, 3] = top
    x[8000:8010] = 0
    return x.reshape(8192, 128)


@pytest.mark.parametrize("rule", ["floor", "ceil", "rceil", "even"])
@pytest.mark.parametrize("name", TORCHAO)
def test_torchao_mx(name, rule, agreement):
    torch, mx = pytest.importorskip("torch"), pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    form, x = MX_FORMATS[name], blocks_of_all_sizes()
    element = getattr(torch, TORCHAO[name], TORCHAO[name])
    scales, codes = mx.to_mx(torch.from_numpy(x), element, 32, getattr(mx.ScaleCalculationMode, rule.upper()))
    scales, codes = scales.view(torch.uint8).numpy(), codes.view(torch.uint8).numpy()
    if name == "MXFP4":
        codes = np.stack([codes & 15, codes >> 4], -1).reshape(x.shape)
    ours, our_scales = form.encode(x, rule)
    amax = np.abs(x).reshape(*scales.shape, 32).max(-1)
    predicted_scales, note = our_scales, "scales, codes"
    if rule == "rceil":  # log2 in float32 forgets that the number is a little above a power of two
        descale = torch.from_numpy(amax) / form.max
        exponent = torch.ceil(torch.log2(descale)).clamp(-127, 127).numpy() + 127
        predicted_scales = exponent.astype(np.uint8)
        forgot = predicted_scales != our_scales
        mantissa = np.frexp(descale.numpy()[forgot])[0]
        assert (predicted_scales[forgot] + 1 == our_scales[forgot]).all() and (2 * mantissa < 1 + 2.0**-16).all()
        note += "; log2 in float32 misses mantissas below 1 + 2^-16"
    # Elements of a block with the scale 2^-127 are divided by 2^-126 (rceil: by 1).
    divisor = np.ldexp(1.0, predicted_scales.astype(int) - 127)
    divisor = np.where(predicted_scales == 0, 1.0 if rule == "rceil" else 2.0**-126, divisor)
    scaled = x.reshape(*scales.shape, 32).astype(np.float64) / divisor[..., None]
    predicted = form.element.encode(scaled, "satfinite").reshape(x.shape)
    note += "; a scale of 2^-127 is not the one divided by"
    different = (ours != codes).sum() + (our_scales != scales).sum()
    agreement("torchao", version("torchao"), f"{name} {rule}", codes.size + scales.size, different, note)
    np.testing.assert_array_equal(predicted_scales, scales)
    np.testing.assert_array_equal(predicted, codes)
    usual = np.broadcast_to(((our_scales == scales) & (scales > 0))[..., None], (*scales.shape, 32)).reshape(x.shape)
    assert usual.mean() > 0.9
    np.testing.assert_array_equal(ours[usual], codes[usual])


@pytest.mark.parametrize("rule", ["floor", "ceil", "rceil", "even"])
def test_torchao_mx_of_nan_and_infinity(rule):
    torch, mx = pytest.importorskip("torch"), pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    x = np.ones((4, 32), np.float32)
    x[0, 3], x[1, 4], x[2, 5:7] = np.nan, -np.inf, (np.inf, np.nan)
    for name in ("MXFP8_E4M3", "MXFP8_E5M2"):
        theirs = mx.to_mx(torch.from_numpy(x), getattr(torch, TORCHAO[name]), 32, mx.ScaleCalculationMode[rule.upper()])
        scales, codes = (part.view(torch.uint8).numpy() for part in theirs)
        ours, our_scales = MX_FORMATS[name].encode(x, rule, nonfinite="saturate")
        np.testing.assert_array_equal(our_scales, scales)
        np.testing.assert_array_equal(ours[[1, 3]], codes[[1, 3]])


def normal_tensors():
    rng = np.random.default_rng(25)
    x = rng.standard_normal((1024, 1024), dtype=np.float32)
    yield "normal", x
    yield "blocks of all sizes", blocks_of_all_sizes(16)[:6000]
    few = rng.integers(-96, 97, (1024, 1024)).astype(np.float32) / 8  # many ties
    few[:, ::16] = 12
    yield "ties", few
    yield "half zeros", x * (np.arange(1024) % 64 < 32).astype(np.float32)


def test_torchao_nvfp4(agreement):
    torch, nv = pytest.importorskip("torch"), pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    for note, x in normal_tensors():
        tensor = torch.from_numpy(np.ascontiguousarray(x))
        g = nv.per_tensor_amax_to_scale(tensor.abs().max())
        scales, codes = nv.nvfp4_quantize(tensor, 16, g)
        scales, codes = scales.view(torch.uint8).numpy(), codes.view(torch.uint8).numpy()
        codes = np.stack([codes & 15, codes >> 4], -1).reshape(x.shape)
        ours, our_scales, our_g = NVFP4.encode(x, "torchao")
        different = (ours != codes).sum() + (our_scales != scales.reshape(our_scales.shape)).sum()
        agreement("torchao", version("torchao"), "NVFP4", codes.size + scales.size, different, note)
        assert float(our_g) == float(g) and different == 0


def test_compressed_tensors_nvfp4(agreement):
    torch = pytest.importorskip("torch")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    args = quantization.QuantizationArgs(
        num_bits=4, type="float", strategy="tensor_group", group_size=16, symmetric=True,
        scale_dtype=torch.float8_e4m3fn, zp_dtype=torch.float8_e4m3fn,
    )  # fmt: skip
    for note, x in normal_tensors():
        tensor = torch.from_numpy(np.ascontiguousarray(x))
        groups = tensor.reshape(x.shape[0], -1, 16)
        g = generate_gparam(tensor.min(), tensor.max())
        s, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args, global_scale=g)
        q = quantize(tensor, s, zero, args, global_scale=g)
        ours, our_scales, our_g = NVFP4.encode(x, "compressed-tensors")
        ours_s = FORMATS["FP8_E4M3FN"].decode(our_scales)
        different = (FORMATS["FP4_E2M1"].decode(ours) != q.numpy()).sum() + (ours_s != s.float().numpy()).sum()
        decoded = dequantize(q, s, zero, args, global_scale=g).numpy()
        different += (NVFP4.decode(ours, our_scales, our_g) != decoded).sum()
        compared = 2 * x.size + our_scales.size
        agreement("compressed-tensors", version("compressed-tensors"), "NVFP4", compared, different, note)
        assert float(our_g) == float(g) and different == 0


def test_compressed_tensors_mxfp4_scales_are_the_even_rule(agreement):
    torch = pytest.importorskip("torch")
    utils = pytest.importorskip("compressed_tensors.quantization.utils.mxfp_utils")
    x = blocks_of_all_sizes()[:6000]
    amax = np.abs(x).reshape(x.shape[0], -1, 32).max(-1)
    ours = MX_FORMATS["MXFP4"].encode(x, "even")[1]
    theirs = utils.generate_mx_scales(torch.from_numpy(amax), 4).numpy()
    different = (ours != theirs).sum()
    agreement("compressed-tensors", version("compressed-tensors"), "MXFP4 even", theirs.size, different, "scales only")
    np.testing.assert_array_equal(ours, theirs)
