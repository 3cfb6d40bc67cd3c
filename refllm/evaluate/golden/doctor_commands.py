"""`refllm golden doctor` and `refllm golden museum`."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from refllm.evaluate.golden.asked import (
    FAILED,
    NOTHING,
    OK,
    UsageError,
    chosen,
    declared_by,
    find_case,
    folder,
    implementation_of,
)
from refllm.evaluate.golden.suite import Case, Suite, read_suite, suite_names


def doctor(args, print_json: Callable) -> int:
    """`refllm golden doctor`: exit code 0 nothing is wrong, 1 something is, 3 nothing ran."""
    from refllm.evaluate.golden.doctor import diagnose, diagnose_array
    from refllm.evaluate.golden.doctor_report import diagnosis_json, diagnosis_text

    root = folder(args)
    if args.got is None:
        if args.output:
            raise UsageError("--output goes with --got; --outputs chooses outputs of a whole run")
        suites, declared, wanted, keep = chosen(args, root)
        call, _ = implementation_of(args)
        found = list(diagnose(suites, call, declared=declared, outputs=wanted, keep=keep))
    else:
        if len(args.suites) != 1 or "#" not in args.suites[0] or args.impl or args.exec is not None:
            raise UsageError("--got FILE goes with one SUITE#ID, and without --impl and --exec")
        suite, case = find_case(root, args.suites[0])
        try:
            name, array = read_got(args.got, suite, case, args.output)
        except ValueError as error:
            raise UsageError(str(error)) from None
        found = [diagnose_array(suite, case, name, array, declared_by(args, [suite]))]
    if args.json:
        print_json("doctor", suites=[diagnosis_json(one) for one in found])
    else:
        ran = [one for one in found if one.passed or one.failed]
        print("\n".join(map(diagnosis_text, ran)) or "no case ran")
    if any(one.failed for one in found):
        return FAILED
    return OK if any(one.passed for one in found) else NOTHING


def museum(args, print_json: Callable) -> int:
    """`refllm golden museum`: exit code 0 every mutant is killed, 1 one is not."""
    from refllm.evaluate.golden.museum import MUTANTS
    from refllm.evaluate.golden.museum.matrix import kill_matrix, matrix_json, matrix_text

    for name in args.mutants:
        if name not in MUTANTS:
            raise UsageError(f"no mutant {name!r}; the museum has {', '.join(MUTANTS)}")
    mutants = [MUTANTS[name] for name in args.mutants or MUTANTS]
    root = folder(args)
    needed = {mutant.suite for mutant in mutants} & set(suite_names(root))
    rows = list(kill_matrix([read_suite(root, name) for name in sorted(needed)], mutants))
    if args.json:
        print_json("museum", mutants=matrix_json(rows))
    else:
        print(matrix_text(rows))
    if not rows:
        return NOTHING
    return OK if all(row.killed for row in rows) else FAILED


def read_got(path: Path, suite: Suite, case: Case, name: str | None) -> tuple[str, np.ndarray]:
    """The output that a file holds, and its array.

    Parameters
    ----------
    path : Path
        .npy, or the bare bytes, little-endian, in C order.
    suite, case : Suite, Case
    name : str or None
        None: the output whose type and size the file has.

    Raises
    ------
    ValueError
        No such file or output, or several that fit.
    """
    from refllm.evaluate.golden.compare import returned_dtype, returned_shape
    from refllm.evaluate.golden.runner import choose, expected_of, reference_names

    known = {}
    for output in sorted(case.expected.keys() - reference_names(case)):
        right = expected_of(suite, case, output, choose(case.expected[output], {}))
        known[output] = (returned_dtype(right), returned_shape(right))
    if not known:
        raise ValueError(f"{case.name} expects no outputs: its input must be rejected")
    if name is not None and name not in known:
        raise ValueError(f"{case.name} has no output {name!r}; outputs: {', '.join(known)}")
    try:
        data = path.read_bytes()
        array = np.load(path, allow_pickle=False) if path.suffix == ".npy" else None
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"--got {path}: {error}") from None
    sizes = {output: (dtype.itemsize * int(np.prod(shape)), dtype) for output, (dtype, shape) in known.items()}
    if array is None:
        fits = [output for output, (nbytes, _) in sizes.items() if nbytes == len(data)]
    else:
        fits = [output for output, (dtype, shape) in known.items() if (array.dtype, array.shape) == (dtype, shape)]
        fits = fits or [
            output for output, (nbytes, dtype) in sizes.items() if (array.nbytes, array.dtype) == (nbytes, dtype)
        ]
    if name is None and len(fits) != 1:
        listed = ", ".join(f"{output} {dtype}{list(shape)}" for output, (dtype, shape) in known.items())
        raise ValueError(f"--got {path}: say which --output it is; {case.name} has {listed}")
    name = name or fits[0]
    dtype, shape = known[name]
    if array is None:
        if len(data) != sizes[name][0]:
            raise ValueError(f"--got {path}: {name} has {sizes[name][0]} bytes, the file {len(data)}")
        array = np.frombuffer(data, dtype.newbyteorder("<")).astype(dtype).reshape(shape)
    return name, array
