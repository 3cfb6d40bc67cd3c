"""The process that measures one model for `refllm compare`: a job as JSON on stdin, the measured columns on stdout.

Order matters: what the model itself needs (load, prefill, decode) comes first and peak memory is read right after;
the comparison with the base, whose log-probabilities are far larger, comes after that, and answers to questions last.
"""

import json
import sys
from pathlib import Path

import numpy as np

from refllm.evaluate.compare import as_text
from refllm.evaluate.measure import divergence, kv_bytes_per_token, log_probabilities, measure_speed
from refllm.evaluate.perplexity import plan, token_nll, window_logits
from refllm.evaluate.recall import answers
from refllm.formats.process import peak_rss_bytes
from refllm.methods.apply import load, with_activations
from refllm.model.model import Model

HALF_ABOVE = 256 << 20  # bytes of float32 log-probabilities above which they are kept as float16


def measure(job: dict) -> dict:
    """Everything of a row but the sizes.

    Parameters
    ----------
    job : dict
        As `refllm.evaluate.compare` writes it: folder, ids, base, tasks, is_base, protocol, starts, window,
        prompt_tokens, new_tokens, repeats, activations.
    """
    model = with_activations(load(job["folder"]), job["activations"])
    ids = np.load(job["ids"])
    speed = measure_speed(model, ids[: job["prompt_tokens"]], job["new_tokens"], job["repeats"])
    costs = {
        "peak_rss_bytes": peak_rss_bytes(),
        "kv_bytes_per_token": kv_bytes_per_token(model, ids[: job["window"]]),
        "prefill_tokens_per_s": speed.prefill_tokens_per_s,
        "decode_tokens_per_s": speed.decode_tokens_per_s,
    }
    quality = _quality(model, ids, job)
    tasks = json.loads(Path(job["tasks"]).read_text(encoding="utf-8"))
    written = {task: answers(model, given) for task, given in tasks.items()}
    return costs | quality | ({"answers": written} if written else {})


def _quality(model: Model, ids: np.ndarray, job: dict) -> dict:
    windows = plan(model, as_text(ids, job["starts"]), job["protocol"], job["window"])
    count = sum(len(window.targets) for window in windows)
    base, top = _base_files(Path(job["base"]), (count, model.config.vocab_size), job["is_base"])
    nll, kl, agree, at = 0.0, 0.0, 0, 0
    for window in windows:
        logits = window_logits(model, window)
        nll += token_nll(logits, window.targets).sum()
        for start in range(0, len(logits), 64):  # float64 copies of 64 rows at a time
            part = logits[start : start + 64]
            rows = slice(at + start, at + start + len(part))
            if job["is_base"]:
                base[rows], top[rows] = log_probabilities(part), part.argmax(axis=-1)
            else:
                moved, same = divergence(base[rows], part, top[rows])
                kl, agree = kl + moved.sum(), agree + same.sum()
        at += len(logits)
    return {
        "perplexity": float(np.exp(nll / count)),
        "kl_to_base": float(kl / count),
        "top1_agreement": 1.0 if job["is_base"] else float(agree / count),
        "tokens_scored": count,
        "base_dtype": str(base.dtype),
    }


def _base_files(stem: Path, shape: tuple[int, int], create: bool) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities (n, V) and most likely tokens (n,) of the base, mapped from disk."""
    names = [stem.with_name(f"{stem.name}_{end}.npy") for end in ("logp", "top")]
    if not create:
        return tuple(np.load(name, mmap_mode="r") for name in names)
    dtype = np.float16 if 4 * shape[0] * shape[1] > HALF_ABOVE else np.float32
    open_new = np.lib.format.open_memmap
    return open_new(names[0], "w+", dtype, shape), open_new(names[1], "w+", np.int32, shape[:1])


def main() -> None:
    """Run one job. A model or text that cannot be measured is an answer, {"error": ...}; anything else is one line."""
    try:
        row = measure(json.loads(sys.stdin.read()))
    except ValueError as error:
        row = {"error": str(error)}
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())}")
    print(json.dumps(row))


if __name__ == "__main__":
    main()
