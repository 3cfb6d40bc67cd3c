"""The suites refllm ships: well formed, what their generators write, passed by refllm, and sharp.

Sharp: every known mistake is caught, and under the flag that names it.
"""

from collections import Counter

import pytest

from refllm.evaluate.golden.lint import lint
from refllm.evaluate.golden.own import implementation
from refllm.evaluate.golden.runner import python_call, run
from refllm.evaluate.golden.suite import default_root, read_suites, suite_names
from tests import (
    golden_mutants,
    golden_mutants_attention,
    golden_mutants_binary,
    golden_mutants_checkpoints,
    golden_mutants_codebooks,
    golden_mutants_distilled,
    golden_mutants_exl2,
    golden_mutants_gguf,
    golden_mutants_gptq,
    golden_mutants_kv_codes,
    golden_mutants_latents,
    golden_mutants_methods,
    golden_mutants_mixes,
    golden_mutants_numbers,
    golden_mutants_outliers,
    golden_mutants_pairs,
    golden_mutants_ranges,
    golden_mutants_rotations,
    golden_mutants_scaled,
    golden_mutants_sequence,
)

MUTANTS = (
    golden_mutants_methods,
    golden_mutants_numbers,
    golden_mutants_gguf,
    golden_mutants_checkpoints,
    golden_mutants_codebooks,
    golden_mutants_distilled,
    golden_mutants_binary,
    golden_mutants_exl2,
    golden_mutants_rotations,
    golden_mutants_gptq,
    golden_mutants_kv_codes,
    golden_mutants_latents,
    golden_mutants_mixes,
    golden_mutants_ranges,
    golden_mutants_scaled,
    golden_mutants_outliers,
    golden_mutants_attention,
    golden_mutants_pairs,
    golden_mutants_sequence,
)
SUITES = list(read_suites(default_root()))
RTN = [suite for suite in SUITES if suite.name.startswith("quant/rtn")]
# (suite, mistake) -> the flag that must be among the failing ones; None is no mistake.
BUGS = {
    ("quant/rtn_matmul" if bug.startswith("mm_") else "quant/rtn", bug): flag
    for bug, flag in golden_mutants.BUGS.items()
} | {
    (suite.name, bug): flag
    for suite in SUITES
    for module in MUTANTS
    for bug, flag in module.BUGS.get(suite.manifest["op"], {}).items()
}
# Mistakes that only cases about them may show: their failures lie within these flags.
ONLY = {
    "ties_away": {"TieToEven", "DivideByScale"},
    "reciprocal": {"DivideByScale"},
    "float64_arithmetic": {"DoubleRounding"},
    "fake_quantization": {"NegativeZero", "Clip"},
    "zero_scale_kept": {"ScaleUnderflow"},
    "no_clip": {"Clip"},
    "nan_ignored": {"NonFinite", "ScaleOverflow"},
    "scale_saturates": {"ScaleOverflow"},
    "group_padded": {"GroupNotDividing"},
    "group_tail_merged": {"GroupNotDividing"},
    "no_params_check": {"BadParams"},
    "flattens": {"BadShape"},
    "float16_scale_always": {"Float32Scale"},
    "mm_flush_subnormal_scale": {"Subnormal"},
    "mm_no_finite_check": {"NonFinite"},
    "mm_no_shape_check": {"BadShape"},
}


def failures(suite_name, bug):
    chosen = [suite for suite in SUITES if suite.name == suite_name]
    op = chosen[0].manifest["op"]
    mutants = next((module for module in MUTANTS if op in module.BUGS), golden_mutants)
    return [r for r in run(chosen, python_call(mutants.mutant(bug))) if r.status != "pass"]


@pytest.fixture(scope="module")
def kills():
    """{(suite, mistake): its failing results}."""
    return {(suite, bug): failures(suite, bug) for suite, bug in BUGS}


def test_lint_finds_nothing():
    assert {"quant/rtn", "quant/rtn_matmul"} <= set(suite_names(default_root()))
    assert list(lint(default_root())) == []


