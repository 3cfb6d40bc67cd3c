"""The directory listing is the dependency diagram: imports point down only, families never import each other.

    formats <- kernels <- model <- methods <- evaluate <- cli

Read from the syntax tree, so imports inside functions count, too. Heavy packages may be imported, but not by `import
refllm` or `import refllm.cli`: that is tried in a fresh interpreter.
"""

import ast
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "refllm"
LAYERS = ("formats", "kernels", "model", "methods", "evaluate", "cli")
HEAVY = {"hypothesis", "llvmlite", "matplotlib", "numba", "safetensors", "scipy", "tokenizers", "torch", "transformers"}
# Numba modules need numba at their top to decorate; the package imports them only inside functions.
HEAVY_AT_TOP = {"numba": "refllm.kernels.packed.", "llvmlite": "refllm.kernels.packed."}


def place(module: str) -> tuple[int, str | None]:
    """Layer number and, inside methods, the family. The package itself and __main__ stand on top of all."""
    parts = module.split(".")
    if len(parts) == 1 or parts[1] not in LAYERS:
        return len(LAYERS), None
    layer = LAYERS.index(parts[1])
    family = parts[2] if parts[1] == "methods" and len(parts) > 2 else None
    return layer, family


def imported(tree: ast.AST, known) -> list[tuple[int, str]]:
    """(line, module) of every import; `from package import module` names the module. Relative ones begin with a dot."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for alias in node.names:
                full = f"{base}.{alias.name}"
                if full != "refllm.__version__":  # a string every layer may know
                    found.append((node.lineno, full if full in known else base))
    return found


def violations(sources: dict[str, str]) -> list[str]:
    """What is wrong with a package given as {module name: source}."""
    families = {place(name)[1] for name in sources if name.count(".") > 2} - {None}
    wrong = []
    for module, source in sources.items():
        layer, family = place(module)
        tree = ast.parse(source)
        for line, target in imported(tree, sources):
            where = f"{module}:{line}: {target}"
            if target.startswith("."):
                wrong.append(f"{where} is a relative import")
            elif target.split(".")[0] == "refllm":
                to_layer, to_family = place(target)
                if to_layer > layer:
                    wrong.append(f"{where} points up")
                elif family in families and to_family in families and to_family != family:
                    wrong.append(f"{where} crosses from {family} to {to_family}")
        for line, target in imported(ast.Module(at_top(tree), []), sources):
            package = target.split(".")[0]
            if package in HEAVY and not module.startswith(HEAVY_AT_TOP.get(package, "refllm!")):
                wrong.append(f"{module}:{line}: {package} is heavy: import it inside the function that uses it")
    return wrong


def at_top(tree: ast.Module) -> list[ast.stmt]:
    """Statements that run on import: everything outside functions, classes and conditions included."""
    result = []
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.If | ast.Try | ast.With):
            bodies = [getattr(node, name, []) for name in ("body", "orelse", "finalbody")]
            bodies += [handler.body for handler in getattr(node, "handlers", [])]
            for body in bodies:
                result += at_top(ast.Module(body, []))
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            result.append(node)
    return result


def package_sources() -> dict[str, str]:
    sources = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        sources[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return sources


def test_refllm_keeps_its_layers():
    sources = package_sources()
    assert {"refllm", "refllm.kernels.nn", "refllm.model.llama"} <= set(sources)
    assert violations(sources) == []


EMPTY = dict.fromkeys(package_sources(), "")  # names are enough to try the checker on one module
FAMILIES = {"refllm.methods.quant.rtn": "", "refllm.methods.prune.wanda": "", "refllm.methods.quant": ""}


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("refllm.kernels.nn", "from refllm.model.llama import forward", "points up"),
        ("refllm.kernels.nn", "def f():\n    import refllm.cli", "points up"),
        ("refllm.model.load", "from refllm.methods.quant import rtn", "points up"),
        ("refllm.formats.gguf", "from refllm import kernels", "points up"),
        ("refllm.model.load", "import refllm", "points up"),
        ("refllm.evaluate.size", "from refllm import cli", "points up"),
        ("refllm.methods.prune.mine", "from refllm.methods.quant.rtn import rtn", "crosses from prune to quant"),
        ("refllm.methods.prune.mine", "from refllm.methods import quant", "crosses from prune to quant"),
        (
            "refllm.methods.prune.mine",
            "def f():\n    from refllm.methods.quant import rtn",
            "crosses from prune to quant",
        ),
        ("refllm.methods.prune.mine", "from .wanda import wanda", "relative import"),
        ("refllm.methods.prune.mine", "from . import wanda", "relative import"),
        ("refllm.model.load", "import numba", "numba is heavy"),
        ("refllm.model.load", "if True:\n    from safetensors.numpy import load", "safetensors is heavy"),
        ("refllm.model.load", "try:\n    import torch\nexcept ImportError:\n    torch = None", "torch is heavy"),
        ("refllm.model.load", "class A:\n    import tokenizers", "tokenizers is heavy"),
        ("refllm.kernels.packed.gemv", "import matplotlib.pyplot as plt", "matplotlib is heavy"),
    ],
)
def test_the_checker_sees(module, source, message):
    sources = EMPTY | FAMILIES | {"refllm.cli": "", module: source}
    found = [line for line in violations(sources) if line.startswith(module + ":")]
    assert len(found) == 1 and message in found[0], found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "refllm.model.load",
            "from refllm.kernels import nn\nimport refllm.formats.files\nfrom refllm.model import cache",
        ),
        (
            "refllm.methods.quant.mine",
            "from refllm.methods.quant.rtn import rtn\nfrom refllm.methods.quant import rtn as r",
        ),
        ("refllm.methods.apply", "from refllm.methods.quant.rtn import rtn\nfrom refllm.methods.prune import wanda"),
        ("refllm.cli", "from refllm.evaluate import size\nimport numpy as np"),
        ("refllm.kernels.packed.gemv", "import numba\nfrom refllm import __version__"),
        ("refllm.model.load", "def f():\n    import safetensors"),
    ],
)
def test_the_checker_allows(module, source):
    sources = EMPTY | FAMILIES | {"refllm.evaluate.size": "", module: source}
    assert [line for line in violations(sources) if line.startswith(module + ":")] == []


LIGHT = ["refllm", "refllm.cli", "refllm.model.llama", "refllm.model.sample", "refllm.kernels.packed"]


@pytest.mark.parametrize("module", LIGHT)
def test_importing_loads_nothing_heavy(module):
    if find_spec(module) is None:
        pytest.skip(f"{module} is not written yet")
    code = f"import sys, {module}; print(*sorted({HEAVY!r} & {{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
