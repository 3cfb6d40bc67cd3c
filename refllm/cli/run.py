"""generate, chat, tokenize, logits: commands that run a model."""

import sys
from math import isnan

from refllm.cli.common import (
    UsageError,
    add_command,
    add_model,
    add_recipe,
    count,
    load_model,
    note,
    print_json,
    read_text,
    tokenizer_of,
)


def add_commands(commands) -> None:
    """Add the commands of this module."""
    parser = add_command(commands, "generate", generate, "continue a text")
    add_model(parser, default="tiny")
    parser.add_argument("-p", "--prompt", required=True, help="text to continue; - reads standard input")
    _add_sampling(parser)
    add_recipe(parser)

    parser = add_command(commands, "chat", chat, "hold a conversation", as_json=False)
    add_model(parser, default="tiny")
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    _add_sampling(parser, new_tokens=256)
    add_recipe(parser)

    parser = add_command(commands, "tokenize", tokenize, "turn text into token ids")
    add_model(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("-p", "--prompt", metavar="TEXT")
    source.add_argument("--file", metavar="FILE")

    parser = add_command(commands, "logits", logits, "write the logits of token ids to a .npy file")
    add_model(parser)
    parser.add_argument("--ids", required=True, metavar="1,2,3", help="token ids, separated by commas")
    parser.add_argument("--out", required=True, metavar="FILE.npy")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--decode-from", type=count, metavar="K", help="prefill K ids, decode the others one by one")
    add_recipe(parser)


def _add_sampling(parser, new_tokens: int = 128) -> None:
    parser.add_argument(
        "-n", "--max-tokens", type=count, default=new_tokens, metavar="N", help=f"at most N new tokens ({new_tokens})"
    )
    parser.add_argument("--temp", type=float, default=0.0, metavar="T", help="temperature; 0 is greedy (default)")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="keep the K most likely tokens; 0 keeps all")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="keep the likeliest up to probability P")
    parser.add_argument("--min-p", type=float, default=0.0, metavar="P", help="keep those P times as likely as the top")
    parser.add_argument("--seed", type=int, default=0, metavar="S")


def _sampling(args):
    from refllm.model.sample import Sampling

    try:
        return Sampling(args.temp, args.top_k, args.top_p, args.min_p, args.seed)
    except ValueError as error:
        raise UsageError(str(error)) from error


def generate(args) -> None:
    """Stream text; --json prints it at the end, with the speed of both phases."""
    from refllm.evaluate.measure import PhaseTimer
    from refllm.model.sample import generate_ids

    sampling = _sampling(args)
    prompt = read_text("-") if args.prompt == "-" else args.prompt
    model = load_model(args)
    tokenizer = tokenizer_of(model)
    ids = tokenizer.encode(prompt)
    if not ids and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id]  # an empty prompt begins a text
    stream = tokenizer.stream()
    for token in ids:  # the text of the first new token depends on what stands before it
        stream.push(token)
    timer, pieces, new = PhaseTimer(len(ids)), [], []
    for token in generate_ids(model, ids, args.max_tokens, sampling, on_prefill=timer.on_prefill):
        timer.on_token()
        new.append(token)
        pieces.append(stream.push(token))
        _show(pieces[-1], args)
    pieces.append(stream.finish())
    _show(pieces[-1], args)
    speed = timer.speed()
    if args.json:
        print_json(
            {
                "text": "".join(pieces),
                "prompt_tokens": len(ids),
                "tokens": len(new),
                "ids": new,
                "prefill_tokens_per_s": speed.prefill_tokens_per_s,
                "decode_tokens_per_s": speed.decode_tokens_per_s,
            }
        )
    else:
        print()
        note(
            f"{len(ids)} tokens read{_at(speed.prefill_tokens_per_s)}, "
            f"{len(new)} written{_at(speed.decode_tokens_per_s)}"
        )


