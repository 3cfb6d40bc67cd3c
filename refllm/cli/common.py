"""What the commands share: options, reading models and texts, printing. Nothing heavy is imported at the top."""

import argparse
import json
import sys
from math import isfinite
from pathlib import Path

from refllm.formats.names import meant

SCHEMA_VERSION = 1
CALIBRATION_TOKENS = 4096


class UsageError(ValueError):
    """Arguments that do not fit together: exit code 2."""


class Silent(Exception):
    """The command ends with this exit code, and everything has been said."""

    def __init__(self, code: int):
        self.code = code


class Parser(argparse.ArgumentParser):
    """An error is one line; no option may be abbreviated, so that a later one cannot change what a script means."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message):
        """One line on stderr; exit code 2."""
        self.exit(2, f"refllm: error: {message} (see {self.prog} --help)\n")

    def parse_known_args(self, args=None, namespace=None):
        """What is left over is an error here, where the command is known, and not in the parser of all commands."""
        found, extras = super().parse_known_args(args, namespace)
        if extras:
            options = [option for action in self._actions for option in action.option_strings]
            self.error(f"unrecognized arguments: {' '.join(extras)}{meant(extras[0].partition('=')[0], options)}")
        return found, extras

    def _check_value(self, action, value):
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            message = f"invalid choice: {value!r}{meant(str(value), choices)} (choose from {', '.join(choices)})"
            raise argparse.ArgumentError(action, message)


def count(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def recipe_text(text: str) -> str:
    """A recipe that says something; the uncompressed model is `none`."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; write none for the uncompressed model")
    return text


def add_command(commands, name: str, run, help_line: str, *, as_json: bool = True) -> Parser:
    """A sub-command with the options every command has."""
    parser = commands.add_parser(name, help=help_line, description=help_line[0].upper() + help_line[1:] + ".")
    parser.set_defaults(run=run)
    if as_json:
        parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def add_model(parser, default: str | None = None) -> None:
    """MODEL, optional where it has a default, and the number of threads."""
    optional = {} if default is None else {"nargs": "?", "default": default}
    about = "tiny, tiny-outliers, smollm2, a folder or a .gguf file" + (f" (default {default})" if default else "")
    parser.add_argument("model", metavar="MODEL", help=about, **optional)
    parser.add_argument("--threads", type=count, metavar="N", help="threads of NumPy and of the kernels (default: all)")


def add_recipe(parser) -> None:
    """--recipe, its calibration text, and the arithmetic of packed weights."""
    parser.add_argument(
        "--recipe",
        type=recipe_text,
        default="none",
        metavar="R",
        help="compress first, e.g. rtn:bits=4,group=32+kivi",
    )
    add_calibration(parser)
    add_activations(parser)


def add_calibration(parser) -> None:
    """--calibration FILE."""
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        help=f"text for methods that look at activations; its first {CALIBRATION_TOKENS} tokens are used",
    )


def add_activations(parser) -> None:
    """--activations float32, int8 or int4."""
    from refllm.kernels.packed import ACTIVATIONS

    parser.add_argument(
        "--activations",
        choices=ACTIVATIONS,
        default="float32",
        help="arithmetic of packed weights: exact, or fast with inputs rounded to 8 bits; or to 4, as fast and coarser",
    )


def load_model(args, *, dtype: str = "float32"):
    """The model of the arguments, compressed by --recipe and run with --activations where the command has them."""
    from refllm.methods.apply import compress, load, needs_calibration, with_activations
    from refllm.methods.recipes import parse

    recipe = getattr(args, "recipe", "none")
    stages = parse(recipe)  # a typing error is found before the model is read
    model = load(args.model, dtype=dtype)
    if stages:
        model = compress(model, recipe, calibration_ids(args, model) if needs_calibration(recipe) else None)
    return with_activations(model, getattr(args, "activations", "float32"))


def calibration_ids(args, model):
    """Ids of --calibration; of the bundled calibration text for the bundled model; else None."""
    from refllm.formats.files import data_path

    bundled = args.model in ("tiny", "tiny-outliers")
    path = args.calibration or (data_path("tiny/calib.txt") if bundled else None)
    return None if path is None else encode_file(model, path)[:CALIBRATION_TOKENS]


def tokenizer_of(model):
    """The model's tokenizer, or one line that says there is none."""
    if model.tokenizer is None:
        raise ValueError(f"model {model.name} has no tokenizer; add its tokenizer.json to the folder")
    return model.tokenizer


def read_text(path) -> str:
    """A UTF-8 text file; "-" is standard input. Line ends stay as they are."""
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else Path(path).read_bytes()
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def encode_file(model, path) -> list[int]:
    """Token ids of a text file."""
    return tokenizer_of(model).encode(read_text(path))


def encode_documents(model, path, max_tokens: int | None = None) -> list[list[int]]:
    """Token ids of every document of a file, up to `max_tokens` in all.

    A document is a line of a .jsonl file (its "text"), or what stands between two blank lines of a text file.
    """
    from refllm.evaluate.perplexity import documents

    text = read_text(path)
    if str(path).endswith(".jsonl"):
        try:
            texts = [json.loads(line)["text"] for line in text.splitlines() if line.strip()]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f'{path}: every line must be a JSON object with "text" ({error})') from None
    else:
        texts = documents(text)
    tokenizer, left, encoded = tokenizer_of(model), max_tokens, []
    for text in texts:
        ids = tokenizer.encode(text)[:left]
        left = None if left is None else left - len(ids)
        encoded += [ids] if ids else []
    return encoded


def print_json(result: dict) -> None:
    """One object with schema_version, as strict JSON: what is not finite becomes null."""
    print(json.dumps({"schema_version": SCHEMA_VERSION, **_strict(result)}, ensure_ascii=True, allow_nan=False))


def _strict(value):
    if isinstance(value, dict):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if isinstance(value, float):
        return value if isfinite(value) else None
    return value if isinstance(value, str | int | bool | None) else str(value)


def note(text: str) -> None:
    """A line for people, beside the result."""
    print(text, file=sys.stderr)
