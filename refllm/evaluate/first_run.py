"""The first comparison on a machine: its kernels are compiled by two processes, before anything is measured.

Compiling runs on one thread, and a comparison needs dozens of kernels. This process applies the recipes from the first
to the last and reads a prompt with each; a second one begins with single tokens, whose kernels are others, and goes
from the last recipe to the first. Whoever comes to a kernel that the other has compiled finds it in the cache. Kernels
depend on forms, not on values: the first layer of the model will do, and a few tokens to calibrate.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from refllm.formats.process import child_environment
from refllm.formats.progress import Progress
from refllm.kernels.packed import backend
from refllm.methods.apply import compress, load, needs_calibration, with_activations
from refllm.model.model import Model
from refllm.model.native import save_native
from refllm.model.sample import generate_ids
from refllm.model.walk import first_layer

CALIBRATION = 64  # tokens


def compile_for_all(model: Model, recipes: Sequence[str], ids: np.ndarray, activations: str) -> None:
    """Compile what a comparison needs if no kernel is kept yet; without a cache it would be lost.

    Parameters
    ----------
    model : Model
        The base.
    recipes : sequence of str
        What a model does not take is left for the comparison to say.
    ids : (T,) integers
        The prompt of the comparison: some kernels are for long ones.
    activations : "float32", "int8" or "int4"
    """
    from refllm.kernels.packed.compile import kernel_folder

    folder = kernel_folder() if backend() == "numba" else None
    if not recipes or folder is None or any(folder.rglob("*.nbc")):
        return
    small = first_layer(model)
    with tempfile.TemporaryDirectory(prefix="refllm-", ignore_cleanup_errors=True) as place:
        save_native(small, Path(place, "model"))
        job = {"recipes": recipes[::-1], "ids": ids.tolist(), "activations": activations}
        Path(place, "job.json").write_text(json.dumps(job), encoding="utf-8")
        silent = subprocess.DEVNULL  # what the second has not compiled is compiled when it is needed
        command = [sys.executable, "-m", "refllm.evaluate.first_run", place]
        with subprocess.Popen(command, stdout=silent, stderr=silent, env=child_environment()) as second:
            try:
                _run_all(small, recipes, ids, activations, write=1)
                with Progress() as progress:
                    progress.show("a second process compiles the last kernels")
                    second.wait()
            except BaseException:
                second.kill()
                raise


def _run_all(model: Model, recipes: Sequence[str], ids: np.ndarray, activations: str, write: int) -> None:
    """Run the model with every recipe once. What fails with one layer or few tokens need not fail with all of them."""
    for recipe in recipes:
        with suppress(Exception):
            calibration = ids[:CALIBRATION] if needs_calibration(recipe) else None
            run_once(compress(model, recipe, calibration), ids, activations, write)


def run_once(model: Model, ids: np.ndarray, activations: str, write: int) -> None:
    """Compile the kernels of a model, so that the process that measures it finds them in the cache.

    Else the first time its peak memory would be the compiler's, up to a hundred megabytes more. What a model does not
    take is that process's to say.

    Parameters
    ----------
    model, ids, activations :
        As in `compile_for_all`.
    write : int
        Tokens to generate; all but the first take a step of their own.
    """
    with suppress(ValueError):
        for _ in generate_ids(with_activations(model, activations), ids, write, stop_ids=()):
            pass


def main() -> None:
    """The second process. Its argument is a folder with the model and the rest of `compile_for_all`'s arguments."""
    folder = Path(sys.argv[1])
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    model, ids = load(folder / "model"), np.array(job["ids"])
    run_once(model, ids[:1], job["activations"], write=2)
    _run_all(model, job["recipes"], ids, job["activations"], write=2)


if __name__ == "__main__":
    main()