def _at(tokens_per_s: float) -> str:
    """The first token comes with the prompt: of it alone there is no speed to tell."""
    from refllm.evaluate.tables import significant

    return "" if isnan(tokens_per_s) else f" at {significant(tokens_per_s)}/s"


def _show(text: str, args) -> None:
    if text and not getattr(args, "json", False):
        sys.stdout.write(text)
        sys.stdout.flush()


def chat(args) -> None:
    """Read a line, answer, until the end of the input or /exit."""
    from refllm.formats.chat import chat_ids

    sampling = _sampling(args)
    model = load_model(args)
    tokenizer = tokenizer_of(model)
    system = [{"role": "system", "content": args.system}] if args.system else []
    if tokenizer.chat_format is None:
        note("this model has no chat format: it continues the text you type")
    if sys.stdin.isatty():
        note("an empty line or /exit ends the conversation")
    turns, text = [], args.system or ""
    for line in _lines():
        if tokenizer.chat_format is None:
            text = f"{text} {line}".strip()
            text += _answer(model, tokenizer.encode(text), args, sampling)
            continue
        turns.append({"role": "user", "content": line})
        ids = chat_ids(tokenizer, system + turns)
        while len(ids) + 16 > model.config.context_length and len(turns) > 1:
            note("(the context is full: the oldest question and its answer are forgotten)")
            turns = turns[2:]
            ids = chat_ids(tokenizer, system + turns)
        turns.append({"role": "assistant", "content": _answer(model, ids, args, sampling)})


def _lines():
    while True:
        if sys.stdin.isatty():
            sys.stderr.write("> ")
            sys.stderr.flush()
        line = sys.stdin.readline()
        if line.strip() in ("", "/exit"):
            return
        yield line.rstrip("\r\n")


def _answer(model, ids, args, sampling) -> str:
    from refllm.model.sample import generate_ids

    stop = tuple({*model.config.eos_token_ids, *model.tokenizer.eos_token_ids})
    stream, pieces = model.tokenizer.stream(), []
    for token in ids:
        stream.push(token)
    for token in generate_ids(model, ids, args.max_tokens, sampling, stop_ids=stop):
        pieces.append(stream.push(token))
        _show(pieces[-1], args)
    pieces.append(stream.finish())
    _show(pieces[-1] + "\n", args)
    return "".join(pieces)


def tokenize(args) -> None:
    """Ids on one line, BOS included where the model begins texts with it."""
    from refllm.methods.apply import load

    tokenizer = tokenizer_of(load(args.model))
    ids = tokenizer.encode(args.prompt if args.file is None else read_text(args.file))
    if args.json:
        print_json({"ids": ids})
    else:
        print(*ids)


def logits(args) -> None:
    """(T, vocab) of the ids, prefilled in one call or decoded one by one after the first K."""
    import numpy as np

    from refllm.formats.files import atomic_write
    from refllm.model.cache import new_cache
    from refllm.model.llama import forward

    try:
        ids = [int(part) for part in args.ids.split(",")]
    except ValueError:
        raise UsageError(f"--ids must be whole numbers separated by commas, got {args.ids!r}") from None
    if args.decode_from is not None and args.decode_from > len(ids):
        raise UsageError(f"--decode-from {args.decode_from} is more than the {len(ids)} ids")
    model = load_model(args, dtype=args.dtype)
    if args.decode_from is None:
        result = forward(model, ids)
    else:
        cache = new_cache(model)
        parts = [forward(model, ids[: args.decode_from], cache=cache)]
        parts += [forward(model, [token], cache=cache) for token in ids[args.decode_from :]]
        result = np.concatenate(parts)
    result = result.astype(args.dtype, copy=False)
    with atomic_write(args.out) as file:
        np.save(file, result)
    if args.json:
        print_json({"out": args.out, "shape": list(result.shape), "dtype": str(result.dtype)})
    else:
        print(f"{args.out}: {result.shape[0]} x {result.shape[1]} {result.dtype}")
