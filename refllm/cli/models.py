"""compress, convert, inspect, fetch, train: commands that make or look at model files."""

import sys
from dataclasses import asdict
from pathlib import Path

from refllm.cli.common import (
    Silent,
    UsageError,
    add_calibration,
    add_command,
    add_model,
    calibration_ids,
    note,
    print_json,
    recipe_text,
)


def add_commands(commands) -> None:
    """Add the commands of this module."""
    parser = add_command(commands, "compress", compress, "store a model packed; every command takes it as MODEL")
    add_model(parser)
    parser.add_argument("out", metavar="OUT", help="folder to write; for gguf a file")
    parser.add_argument("--recipe", type=recipe_text, required=True, metavar="R", help="e.g. awq:bits=4,group=32")
    add_calibration(parser)
    formats = ("native", "gguf", "gptq", "awq", "compressed-tensors", "bitsandbytes", "fp8")
    parser.add_argument("--format", choices=formats, default="native", help="layout of the files (default native)")
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is there")

    parser = add_command(commands, "convert", convert, "between Hugging Face folders and GGUF, both ways")
    parser.add_argument("model", metavar="MODEL", help="tiny, smollm2, a .gguf file or a folder, packed or not")
    parser.add_argument("out", metavar="OUT", help="a name that ends in .gguf, or a folder")
    parser.add_argument(
        "--type",
        default="F32",
        metavar="T",
        help="F32, F16, BF16; GGUF also Q8_0, Q4_K, ...; a folder also NF4, FP8, ...",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is there")

    parser = add_command(commands, "inspect", inspect, "show what a model file or folder holds")
    parser.add_argument("path", metavar="PATH")

    parser = add_command(commands, "fetch", fetch, "bring a model into the user's cache (the only use of the network)")
    parser.add_argument("name", choices=("smollm2",))

    parser = add_command(commands, "train", train, "train the small model from scratch, or go on with it")
    parser.add_argument("config", metavar="CONFIG", help="a training recipe, e.g. data/tiny/recipe.json")
    parser.add_argument("out", metavar="OUT", help="folder; a checkpoint in it is continued")
    parser.add_argument("--fresh", action="store_true", help="forget the checkpoint")


def compress(args) -> None:
    """Apply a recipe and store the result; the size on stdout."""
    from refllm.evaluate.measure import sizes
    from refllm.evaluate.tables import nbytes
    from refllm.formats.progress import Progress
    from refllm.methods.apply import check, compress, load
    from refllm.methods.recipes import parse
    from refllm.model.convert import save
    from refllm.model.load import resolve

    if not parse(args.recipe):
        note("recipe none: nothing to do")
        raise Silent(3)
    model = load(args.model)
    calibration, source_bytes = calibration_ids(args, model), _stored_bytes(resolve(args.model))
    check(model, args.recipe, calibration)
    reports = []
    with Progress() as progress:

        def show(report):
            reports.append(report)
            progress.show(f"{len(reports)} weights, {report.name}")

        if calibration is not None:
            progress.show(f"the first layer reads {len(calibration)} tokens")  # a while until the first weight
        small = compress(model, args.recipe, calibration, on_report=show)
    save(small, args.out, args.format, overwrite=args.overwrite)
    if _stored_bytes(Path(args.out)) > source_bytes:
        note(
            f"the result is larger than the source: {nbytes(source_bytes)} -> {nbytes(_stored_bytes(Path(args.out)))}; "
            "scales count too, and a weight that no stage packs may take more room than in its source"
        )
    before, after = sizes(model), sizes(small)
    if args.json:
        result = {"out": args.out, "format": args.format, "recipe": small.recipe, **asdict(after)}
        print_json({**result, "weight_bytes_before": before.weight_bytes, "weights": [asdict(r) for r in reports]})
        return
    print(
        f"{args.out}: {nbytes(before.weight_bytes)} -> {nbytes(after.weight_bytes)}, "
        f"{after.bits_per_weight:.2f} bits a weight, {after.linear_bits_per_weight:.2f} in the linears"
    )
    if reports:
        worst = max(reports, key=lambda report: report.weight_error)
        print(f"largest relative error ||W - W'||^2 / ||W||^2: {worst.weight_error:.2e} in {worst.name}")


def _stored_bytes(path: Path) -> int:
    """Of a model on disk: the file, or the weights of a folder."""
    return sum(file.stat().st_size for file in (path.glob("*.safetensors") if path.is_dir() else [path]))


def convert(args) -> None:
    """Write the other format."""
    from refllm.evaluate.tables import nbytes
    from refllm.model.convert import FOLDER_TYPES, convert
    from refllm.model.to_gguf import GGUF_TYPES

    types = GGUF_TYPES if args.out.endswith(".gguf") else FOLDER_TYPES
    if args.type.upper() not in types:
        raise UsageError(f"--type must be one of {', '.join(types)} for {args.out}, got {args.type!r}")
    done = convert(args.model, args.out, args.type.upper(), overwrite=args.overwrite)
    if args.json:
        print_json(done)
        return
    print(f"{done['path']}: {done['tensors']} tensors, {done['type']}, {nbytes(done['bytes'])}")
    if others := done["other_types"]:
        some = ", ".join(f"{name} {type_name}" for name, type_name in list(others.items())[:4])
        note(f"{len(others)} matrices have rows that no {done['type']} block divides and got another type: {some}")


def inspect(args) -> None:
    """What is in a file, tensor by tensor."""
    from refllm.evaluate.tables import nbytes, table
    from refllm.model.describe import describe

    found = describe(args.path)
    if args.json:
        print_json(found)
        return
    types = ", ".join(f"{count} {name}" for name, count in found["types"].items())
    print(f"{found['path']}: {found['format']}, {found['architecture'] or 'architecture not stated'}")
    print(f"{found['parameters']:,} stored numbers, {nbytes(found['bytes'])}; tensors: {types}")
    for name, text in found["conventions"].items():
        print(f"{name}: {text}")
    if found["reason"]:
        print(f"refllm cannot run it: {found['reason']}")
    rows = [[t["name"], t["dtype"], " x ".join(map(str, t["shape"])), f"{t['bytes']:,}"] for t in found["tensors"]]
    print(table(["tensor", "type", "shape", "bytes"], rows, left=2))


def fetch(args) -> None:
    """Download once; afterwards the name works offline."""
    from refllm.formats.fetch import SHA256, fetch_smollm2

    path = fetch_smollm2()
    if args.json:
        print_json({"path": str(path), "bytes": path.stat().st_size, "sha256": SHA256})
    else:
        print(path)


def train(args) -> None:
    """Train by a recipe; the measurements go to stderr and to OUT/training_log.jsonl."""
    from refllm.model.tiny import train_from_recipe

    out = train_from_recipe(args.config, args.out, resume=not args.fresh, log=lambda line: print(line, file=sys.stderr))
    if args.json:
        print_json({"out": str(out)})
    else:
        print(out)
