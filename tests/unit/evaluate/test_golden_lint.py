"""Lint finds every kind of mistake in a manifest, each by itself, and says where."""

import json

import pytest

from refllm.evaluate.golden.build import CaseSpec, Output, values
from refllm.evaluate.golden.lint import lint
from refllm.evaluate.golden.suite import CorruptVectors
from tests.golden_tiny import BITS, spec, write, write_manifest

MEAN = {"class": "statistical", "test": "mean", "n": 3, "alpha": 1e-6}


def problems(root):
    return [problem for _, problem in lint(root)]


def cases(manifest):
    return manifest["groups"][0]["cases"]


def expected(manifest, at=0):
    return cases(manifest)[at]["expected"]["y"]


def test_a_good_suite_has_no_problem(tmp_path):
    assert problems(write(tmp_path)) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(extra=1), "(top): does not allow 'extra'"),
        (lambda m: m.update(num_cases=4), "num_cases is 4, there are 5"),
        (lambda m: m.update(suite="demo/other"), "suite is 'demo/other', the file is demo/double.json"),
        (
            lambda m: m["notes"].update(Unused={"bug_type": "BASIC", "description": ""}),
            "Unused is explained in notes but",
        ),
        (lambda m: m["notes"].pop("Long"), "flag Long is not explained"),
        (lambda m: m["notes"]["Basic"].update(links=["http://example.org"]), "does not start with https"),
        (lambda m: cases(m)[1].update(id=1), "id 1 stands twice"),
        (lambda m: cases(m)[0].update(flags=[]), "#1 has no flag"),
        (lambda m: cases(m)[2].update(expected=cases(m)[0]["expected"]), "#3 is invalid, yet gives expected values"),
        (lambda m: cases(m)[0].update(expected={}), "#1 expects nothing"),
        (lambda m: cases(m)[0]["inputs"]["x"].pop("sha256"), "#1 x: has no sha256"),
        (lambda m: cases(m)[1]["inputs"]["x"]["recipe"].pop("exp2"), "#2 x: recipe splitmix64_dyadic takes"),
        (lambda m: cases(m)[1]["expected"].update(y=expected(m)), "tensor '2/y' of the data file is not used"),
        (lambda m: cases(m)[0]["inputs"].update({"../x": cases(m)[0]["inputs"]["x"]}), "'../x' is not a plain word"),
        (
            lambda m: expected(m).update(compare={"class": "rank", "top": 3, "min_margin": 0.1}),
            "class 'rank' cannot be compared",
        ),
        (lambda m: expected(m).update(compare={"class": "statistical", "test": "ks", "n": 3}), "cannot be compared"),
        (lambda m: expected(m).update(compare=MEAN), "test mean needs 'bound'"),
        (lambda m: expected(m).update(compare=MEAN | {"alpha": 0.01, "bound": 1}), "must be at most 0.0001"),
        (lambda m: expected(m).update(compare=MEAN | {"test": "chi2", "bound": 1}), "chi2 does not take 'bound'"),
        (lambda m: expected(m).update(compare={"class": "bits", "rtol": 1}), "class bits does not take 'rtol'"),
        (lambda m: expected(m).update(compare={"class": "allclose", "rtol": -1, "atol": 0}), "a bound is negative"),
        (lambda m: expected(m).update(compare={"class": "allclose", "rtol": 0}), "lacks atol"),
        (
            lambda m: expected(m).update(compare={"class": "allclose", "rtol": 0, "atol": 0, "nan": "any"}),
            "not take 'nan'",
        ),
        (lambda m: expected(m, 4)["variants"][1].update(when={"sign": "plus"}), "different, non-empty conditions"),
        (lambda m: expected(m, 4)["variants"][1].update(when={}), "different, non-empty conditions"),
        (lambda m: expected(m, 4)["variants"][1].update(when={"sign": "a/b"}), "'a/b' in a variant's condition"),
    ],
)
def test_each_mistake_is_found(tmp_path, change, message):
    assert any(message in problem for problem in problems(write_manifest(tmp_path, change)))


def test_a_dot_bound_needs_its_reference(tmp_path):
    compare = {"class": "dot_bound", "k": 3, "factor": 1, "abs_ref": "s", "unit": "f32"}
    y, s = values("f64", [3, -4]), Output(BITS, values("f64", [3, 4]))
    case = lambda outputs: CaseSpec(9, "", ("Basic",), {"x": values("f32", [1])}, outputs)
    assert problems(write(tmp_path / "a", spec(extra=[case({"y": Output(compare, y), "s": s})]))) == []
    for name, outputs in {
        "b": {"y": Output(compare, y)},
        "c": {"y": Output(compare, y), "s": Output(BITS, values("f32", [3, 4]))},
        "d": {"y": Output(compare, y), "s": Output(BITS, values("f64", [3]))},
        "e": {"y": Output(compare, values("f32", [3, -4])), "s": s},
    }.items():
        found = problems(write(tmp_path / name, spec(extra=[case(outputs)])))
        assert found == ["#9 y: a dot_bound and its abs_ref 's' must both be f64 of one shape"]


def test_tolerant_classes_need_floats(tmp_path):
    case = CaseSpec(9, "", ("Basic",), {}, {"y": Output({"class": "ulp", "max_ulp": 1}, values("u8", [1]))})
    assert problems(write(tmp_path, spec(extra=[case]))) == ["#9 y: class ulp needs f16, f32 or f64, got u8"]


def test_a_wrong_tensor_hash_is_corruption(tmp_path):
    change = lambda m: cases(m)[0]["inputs"]["x"].update(inline=["0x1.8p+0", "0x1p+1"])
    with pytest.raises(CorruptVectors, match="sha256 of the manifest"):
        problems(write_manifest(tmp_path, change))


def test_a_listed_file_that_is_gone_is_corruption(tmp_path):
    write(tmp_path)
    (tmp_path / "demo/double.json").unlink()
    with pytest.raises(CorruptVectors, match="missing"):
        problems(tmp_path)


def test_manifests_are_plain_json(tmp_path):
    text = (write(tmp_path) / "demo/double.json").read_text(encoding="utf-8")
    assert json.loads(text)["num_cases"] == 5 and max(map(len, text.splitlines())) < 400
