"""Writing files that are whole or absent, strict JSON, and where refllm keeps its own data."""

import errno
import json
import mmap
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from refllm.formats.errors import FormatError

_DISK_ERRORS = (errno.ENOSPC, errno.EFBIG, errno.EIO, getattr(errno, "EDQUOT", errno.ENOSPC))


@contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "wb") -> Iterator[IO]:
    """Open a file that appears under its name only when it is complete.

    The bytes go to a temporary name in the same folder, are flushed to the disk and renamed; any exception, Ctrl-C
    included, removes the temporary file and leaves a file that was there before untouched.

    Parameters
    ----------
    path : path
        The final name; its folder must exist.
    mode : str
        "wb", or "w" for UTF-8 text with "\\n" line ends on every system.

    Raises
    ------
    OSError
        One line naming the file when it cannot be created or the disk is full.
    """
    if mode not in ("wb", "w"):
        raise ValueError(f"mode must be 'wb' or 'w', got {mode!r}")
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    text = {} if mode == "wb" else {"encoding": "utf-8", "newline": "\n"}
    try:
        with open(temporary, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise _plain(error, path, temporary) from error
    finally:
        temporary.unlink(missing_ok=True)


def _plain(error: OSError, path: Path, temporary: Path) -> OSError:
    """The same error in words that name the file the user asked for; an error about another file stays as it is."""
    if error.errno not in _DISK_ERRORS and str(error.filename) != str(temporary):
        return error
    hint = "; free some space and try again, nothing was left behind" if error.errno in _DISK_ERRORS else ""
    reason = error.strerror or getattr(error.__cause__, "strerror", None)  # of a file inside an atomic_folder
    plain = OSError(f"cannot write {path}: {reason}{hint}")
    plain.errno = error.errno
    return plain


@contextmanager
def atomic_folder(path: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """Build a folder under a temporary name beside its place and rename it when it is complete.

    Parameters
    ----------
    path : path
        The final folder: missing or empty, unless `overwrite`.
    overwrite : bool
        Replace a model folder (one that holds refllm.json or config.json). Nothing else is ever deleted.

    Yields
    ------
    Path
        The temporary folder to fill.

    Raises
    ------
    FileExistsError
        Something else is there.
    """
    path = Path(os.path.abspath(path))
    _check_replaceable(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (path.with_name(f".{path.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    try:
        temporary.mkdir()
        yield temporary
        if path.exists():
            os.rename(path, old)
        try:
            os.rename(temporary, path)
        except OSError:
            if old.exists():
                os.rename(old, path)
            raise
    except OSError as error:
        raise _plain(error, path, temporary) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _check_replaceable(path: Path, overwrite: bool) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise FileExistsError(f"{path} is a file; the output is a folder, give another name")
    if not any(path.iterdir()):
        return
    if not any((path / name).exists() for name in ("refllm.json", "config.json")):
        raise FileExistsError(f"{path} is not empty and not a model folder; give another name or empty it yourself")
    if not overwrite:
        raise FileExistsError(
            f"{path} already holds a model; give another name or --overwrite (in Python: overwrite=True)"
        )


def parse_json(data: bytes, *, path: object = None, base: int = 0, integers_only: bool = False) -> dict:
    """Parse a JSON object strictly: UTF-8, no duplicate keys, no NaN or Infinity, no bottomless nesting.

    Parameters
    ----------
    data : bytes
        The text.
    path, base : optional
        The file it came from and the byte offset of its first byte there, for the error message.
    integers_only : bool
        Reject every number with a point or an exponent.

    Returns
    -------
    dict

    Raises
    ------
    FormatError
    """

    def fail(message, offset=0):
        return FormatError(message, path=path, offset=base + offset)

    def unique(pairs):
        result = dict(pairs)
        if len(result) < len(pairs):
            seen = set()
            key = next(k for k, _ in pairs if k in seen or seen.add(k))
            at = data.rfind(json.dumps(key, ensure_ascii=False).encode("utf-8", "surrogatepass"))
            raise fail(f"JSON key {key!r} stands twice", max(at, 0))
        return result

    def refuse(text):
        raise fail(f"JSON number {text!r} is not allowed here", max(data.find(text.encode()), 0))

    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise fail(f"not UTF-8: {error.reason}", error.start) from None
    if text.startswith("\ufeff"):
        raise fail("JSON starts with a byte order mark")
    # A few bytes of brackets become many times as much memory: a table of tensors never has this many.
    if data.count(b"[") + data.count(b"{") > len(data) // 8 + 4096:
        raise fail("JSON is made of brackets")
    try:
        floats = {"parse_float": refuse} if integers_only else {}
        result = json.loads(text, object_pairs_hook=unique, parse_constant=refuse, **floats)
    except json.JSONDecodeError as error:
        raise fail(f"not valid JSON: {error.msg}", len(text[: error.pos].encode())) from None
    except RecursionError:
        raise fail("JSON is nested too deep") from None
    except FormatError:
        raise
    except ValueError as error:  # an integer with thousands of digits
        raise fail(f"not valid JSON: {error}") from None
    if not isinstance(result, dict):
        raise fail(f"a JSON object {{…}} was expected, got {type(result).__name__}")
    return result


def read_json(path: str | os.PathLike, limit: int = 32 << 20) -> dict:
    """Read a small JSON object from a file, strictly (see `parse_json`); more than `limit` bytes are refused."""
    path = Path(path)
    size = path.stat().st_size
    if size > limit:
        raise FormatError(f"{size} bytes of JSON; at most {limit} are read", path=path, offset=limit)
    return parse_json(path.read_bytes(), path=path)


def data_path(name: str) -> Path:
    """Path of a file refllm ships: `refllm/data` in an installed wheel, the top-level `data` in a checkout."""
    package = Path(__file__).resolve().parents[1]
    places = [package / "data" / name, package.parent / "data" / name]
    for place in places:
        if place.exists():
            return place
    raise FileNotFoundError(f"refllm's own file {name!r} is missing; looked for {places[0]} and {places[1]}")


def cache_dir() -> Path:
    """The folder for what refllm fetches or compiles for this user; REFLLM_CACHE overrides it. It may not exist yet."""
    if override := os.environ.get("REFLLM_CACHE"):
        return Path(override).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "refllm"
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "refllm"
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "refllm"


AROUND = 1 << 16  # bytes


def forget_pages(array: np.ndarray) -> None:
    """Let go of the memory behind a view of a mapped file: it is read from the file again when needed.

    That goes for what lies `AROUND` it, too: a system maps some pages more than were touched. Does nothing for other
    arrays, and on systems (Windows) without such a request.
    """
    base = array
    while isinstance(base, np.ndarray | memoryview):
        base = base.obj if isinstance(base, memoryview) else base.base
    if not isinstance(base, mmap.mmap) or not hasattr(base, "madvise"):
        return
    whole = np.frombuffer(base, np.uint8).ctypes.data
    start = max(0, array.ctypes.data - whole - AROUND) // mmap.PAGESIZE * mmap.PAGESIZE
    end = min(len(base), array.ctypes.data - whole + array.nbytes + AROUND)
    base.madvise(mmap.MADV_DONTNEED, start, end - start)
