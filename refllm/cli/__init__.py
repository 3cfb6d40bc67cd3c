"""The command line. Each group of commands is a module here; this one builds the parser and sets the exit code.

Results go to stdout, progress and notes to stderr. Exit codes: 0 ok, 1 runtime error or failed check, 2 usage, 3
nothing to do, 4 corrupt vectors, 130 interrupted. An error is one line on stderr; --debug adds the traceback. Nothing
heavy is imported before a command runs, so that `refllm --help` is quick.
"""

import os
import platform
import sys
import traceback
import warnings
from collections.abc import Sequence

from refllm.cli.common import Parser, Silent, UsageError

# There NumPy at times reports an overflow or a division by zero in a product of small finite matrices; the same product
# again passes. Presumably OpenBLAS multiplies what lies behind their ends, too, and drops it.
ARM, FALSE_ALARMS = ("aarch64", "arm64"), ".* encountered in matmul"


def build_parser() -> Parser:
    """The parser of all commands."""
    from refllm import __version__
    from refllm.cli import bench, learn, measure, models, run

    parser = Parser(
        prog="refllm",
        description="Compress small language models, and see what it costs and keeps.",
        epilog="MODEL is tiny (bundled), smollm2 (after `refllm fetch smollm2`), a folder or a .gguf file. "
        "Start with `refllm compare`, `refllm methods` and `refllm lesson`.",
    )
    parser.add_argument("--version", action="version", version=f"refllm {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for module in (measure, bench, run, models, learn):
        module.add_commands(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    argv : sequence of str, optional
        None takes sys.argv.

    Returns
    -------
    int
        The exit code.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    _replace_what_the_terminal_cannot_show()
    _limit_threads(argv)
    if platform.machine().lower() in ARM:
        warnings.filterwarnings("ignore", FALSE_ALARMS, RuntimeWarning)
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as end:  # argparse has printed the help or the error
        return end.code or 0
    try:
        code = args.run(args) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader has seen enough: `refllm methods | head`
        sys.stdout = open(os.devnull, "w")
        return 1
    except KeyboardInterrupt:
        return _fail("interrupted", 130, args)
    except Silent as end:
        return end.code
    except Exception as error:
        return _fail(_one_line(error), _exit_code(error), args)


def _limit_threads(argv: list[str]) -> None:
    """Obey --threads before NumPy is imported, which reads its limit once; the parser checks the value later."""
    from refllm.formats.process import thread_variables

    for option, value in zip(argv, [*argv, ""][1:], strict=True):
        value = option.removeprefix("--threads=") if option.startswith("--threads=") else value
        if option.startswith("--threads") and value.isdecimal() and int(value):
            os.environ.update(thread_variables(int(value)))


def _exit_code(error: Exception) -> int:
    from refllm.methods.recipes import RecipeError

    if isinstance(error, UsageError | RecipeError):
        return 2
    return getattr(error, "exit_code", 1)  # corrupt golden vectors say 4


def _one_line(error: Exception) -> str:
    message = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, ValueError | OSError | RuntimeError | NotImplementedError) and message:
        return message
    if isinstance(error, MemoryError):
        return f"not enough memory ({message or 'no details'}); take a smaller model, window or --max-tokens"
    return f"{type(error).__name__}: {message} (a bug in refllm; --debug shows where)"


def _fail(message: str, code: int, args) -> int:
    if getattr(args, "debug", False):
        traceback.print_exc()
    print(f"refllm: error: {message}", file=sys.stderr)
    return code


def _replace_what_the_terminal_cannot_show() -> None:
    """Text of a model may hold any character; a terminal in ASCII or cp1252 gets `?` instead of an exception."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
