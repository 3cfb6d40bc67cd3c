"""What the suites about rounded inputs and outliers share: outputs, heads, rejected cases."""

from refllm.evaluate.golden.build import CaseSpec, Output, SuiteSpec, values
from refllm.evaluate.golden.suites.exact import dyadic, dyadic_recipe

BITS = {"class": "bits", "zero_sign": "ignore"}


def drawn_rows(seed: int, rows: int, columns: int, scale: int = -9) -> list[list]:
    """Dyadic random rows."""
    flat = dyadic(seed, 12, scale, rows * columns)
    return [flat[i * columns : (i + 1) * columns] for i in range(rows)]


def recipe_of(seed: int, scale: int = -9) -> dict:
    """How the manifest writes drawn_rows."""
    return dyadic_recipe(seed, 12, scale)


def bits_output(dtype: str, nested: object) -> Output:
    """An output that must agree bit for bit, but for the sign of zeros."""
    return Output(BITS, values(dtype, nested))


def near_output(nested: object, rtol: float, atol: float = 0.0, dtype: str = "f64") -> Output:
    """An output within rtol and atol."""
    return Output({"class": "allclose", "rtol": rtol, "atol": float(f"{atol:.1e}")}, values(dtype, nested))


def suite_of(
    name: str, title: str, header: list[str], notes: dict, groups: list[list[CaseSpec]], version: str = "1.0.0"
) -> SuiteSpec:
    """A suite about outliers; its op has its name."""
    head = {
        "suite": name,
        "suite_version": version,
        "op": name.replace("/", "."),
        "title": title,
        "header": header,
        "lesson": "lessons/12-outliers.md",
        "generator": {"name": "refllm golden regen, suites/outliers_inputs.py and outliers_weights.py", "version": "1"},
    }
    source = {"kind": "first_principles", "name": "the header above, in fractions"}
    return SuiteSpec(head, notes, [({"params": {}, "source": source}, cases) for cases in groups])


def rejected(id: int, comment: str, flag: str, error: str, inputs: dict, **params) -> CaseSpec:
    """A case that must be rejected."""
    given = {name: values("f32", nested) for name, nested in inputs.items()}
    return CaseSpec(id, comment, (flag,), given, result="invalid", error=error, params=params)
