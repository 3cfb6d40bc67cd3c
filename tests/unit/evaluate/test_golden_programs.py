"""Programs in the form "raw", and programs that stay: what they give is judged, whatever they do, case by case."""

import sys
import time

import numpy as np
import pytest

from refllm.evaluate.golden import raw
from refllm.evaluate.golden.programs import BatchCall, program_call

# Doubles x; a request or - as the last argument. MISCHIEF may come before a case with n = 2 is answered.
PROGRAM = """
import os, sys, time

def answer(path):
    folder = os.path.dirname(path)
    lines = [line.split() for line in open(path).read().splitlines()]
    n = next(int(line[2]) for line in lines if line[:2] == ["param", "n"])
    _, name, dtype, axes, size, file = next(line for line in lines if line[0] == "input")
    assert (name, dtype, axes) == ("x", "u8", "1")
    data = open(os.path.join(folder, file), "rb").read()
    output = "output y u8 1 " + size + " y.bin"
    MISCHIEF
    open(os.path.join(folder, "y.bin"), "wb").write(bytes(2 * b for b in data))
    open(os.path.join(folder, "answer.txt"), "w").write(output + chr(10))
    return 0

if sys.argv[-1] != "-":
    sys.exit(answer(sys.argv[-1]))
for line in sys.stdin:
    print(answer(line.strip()), flush=True)
"""


@pytest.fixture(params=[program_call, BatchCall])
def program(request, tmp_path):
    """program(mischief, timeout) -> call, for both ways to run it."""

    def make(mischief="pass", timeout=30):
        path = tmp_path / "program.py"
        path.write_text(PROGRAM.replace("MISCHIEF", f"if n == 2: {mischief}"))
        return request.param([sys.executable, "-S", str(path)], timeout, "raw")

    return make


def ask(call, n, x=(1, 2, 3)):
    return call("demo", {"n": n}, {"x": np.uint8(x)})


def test_answers_come_back(program):
    call = program()
    for x in ([1, 2, 3], [], [7]):
        answer = ask(call, 1, x)
        assert (answer.kind, list(answer.outputs)) == ("ok", ["y"])
        assert answer.outputs["y"].dtype == np.uint8 and answer.outputs["y"].tolist() == [2 * v for v in x]


@pytest.mark.parametrize(
    ("mischief", "kind", "message"),
    [
        ("return 3", "unsupported", ""),
        ("return 4", "rejected", ""),
        ("return 9", "crash", "exit code 9"),
        ("os._exit(7)", "crash", "exit code 7"),
        ("return 0", "garbage", "no answer.txt"),
        ("output = 'nonsense'", "garbage", "was expected, got 'nonsense'"),
        ("output = 'output y u8 1 -3 y.bin'", "garbage", "was expected"),
        ("output = 'output y u8 2 3 y.bin'", "garbage", "was expected"),
        ("output = 'output y u9 1 3 y.bin'", "garbage", "unknown dtype 'u9'"),
        ("output = 'output y f32 1 3 y.bin'", "garbage", "12 bytes were expected for f32 (3,), got 3"),
        ("output = 'output y u8 2 999999999 999999999 y.bin'", "garbage", "got 3"),
        ("output = 'output y u8 1 3 ../y.bin'", "garbage", "no file"),
        ("output = 'output y u8 1 3 z.bin'", "garbage", "no file"),
    ],
)
def test_what_goes_wrong_spoils_one_case_only(program, mischief, kind, message):
    call = program(mischief)
    kinds = [ask(call, n).kind for n in (1, 2, 1)]
    assert kinds == ["ok", kind, "ok"]
    assert message in ask(call, 2).message


def test_a_program_that_hangs_is_ended_and_started_again(program):
    call = program("time.sleep(60)", timeout=3)
    start = time.monotonic()
    assert [ask(call, n).kind for n in (1, 2, 1)] == ["ok", "timeout", "ok"]
    assert time.monotonic() - start < 30


def test_standard_output_of_a_batch_is_for_codes_only(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM.replace("MISCHIEF", "if n == 2: print('hello', flush=True)"))
    call = BatchCall([sys.executable, "-S", str(tmp_path / "program.py")], 30, "raw")
    answers = [ask(call, n) for n in (1, 2, 1)]
    assert [a.kind for a in answers] == ["ok", "garbage", "ok"]
    assert "'hello" in answers[1].message


def test_a_batch_that_cannot_start_is_a_crash(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    assert ask(BatchCall([str(tmp_path / "empty")], 5, "raw"), 1).kind == "crash"


def test_close_ends_the_program(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM.replace("MISCHIEF", "pass"))
    call = BatchCall([sys.executable, "-S", str(tmp_path / "program.py")], 30, "raw")
    assert ask(call, 1).kind == "ok"
    assert call.close() == 0 and call.close() is None
    assert ask(call, 1).kind == "ok"


def test_a_request_names_storage_types_and_is_little_endian(tmp_path):
    inputs = {"a": np.array([[1, 2]], ">i4"), "b": np.float16(1.5), "c": np.zeros((0, 3), np.uint64)}
    path = raw.write_request(tmp_path, "demo", {"bits": 4, "name": "x y", "list": [1, 2]}, inputs)
    assert path.read_text().splitlines() == [
        "op demo",
        "param bits 4",
        'param name "x y"',
        "param list [1, 2]",
        "input a i32 2 1 2 a.in.bin",
        "input b f16 0 b.in.bin",
        "input c u64 2 0 3 c.in.bin",
    ]
    assert (tmp_path / "a.in.bin").read_bytes() == b"\1\0\0\0\2\0\0\0"
    assert (tmp_path / "b.in.bin").read_bytes() == np.float16(1.5).tobytes()
