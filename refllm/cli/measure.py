"""compare, perplexity, eval: commands that measure models."""

from dataclasses import asdict

from refllm.cli.common import (
    Silent,
    UsageError,
    add_activations,
    add_calibration,
    add_command,
    add_model,
    add_recipe,
    count,
    encode_documents,
    encode_file,
    load_model,
    note,
    print_json,
    recipe_text,
)


def add_commands(commands) -> None:
    """Add the commands of this module."""
    parser = add_command(commands, "compare", compare, "measure recipes side by side: size, speed, memory, quality")
    add_model(parser, default="tiny")
    parser.add_argument("--recipes", nargs="+", type=recipe_text, metavar="R", help="default: a list with every family")
    parser.add_argument("--text", metavar="FILE", help="text to evaluate on (default: the bundled one)")
    parser.add_argument(
        "--max-tokens",
        type=count,
        metavar="N",
        help="evaluate on the first N tokens, of documents on the whole ones among them (default 4096)",
    )
    parser.add_argument("--window", type=count, metavar="N", help="tokens of context (default 512)")
    parser.add_argument(
        "--task",
        nargs="+",
        default=[],
        metavar="TASK",
        help="also ask questions: facts, passkey (for tiny), or a task file of prompts and answers",
    )
    parser.add_argument("--items", type=count, metavar="N", help="questions of each task (default 40)")
    parser.add_argument(
        "--plot", metavar="FILE.png", help="draw quality against size; with --task, recall against bytes of the cache"
    )
    parser.add_argument(
        "--resume", metavar="FILE.jsonl", help="keep rows here as they are measured; those of an earlier run are taken"
    )
    add_calibration(parser)
    add_activations(parser)

    parser = add_command(commands, "perplexity", perplexity, "measure perplexity by a named protocol")
    add_model(parser)
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text; for document also .jsonl")
    parser.add_argument("--protocol", default="gptq", metavar="P", help="gptq, strided, llamacpp or document")
    parser.add_argument("--window", type=count, metavar="N", help="tokens a pass sees (default: the context, <= 2048)")
    parser.add_argument("--stride", type=count, metavar="N", help="of strided (default: half the window)")
    parser.add_argument("--max-tokens", type=count, metavar="N", help="take the first N tokens of the text")
    add_recipe(parser)

    parser = add_command(commands, "eval", evaluate, "score the items of a task file")
    add_model(parser)
    parser.add_argument("--task", required=True, metavar="FILE.jsonl", help="one item a line; the keys tell its kind")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N items")
    add_recipe(parser)


def compare(args) -> int:
    """The table on stdout; recipes that the model cannot take are named on stderr."""
    from refllm.evaluate import compare as comparing
    from refllm.formats.files import data_path
    from refllm.formats.progress import Progress
    from refllm.methods.apply import load
    from refllm.methods.recipes import parse

    recipes = args.recipes or comparing.DEFAULT_RECIPES
    for recipe in recipes:
        parse(recipe)
    if args.plot is not None:
        from refllm.evaluate.plots import check_target

        check_target(args.plot)
    model = load(args.model)
    if args.text:
        text = encode_file(model, args.text)
    else:
        text = encode_documents(model, data_path("tiny/eval.txt"))
    if args.calibration:
        calibration = encode_file(model, args.calibration)
    else:
        bundled = [] if args.text else encode_documents(model, data_path("tiny/calib.txt"))
        calibration = [i for document in bundled for i in document] or None
    setting = comparing.setting(
        model,
        text,
        None if calibration is None else calibration[: comparing.CALIBRATION_TOKENS],
        max_tokens=args.max_tokens or comparing.DEFAULT_TOKENS,
        window=args.window,
        activations=args.activations,
        threads=args.threads,
        tasks=tuple(args.task),
        items=args.items or comparing.ITEMS,
    )
    with Progress() as progress:

        def leave_out(recipe, reason):
            progress.close()
            note(f"left out: {recipe}: {reason}")

        show = lambda number, total, recipe: progress.show(f"{number}/{total} {recipe}")
        result = comparing.compare(model, recipes, setting, on_recipe=show, on_failed=leave_out, resume=args.resume)
    if args.plot is not None:
        from refllm.evaluate.plots import quality_against_size

        quality_against_size(result["rows"], args.plot)
        note(f"picture: {args.plot}")
    if args.json:
        print_json({"model": model.name, **result})
    else:
        from refllm.evaluate.tables import compare_table

        print(compare_table(result))
    return 1 if result["failed"] and (args.recipes or not result["rows"]) else 0


def perplexity(args) -> None:
    """One number, and how it was measured."""
    from refllm.evaluate.perplexity import PROTOCOLS, check_window, evaluate_perplexity
    from refllm.formats.progress import Progress

    if args.protocol not in PROTOCOLS:
        raise UsageError(f"unknown protocol {args.protocol!r}; known: {', '.join(PROTOCOLS)}")
    if args.stride is not None and args.protocol != "strided":
        raise UsageError(f"--stride belongs to the protocol strided, not to {args.protocol}")
    model = load_model(args)
    check_window(model, args.window)
    if args.protocol == "document":
        ids = encode_documents(model, args.text, args.max_tokens)
    else:
        ids = encode_file(model, args.text)[: args.max_tokens]
    with Progress() as progress:
        show = lambda done, total, nll: progress.show(f"window {done}/{total}, nll {nll:.4f}")
        result = evaluate_perplexity(
            model, ids, protocol=args.protocol, window=args.window, stride=args.stride, on_window=show
        )
    if args.json:
        print_json({"model": model.name, "recipe": model.recipe, "activations": args.activations, **asdict(result)})
    else:
        print(
            f"perplexity {result.perplexity:.4f}  nll {result.nll:.4f}  tokens scored {result.tokens_scored}  "
            f"protocol {result.protocol}  window {result.window}  stride {result.stride}"
        )


def evaluate(args) -> None:
    """The scores of a task."""
    from refllm.evaluate.tasks import read_task, score
    from refllm.formats.progress import Progress

    kind, items = read_task(args.task, args.limit)
    if not items:
        note("no items: nothing to do")
        raise Silent(3)
    model = load_model(args)
    with Progress() as progress:
        result = score(model, kind, items, on_item=lambda done: progress.show(f"item {done}/{len(items)}"))
    if args.json:
        print_json({"model": model.name, "recipe": model.recipe, "task": args.task, "kind": kind, **result})
        return
    numbers = "  ".join(f"{key} {value:.4f}" for key, value in result.items() if isinstance(value, float))
    print(f"{kind}  items {result['items']}  {numbers}")
