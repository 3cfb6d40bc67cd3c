"""`refllm golden`: exit codes, one-line errors, JSON, and that a tampered folder is never trusted."""

import argparse
import json
import sys

import pytest

from refllm.evaluate.golden import add_parser
from refllm.evaluate.golden.suite import default_root
from tests.golden_tiny import spec, write, write_manifest


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
    """A folder of vectors, and modules beside it."""
    (tmp_path / "mine.py").write_text(
        "import numpy as np\nfrom tests.golden_tiny import double\n"
        "def half(op, p, i): return {'y': i['x'] / 2}\n"
        "def none(op, p, i): raise NotImplementedError\n"
        "def minus(op, p, i):\n    y = double(op, p, i)['y']\n"
        "    return {'y': -y if len(y) == 2 and i['x'][1] == 2 else y}\n"
    )
    monkeypatch.chdir(tmp_path)
    yield write(tmp_path / "vectors")
    sys.modules.pop("mine", None)


def test_exit_codes_of_verify(golden, demo):
    at = ("--vectors", demo)
    assert golden("verify", *at, "--impl", "tests.golden_tiny:double")[0] == 0
    assert golden("verify", *at, "--impl", "mine:half")[0] == 1
    assert golden("verify", *at, "--impl", "mine:none")[0] == 3
    assert golden("verify", *at)[0] == 3  # refllm has no op demo.double
    assert golden("verify", *at, "--impl", "mine:minus")[0] == 1
    assert golden("verify", *at, "--impl", "mine:minus", "--declare", "sign=minus")[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("verify", "demo/gone"), "unknown suite 'demo/gone'; did you mean demo/double?; known: demo/double"),
        (("verify", "demo/double#99"), "has no case 99; ids: 1, 2, 3, 4, 7"),
        (("verify", "--impl", "mine"), "MODULE:FUNCTION"),
        (("verify", "--impl", "gone_module:f"), "gone_module"),
        (("verify", "--impl", "mine:gone"), "gone"),
        (("verify", "--exec"), "no program"),
        (("verify", "--exec", "/no/such/program"), "no program '/no/such/program'"),
        (("verify", "--timeout", "0", "--exec", sys.executable), "positive number of seconds"),
        (("verify", "--declare", "sign=both"), "known: sign=minus, sign=plus"),
        (("verify", "--declare", "ties=away"), "means nothing"),
        (("verify", "--flag", "Gone"), "flags: Basic, Empty, Long, NonFinite"),
        (("verify", "--outputs", "z"), "outputs: y"),
        (("show", "demo/double"), "give SUITE#ID"),
        (("show", "nothing#1"), "unknown suite"),
        (("lint", "x"), "unknown suite"),
        (("export", "vectors"), "not an empty folder"),
    ],
)
def test_usage_errors_are_one_line_and_exit_code_2(golden, demo, words, message):
    code, out, err = golden(*words[:1], "--vectors", demo, *words[1:])
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1


def test_no_such_folder_is_usage(golden, tmp_path):
    assert golden("list", "--vectors", tmp_path / "gone")[0] == 2


@pytest.mark.parametrize("words", [("verify",), ("lint",), ("list",), ("show", "demo/double#1"), ("export", "out")])
@pytest.mark.parametrize("file", ["SHA256SUMS", "demo/double.json", "demo/double.safetensors"])
def test_tampered_vectors_are_exit_code_4(golden, demo, words, file):
    data = (demo / file).read_bytes()
    (demo / file).write_bytes(data.replace(b"1", b"2", 1) if b"1" in data else data[:-1] + b"!")
    code, out, err = golden(*words, "--vectors", demo)
    assert (code, out) == (4, "") and err.startswith("refllm golden: corrupt vectors: ") and err.count("\n") == 1
    assert not (demo.parent / "out").exists()


def test_a_wrong_tensor_hash_is_exit_code_4_even_with_right_file_hashes(golden, demo):
    write_manifest(demo, lambda m: m["groups"][0]["cases"][0]["inputs"]["x"].update(sha256="0" * 64))
    for words in (("lint",), ("show", "demo/double#1"), ("verify", "--impl", "tests.golden_tiny:double")):
        assert golden(*words, "--vectors", demo)[0] == 4


def test_lint_problems_are_exit_code_1(golden, demo):
    write_manifest(demo, lambda m: m.update(num_cases=9))
    code, out, _ = golden("lint", "--vectors", demo)
    assert code == 1 and "num_cases is 9" in out
    assert json.loads(golden("lint", "--json", "--vectors", demo)[1])["problems"][0]["suite"] == "demo/double"


def test_selection_by_case_and_flag(golden, demo):
    def names(*words):
        out = golden("verify", "--json", "--vectors", demo, "--impl", "tests.golden_tiny:double", *words)[1]
        return [case["case"].split("#")[1] for case in json.loads(out)["cases"]]

    assert names("demo/double#7", "demo/double#2") == ["2", "7"]
    assert names("--flag", "Basic") == ["1", "7"]
    assert names("demo/double") == ["1", "2", "3", "4", "7"]


