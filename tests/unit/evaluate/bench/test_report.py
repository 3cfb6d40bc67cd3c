"""Jobs in their own process, quantisation, and what is printed and drawn of a result."""

import json

import numpy as np
import pytest

from refllm.evaluate.bench import report, worker
from refllm.evaluate.bench.machine import cpu_name, describe
from refllm.evaluate.bench.quantize import check_types, measure_encoders, measure_recipes
from refllm.formats.blocks import BLOCKS
from tests.bytemodel import byte_model

MACHINE = {"cpu": "CPU", "cpus": 2, "system": "Linux", "python": "3.11", "versions": {"numpy": "2.0"}}
TIMES = {"seconds": 2e-6, "lower": 1e-6, "upper": 4e-6}
COMMON = {"threads": 1, "rounds": 5, "machine": MACHINE, "programs": {"peer": "1.0"}}


def product_row(program, type_name, **fields):
    row = {
        "shape": [8, 64],
        "tokens": 1,
        "program": program,
        "type": type_name,
        "detail": "int8",
        "weight_bytes": 1000,
        "gbytes_per_s": 0.5,
        "bandwidth_share": 0.25,
        "gflops": 3.0,
        "x_numpy": 2.0,
        "x_peers": {},
    }
    return row | TIMES | fields


KERNELS = COMMON | {
    "what": "kernels",
    "bandwidth_gbytes_per_s": 2.0,
    "other_work": 0.04,
    "rows": [
        product_row("refllm", "Q4_0", x_peers={"peer": 1.25}),
        product_row("peer", "Q4_0"),
        product_row("refllm", "Q4_0", shape=[4, 32], tokens=512),
    ],
}
TOKENS = {"lower": 90.0, "upper": 110.0, "tokens_per_s": 100.0, "gbytes_per_s": 0.5, "bandwidth_share": 0.5}
DECODE = COMMON | {
    "what": "decode",
    "bandwidth_gbytes_per_s": 1.0,
    "other_work": 0.5,
    "rows": [
        TOKENS
        | {
            "file": "a.gguf",
            "program": program,
            "detail": "",
            "tokens": 128,
            "context": 8,
            "weight_bytes": 5_000_000,
            "same_top1": 0.98,
            "ratios": ratios,
        }
        for program, ratios in (("refllm", {"peer": 1.5}), ("peer", {}))
    ],
}


def test_table_of_kernels():
    lines = report.text(KERNELS).splitlines()
    assert lines[0] == "8x64, 1 token" and "x peer" in lines[2] and "4x32, 512 tokens" in lines
    row = next(line for line in lines if line.startswith("refllm"))
    cells = ["refllm", "Q4_0", "int8", "1.00", "kB", "2.00", "1.00-4.00", "0.5", "25%", "2.00", "1.25"]
    assert row.split() == cells
    many = lines[lines.index("4x32, 512 tokens") + 1 :]
    assert "GFLOP/s" in " ".join(many) and "of read" not in " ".join(many[:-2])
    assert lines[-2] == (
        "medians of 5 rounds in turns, 1 thread each, memory read 2.0 GB/s in the same rounds, "
        "other work took 4% of the processors"
    )
    assert lines[-1] == "CPU, 2 processors, Linux; Python 3.11, numpy 2.0, peer 1.0"


def test_table_of_decode():
    lines = report.text(DECODE).splitlines()
    assert lines[0] == "decode: 128 tokens written one by one behind 8 others"
    assert next(line for line in lines if line.startswith("a.gguf")).split() == [
        "a.gguf", "refllm", "100", "90.0-110", "0.5", "50%", "98%", "1.50",
    ]  # fmt: skip
    prefill = report.text(DECODE | {"what": "prefill"})
    assert "128 tokens read at once" in prefill and "GB/s " not in prefill.split("medians")[0]


def test_noise_is_named():
    assert report.noise(KERNELS) is None and report.noise(KERNELS | {"other_work": None}) is None
    assert report.noise(DECODE | {"busy": 1}) is None and "1 processor kept busy" in report.text(DECODE | {"busy": 1})
    assert report.noise(DECODE).startswith("other work took 50% of the processors while this was measured")


