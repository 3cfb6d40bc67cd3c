"""Every command's usual path and every class of error, with its exit code. In this process, but for three of them."""

import io
import json
import os
import re
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from refllm.cli import main
from refllm.formats.process import thread_variables
from refllm.model.llama import forward
from refllm.model.native import save_native
from tests.bytemodel import byte_model

ROOT = Path(__file__).parent.parent
TEXT = "Anna put the lamp in the hall. Where is the lamp? " * 12


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """The NumPy text of the kernels (nothing to compile), and the limits of --threads taken back after each test."""
    monkeypatch.setenv("REFLLM_KERNELS", "numpy")
    for name in thread_variables(1):
        monkeypatch.setenv(name, "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    save_native(byte_model(), folder / "model")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return folder


@pytest.fixture
def model(folder):
    return str(folder / "model")


@pytest.fixture
def text(folder):
    return str(folder / "text.txt")


@pytest.fixture
def run(capsys):
    """run(arguments) -> (exit code, stdout, stderr)."""

    def call(*argv):
        code = main([str(arg) for arg in argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def run_json(run):
    """The object a command prints with --json; nothing else may be there, on either stream."""

    def call(*argv):
        code, out, err = run(*argv, "--json")
        assert (code, err) == (0, ""), err
        found = json.loads(out)
        assert found.pop("schema_version") == 1 and out.count("\n") == 1
        return found

    return call


# ---- usual paths ----------------------------------------------------------------------------------------------------


def test_tokenize(run, run_json, model, folder):
    ids = [257, *byte_model().tokenizer.encode("hé", add_bos=False)]
    assert run("tokenize", model, "-p", "hé") == (0, " ".join(map(str, ids)) + "\n", "")
    (folder / "he.txt").write_bytes("hé".encode())
    assert run_json("tokenize", model, "--file", folder / "he.txt") == {"ids": ids}


def test_logits_in_one_call_and_by_decoding(run, run_json, model, folder):
    ids = [257, 5, 9, 12, 40]
    expected = forward(byte_model(), ids)
    out = folder / "logits.npy"
    code, printed, _ = run("logits", model, "--ids", "257,5,9,12,40", "--out", out)
    assert code == 0 and "5 x 259 float32" in printed
    whole = np.load(out)
    assert whole.dtype == np.float32
    np.testing.assert_allclose(whole, expected, atol=1e-5 * np.abs(expected).max())
    options = ("--ids", "257,5,9,12,40", "--out", out, "--dtype", "float64", "--decode-from", "2")
    assert run_json("logits", model, *options)["dtype"] == "float64"
    np.testing.assert_allclose(np.load(out), expected, atol=1e-5 * np.abs(expected).max())
    assert sorted(p.name for p in folder.iterdir() if p.name.startswith((".", "logits"))) == ["logits.npy"]


def test_generate_shows_what_the_loop_yields(run, run_json, model):
    from refllm.model.sample import generate_ids

    ids = list(generate_ids(byte_model(), byte_model().tokenizer.encode("Anna"), 12))
    found = run_json("generate", model, "-p", "Anna", "-n", "12")
    assert found["ids"] == ids and found["tokens"] == len(ids) and found["prompt_tokens"] == 5
    assert found["text"] == byte_model().tokenizer.decode(ids)
    code, out, err = run("generate", model, "-p", "Anna", "-n", "12")
    assert (code, out) == (0, found["text"] + "\n")
    assert re.fullmatch(rf"5 tokens read at [\d.,]+/s, {len(ids)} written at [\d.,]+/s\n", err)


def test_one_token_has_no_speed(run, run_json, model):
    assert run_json("generate", model, "-p", "Anna", "-n", "1")["decode_tokens_per_s"] is None
    assert run("generate", model, "-p", "Anna", "-n", "1")[2].endswith("/s, 1 written\n")


def test_generate_obeys_seed_and_sampling(run_json, model):
    sample = lambda seed: run_json("generate", model, "-p", "A", "-n", "20", "--temp", "2", "--seed", seed)["ids"]
    assert sample(1) == sample(1) != sample(2)
    narrow = run_json("generate", model, "-p", "A", "-n", "20", "--temp", "2", "--top-k", "1")["ids"]
    assert narrow == run_json("generate", model, "-p", "A", "-n", "20")["ids"]


def test_an_empty_prompt_begins_with_bos(run_json, model):
    found = run_json("generate", model, "-p", "", "-n", "3")
    assert found["prompt_tokens"] == 1 and found["tokens"] <= 3


def test_recipes_and_int8_activations_change_the_result(run_json, model, text):
    options = ("perplexity", model, "--text", text, "--window", "64")
    plain = run_json(*options)
    small = run_json(*options, "--recipe", "rtn:bits=3,group=16")
    fast = run_json(*options, "--recipe", "rtn:bits=3,group=16", "--activations", "int8")
    calibrated = run_json(*options, "--recipe", "wanda", "--calibration", text)
    assert len({plain["nll"], small["nll"], fast["nll"], calibrated["nll"]}) == 4
    assert small["recipe"] == "rtn:bits=3,group=16" and fast["activations"] == "int8"


def test_perplexity_of_every_protocol(run, run_json, model, text):
    n = len(TEXT) + 1
    expected = {"gptq": n // 64 * 63, "strided": n - 1, "llamacpp": n // 64 * 31, "document": n - 1}
    for protocol, scored in expected.items():
        found = run_json("perplexity", model, "--text", text, "--protocol", protocol, "--window", "64")
        assert found["tokens_scored"] == scored
        assert found["perplexity"] == pytest.approx(np.exp(found["nll"]))
        assert (found["protocol"], found["window"]) == (protocol, 64)
    found = run_json("perplexity", model, "--text", text, "--window", "64", "--max-tokens", "130")
    assert found["tokens_scored"] == 126
    assert run("perplexity", model, "--text", text, "--window", "64")[1].startswith("perplexity ")


def test_documents_of_text_and_of_jsonl_are_the_same(run_json, model, folder):
    (folder / "two.txt").write_text("one here\n\n \ntwo", encoding="utf-8")
    rows = "".join(json.dumps({"text": part}) + "\n" for part in ("one here", "two"))
    (folder / "two.jsonl").write_text(rows, encoding="utf-8")
    measure = lambda name: run_json("perplexity", model, "--text", folder / name, "--protocol", "document")
    first, second = measure("two.txt"), measure("two.jsonl")
    assert first == second and first["tokens_scored"] == 11


def test_compare_prints_table_json_and_picture(run, run_json, model, text, folder):
    options = ("compare", model, "--text", text, "--max-tokens", "200", "--recipes", "none", "rtn:bits=4,group=16")
    found = run_json(*options, "--threads", "1")
    assert [row["recipe"] for row in found["rows"]] == ["none", "rtn:bits=4,group=16"] and found["threads"] == 1
    code, out, err = run(*options, "--plot", folder / "p.png")
    assert code == 0 and "KL," in out and "rtn:bits=4,group=16" in out and "p.png" in err
    assert (folder / "p.png").read_bytes().startswith(b"\x89PNG")


def test_compare_says_what_it_leaves_out_and_fails(run, model, text):
    code, out, err = run("compare", model, "--text", text, "--max-tokens", "200", "--recipes", "none", "kivi")
    assert code == 1 and "none" in out and err.startswith("left out: kivi: ") and err.count("\n") == 1


BAD = {  # for the random model: linears of 32 and 48 columns, heads of 8
    "rtn:bits=16": "bits must be 2 to 8, got 16",
    "rtn:group=7": "group_size 7 does not divide the 32 columns",
    "rtn:group=32": "group_size 32 does not divide the 48 columns",
    "rtn:group=8,scale_dtype=float8": "scale_dtype must be one of",
    "wanda:sparsity=2": "sparsity must lie between 0 and 1",
    "wanda:pattern=2:5": "needs a multiple of 5 columns",
    "svd:ratio=2": "ratio must lie between 0 and 1",
    "svd:rank=17": "rank must lie between 1 and 16",
    "wanda:pattern=2:4+rtn:group=32": "group_size 32 does not divide",
    "kivi:bits=9": "kivi bits must be 1 to 8, got 9",
    "kivi:group=16": "group_size 16 does not divide the key head_dim 8",
    "flash:block_q=0": "block_q must be at least 1, got 0",
    "speculative:gamma=0": "gamma must be at least 1, got 0",
    "speculative:draft=layers,draft_layers=3": "draft_layers must be 1 to 2",
    "rtn:group=8,only=nothing": "only=nothing matches no weight",
}


def test_compare_refuses_what_no_row_can_show_before_it_measures(run, model, text, monkeypatch):
    from refllm.evaluate import compare as comparing

    monkeypatch.setattr(comparing, "_measure", lambda *args, **options: pytest.fail("something was measured"))
    options = ("compare", model, "--text", text, "--max-tokens", "200", "--recipes")
    code, out, err = run(*options, *BAD)
    assert (code, out) == (1, "") and err.count("\n") == 1
    for recipe, reason in BAD.items():
        code, out, err = run(*options, recipe)
        assert (code, out) == (1, "") and err.startswith(f"refllm: error: {recipe}: ") and reason in err, err


def test_compare_names_a_refused_recipe_before_it_measures_the_others(run, model, text, monkeypatch, capsys):
    from refllm.evaluate import compare as comparing

    def measure(*args, **options):
        seen.append(capsys.readouterr().err)
        raise RuntimeError("enough")

    seen = []
    monkeypatch.setattr(comparing, "_measure", measure)
    run("compare", model, "--text", text, "--max-tokens", "200", "--recipes", "none", "rtn:bits=16")
    assert len(seen) == 1 and seen[0].startswith("left out: rtn:bits=16: rtn cannot compress model.layers.0.")


def test_compare_scores_no_more_than_max_tokens(run_json, text):
    found = run_json("compare", "tiny", "--max-tokens", "64", "--recipes", "none", "--threads", "1")
    assert (found["protocol"], found["tokens_scored"], found["window"]) == ("document", 63, 64)  # BOS is not scored


def test_compress_writes_what_other_commands_read(run, run_json, model, text, folder):
    recipe = "wanda:pattern=2:4+rtn:bits=8,group=8+kivi:group=8,bits=4"
    found = run_json("compress", model, folder / "small", "--recipe", recipe, "--calibration", text)
    assert found["weight_bytes"] < found["weight_bytes_before"] and len(found["weights"]) == 14
    options = ("--text", text, "--window", "64")
    stored = run_json("perplexity", folder / "small", *options)
    direct = run_json("perplexity", model, *options, "--recipe", recipe, "--calibration", text)
    assert stored["nll"] == pytest.approx(direct["nll"], abs=1e-6) and stored["recipe"] == recipe
    code, out, err = run("compress", model, folder / "small", "--recipe", "rtn:bits=4,group=16", "--overwrite")
    assert code == 0 and "bits a weight" in out and "larger" not in err
    again = ("compress", folder / "small", folder / "small2", "--recipe", "rtn:bits=8,group=2,scale_dtype=float32")
    code, _, err = run(*again)
    assert code == 0 and err.startswith("the result is larger than the source: ") and err.count("\n") == 1
    code, _, err = run(*again)
    assert code == 1 and "already holds a model; give another name or --overwrite" in err


def test_convert_and_inspect_both_ways(run, run_json, model, text, folder):
    assert run("convert", model, folder / "m.gguf", "--type", "f32")[0] == 0
    assert run("convert", folder / "m.gguf", folder / "hf")[0] == 0
    first = run_json("perplexity", model, "--text", text, "--window", "64")
    assert run_json("perplexity", folder / "hf", "--text", text, "--window", "64")["nll"] == first["nll"]
    found = run_json("inspect", folder / "m.gguf")
    assert found["format"] == "GGUF v3" and found["architecture"] == "llama"
    assert {"name", "shape", "dtype", "bytes"} == set(found["tensors"][0])
    code, out, _ = run("inspect", folder / "hf")
    assert code == 0 and "model.embed_tokens.weight" in out and "rope layout" in out


def test_eval(run, run_json, model, folder):
    task = folder / "task.jsonl"
    task.write_text('{"query": "Q", "choices": ["a", "bb"], "gold": 0}\n' * 3, encoding="utf-8")
    found = run_json("eval", model, "--task", task, "--limit", "2")
    assert found["kind"] == "choice" and found["items"] == 2 and {"acc", "acc_norm"} <= set(found)
    assert run("eval", model, "--task", task)[1].startswith("choice  items 3")


def test_methods_are_the_catalogue(run, run_json):
    from refllm.methods.catalogue import catalogue

    assert run_json("methods") == {"methods": catalogue()}
    code, out, _ = run("methods")
    assert code == 0 and "rtn" in out and "keys: bits=4, group=64, symmetric=false, scale_dtype=float16\n" in out
    some = run_json("methods", "svd", "prune")["methods"]
    assert [entry["name"] for entry in some] == ["magnitude", "wanda", "svd"]
    code, _, err = run("methods", "rtm")
    assert code == 2 and "no method or family 'rtm'; did you mean rtn?; there are aciq, activations" in err


def test_lesson_lists_and_runs(run, run_json, monkeypatch, tmp_path):
    from refllm.evaluate import lessons

    good, bad = tmp_path / "00-good.md", tmp_path / "01-bad.md"
    good.write_text("# 00 · Good\n```python\nprint(1)\n```\n```text\n1\n```\n", encoding="utf-8")
    bad.write_text("# 01 · Bad\n```python\nprint(1)\n```\n```text\n2\n```\n", encoding="utf-8")
    monkeypatch.setattr(lessons, "lessons", lambda: [good, bad])
    assert run("lesson")[1] == "00 · Good\n01 · Bad\n"
    assert [page["number"] for page in run_json("lesson")["lessons"]] == ["00", "01"]
    assert run("lesson", "0") == (0, f"== 00 · Good ({good}): as printed in the lesson\n1\n", "")
    assert run("lesson", good) == run("lesson", "0")  # a page by its path
    code, out, err = run("lesson", "--all")
    assert code == 1 and "DIFFERS" in out and err.startswith("refllm: error: ") and "01-bad.md:6" in err
    assert run("lesson", "7")[0] == 2
    monkeypatch.setattr(lessons, "lessons", lambda: [])
    assert run("lesson")[0] == 3


def test_golden_is_there(run):
    code, out, _ = run("golden", "list")
    assert code == 0 and "quant/rtn" in out
    code, out, err = run("golden")
    assert (code, out) == (2, "") and all(f"\n    {name} " in err for name in ("list", "verify", "doctor", "export"))


BENCH = {"threads": 1, "rounds": 5, "machine": {"cpus": 2}, "programs": {}, "rows": [], "other_work": 0.3}


@pytest.fixture
def jobs(monkeypatch):
    """What bench hands to its measuring process; nothing is measured."""
    from refllm.evaluate.bench import report, worker

    found = []
    monkeypatch.setattr(worker, "run", lambda job: found.append(job) or BENCH | {"what": job["what"]})
    monkeypatch.setattr(report, "text", lambda result: f"table of {result['what']}")
    return found


def test_bench_kernels(run):
    small = ("bench", "kernels", "--shapes", "32x256", "--types", "w8", "--rounds", "1")
    code, out, _ = run(*small, "--json")
    found = json.loads(out)
    assert code == 0 and found["threads"] == 1 and found["what"] == "kernels" and found["machine"]["cpus"] >= 1
    names = [(row["program"], row["type"], row["detail"]) for row in found["rows"]]
    assert names[:2] == [("numpy", "float32", ""), ("refllm", "w8", "int8")] and len(names) == 3
    assert "x NumPy" in run(*small)[1]


def test_bench_hands_over(run, jobs, model, tmp_path):
    file = tmp_path / "a.gguf"
    file.write_bytes(b"GGUF")
    code, out, err = run("bench", "decode", file, "--threads", "2", "--activations", "float32", "int8")
    assert (code, out) == (0, "table of decode\n") and err.startswith("other work took 30% of the processors")
    run("bench", "prefill", model, file)
    run("bench", "quantize", "--types", "Q4_K", "--shapes", "8x256", "--recipes", "rtn:bits=4", "--model", model)
    run("bench", "bandwidth", "--threads", "3")
    decode, prefill, quantize, bandwidth = jobs
    common = {"peers": [], "rounds": 5}
    expected = {"what": "decode", "threads": 2, "tokens": 128, "models": [str(file)], "busy": 0, "context": 8}
    assert decode == expected | common | {"activations": ["float32", "int8"], "caches": ["none"]}
    assert prefill["models"] == [model, str(file)] and (prefill["tokens"], prefill["activations"]) == (512, ["int8"])
    assert quantize["recipes"] == ["rtn:bits=4"] and quantize["shapes"] == [[8, 256]] and not quantize["calibration"]
    assert bandwidth == {"what": "bandwidth", "threads": 3, "rounds": 9, "peers": []}


def test_bench_checks_before_it_measures(run, jobs, model, tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    for arguments, code, message in (
        (["kernels", "--peer", "ggml"], 1, "unknown peer 'ggml'; known: llama.cpp"),
        (["kernels", "--types", "Q4_9"], 1, "unknown type 'Q4_9'; known: w4"),
        (["kernels", "--types", "Q4_K", "--shapes", "8x100"], 1, "100 columns are no multiple of 256"),
        (["kernels", "--shapes", "8"], 2, "must be OUTxIN, e.g. 4096x4096, got '8'"),
        (["kernels", "--plot", "a.jpg"], 1, "the picture must be a .png file"),
        (
            ["decode", model, "--caches", "none", "rtn"],
            2,
            "--caches takes recipes of caches only, rtn in 'rtn' is none",
        ),
        (["decode", model, "--peer", "llama.cpp"], 2, "to compare with a peer give a .gguf file"),
        (["decode", tmp_path / "a.gguf", "--peer", "torch, llama.cpp"], 1, "torch is no peer of bench decode"),
        (["decode", tmp_path / "none.gguf"], 1, "no such file or folder"),
        (["quantize", "--types", "w4"], 1, "unknown GGUF type 'w4'"),
        (["quantize", "--recipes", "rtn:bit=4"], 2, "unknown key 'bit'"),
        (["files", model], 1, "package llama-cpp-python is not installed"),
    ):
        if arguments[0] == "files" and find_spec("llama_cpp") is not None:
            message = "is a folder; llama.cpp needs a .gguf file"
        found, out, err = run("bench", *arguments)
        assert (found, out) == (code, "") and message in err and err.count("\n") == 1, (arguments, err)
    code, out, err = run("bench")
    assert (code, out) == (2, "") and "bandwidth" in err and "prefill" in err
    assert jobs == []


def test_fetch_prints_where_the_model_is(run, run_json, monkeypatch, tmp_path):
    from refllm.formats import fetch

    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(fetch, "fetch_smollm2", lambda: tmp_path / "model.gguf")
    assert run_json("fetch", "smollm2")["bytes"] == 4
    assert run("fetch", "smollm2")[1] == f"{tmp_path / 'model.gguf'}\n"


def test_train_hands_over(run, monkeypatch, tmp_path):
    from refllm.model import tiny

    calls = []
    monkeypatch.setattr(tiny, "train_from_recipe", lambda config, out, resume, log: calls.append(resume) or out)
    assert run("train", "recipe.json", tmp_path)[0] == 0 and run("train", "recipe.json", tmp_path, "--fresh")[0] == 0
    assert calls == [True, False]


def test_chat_continues_text_where_there_is_no_format(run, model, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nagain\n/exit\nnever\n"))
    code, out, err = run("chat", model, "-n", "4")
    assert code == 0 and "no chat format" in err and out.count("\n") >= 2


def test_chat_keeps_the_conversation_and_forgets_its_oldest_part(run, monkeypatch, folder):
    from refllm.formats import chat
    from refllm.model import sample

    model = byte_model(vocab_size=261)
    model.tokenizer.backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    save_native(model, folder / "chatty")
    seen = []
    original = chat.chat_ids
    monkeypatch.setattr(chat, "chat_ids", lambda t, messages: seen.append(list(messages)) or original(t, messages))
    monkeypatch.setattr(sample, "generate_ids", lambda *args, **options: iter([65]))
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\nthree\nfour\n"))
    code, out, err = run("chat", str(folder / "chatty"), "--system", "be short")
    assert (code, out.count("\n")) == (0, 4)
    assert [m["content"] for m in seen[1]][:2] == ["be short", "one"] and seen[1][-1]["content"] == "two"
    assert "forgotten" in err and "one" not in [m["content"] for m in seen[-1]]
    assert seen[-1][0]["role"] == "system"


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["nonsense"], "invalid choice: 'nonsense' (choose from compare, "),
        (["compar"], "invalid choice: 'compar'; did you mean compare? (choose"),
        (["golden", "verfy"], "did you mean verify? (choose from list, show"),
        (["compare", "--recipe", "none"], "arguments: --recipe; did you mean --recipes? (see refllm compare --help)"),
        (["compare", "--wndow=3"], "unrecognized arguments: --wndow=3; did you mean --window? (see refllm compare"),
        (["tokenize", "MODEL", "-p", "x", "--qqqq", "1"], "arguments: --qqqq 1 (see refllm tokenize --help)"),
        (["compare", "--window", "abc"], "--window: must be a whole number of at least 1, got 'abc'"),
        (["compare", "--recipes", "none", ""], "argument --recipes: is empty; write none for the uncompressed model"),
        (["generate", "MODEL", "-p", "x", "--recipe", " "], "argument --recipe: is empty"),
        (["compress", "MODEL", "o", "--recipe", ""], "argument --recipe: is empty"),
        (["compare", "MODEL", "--recipes", "none+rtn"], "none, the uncompressed model, stands alone"),
        (["lesson", "no-such-page.md"], "there is no lesson and no file no-such-page.md; there are 00"),
        (["tokenize", "MODEL"], "one of the arguments -p/--prompt --file is required"),
        (["generate", "MODEL", "-p", "x", "-n", "0"], "must be a whole number of at least 1, got '0'"),
        (["generate", "MODEL", "-p", "x", "--temp", "-1"], "temperature must be 0 or more, got -1.0"),
        (["generate", "MODEL", "-p", "x", "--recipe", "nothing"], "unknown method 'nothing'"),
        (["generate", "MODEL", "-p", "x", "--recipe", "rtn:bitz=4"], "unknown key 'bitz'"),
        (["compare", "MODEL", "--recipes", "rtn:bits=four"], "bits must be int, got 'four'"),
        (["logits", "MODEL", "--ids", "1,x", "--out", "o.npy"], "--ids must be whole numbers"),
        (["logits", "MODEL", "--ids", "1,2", "--out", "o.npy", "--decode-from", "3"], "more than the 2 ids"),
        (["perplexity", "MODEL", "--text", "t", "--protocol", "mine"], "unknown protocol 'mine'; known: gptq"),
        (["perplexity", "MODEL", "--text", "t", "--stride", "3"], "--stride belongs to the protocol strided"),
        (["convert", "MODEL", "o.gguf", "--type", "Q9"], "--type must be one of F32"),
        (["generate", "MODEL", "--prom", "x"], "required: -p/--prompt"),
        (["compare", "MODEL", "--threads", "none"], "must be a whole number of at least 1, got 'none'"),
    ],
)
def test_usage_errors_are_one_line_and_2(run, model, argv, message):
    code, out, err = run(*(model if arg == "MODEL" else arg for arg in argv))
    assert (code, out) == (2, "")
    assert err.startswith("refllm: error: ") and err.count("\n") == 1 and message in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generate", "no-such-model", "-p", "x"], "no such file or folder 'no-such-model': give tiny"),
        (["generate", "OUT/short.txt", "-p", "x"], "neither a .gguf file (it begins with b'ten ') nor a folder"),
        (["generate", "MODEL", "-p", "x", "--recipe", "wanda"], "needs calibration tokens: give --calibration FILE"),
        (["compare", "MODEL", "--text", "OUT/short.txt", "--window", "129"], "from 2 to the model's context of 128"),
        (["compress", "MODEL", "OUT/c", "--recipe", "kivi:bits=9,group=8"], "kivi bits must be 1 to 8, got 9"),
        (["generate", "MODEL", "-p", "x" * 200], "the context of 128 tokens is full"),
        (["logits", "MODEL", "--ids", "1,999", "--out", "OUT/o.npy"], "token id 999 is outside the vocabulary"),
        (["logits", "MODEL", "--ids", "1", "--out", "OUT/no/o.npy"], "o.npy"),
        (["perplexity", "MODEL", "--text", "no-such-file"], "no-such-file: No such file or directory"),
        (["perplexity", "MODEL", "--text", "OUT/latin.txt"], "not UTF-8 text (invalid continuation byte at byte 1)"),
        (["perplexity", "MODEL", "--text", "OUT/short.txt", "--window", "64"], "fewer than one window of 64"),
        (["perplexity", "MODEL", "--text", "OUT/short.txt", "--window", "129"], "context of 128"),
        (["perplexity", "MODEL", "--text", "OUT/bad.jsonl", "--protocol", "document"], 'with "text"'),
        (["compare", "MODEL", "--text", "OUT/short.txt", "--plot", "OUT/p.pdf"], "must be a .png file"),
        (["compress", "MODEL", "OUT/c", "--recipe", "rtn:bits=4,group=7"], "group_size 7 does not divide"),
        (["compress", "MODEL", "OUT/c", "--recipe", "wanda"], "wanda needs calibration tokens"),
        (["compress", "MODEL", "OUT", "--recipe", "rtn:bits=4,group=16"], "not a model folder"),
        (["eval", "MODEL", "--task", "OUT/bad.jsonl"], "line 1: not an item of a known task"),
        (["inspect", "OUT/latin.txt"], "neither a .gguf file"),
        (["chat", "no-such-model"], "no such file or folder"),
    ],
)
def test_runtime_errors_are_one_line_and_1(run, model, tmp_path, argv, message):
    (tmp_path / "latin.txt").write_bytes(b"a\xe9b")
    (tmp_path / "short.txt").write_text("ten tokens", encoding="utf-8")
    (tmp_path / "bad.jsonl").write_text('{"no": 1}\n', encoding="utf-8")
    argv = [model if arg == "MODEL" else arg.replace("OUT", str(tmp_path)) for arg in argv]
    code, out, err = run(*argv)
    assert (code, out) == (1, "")
    assert err.startswith("refllm: error: ") and err.count("\n") == 1 and message in err, err
    assert sorted(os.listdir(tmp_path)) == ["bad.jsonl", "latin.txt", "short.txt"]  # nothing half-written


def test_damaged_models_are_named_with_their_byte(run, folder, tmp_path):
    data = (folder / "model" / "model.safetensors").read_bytes()
    bad = tmp_path / "bad"
    save_native(byte_model(), bad)
    (bad / "model.safetensors").write_bytes(data[: len(data) // 2])
    code, _, err = run("generate", bad, "-p", "x")
    assert code == 1 and "(byte " in err and err.count("\n") == 1


def test_nothing_to_do_is_3(run, model, folder):
    assert run("compress", model, folder / "none", "--recipe", "none")[0] == 3
    (folder / "empty.jsonl").write_text("", encoding="utf-8")
    assert run("eval", model, "--task", folder / "empty.jsonl")[0] == 3
    assert not (folder / "none").exists()


def test_an_interrupt_is_130_and_a_bug_is_named(run, model, monkeypatch):
    from refllm.model import sample

    def interrupt(*args, **options):
        raise KeyboardInterrupt

    def bug(*args, **options):
        raise KeyError("x")

    monkeypatch.setattr(sample, "generate_ids", interrupt)
    assert run("generate", model, "-p", "x") == (130, "", "refllm: error: interrupted\n")
    monkeypatch.setattr(sample, "generate_ids", bug)
    code, _, err = run("generate", model, "-p", "x")
    assert code == 1 and "KeyError: 'x' (a bug in refllm" in err and err.count("\n") == 1


def test_debug_adds_the_traceback(run):
    code, _, err = run("generate", "no-such-model", "-p", "x", "--debug")
    assert code == 1 and err.startswith("Traceback") and err.splitlines()[-1].startswith("refllm: error: no such file")


def test_a_full_disk_leaves_nothing_behind(run, model, monkeypatch, tmp_path):
    import errno

    def full(file, array):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    code, _, err = run("logits", model, "--ids", "1", "--out", tmp_path / "o.npy")
    assert code == 1 and "No space left on device" in err and "o.npy" in err and os.listdir(tmp_path) == []


# ---- in processes of their own --------------------------------------------------------------------------------------


def process(*argv, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    return subprocess.run([sys.executable, "-m", "refllm", *argv], capture_output=True, env=environment, **options)


def test_help_needs_no_model_and_names_every_command():
    done = process("--help", cwd=ROOT)
    assert done.returncode == 0 and done.stderr == b""
    for command in (
        "compare generate chat tokenize logits perplexity eval compress convert inspect methods golden bench train "
        "lesson fetch"
    ).split():
        assert f"\n    {command}".encode() in done.stdout


def test_a_terminal_in_ascii_shows_question_marks(model):
    done = process("tokenize", model, "-p", "x", "--json", env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0
    done = process("generate", model, "-p", "é", "-n", "40", env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and done.stdout.isascii() and done.stdout


def test_a_reader_that_leaves_is_no_error():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "refllm", "methods"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as running:
        running.stdout.close()
        assert running.stderr.read() == b"" and running.wait() == 1


def test_threads_are_limited_before_numpy_comes():
    code = (
        "import os, sys; from refllm.cli import main, _limit_threads; assert 'numpy' not in sys.modules;"
        "_limit_threads(['compare', '--threads', '3']); assert 'numpy' not in sys.modules;"
        "print(os.environ['OPENBLAS_NUM_THREADS'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr


@pytest.mark.parametrize(("machine", "hidden"), [("arm64", {"matmul"}), ("x86_64", set())])
def test_false_alarms_of_a_product_are_not_shown_on_arm(monkeypatch, machine, hidden):
    monkeypatch.setattr("platform.machine", lambda: machine)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        main(["lesson", "--json"])
        for where in ("matmul", "exp"):
            warnings.warn(f"overflow encountered in {where}", RuntimeWarning, stacklevel=1)
    assert {str(warning.message).split()[-1] for warning in shown} == {"matmul", "exp"} - hidden