def test_the_report_names_the_flag_and_its_links(golden, demo):
    accepts = golden("verify", "--vectors", demo, "--impl", "mine:half")[1]
    assert "FAIL demo/double#3  NaN  [NonFinite]" in accepts and "an invalid input was accepted" in accepts
    assert "NonFinite (NON_FINITE): 1 of 1 fail. reject" in accepts and "https://example.org/1" in accepts
    assert "demo/double: 1 pass, 4 fail, 0 skip" in accepts


def test_json_of_verify(golden, demo):
    found = json.loads(golden("verify", "--json", "--vectors", demo, "--impl", "mine:half")[1])
    assert (found["schema_version"], found["pass"], found["fail"], found["skip"]) == (1, 1, 4, 0)
    assert found["suites"] == {"demo/double": "1.0.0"} and found["implementation"] == "mine:half"
    assert found["cases"][0]["kind"] == "mismatch" and found["flags"][0]["flag"] == "Basic"


def test_list_and_show(golden, demo):
    code, out, _ = golden("list", "--vectors", demo)
    assert code == 0 and "demo/double 1.0.0  5 cases  op demo.double" in out
    assert golden("list", "--vectors", demo, "--flag", "Gone")[0] == 3
    assert json.loads(golden("list", "--json", "--vectors", demo)[1])["suites"][0]["flags"]["Basic"] == 2
    code, out, _ = golden("show", "--vectors", demo, "demo/double#7")
    assert code == 0 and "expected y if sign=minus f32 [2]\n  [-2. -4.]" in out
    shown = json.loads(golden("show", "--json", "--vectors", demo, "demo/double#3")[1])
    assert shown["arrays"][0]["values"] == ["nan"] and shown["result"] == "invalid"


def test_export_files_can_be_used_in_place_of_the_originals(golden, demo, tmp_path):
    assert golden("export", tmp_path / "out", "--vectors", demo)[0] == 0
    assert golden("lint", "--vectors", tmp_path / "out")[0] == 0
    assert golden("verify", "--vectors", tmp_path / "out", "--impl", "tests.golden_tiny:double")[0] == 0
    text = (tmp_path / "out/demo/double.json").read_text()
    assert '"recipe"' not in text and '"inline"' not in text


def test_export_raw(golden, demo, tmp_path):
    assert golden("export", tmp_path / "out", "demo/double", "--format", "raw", "--vectors", demo)[0] == 0
    assert (tmp_path / "out/cases.txt").read_text().split() == [f"demo/double/{i}" for i in (1, 2, 3, 4, 7)]
    lines = (tmp_path / "out/demo/double/7/case.txt").read_text().splitlines()
    assert "param times 2" in lines and "input x f32 1 2 x.in.bin" in lines
    assert "variant y f32 1 2 y.sign-minus.out.bin class=bits sign=minus" in lines
    minus = (tmp_path / "out/demo/double/7/y.sign-minus.out.bin").read_bytes()
    assert minus == b"\x00\x00\x00\xc0\x00\x00\x80\xc0"  # -2, -4, little-endian
    assert "error value" in (tmp_path / "out/demo/double/3/case.txt").read_text()


@pytest.fixture
def one_generator(monkeypatch):
    """Only the quicker suite; tests/test_golden.py checks all of them."""
    from refllm.evaluate.golden import suites

    monkeypatch.setattr(suites, "GENERATORS", (suites.rtn_matmul.suite,))


def test_regen(golden, tmp_path, one_generator):
    (tmp_path / "new").mkdir()
    assert golden("regen", "--check", "--vectors", tmp_path / "new")[0] == 1
    assert golden("regen", "--vectors", tmp_path / "new")[0] == 0
    assert golden("regen", "--check", "--vectors", tmp_path / "new")[0] == 0
    for end in (".json", ".safetensors"):
        file = f"quant/rtn_matmul{end}"
        assert (tmp_path / "new" / file).read_bytes() == (default_root() / file).read_bytes()
    manifest = tmp_path / "new/quant/rtn_matmul.json"
    text = manifest.read_text(encoding="utf-8")
    manifest.write_text(text.replace('"bits": 4', '"bits": 5', 1), encoding="utf-8")  # a changed case, same version
    code, out, err = golden("regen", "--vectors", tmp_path / "new")
    assert (code, out) == (2, "") and "raise the major part of suite_version above 1.0.0" in err
    assert golden("regen", "--check", "--vectors", tmp_path / "new")[0] == 1


def test_a_suite_without_a_generator_is_reported(golden, tmp_path, one_generator):
    golden("regen", "--vectors", write(tmp_path, spec()))
    assert "demo/double.json has no generator" in golden("regen", "--check", "--vectors", tmp_path)[1]
