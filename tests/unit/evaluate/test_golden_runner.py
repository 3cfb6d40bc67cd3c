"""Running implementations: Python functions and programs that answer, refuse, hang, crash or write garbage."""

import sys
import time

import numpy as np
import pytest

from refllm.evaluate.golden.programs import program_call
from refllm.evaluate.golden.runner import python_call, run
from refllm.evaluate.golden.suite import read_suites
from tests.golden_tiny import double, write


@pytest.fixture
def suites(tmp_path):
    return list(read_suites(write(tmp_path / "vectors")))


def verdicts(suites, call, **options):
    return {r.case.id: (r.status, r.kind) for r in run(suites, call, **options)}


PASS, SKIP = ("pass", ""), ("skip", "")
ALL = {1: PASS, 2: PASS, 3: PASS, 4: PASS, 7: PASS}


def test_a_right_implementation_passes(suites):
    assert verdicts(suites, python_call(double)) == ALL


def test_variants_follow_what_is_declared(suites):
    assert verdicts(suites, python_call(double), declared={"sign": "plus"}) == ALL
    assert verdicts(suites, python_call(double), declared={"sign": "minus"})[7] == ("fail", "mismatch")
    negative = lambda op, params, inputs: {"y": -2 * inputs["x"]}
    result = next(r for r in run(suites, python_call(negative)) if r.case.id == 7)
    assert result.status == "fail" and result.problems[0].endswith("another convention: --declare sign=minus")
    assert verdicts(suites, python_call(negative), declared={"sign": "minus"})[7] == PASS


def raising(error):
    def function(op, params, inputs):
        raise error

    return function


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (raising(NotImplementedError("no")), dict.fromkeys(ALL, SKIP)),
        (raising(ValueError("no")), {i: ("fail", "rejected") for i in (1, 2, 7)} | {3: PASS, 4: PASS}),
        (raising(ZeroDivisionError()), dict.fromkeys(ALL, ("fail", "crash"))),
        (lambda *a: [1], dict.fromkeys(ALL, ("fail", "garbage"))),
        (lambda *a: {}, dict.fromkeys(ALL, ("fail", "mismatch")) | {3: ("fail", "accepted")}),
        (lambda *a: {"y": 3}, dict.fromkeys(ALL, ("fail", "mismatch")) | {3: ("fail", "accepted")}),
    ],
)
def test_what_can_go_wrong_in_python(suites, function, expected):
    assert verdicts(suites, python_call(function)) == expected


def test_an_implementation_cannot_change_the_next_ones_inputs(suites):
    def scribble(op, params, inputs):
        out = double(op, params, inputs)
        inputs["x"][...] = 0
        params.clear()
        return out

    assert verdicts(suites, python_call(scribble)) == ALL
    assert verdicts(suites, python_call(double)) == ALL


def test_requires_and_outputs(suites):
    suites[0].manifest["groups"][0]["requires"] = ["fast"]
    assert verdicts(suites, python_call(double)) == dict.fromkeys(ALL, SKIP)
    assert verdicts(suites, python_call(double), declared={"fast": "yes"}) == ALL
    none = verdicts(suites, python_call(double), declared={"fast": "yes"}, outputs={"z"})
    assert none == dict.fromkeys(ALL, SKIP) | {3: PASS}


# A consumer that needs nothing but the standard library.
PROGRAM = """
import json, math, struct, sys
request = json.load(open(sys.argv[-1]))
raw = open(request["inputs"], "rb").read()
n = struct.unpack("<Q", raw[:8])[0]
entry = json.loads(raw[8:8 + n])["x"]
begin, end = entry["data_offsets"]
x = struct.unpack("<%df" % ((end - begin) // 4), raw[8 + n + begin:8 + n + end])
if not all(map(math.isfinite, x)):
    print("not finite", file=sys.stderr)
    sys.exit(4)
MISCHIEF
data = struct.pack("<%df" % len(x), *(2 * v for v in x))
header = json.dumps({"y": {"dtype": "F32", "shape": entry["shape"], "data_offsets": [0, len(data)]}}).encode()
open(request["outputs"], "wb").write(struct.pack("<Q", len(header)) + header + data)
"""


