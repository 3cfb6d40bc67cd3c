"""Any program as an implementation: one process a case, or one for all cases.

    COMMAND REQUEST    one case. The exit code says how it went: 0 the outputs are written, 3 the op is not supported,
                       4 the input is rejected, anything else is a crash.
    COMMAND -          many cases (`BatchCall`). Reads the path of one request a line from standard input and answers
                       each with one line on standard output: that code, then a space and a message if it likes. It ends
                       with the input. What crashes, hangs or says something else is ended, and started anew.

A request lies in a folder of its own. In the form "json" it is request.json, with the paths of an input and an output
safetensors file; in the form "raw" it is args.txt, see golden/raw.py.
"""

import json
import os
import queue
import re
import signal
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from refllm.evaluate.golden import raw
from refllm.evaluate.golden.runner import Answer, Call, one_line
from refllm.formats.tensors import read_safetensors, write_safetensors

REQUEST = "refllm/golden-request/v1"
EXIT_UNSUPPORTED, EXIT_REJECTED = 3, 4
_OUTPUT_LIMIT = 64 << 20  # bytes of an answer; suites are far smaller


def program_call(command: list[str], timeout: float, form: str = "json") -> Call:
    """Wrap a program that is run once a case.

    Parameters
    ----------
    command : list of str
        The path of the request is added.
    timeout : float
        Seconds a case; then the program and whatever it started are killed.
    form : str
        "json" or "raw".
    """
    write_request, read_answer = _FORMS[form]

    def call(op, params, inputs):
        with _folder() as folder:
            folder = Path(folder).resolve()
            request = write_request(folder, op, params, inputs)
            try:
                code, tail = _run([*command, str(request)], folder, timeout)
            except OSError as error:
                return Answer("crash", f"cannot start: {one_line(error)}")
            if code is None:
                return Answer("timeout", f"no answer within {timeout:g} s")
            return _answer(code, tail, lambda: read_answer(folder))

    return call


class BatchCall:
    """Wrap a program that stays: `COMMAND -`, see the module.

    Parameters
    ----------
    command, timeout, form
        As for `program_call`.
    """

    def __init__(self, command: list[str], timeout: float, form: str = "json"):
        self._command, self._timeout = [*command, "-"], timeout
        self._write_request, self._read_answer = _FORMS[form]
        self._process: subprocess.Popen | None = None
        self._finalizer = None

    def __call__(self, op: str, params: dict, inputs: dict[str, np.ndarray]) -> Answer:
        """The answer to one case."""
        with _folder() as folder:
            folder = Path(folder).resolve()
            request = self._write_request(folder, op, params, inputs)
            try:
                line = self._ask(str(request))
            except queue.Empty:
                self.close()
                return Answer("timeout", f"no answer within {self._timeout:g} s")
            except OSError as error:
                self.close()
                return Answer("crash", f"cannot be started, or has ended: {one_line(error)}")
            if not line:
                return Answer("crash", f"ended without an answer, exit code {self.close()}")
            found = re.fullmatch(r"([0-9]{1,3})(?: (.*))?", line.strip())
            if not found:
                self.close()
                return Answer("garbage", f"'CODE MESSAGE' was expected on standard output, got {line[:100]!r}")
            return _answer(int(found[1]), (found[2] or "")[:200], lambda: self._read_answer(folder))

    def _ask(self, request: str) -> str:
        """The line that answers a request; "" when the program ends."""
        if self._process is None:
            self._process = _start(self._command, subprocess.PIPE, subprocess.PIPE, subprocess.DEVNULL)
            self._finalizer = weakref.finalize(self, _end, self._process)
        process, answers = self._process, queue.Queue()
        process.stdin.write(f"{request}\n".encode())
        process.stdin.flush()
        # In a thread, because not every system can wait for a pipe with a time limit.
        threading.Thread(target=lambda: answers.put(process.stdout.readline(4096)), daemon=True).start()
        return answers.get(timeout=self._timeout).decode("utf-8", "replace")

    def close(self) -> int | None:
        """End the program; its exit code, if it had ended by itself. The next call starts it again."""
        process, self._process = self._process, None
        return self._finalizer() if process is not None else None


def _end(process: subprocess.Popen) -> int | None:
    with suppress(OSError):  # what was written to a program that is no more
        process.stdin.close()
    with suppress(subprocess.TimeoutExpired):
        process.wait(1)
    code = process.poll()
    _kill(process)  # even if it has ended: a child of it may hold the pipe open
    process.stdout.close()
    return code


def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="refllm-golden-", ignore_cleanup_errors=True)


def _answer(code: int, message: str, read: Callable[[], dict]) -> Answer:
    """From an exit code."""
    if code == EXIT_UNSUPPORTED:
        return Answer("unsupported", message)
    if code == EXIT_REJECTED:
        return Answer("rejected", message)
    if code:
        return Answer("crash", f"exit code {code}" + (f": {message}" if message else ""))
    try:
        return Answer("ok", outputs=read())
    except ValueError as error:
        return Answer("garbage", one_line(error))


def _start(command: list[str], stdin, stdout, stderr) -> subprocess.Popen:
    """A process that can be killed together with whatever it starts."""
    return subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=stderr, start_new_session=os.name == "posix")


def _run(command: list[str], folder: Path, timeout: float) -> tuple[int | None, str]:
    """Exit code (None after a timeout) and the last line of standard error; of standard output if there is none.

    Two files, for programs keep back what they print into one file until they end: the last line would be any.
    """
    logs = folder / "stderr.txt", folder / "stdout.txt"
    with open(logs[0], "wb") as errors, open(logs[1], "wb") as output:
        process = _start(command, subprocess.DEVNULL, output, errors)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                _kill(process)
    return code, _last_line(logs[0]) or _last_line(logs[1])


def _last_line(log: Path) -> str:
    with open(log, "rb") as file:
        file.seek(max(log.stat().st_size - 2000, 0))
        lines = [line for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else ""


def _kill(process: subprocess.Popen) -> None:
    """End a program that did not end by itself, with its children where the system groups them."""
    if os.name == "posix":
        with suppress(ProcessLookupError):  # it ended between the question and the signal
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def _write_request(folder: Path, op: str, params: dict, inputs: dict[str, np.ndarray]) -> Path:
    document = {"schema": REQUEST, "op": op, "params": params}
    document |= {"inputs": str(folder / "in.safetensors"), "outputs": str(folder / "out.safetensors")}
    write_safetensors(folder / "in.safetensors", inputs)
    request = folder / "request.json"
    request.write_text(json.dumps(document), encoding="utf-8")
    return request


def _read_answer(folder: Path) -> dict[str, np.ndarray]:
    out = folder / "out.safetensors"
    if not out.is_file():
        raise ValueError("exit code 0, but no output file was written")
    if out.stat().st_size > _OUTPUT_LIMIT:
        raise ValueError(f"the output file has {out.stat().st_size} bytes; at most {_OUTPUT_LIMIT} are read")
    try:
        tensors, _ = read_safetensors(out)
        return {name: tensor.stored() for name, tensor in tensors.items()}
    except ValueError as error:
        raise ValueError(str(error).replace(str(out), "output file")) from None


# What a program gets and what it gives back: (write into a folder, read from it).
_FORMS = {"json": (_write_request, _read_answer), "raw": (raw.write_request, raw.read_answer)}