def test_panels_and_picture(tmp_path):
    first, many = report.panels(KERNELS)
    assert first["roof"] == 2.0 and first["bars"][0] == ("refllm Q4_0 int8", "refllm", 0.5, 0.25, 1.0)
    assert many["roof"] is None and many["unit"] == "GFLOP/s"
    [panel] = report.panels(DECODE)
    assert panel["roof"] == pytest.approx(200) and panel["bars"][1] == ("peer", "peer", 100.0, 90.0, 110.0)
    for name, result in (("kernels", KERNELS), ("decode", DECODE)):
        report.draw(result, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_encoders_are_compared_byte_for_byte():
    class Lossy:
        name = "lossy"

        def encoder(self, type_name):
            return None if type_name == "Q8_0" else lambda W: np.zeros_like(BLOCKS[type_name].encode(W))

    found = measure_encoders((4, 256), ("Q4_0", "Q8_0"), peers=[Lossy()], rounds=2)
    rows = {(row["type"], row["program"]): row for row in found["rows"]}
    assert ("Q8_0", "lossy") not in rows and rows["Q4_0", "lossy"]["same_bytes"] == 0
    assert rows["Q4_0", "refllm"]["same_bytes"] == rows["Q4_0", "numpy"]["same_bytes"] == 1
    mine = rows["Q4_0", "refllm"]
    assert mine["ratios"] == {"lossy": pytest.approx(rows["Q4_0", "lossy"]["seconds"] / mine["seconds"])}
    assert mine["mweights_per_s"] == pytest.approx(1024 / mine["seconds"] / 1e6)
    table = report.text(COMMON | {"what": "quantize", **found})
    assert "4x256 float32 -> GGUF blocks" in table and "x lossy" in table
    report.panels(COMMON | {"what": "quantize", **found})


def test_recipes_are_timed():
    found = measure_recipes(byte_model(), ["none", "rtn:bits=4,group=16"], rounds=2)
    assert [row["recipe"] for row in found["rows"]] == ["none", "rtn:bits=4,group=16"]
    assert "compress bytes" in report.text(COMMON | {"what": "quantize", **found})


def test_types_of_encoders_are_checked():
    with pytest.raises(ValueError, match="unknown GGUF type 'w4'"):
        check_types(["w4"])
    with pytest.raises(ValueError, match="8x100: 100 columns are no multiple of 256, as Q4_K needs"):
        check_types(["Q4_K"], [(8, 100)])


def test_machine(tmp_path):
    found = describe()
    assert found["cpus"] >= 1 and found["versions"]["numpy"] == np.__version__ and found["cpu"]
    (tmp_path / "cpuinfo").write_text("processor: 0\nmodel name\t: A Chip\n", encoding="utf-8")
    assert cpu_name(str(tmp_path / "cpuinfo")).startswith("A Chip")
    assert cpu_name(str(tmp_path / "none"))


def test_a_job_runs_in_a_process_with_its_threads():
    job = {"what": "bandwidth", "threads": 2, "rounds": 1, "peers": [], "busy": 1, "sizes": {"read_bytes": 1 << 16}}
    found = worker.run(job)
    assert [row["threads"] for row in found["rows"]] == [1, 2] and found["what"] == "bandwidth"
    assert "read GB/s" in report.text(found)


def test_what_goes_wrong_there_is_said_here(monkeypatch):
    job = {"what": "decode", "threads": 1, "rounds": 1, "peers": [], "models": ["/none"]}
    with pytest.raises(ValueError, match="KeyError: 'activations'"):
        worker.run(job)
    monkeypatch.setattr(worker.subprocess, "run", lambda *a, **k: type("Done", (), {"returncode": -11, "stdout": ""}))
    with pytest.raises(RuntimeError, match="ended with code -11"):
        worker.run(job)


def test_the_answer_is_the_last_line(monkeypatch):
    answer = json.dumps({"rows": []})
    done = type("Done", (), {"returncode": 0, "stdout": f"a peer says hello\n\n{answer}\n"})
    monkeypatch.setattr(worker.subprocess, "run", lambda *a, **k: done)
    assert worker.run({"threads": 1}) == {"rows": []}