def program(tmp_path, mischief="", timeout=20):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM.replace("MISCHIEF", f"if entry['shape'] == [40]:\n    {mischief}" if mischief else ""))
    return program_call([sys.executable, "-S", str(path)], timeout)


def test_a_right_program_passes(suites, tmp_path):
    assert verdicts(suites, program(tmp_path)) == ALL


@pytest.mark.parametrize(
    ("mischief", "kind", "message"),
    [
        ("sys.exit(3)", "", ""),
        ("sys.exit(4)", "rejected", "rejected"),
        ("print('deep'); print('trouble', file=sys.stderr); sys.exit(7)", "crash", "exit code 7: trouble"),
        ("print('all there is'); sys.exit(7)", "crash", "exit code 7: all there is"),
        ("raise RuntimeError('boom')", "crash", "RuntimeError: boom"),
        ("sys.exit(0)", "garbage", "no output file"),
        ("open(request['outputs'], 'wb').write(b'nonsense, not a tensor'); sys.exit(0)", "garbage", "header length"),
        ("open(request['outputs'], 'wb').write(raw[:-1]); sys.exit(0)", "garbage", "outside"),
        ("open(request['outputs'], 'wb').truncate(65 << 20); sys.exit(0)", "garbage", "at most"),
        ("open(request['outputs'], 'wb').write(raw); sys.exit(0)", "mismatch", "missing; got x"),
        ("x = x[::-1]", "mismatch", "differ, first at [0]"),
        ("entry['shape'] = [4, 10]", "mismatch", "shape (40,) was expected, got (4, 10)"),
    ],
)
def test_a_program_that_goes_wrong_spoils_one_case_only(suites, tmp_path, mischief, kind, message):
    results = {r.case.id: r for r in run(suites, program(tmp_path, mischief))}
    assert (results[2].status, results[2].kind) == ("fail" if kind else "skip", kind)
    assert message in " ".join(results[2].problems)
    assert {i: (r.status, r.kind) for i, r in results.items() if i != 2} == {i: PASS for i in (1, 3, 4, 7)}


def test_a_program_that_hangs_is_ended_with_its_children(suites, tmp_path):
    alive = tmp_path / "alive"
    child = f"import time; [(open({str(alive)!r}, 'a').write('.'), time.sleep(0.05)) for _ in range(400)]"
    mischief = f"import subprocess, time; subprocess.Popen([sys.executable, '-S', '-c', {child!r}]); time.sleep(60)"
    start = time.monotonic()
    results = {r.case.id: r for r in run(suites, program(tmp_path, mischief, timeout=1.5))}
    assert time.monotonic() - start < 20
    assert results[2].kind == "timeout" and results[2].problems == ("timeout: no answer within 1.5 s",)
    assert {i: r.status for i, r in results.items() if i != 2} == dict.fromkeys((1, 3, 4, 7), "pass")
    if sys.platform != "win32":  # there, only the program itself can be ended
        size = alive.stat().st_size
        time.sleep(0.3)
        assert alive.stat().st_size == size


def test_a_program_that_cannot_start_is_a_crash(suites, tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    assert verdicts(suites, program_call([str(tmp_path / "empty")], 5)) == dict.fromkeys(ALL, ("fail", "crash"))


def test_inputs_reach_a_program_bit_for_bit(suites, tmp_path):
    odd = np.uint32([0x80000000, 0x7FC00001, 0x00000001, 0xFF800000]).view(np.float32)
    echo = tmp_path / "echo.py"
    echo.write_text(
        "import json, shutil, sys\nr = json.load(open(sys.argv[1]))\n"
        "assert r['op'] == 'demo' and r['params'] == {'n': 3}\nshutil.copy(r['inputs'], r['outputs'])\n"
    )
    answer = program_call([sys.executable, "-S", str(echo)], 20)("demo", {"n": 3}, {"x": odd[::-1], "e": odd[:0]})
    assert answer.kind == "ok", answer.message
    assert np.array_equal(answer.outputs["x"].view(np.uint32), odd[::-1].copy().view(np.uint32))
    assert answer.outputs["e"].shape == (0,)