def test_shipped_vectors_stay_small():
    """Every suite within 300 kB, all of them within the 10 MB that data/golden may have."""
    sizes = Counter()
    for suite in SUITES:
        sizes[suite.name] = sum(suite.path.with_suffix(end).stat().st_size for end in (".json", ".safetensors"))
    assert max(sizes.values()) <= 300_000 and sizes.total() <= 10_000_000


@pytest.mark.parametrize("kernels", ["numpy", "numba"])
def test_refllm_passes(kernels, monkeypatch):
    monkeypatch.setenv("REFLLM_KERNELS", kernels)
    results = list(run(SUITES, python_call(implementation)))
    assert [(r.case.name, r.problems) for r in results if r.status != "pass"] == []
    assert len(results) == sum(len(suite.cases) for suite in SUITES) >= 100


@pytest.mark.parametrize("suite", [suite.name for suite in SUITES])
def test_a_second_implementation_without_mistakes_passes(suite):
    assert [(r.case.name, r.problems) for r in failures(suite, None)] == []


@pytest.mark.parametrize(("suite", "bug"), BUGS)
def test_mutant_is_killed_under_its_flag(suite, bug, kills):
    failed = kills[suite, bug]
    assert BUGS[suite, bug] in {flag for r in failed for flag in r.case.flags}
    assert "crash" not in {r.kind for r in failed}, "a mutant gives wrong answers, it does not fall over"
    if suite.startswith("quant/rtn") and bug in ONLY:
        assert all(ONLY[bug] & set(r.case.flags) for r in failed)


def test_every_flag_catches_a_mutant(kills):
    """A flag that no mistake fails under proves nothing."""
    flags = {(case.suite, flag) for suite in SUITES for case in suite.cases for flag in case.flags}
    caught = {(suite, flag) for (suite, _), failed in kills.items() for r in failed for flag in r.case.flags}
    assert flags - caught == set()


def test_every_flag_is_named_by_a_mutant():
    """Stronger than the test above: a mutant was written for the flag (the two suites of rtn share theirs)."""
    family = lambda suite: suite.removesuffix("_matmul")
    flags = {(family(suite.name), flag) for suite in SUITES for case in suite.cases for flag in case.flags}
    assert flags - {(family(suite), flag) for (suite, _), flag in BUGS.items()} == set()


def test_every_way_refllm_attends_is_judged():
    def spoilt(op, params, inputs):
        ways = implementation(op, params, inputs)
        return ways | {"flash_v1": {name: array + 1 for name, array in ways["flash_v1"].items()}}

    flash = [suite for suite in SUITES if suite.name == "attention/flash"]
    results = [r for r in run(flash, python_call(spoilt)) if r.case.result == "valid"]
    assert len(results) > 10 and {r.status for r in results} == {"fail"}
    assert all(problem.startswith("flash_v1: ") for r in results for problem in r.problems)


def test_ties_away_passes_when_it_is_declared():
    results = list(run(RTN, python_call(golden_mutants.mutant("ties_away")), declared={"ties": "away"}))
    assert [r.case.name for r in results if r.status != "pass"] == []


def test_float64_arithmetic_passes_when_it_is_declared():
    results = list(
        run(RTN, python_call(golden_mutants.mutant("float64_arithmetic")), declared={"arithmetic": "float64"})
    )
    assert [r.case.name for r in results if r.status != "pass"] == []


def test_suites_are_what_their_generators_write():
    from refllm.evaluate.golden.build import folder_files, render
    from refllm.evaluate.golden.suite import SCHEMA_FILE
    from refllm.evaluate.golden.suites import GENERATORS

    root = default_root()
    files = {}
    for generate in GENERATORS:
        files |= render(generate())
    for name, data in folder_files(files, (root / SCHEMA_FILE).read_bytes()).items():
        assert (root / name).read_bytes() == data, f"{name}: run `refllm golden regen`"
