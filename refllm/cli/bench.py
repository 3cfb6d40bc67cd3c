"""bench: how fast kernels, models and encoders are, beside NumPy and beside other programs."""

import argparse
import re
import sys

from refllm.cli.common import UsageError, add_calibration, add_command, count, note, print_json, recipe_text


def add_commands(commands) -> None:
    """Add `bench` with its sub-commands."""
    about = "time kernels, decoding, prefill and quantisation, beside NumPy and other programs"
    bench = commands.add_parser("bench", help=about, description=about[0].upper() + about[1:] + ".")
    bench.set_defaults(run=lambda args: bench.print_help(sys.stderr) or 2)
    commands = bench.add_subparsers(title="commands", metavar="WHAT", dest="what")

    parser = _add(commands, "kernels", kernels, "one product of a packed weight after another", rounds=21)
    _types(parser, "GGUF types and w4, w4g32, w4a, w2a, w8, w8g128", "--types")
    _shapes(parser, "4096x4096 11008x4096")
    _activations(parser, ("int8", "float32"))
    parser.add_argument("--tokens", type=count, default=1, metavar="N", help="rows multiplied at once (default 1)")

    for name, tokens, about in (
        ("decode", 128, "tokens per second, written one by one"),
        ("prefill", 512, "tokens per second of reading a prompt"),
    ):
        parser = _add(commands, name, generation, about, rounds=5)
        parser.add_argument(
            "models", nargs="*", metavar="MODEL", help=".gguf files (default: those of `refllm bench files`)"
        )
        parser.add_argument("--tokens", type=count, default=tokens, metavar="N", help=f"default {tokens}")
        _activations(parser, ("int8",))
        about = "keep so many processors busy meanwhile, to see what sharing costs"
        parser.add_argument("--busy", type=count, default=0, metavar="N", help=about)
        if name == "decode":
            parser.add_argument("--context", type=count, default=8, metavar="N", help="tokens read before (default 8)")
            about = "recipes of refllm's cache, such as kivi:bits=4; none: as it comes (default none)"
            parser.add_argument("--caches", nargs="+", type=recipe_text, default=["none"], metavar="R", help=about)

    parser = _add(commands, "quantize", quantize, "seconds to encode a matrix, or to compress a model", rounds=5)
    _types(parser, "GGUF types", "--types")
    _shapes(parser, "4096x4096")
    parser.add_argument("--recipes", nargs="+", default=[], type=recipe_text, metavar="R", help="time these, too")
    parser.add_argument("--model", default="tiny", metavar="MODEL", help="that they compress (default tiny)")
    add_calibration(parser)

    parser = _add(commands, "bandwidth", bandwidth, "what reading memory reaches with 1 to N threads", rounds=9)
    parser.set_defaults(peer=[], plot=None)

    parser = add_command(commands, "files", files, "make the GGUF files that decode and prefill measure on")
    parser.add_argument("model", nargs="?", default="smollm2", metavar="MODEL", help="default smollm2")
    parser.add_argument("--out", metavar="DIR", help="default: the user's cache")
    parser.add_argument("--types", nargs="+", metavar="T", help="llama.cpp's types (default Q4_0 Q4_K_M Q8_0)")
    parser.add_argument("--threads", type=count, default=1, metavar="N", help="default 1")


def _add(commands, name: str, run, about: str, rounds: int):
    parser = add_command(commands, name, run, about)
    parser.add_argument("--threads", type=count, default=1, metavar="N", help="of every program (default 1)")
    parser.add_argument("--rounds", type=count, default=rounds, metavar="N", help=f"turns of each (default {rounds})")
    if name != "bandwidth":
        parser.add_argument(
            "--peer",
            action="append",
            default=[],
            metavar="NAME",
            help="compare with llama.cpp, onnxruntime, torch, libgguf or all that are installed; several with commas",
        )
        parser.add_argument("--plot", metavar="FILE.png", help="draw the result")
    return parser


