"""Benchmarks run in a process of their own: NumPy's libraries read their number of threads when they are imported.

`run` is the side of the command line, `main` the process: a job as JSON on stdin, the result on the last line of stdout
(a peer may print above it), progress on stderr.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from statistics import median

from refllm.formats.process import child_environment


def run(job: dict) -> dict:
    """Measure in a child process with as many threads as the job says.

    Parameters
    ----------
    job : dict
        what (kernels, decode, prefill, quantize, bandwidth), threads, rounds, peers, busy (processors that are kept
        busy meanwhile; default 0), and what that measurement takes.

    Returns
    -------
    dict
        what, threads, rounds, busy, machine, programs (versions of the peers), rows; bandwidth_gbytes_per_s and
        other_work where they were measured.

    Raises
    ------
    ValueError
        What cannot be measured, and why.
    RuntimeError
        The process ended without an answer.
    """
    command = [sys.executable, "-m", "refllm.evaluate.bench.worker"]
    done = subprocess.run(
        command,
        input=json.dumps(job),
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env=child_environment(job["threads"]),
        check=False,
    )
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        raise RuntimeError(f"the measuring process ended with code {done.returncode} and without an answer")
    answer = json.loads(lines[-1])
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer


def measure(job: dict, say: Callable[[str], None]) -> dict:
    """Do a job in this process."""
    from refllm.evaluate.bench.machine import describe
    from refllm.evaluate.bench.peers import open_peer
    from refllm.evaluate.bench.rounds import busy_processors

    peers = [open_peer(name, job["threads"]) for name in job["peers"]]
    with busy_processors(job.get("busy", 0)):
        found = _MEASUREMENTS[job["what"]](job, peers, say)
    result = {
        "what": job["what"],
        "threads": job["threads"],
        "rounds": job["rounds"],
        "busy": job.get("busy", 0),
        "machine": describe(),
        "programs": {peer.name: peer.version for peer in peers},
        "rows": [row for part in found for row in part["rows"]],
    }
    for key, summary in (("bandwidth_gbytes_per_s", median), ("other_work", max)):
        values = [part[key] for part in found if part.get(key) is not None]
        if values:
            result[key] = summary(values)
    return result


def _kernels(job: dict, peers: list, say) -> list[dict]:
    from refllm.evaluate.bench.kernels import measure_products

    options = {key: job[key] for key in ("activations", "tokens", "threads", "rounds")}
    return [
        measure_products(tuple(shape), job["types"], peers=peers, on_step=say, **options, **job.get("sizes", {}))
        for shape in job["shapes"]
    ]


def _generation(job: dict, peers: list, say) -> list[dict]:
    from refllm.evaluate.bench.generation import measure_decode, measure_prefill

    run = {"decode": measure_decode, "prefill": measure_prefill}[job["what"]]
    options = {key: job[key] for key in ("activations", "tokens", "threads", "rounds")}
    options |= {key: job[key] for key in ("context", "caches") if key in job}
    return [run(path, peers=peers, on_step=say, **options, **job.get("sizes", {})) for path in job["models"]]


def _quantize(job: dict, peers: list, say) -> list[dict]:
    from refllm.evaluate.bench.quantize import measure_encoders, measure_recipes

    found = [
        measure_encoders(tuple(shape), job["types"], peers=peers, rounds=job["rounds"], on_step=say)
        for shape in job["shapes"]
    ]
    if job["recipes"]:
        from refllm.methods.apply import load

        model = load(job["model"])
        found.append(measure_recipes(model, job["recipes"], job["calibration"], rounds=job["rounds"], on_step=say))
    return found


def _bandwidth(job: dict, peers: list, say) -> list[dict]:
    from refllm.evaluate.bench.bandwidth import measure_bandwidth

    show = lambda done, total: say(f"round {done + 1}/{total}")
    return [measure_bandwidth(job["threads"], job["rounds"], on_round=show, **job.get("sizes", {}))]


_MEASUREMENTS = {
    "kernels": _kernels,
    "decode": _generation,
    "prefill": _generation,
    "quantize": _quantize,
    "bandwidth": _bandwidth,
}


def main() -> None:
    """Run one job. What goes wrong is the answer {"error": ...}, one line."""
    from refllm.formats.progress import Progress

    try:
        with Progress() as progress:
            answer = measure(json.loads(sys.stdin.read()), progress.show)
    except Exception as error:
        known = isinstance(error, ValueError | OSError | RuntimeError)
        text = " ".join(str(error).split()) or type(error).__name__
        answer = {"error": text if known else f"{type(error).__name__}: {text}"}
    print("\n" + json.dumps(answer))


if __name__ == "__main__":
    main()
