"""The consumers in docs/consumers pass the suites they support, and fail when they are wrong.

They are what people start from, so their own judgement (golden.h) is tested too: against refllm's, class by class.
"""

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from refllm.cli import main
from refllm.evaluate.golden import raw
from refllm.evaluate.golden.compare import Expected, mismatch
from refllm.evaluate.golden.suite import default_root, read_suites
from refllm.formats.dtypes import BF16

CONSUMERS = Path(__file__).parents[1] / "docs/consumers"
# op -> suites must exist for it and are run whole; what a consumer does not know it must say.
OPS = {
    *("formats.float.encode", "formats.float.decode", "formats.gguf.decode", "formats.gptq", "formats.awq"),
    "quant.rtn.matmul",
}
SUITES = [suite for suite in read_suites(default_root()) if suite.manifest["op"] in OPS]
NAMES = [suite.name for suite in SUITES]
INF, NAN = float("inf"), float("nan")


def compile_consumer(folder, *flags):
    cc = next((path for path in map(shutil.which, ("cc", "gcc", "clang")) if path), None)
    if cc is None:
        pytest.skip("no C compiler (cc, gcc or clang) on this machine: the C consumer is NOT tested")
    program = folder / ("consumer" + "".join(flags))
    command = [cc, "-std=c99", "-O2", "-Wall", "-Wextra", *flags, "-o", program, CONSUMERS / "c/consumer.c", "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return str(program)


@pytest.fixture(scope="module")
def c_consumer(tmp_path_factory):
    return compile_consumer(tmp_path_factory.mktemp("c"))


@pytest.fixture(scope="module")
def js_consumer():
    if shutil.which("node") is None:
        pytest.skip("no node on this machine: the JavaScript consumer is NOT tested")
    return ["node", str(CONSUMERS / "js/consumer.mjs")]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "cases"
    assert main(["golden", "export", str(folder), *NAMES, "--format", "raw"]) == 0
    return folder


def run(*command):
    """Exit code and {suite: (passed, failed, unsupported)}, and the whole text."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, timeout=60)
    lines = re.findall(r"^(\S+): (\d+) passed, (\d+) failed, (\d+) unsupported$", done.stdout, re.MULTILINE)
    return done.returncode, {name: tuple(map(int, counts)) for name, *counts in lines}, done.stdout + done.stderr


def verify(capsys, *words):
    """Exit code and {suite: (pass, fail, skip)}, and the whole text."""
    code = main(["golden", "verify", *map(str, words)])
    text = capsys.readouterr().out
    lines = re.findall(r"^([a-z0-9_/]+): (\d+) pass, (\d+) fail, (\d+) skip$", text, re.MULTILINE)
    return code, {name: tuple(map(int, counts)) for name, *counts in lines}, text


def unsupported(case):
    """Block formats that the consumers do not know, and packing; everything else they must answer."""
    if case.op == "formats.gguf.decode":
        return case.params["type"] not in ("Q4_0", "Q8_0", "Q4_K", "Q6_K", "MXFP4")
    return case.params.get("direction") == "pack"


def expected_counts():
    counts = {suite.name: Counter(map(unsupported, suite.cases)) for suite in SUITES}
    return {name: (count[False], 0, count[True]) for name, count in counts.items()}


def test_every_op_has_a_suite():
    assert {suite.manifest["op"] for suite in SUITES} == OPS


def test_c_judges_a_folder(c_consumer, exported):
    code, counts, text = run(c_consumer, exported)
    assert (code, counts) == (0, expected_counts()), text


def test_verify_judges_c(c_consumer, capsys):
    code, counts, text = verify(capsys, *NAMES, "--batch", "--format", "raw", "--exec", c_consumer)
    assert (code, counts) == (0, expected_counts()), text


def test_verify_judges_javascript(js_consumer, capsys):
    code, counts, text = verify(capsys, *NAMES, "--batch", "--exec", *js_consumer)
    assert (code, counts) == (0, expected_counts()), text


FEW = ("quant/rtn_matmul#1", "quant/rtn_matmul#40", "attention/flash#1")  # valid, invalid, unsupported


def test_one_process_a_case(c_consumer, capsys):
    code, counts, text = verify(capsys, *FEW, "--format", "raw", "--exec", c_consumer)
    assert (code, counts) == (0, {"quant/rtn_matmul": (2, 0, 0), "attention/flash": (0, 0, 1)}), text


def test_one_process_a_case_in_javascript(js_consumer, capsys):
    code, counts, text = verify(capsys, *FEW, "--exec", *js_consumer)
    assert (code, counts) == (0, {"quant/rtn_matmul": (2, 0, 0), "attention/flash": (0, 0, 1)}), text


def swapped_suites():
    """Suites that cannot pass with nibbles swapped."""
    return [suite.name for suite in SUITES if suite.manifest["op"] in ("formats.gguf.decode", "formats.awq")]


def test_swapped_nibbles_are_caught_in_c(exported, tmp_path):
    code, counts, text = run(compile_consumer(tmp_path, "-DSWAP_NIBBLES"), exported)
    assert code == 1, text
    assert {name for name, (_, failed, _) in counts.items() if failed} == set(swapped_suites())
    assert "FAIL formats/gguf" in text


def test_swapped_nibbles_are_caught_in_javascript(js_consumer, capsys, monkeypatch):
    monkeypatch.setenv("SWAP_NIBBLES", "1")
    code, counts, text = verify(capsys, *NAMES, "--batch", "--exec", *js_consumer)
    assert code == 1, text
    assert {name for name, (_, failed, _) in counts.items() if failed} == set(swapped_suites())


def test_declaring_another_convention_fails_and_says_so(c_consumer, exported):
    code, _, text = run(c_consumer, exported, "ties=away")
    assert code == 1
    assert "right under another convention: class=bits ties=even" in text


def test_nothing_supported_is_exit_code_3(c_consumer, tmp_path):
    assert main(["golden", "export", str(tmp_path / "out"), "attention/flash", "--format", "raw"]) == 0
    assert run(c_consumer, tmp_path / "out")[0] == 3


@pytest.mark.parametrize("harm", ["short", "long", "gone"])
def test_damaged_files_are_exit_code_4(c_consumer, tmp_path, harm):
    assert main(["golden", "export", str(tmp_path / "out"), "quant/rtn_matmul", "--format", "raw"]) == 0
    file = tmp_path / "out/quant/rtn_matmul/1/y.out.bin"
    data = file.read_bytes()
    file.unlink()
    if harm != "gone":
        file.write_bytes(data[:-1] if harm == "short" else data + b"x")
    code, _, text = run(c_consumer, tmp_path / "out")
    assert code == 4 and "y.out.bin" in text


def f32(*numbers):
    return np.float32(numbers)


def bits(*codes):
    return np.uint32(codes).view(np.float32)


def decoded(*numbers):
    """An answer of formats.float.decode: numbers that bfloat16 holds."""
    return "formats.float.decode", "BF16", "x", "f32", BF16.encode(np.float32(numbers))


def encoded(name, dtype, *numbers):
    return "formats.float.encode", name, "codes", dtype, np.float32(numbers)


ANY, PAYLOAD = {"class": "bits"}, {"class": "bits", "nan": "payload"}
IGNORE, STRICT = {"class": "bits", "zero_sign": "ignore"}, {"class": "bits", "zero_sign": "strict"}
ONE_ULP, TWO_ULP = {"class": "ulp", "max_ulp": 1}, {"class": "ulp", "max_ulp": 2}
CLOSE = {"class": "allclose", "rtol": 0.125, "atol": 0.25}
BOUND = {"class": "dot_bound", "k": 3, "factor": 1, "abs_ref": "x_abs", "unit": "f32"}
RMS = {"class": "rms_peak", "rms": 0.5, "peak": 0.75}
UP, UP2 = 0x3F800001, 0x3F800002  # 1 and one, two steps
# What is asked, the expected array, how they are compared.
JUDGED = [
    (decoded(1, -2, INF), f32(1, -2, INF), ANY),
    (decoded(1, -2), f32(1, 2), ANY),
    (decoded(1, -2), f32(1, -2, 3), ANY),
    (decoded(1, -2), f32(1, -2).reshape(2, 1), ANY),
    (decoded([1], [-2]), f32(1, -2), ANY),
    (decoded(NAN), bits(0xFFC12345), ANY),
    (decoded(NAN), bits(0xFFC12345), PAYLOAD),
    (decoded(NAN), f32(INF), ANY),
    (decoded(0.0, -0.0), f32(0.0, -0.0), ANY),
    (decoded(0.0, -0.0), f32(-0.0, -0.0), ANY),
    (decoded(0.0, -0.0), f32(-0.0, -0.0), STRICT),
    (decoded(0.0, -0.0), f32(-0.0, 0.0), IGNORE),
    (decoded(0.0), bits(1), IGNORE),
    (encoded("FP8_E4M3FN", "f8_e4m3fn", NAN, 1), np.uint8([0xFF, 0x38]), ANY),
    (encoded("FP8_E4M3FN", "f8_e4m3fn", NAN, 1), np.uint8([0xFE, 0x38]), ANY),
    (encoded("FP8_E5M2", "f8_e5m2", NAN), np.uint8([0xFD]), ANY),
    (encoded("FP8_E5M2", "f8_e5m2", NAN), np.uint8([0x7C]), ANY),
    (encoded("FP8_E4M3FN", "f8_e4m3fn", 0), np.uint8([0x80]), ANY),
    (encoded("FP8_E4M3FN", "f8_e4m3fn", 0), np.uint8([0x80]), IGNORE),
    (encoded("FP8_E4M3FNUZ", "f8_e4m3fnuz", NAN), np.uint8([0x80]), ANY),
    (encoded("FP8_E4M3FNUZ", "f8_e4m3fnuz", 0), np.uint8([0x80]), IGNORE),
    (encoded("BF16", "bf16", NAN, 2), np.uint16([0xFF81, 0x4000]), ANY),
    (encoded("BF16", "bf16", NAN, 2), np.uint16([0xFF80, 0x4000]), ANY),
    (encoded("FP16", "f16", 1, 2), np.float16([1, 2]), ANY),
    (encoded("FP16", "f16", 1, 2), np.float16([1, 2.002]), ONE_ULP),
    (encoded("FP16", "f16", 1, 2), np.float16([1, 2.004]), ONE_ULP),
    (decoded(1), bits(UP), ONE_ULP),
    (decoded(1), bits(UP2), ONE_ULP),
    (decoded(1), bits(UP2), TWO_ULP),
    (decoded(0), bits(0x80000001), ONE_ULP),
    (decoded(0), bits(0x80000002), ONE_ULP),
    (decoded(0), f32(-0.0), ONE_ULP),
    (decoded(INF), bits(0x7F7FFFFF), ONE_ULP),
    (decoded(1), f32(-1), ONE_ULP),
    (decoded(NAN), f32(NAN), ONE_ULP),
    (decoded(10, -1, 0, INF), f32(8.75, -1.25, -0.0, INF), CLOSE),
    (decoded(10), f32(8.625), CLOSE),
    (decoded(INF), f32(-INF), CLOSE),
    (decoded(NAN), f32(1), CLOSE),
    (decoded(NAN, 1), f32(NAN, 1), CLOSE),
    (decoded(1, 2), np.float64([1 + 2.0**-20, 2]), BOUND),
    (decoded(1, 2), np.float64([1 + 2.0**-19, 2]), BOUND),
    (decoded(1, 2), np.float64([NAN, 2]), BOUND),
    (decoded(1, 2, NAN), f32(1.5, 2.5, NAN), RMS),
    (decoded(1, 2), f32(1.75, 2), RMS),
    (decoded(1, 2), f32(1.75, 2.75), RMS),
    (decoded(1, 2, 3), f32(2, 2, 3), RMS),
    (decoded(1, 2, 3, 4), f32(1.875, 2, 3, 4), RMS),
    (decoded(1, INF), f32(1, 2), RMS),
    (decoded(1, 2), f32(1, INF), RMS),
]


def test_the_judgement_of_golden_h_is_that_of_refllm(c_consumer, tmp_path):
    from refllm.evaluate.golden.own import implementation

    wanted, lines = {}, []
    for number, ((op, name, output, dtype, given), expected, compare) in enumerate(JUDGED):
        suite, place = f"t{number}", tmp_path / f"t{number}"
        place.mkdir()
        params, inputs = {"format": name}, {"codes" if op.endswith("decode") else "x": given}
        got = implementation(op, params, inputs)[output]
        S = np.full(expected.shape, 8.0)
        options = " ".join(f"{key}={value}" for key, value in compare.items())
        logical = "f64" if compare is BOUND else dtype
        text = [f"suite {suite}", "id 1", f"op {op}", "result valid", "comment -", *raw.param_lines(params)]
        text += [raw.write_array(place, "input", key, raw.NAMES[a.dtype], a, "in.bin") for key, a in inputs.items()]
        text.append(raw.write_array(place, "expect", output, logical, expected, "out.bin") + " " + options)
        if compare is BOUND:
            text.append(raw.write_array(place, "expect", "x_abs", "f64", S, "abs.bin") + " class=bits")
        (place / "case.txt").write_text("\n".join(text) + "\n")
        lines.append(suite)
        right = mismatch(got, Expected(expected, logical, compare, S)) is None
        wanted[suite] = (int(right), int(not right), 0)
    (tmp_path / "cases.txt").write_text("\n".join(lines) + "\n")
    code, counts, text = run(c_consumer, tmp_path)
    assert counts == wanted, text
    assert code == 1 and {(1, 0, 0), (0, 1, 0)} == set(wanted.values())