def _types(parser, known: str, option: str) -> None:
    parser.add_argument(option, nargs="+", metavar="T", help=f"{known}")


def _shapes(parser, default: str) -> None:
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=shape,
        default=[shape(text) for text in default.split()],
        metavar="OUTxIN",
        help=f"default {default}",
    )


def _activations(parser, default: tuple[str, ...]) -> None:
    parser.add_argument(
        "--activations",
        nargs="+",
        choices=("int8", "float32"),
        default=list(default),
        help=f"of refllm (default {' '.join(default)})",
    )


def shape(text: str) -> list[int]:
    """OUTxIN, e.g. 4096x4096."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"must be OUTxIN, e.g. 4096x4096, got {text!r}")
    return [int(part) for part in found.groups()]


def kernels(args) -> int:
    """Products, checked and then timed in turns."""
    from refllm.evaluate.bench.kernels import TYPES
    from refllm.evaluate.bench.products import check_types

    types = args.types or list(TYPES)
    check_types(types, args.shapes)
    return _measure(args, types=types, shapes=args.shapes, activations=args.activations, tokens=args.tokens)


def generation(args) -> int:
    """Tokens per second of each file."""
    from refllm.evaluate.bench.files import default_files
    from refllm.methods.recipes import parse
    from refllm.model.load import resolve

    paths = [resolve(model) for model in args.models] or default_files()
    if args.peer:
        for path in paths:
            if path.is_dir():
                raise UsageError(f"{path} is a folder; to compare with a peer give a .gguf file (refllm convert)")
    more = {}
    if args.what == "decode":
        for recipe in args.caches:
            if others := [stage.method for stage in parse(recipe) if stage.family != "kvcache"]:
                raise UsageError(f"--caches takes recipes of caches only, {others[0]} in {recipe!r} is none")
        more = {"context": args.context, "caches": args.caches}
    return _measure(
        args,
        models=[str(path) for path in paths],
        activations=args.activations,
        tokens=args.tokens,
        busy=args.busy,
        **more,
    )


def quantize(args) -> int:
    """Encoders of GGUF blocks, and recipes."""
    from refllm.evaluate.bench.quantize import TYPES, check_types
    from refllm.methods.recipes import parse

    types = args.types or list(TYPES)
    check_types(types, args.shapes)
    for recipe in args.recipes:
        parse(recipe)
    calibration = None
    if args.recipes:
        from refllm.cli.common import calibration_ids
        from refllm.methods.apply import load

        calibration = calibration_ids(args, load(args.model))
    return _measure(
        args, types=types, shapes=args.shapes, recipes=args.recipes, model=args.model, calibration=calibration
    )


def bandwidth(args) -> int:
    """Read bandwidth."""
    return _measure(args)


def files(args) -> None:
    """Paths of the files, one a line."""
    from pathlib import Path

    from refllm.evaluate.bench.files import TYPES, make_files
    from refllm.formats.progress import Progress

    with Progress() as progress:
        made = make_files(
            args.model,
            None if args.out is None else Path(args.out),
            args.types or TYPES,
            threads=args.threads,
            on_step=progress.show,
        )
    if args.json:
        print_json({"files": [str(path) for path in made]})
    else:
        print("\n".join(map(str, made)))


def _measure(args, **job) -> int:
    """Check names, measure in a process of its own, print."""
    from refllm.evaluate.bench import report
    from refllm.evaluate.bench.peers import check_peers
    from refllm.evaluate.bench.worker import run

    asked = [name.strip() for text in args.peer for name in text.split(",") if name.strip()]
    peers = check_peers(asked, args.what) if asked else []
    if args.plot is not None:
        from refllm.evaluate.plots import check_target

        check_target(args.plot)
    result = run({"what": args.what, "threads": args.threads, "rounds": args.rounds, "peers": peers, **job})
    if warning := report.noise(result):
        note(warning)
    if args.plot is not None:
        report.draw(result, args.plot)
        note(f"picture: {args.plot}")
    if args.json:
        print_json(result)
    else:
        print(report.text(result))
    return 0
