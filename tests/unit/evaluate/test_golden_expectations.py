"""`refllm golden verify --skips --xfails --junit --markdown`, `doctor` and `museum` on the command line."""

import argparse
import json
import sys
from xml.etree import ElementTree

import numpy as np
import pytest

from refllm.evaluate.golden import add_parser
from refllm.evaluate.golden.expectations import listed, unmatched
from tests.golden_tiny import write


@pytest.fixture
def golden(capsys):
    """Run a command; returns (exit code, standard output, standard error)."""

    def run(*words):
        parser = argparse.ArgumentParser(prog="refllm")
        add_parser(parser.add_subparsers(required=True))
        args = parser.parse_args(["golden", *map(str, words)])
        code = args.run(args)
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """Vectors, an implementation that doubles twice, and programs beside them."""
    (tmp_path / "four.py").write_text(
        "from tests.golden_tiny import double\ndef times(op, p, i): return {'y': 2 * double(op, p, i)['y']}\n"
    )
    monkeypatch.chdir(tmp_path)
    yield write(tmp_path / "vectors")
    sys.modules.pop("four", None)


def verify(golden, demo, *words, impl="four:times"):
    return golden("verify", "--vectors", demo, "--impl", impl, *words)


def test_patterns():
    assert listed("quant/rtn#20", ["quant/rtn#2*"]) and listed("quant/rtn#20", ["quant/*"])
    assert not listed("quant/rtn#20", ["quant/rtn#2"]) and not listed("quant/rtn_matmul#2", ["quant/rtn"])
    assert unmatched(["a#1", "b"], ["a#1", "a#2"]) == ["b"]


def test_skips(golden, demo):
    (demo.parent / "skips").write_text("# what we do not do\ndemo/double#[127]\n\n")
    code, out, _ = verify(golden, demo, "--skips", "skips")
    assert code == 0 and "demo/double: 2 pass, 0 fail, 0 skip" in out  # the NaN and the empty case are left
    assert verify(golden, demo, "--skips", "skips", "--flag", "Basic")[0] == 3


def test_xfails(golden, demo):
    (demo.parent / "xfails").write_text("demo/double#1\ndemo/double#2\ndemo/double#7\n")
    code, out, _ = verify(golden, demo, "--xfails", "xfails")
    assert code == 0 and "demo/double: 2 pass, 0 fail, 0 skip, 3 xfail" in out
    found = json.loads(verify(golden, demo, "--xfails", "xfails", "--json")[1])
    assert (found["xfail"], found["xpass"]) == (3, 0)
    assert [case["status"] for case in found["cases"]].count("xfail") == 3


def test_an_unexpected_pass_fails(golden, demo):
    (demo.parent / "xfails").write_text("demo/double#1\n")
    code, out, _ = verify(golden, demo, "--xfails", "xfails", impl="tests.golden_tiny:double")
    assert code == 1 and "XPASS demo/double#1" in out and "4 pass, 0 fail, 0 skip, 1 xpass" in out


def test_only_expected_failures_are_success(golden, demo):
    (demo.parent / "xfails").write_text("demo/double\n")
    assert verify(golden, demo, "--xfails", "xfails", "--flag", "Basic")[0] == 0


def test_junit(golden, demo):
    (demo.parent / "xfails").write_text("demo/double#7\n")
    verify(golden, demo, "--junit", "out.xml", "--xfails", "xfails")
    suite = ElementTree.parse(demo.parent / "out.xml").getroot().find("testsuite")
    counts = {key: int(suite.get(key)) for key in ("tests", "failures", "skipped")}
    failed = [case.get("name") for case in suite if case.find("failure") is not None]
    assert counts["tests"] == 5 and counts["failures"] == len(failed) and counts["skipped"] == 1
    assert "demo/double#1 Basic" in failed
    assert "got 6.0, expected 3.0" in suite.find("testcase/failure").get("message")


