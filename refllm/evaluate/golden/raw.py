"""Cases as lines of text and one .bin file an array, for programs that read neither JSON nor safetensors.

A line is a key and its values, separated by single spaces:

    param bits 4                                             the value as JSON
    input w f32 2 3 8 w.in.bin                               name, dtype, number of axes, the axes, file
    output codes u8 2 3 8 codes.out.bin                      the same, in an answer

The files are little-endian, in C order, and hold nothing else.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from refllm.evaluate.golden.suite import STORAGE

_PLAIN = ("u8", "i8", "u16", "i16", "u32", "i32", "u64", "i64", "f16", "f32", "f64")
# NumPy type -> the dtype it is called where nothing else is known.
NAMES = {np.dtype(STORAGE[name]): name for name in _PLAIN} | {np.dtype(bool): "bool"}
_ANSWER_LIMIT = 64 << 20  # bytes of an array; those of the suites are far smaller


def param_lines(params: Mapping) -> list[str]:
    """`param NAME VALUE` for every parameter."""
    return [f"param {name} {json.dumps(value)}" for name, value in params.items()]


def write_array(folder: Path, key: str, name: str, dtype: str, array: np.ndarray, file: str) -> str:
    """Write `folder/file`; returns the line that describes it.

    Parameters
    ----------
    folder : Path
    key : str
        "input", "expect" ...
    name, dtype : str
        `dtype` as the manifest names it.
    array : ndarray
        In storage type.
    file : str
        A plain file name.
    """
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    (folder / file).write_bytes(little.tobytes())
    return " ".join(map(str, (key, name, dtype, array.ndim, *array.shape, file)))


def write_request(folder: Path, op: str, params: Mapping, inputs: Mapping[str, np.ndarray]) -> Path:
    """Write `args.txt` and the input files into a folder.

    Returns
    -------
    Path
        Of args.txt, for the program's command line. Inputs are named by their storage type: bf16 is u16.
    """
    lines = [f"op {op}", *param_lines(params)]
    for name, array in inputs.items():
        dtype = NAMES[array.dtype.newbyteorder("=")]
        lines.append(write_array(folder, "input", name, dtype, array, f"{name}.in.bin"))
    request = folder / "args.txt"
    request.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    return request


def read_answer(folder: Path) -> dict[str, np.ndarray]:
    """The outputs that a program named in `answer.txt` of its folder.

    Raises
    ------
    ValueError
        No such file, another line than `output NAME DTYPE AXES SIZES... FILE`, or a file of another size.
    """
    listing = folder / "answer.txt"
    if not listing.is_file():
        raise ValueError("exit code 0, but no answer.txt was written")
    if listing.stat().st_size > 1 << 20:
        raise ValueError("answer.txt is longer than a megabyte")
    lines = listing.read_text(encoding="utf-8", errors="replace").splitlines()
    return dict(_read_output(folder, line) for line in lines if line.strip())


def _read_output(folder: Path, line: str) -> tuple[str, np.ndarray]:
    words = line.split()
    number = re.compile(r"[0-9]{1,9}")
    axes = int(words[3]) if len(words) > 4 and number.fullmatch(words[3]) else -1
    if words[0] != "output" or len(words) != 5 + axes or not all(map(number.fullmatch, words[4:-1])):
        raise ValueError(f"answer.txt: 'output NAME DTYPE AXES SIZES... FILE' was expected, got {line[:100]!r}")
    name, dtype, file, shape = words[1], words[2], words[-1], tuple(map(int, words[4:-1]))
    if dtype not in STORAGE:
        raise ValueError(f"answer.txt: {name}: unknown dtype {dtype[:40]!r}; known: {', '.join(STORAGE)}")
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", file) or not (folder / file).is_file():
        raise ValueError(f"answer.txt: {name}: no file {file[:100]!r} beside it")
    stored = np.dtype(STORAGE[dtype])
    wanted = int(np.prod(shape, dtype=object)) * stored.itemsize if shape else stored.itemsize
    size = (folder / file).stat().st_size
    if size != wanted or size > _ANSWER_LIMIT:
        raise ValueError(
            f"{file}: {wanted} bytes were expected for {dtype} {shape}, got {size}; at most {_ANSWER_LIMIT}"
        )
    array = np.frombuffer((folder / file).read_bytes(), stored).reshape(shape)
    return name, array.astype(stored.newbyteorder("="))