def test_markdown(golden, demo):
    verify(golden, demo, "--markdown", "out.md")
    text = (demo.parent / "out.md").read_text()
    assert "| suite | pass | fail | skip | xfail | xpass |" in text and "| demo/double | " in text
    assert "- `demo/double#1` two numbers (Basic): `y: 2 of 2 differ" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("verify", "--skips", "gone"), "gone"),
        (("verify", "--xfails", "typo"), "demo/double#99 names no case"),
        (("verify", "--junit", "no/folder/x.xml"), "no/folder"),
        (("doctor", "demo/double", "--got", "y.npy"), "one SUITE#ID"),
        (("doctor", "demo/double#1", "--got", "gone.npy"), "gone.npy"),
        (("doctor", "demo/double#1", "--got", "y.bin"), "which --output"),
        (("doctor", "demo/double#1", "--got", "y.bin", "--output", "y"), "y has 8 bytes, the file 3"),
        (("doctor", "demo/double#1", "--got", "pickle.npy"), "pickle.npy"),
        (("doctor", "demo/double#1", "--got", "y.npy", "--output", "z"), "has no output 'z'"),
        (("doctor", "demo/double#3", "--got", "y.npy"), "must be rejected"),
        (("doctor", "--output", "y"), "goes with --got"),
        (("museum", "gone"), "no mutant 'gone'"),
    ],
)
def test_usage_errors_are_one_line_and_exit_code_2(golden, demo, words, message):
    (demo.parent / "typo").write_text("demo/double#99\n")
    np.save(demo.parent / "y.npy", np.float32([6, -8]))
    np.save(demo.parent / "pickle.npy", np.array([{}], object), allow_pickle=True)
    (demo.parent / "y.bin").write_bytes(b"abc")
    impl = ("--impl", "four:times") if words[0] == "verify" else ()
    code, out, err = golden(*words[:1], "--vectors", demo, *words[1:], *impl)
    assert code == 2 and message in err and err.count("\n") == 1
    assert out == "" or words[1] == "--junit"


def test_doctor_exit_codes_and_text(golden, demo):
    code, out, _ = golden("doctor", "--vectors", demo, "--impl", "four:times")
    assert code == 1 and "factor-of-two (output y*2) explains" in out.replace("output y)", "output y*2)")
    assert "https://github.com/tinygrad/tinygrad/pull/14866" in out
    assert golden("doctor", "--vectors", demo, "--impl", "tests.golden_tiny:double")[0] == 0
    assert golden("doctor", "--vectors", demo) == (3, "no case ran\n", "")
    found = json.loads(golden("doctor", "--vectors", demo, "--impl", "four:times", "--json")[1])
    assert found["suites"][0]["findings"][0]["mistake"] == "factor-of-two"


def test_doctor_of_one_array(golden, demo):
    np.save(demo.parent / "y.npy", np.float32([6, -8]))
    assert "factor-of-two" in golden("doctor", "--vectors", demo, "demo/double#1", "--got", "y.npy")[1]
    (demo.parent / "y.bin").write_bytes(np.float32([3, -4]).tobytes())
    code, out, _ = golden("doctor", "--vectors", demo, "demo/double#1", "--got", "y.bin")
    assert code == 0 and "nothing is wrong" in out


def test_tampered_vectors_are_exit_code_4_for_the_doctor_too(golden, demo):
    data = (demo / "demo/double.safetensors").read_bytes()
    (demo / "demo/double.safetensors").write_bytes(data[:-1] + b"!")
    code, out, err = golden("doctor", "--vectors", demo, "--impl", "four:times")
    assert (code, out) == (4, "") and err.startswith("refllm golden: corrupt vectors: ")


def test_museum_of_one_mutant(golden):
    code, out, _ = golden("museum", "k-permuted-by-group")
    assert code == 0 and "model/rope_permute" in out and "1 mutants: 1 killed, 1 named by the doctor (100 %)" in out
    entry = json.loads(golden("museum", "k-permuted-by-group", "--json")[1])["mutants"][0]
    assert entry["killed"] and entry["right"] and entry["year"] == 2023


def test_a_museum_without_its_vectors_ran_nothing(golden, demo):
    assert golden("museum", "--vectors", demo)[0] == 3


def test_a_program_that_misbehaves_is_reported_per_case_and_the_run_goes_on(golden, demo, tmp_path):
    program = tmp_path / "p.py"
    program.write_text(
        "import json, sys, time\nr = json.load(open(sys.argv[-1]))\nraw = open(r['inputs'], 'rb').read()\n"
        "if b'[40]' in raw: time.sleep(60)\n"
        "if b'[0]' in raw: open(r['outputs'], 'wb').write(b'nonsense'); sys.exit(0)\n"
        "if b'[1]' in raw: sys.exit(4)\n"
        "sys.exit(9)\n"
    )
    words = ("verify", "--vectors", demo, "--json", "--timeout", "1", "--exec", sys.executable, "-S", program)
    code, out, _ = golden(*words)
    kinds = {case["case"]: case["kind"] for case in json.loads(out)["cases"]}
    assert code == 1 and kinds == {
        "demo/double#1": "crash", "demo/double#2": "timeout", "demo/double#3": "", "demo/double#4": "garbage",
        "demo/double#7": "crash",
    }  # fmt: skip
