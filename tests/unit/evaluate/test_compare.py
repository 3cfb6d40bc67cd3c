"""compare on a random model: the columns are those of the interface, and each is what its name says."""

import math
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refllm.evaluate import compare as comparing
from refllm.evaluate import plots, worker
from refllm.evaluate.compare import DEFAULT_RECIPES, compare, family, setting
from refllm.evaluate.perplexity import evaluate_perplexity, plan
from refllm.evaluate.plots import check_target, quality_against_size
from refllm.methods.apply import compress
from refllm.methods.recipes import RecipeError
from refllm.model.llama import forward
from tests.models import random_model

COLUMNS = (
    "recipe family bits_per_weight weight_bytes peak_rss_bytes kv_bytes_per_token prefill_tokens_per_s "
    "decode_tokens_per_s perplexity kl_to_base top1_agreement"
).split()
MODEL = random_model("llama")
IDS = np.random.default_rng(2).integers(3, 64, 400)
RECIPES = ["none", "rtn:bits=2,group=16", "kivi:bits=2,group=8,residual=8", "kivi"]


@pytest.fixture(scope="module")
def result():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFLLM_KERNELS", "numpy")  # nothing to compile in the processes
        return compare(MODEL, RECIPES, setting(MODEL, IDS, max_tokens=260, threads=1))


def test_every_column_is_there_and_finite(result):
    assert [row["recipe"] for row in result["rows"]] == RECIPES[:3]
    for row in result["rows"]:
        assert set(COLUMNS) <= set(row)
        assert all(math.isfinite(row[key]) and row[key] >= 0 for key in COLUMNS[2:])
    assert (result["protocol"], result["window"], result["threads"], result["tokens_scored"]) == ("gptq", 128, 1, 254)


def test_the_base_is_its_own_measure(result):
    base = result["rows"][0]
    assert (base["kl_to_base"], base["top1_agreement"], base["bits_per_weight"]) == (0.0, 1.0, 32.0)
    own = evaluate_perplexity(MODEL, IDS[:260], window=128)
    assert base["perplexity"] == pytest.approx(own.perplexity, rel=1e-6) == result["base_perplexity"]


def test_quality_is_that_of_the_compressed_model(result):
    """A twin in this process: both models over the same windows, KL by its definition."""
    row = result["rows"][1]
    small = compress(MODEL, row["recipe"], IDS[260:])
    kl, agree = [], []
    for window in plan(MODEL, IDS[:260], "gptq", 128):
        p, q = (forward(m, window.ids).astype(np.float64) for m in (MODEL, small))
        p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (p, q))
        kl.append((p * np.log(p / q)).sum(-1))
        agree.append(p.argmax(-1) == q.argmax(-1))
    assert row["kl_to_base"] == pytest.approx(np.concatenate(kl).mean(), rel=1e-4)
    assert row["top1_agreement"] == pytest.approx(np.concatenate(agree).mean(), abs=1e-9)
    assert row["perplexity"] == pytest.approx(evaluate_perplexity(small, IDS[:260], window=128).perplexity, rel=1e-5)


def test_a_cache_method_shows_in_bytes_and_in_quality(result):
    base, kivi = result["rows"][0], result["rows"][2]
    assert kivi["kv_bytes_per_token"] < base["kv_bytes_per_token"] / 2
    assert kivi["weight_bytes"] == base["weight_bytes"]
    assert kivi["kl_to_base"] > 1e-4


def test_peak_memory_is_that_of_a_process_of_its_own(result):
    assert all(15e6 < row["peak_rss_bytes"] < 1e9 for row in result["rows"])


_WITHOUT_KERNELS = """
import numpy as np
from refllm.evaluate import compare as comparing
from refllm.kernels.packed import compile
from tests.models import random_model
run, grown = comparing._run_worker, []
def watched(*args):
    kept = lambda: sorted(compile.kernel_folder().rglob("*.nbc"))
    before = kept()
    row = run(*args)
    grown.append((len(before), kept() == before))
    return row
comparing._run_worker = watched
model, ids = random_model("llama"), np.random.default_rng(2).integers(3, 64, 400)
comparing.compare(model, ["rtn:bits=8,group=16"], comparing.setting(model, ids, max_tokens=260))
print(grown, compile._compilations)
assert len(grown) == 2 and all(found > 3 and same for found, same in grown)
assert 0 < compile._compilations < grown[-1][0]  # a second process has compiled the others
"""


def test_kernels_are_compiled_by_two_processes_before_a_model_is_measured(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("NUMBA_", "REFLLM_"))}
    environment |= {"REFLLM_CACHE": str(tmp_path), "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    done = subprocess.run([sys.executable, "-c", _WITHOUT_KERNELS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_recipe_the_model_cannot_take_does_not_stop_the_others(result):
    (failure,) = result["failed"]
    assert failure["recipe"] == "kivi" and "does not divide" in failure["reason"]


def test_an_unknown_recipe_is_found_before_anything_runs(monkeypatch):
    monkeypatch.setattr(comparing, "_measure", lambda *args, **options: pytest.fail("something ran"))
    with pytest.raises(RecipeError, match="unknown method"):
        compare(MODEL, ["none", "nothing"], setting(MODEL, IDS))


def test_calibration_follows_the_evaluated_text():
    cut = setting(MODEL, IDS, max_tokens=300)
    assert cut.ids.tolist() == IDS[:300].tolist() and cut.calibration.tolist() == IDS[300:].tolist()
    assert setting(MODEL, IDS, max_tokens=400).calibration is None
    assert setting(MODEL, IDS, IDS[:5], max_tokens=400).calibration.tolist() == IDS[:5].tolist()
    assert cut.prompt_tokens + cut.new_tokens <= MODEL.config.context_length


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (IDS[:1], {}, "at least 2"),
        (IDS[:20], {"window": 21}, "fewer than one window"),
        (IDS, {"window": 129}, "from 2 to the model's context of 128 tokens, got 129"),
        ([IDS.tolist()], {"window": 129}, "from 2 to the model's context of 128 tokens, got 129"),
        ([IDS.tolist()], {"window": 1}, "from 2"),
        (IDS + 64, {}, "vocabulary"),
    ],
)
def test_texts_that_cannot_be_used(ids, options, message):
    with pytest.raises(ValueError, match=message):
        setting(MODEL, ids, **options)


def test_a_process_that_dies_is_reported(monkeypatch, tmp_path):
    monkeypatch.setattr(comparing, "save_native", lambda *args, **options: None)
    with pytest.raises(RuntimeError, match="the measuring process failed: FileNotFoundError: "):
        comparing._measure(MODEL, "none", setting(MODEL, IDS), tmp_path)


def test_large_bases_are_kept_in_half_precision(tmp_path, monkeypatch):
    assert worker._base_files(tmp_path / "a", (3, 5), create=True)[0].dtype == np.float32
    monkeypatch.setattr(worker, "HALF_ABOVE", 59)
    assert worker._base_files(tmp_path / "b", (3, 5), create=True)[0].dtype == np.float16


def test_the_default_list_covers_the_families():
    families = {part for recipe in DEFAULT_RECIPES for part in family(recipe).split("+")}
    assert len(DEFAULT_RECIPES) >= 10 and len(set(DEFAULT_RECIPES)) == len(DEFAULT_RECIPES)
    from refllm.methods.recipes import FAMILIES, methods

    assert {name for name, _ in methods().values()} == set(FAMILIES)
    assert families - {"base"} == {name for name, _ in methods().values()}


def test_the_picture_is_a_png(result, tmp_path):
    path = tmp_path / "quality.png"
    quality_against_size(result["rows"], path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 10_000
    assert os.listdir(tmp_path) == ["quality.png"]


def test_with_questions_the_picture_is_another(result, tmp_path):
    """Cost and height of every point: bytes beside the attention, and the mean share of answers found."""
    row = result["rows"][0] | {
        "recall": {"facts": 1.0, "passkey": 0.5},
        "cache_bytes": {"stored_bytes_per_token": 9.0, "device_bytes_per_token": 7.0, "recalled_bytes_per_step": 1.0},
    }
    assert plots._point(row, True, 1e-6, 5.0) == (7.0, 1e-6, 0.75)
    assert plots._point(row, False, 1e-6, 1e9) == (row["bits_per_weight"], 1e-6, row["perplexity"])
    assert plots._point(row, False, 1e-6, 5.0) == (row["bits_per_weight"], 1e-6, 5.0)
    rows = [row, row | {"recipe": "kivi", "family": "kvcache"}]
    quality_against_size(rows, tmp_path / "recall.png")
    quality_against_size(result["rows"], tmp_path / "size.png")
    assert (tmp_path / "recall.png").read_bytes() != (tmp_path / "size.png").read_bytes()


def test_many_points_have_numbers_and_a_list(result, tmp_path):
    width = lambda path: int.from_bytes(path.read_bytes()[16:20], "big")  # of a PNG's first chunk
    many = [result["rows"][1] | {"recipe": f"number {i}", "bits_per_weight": 1.0 + i} for i in range(60)]
    quality_against_size(many, tmp_path / "many.png")
    quality_against_size(many[: plots._NAMES], tmp_path / "few.png")
    assert width(tmp_path / "many.png") > width(tmp_path / "few.png")


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=30))
def test_labels_cover_neither_each_other_nor_markers(points):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    figure = Figure(figsize=(8, 6), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set(xlim=(-5, 25), ylim=(-5, 25))
    plots._label(axes, points, [f"name {i}" for i in range(len(points))])
    half = plots._MARKER - 0.01  # neighbours may touch
    markers = [[x - half, y - half, x + half, y + half] for x, y in axes.transData.transform(points)]
    labels = [Text.get_window_extent(text).padded(-0.01).extents for text in axes.texts]  # without its line
    boxes = np.array(markers + labels)
    for i, label in enumerate(labels, len(markers)):
        apart = (label[:2] >= boxes[:, 2:]) | (label[2:] <= boxes[:, :2])
        assert np.flatnonzero(~apart.any(axis=1)).tolist() == [i]
        assert axes.bbox.containsx(label[0]) and axes.bbox.containsx(label[2])
        assert axes.bbox.containsy(label[1]) and axes.bbox.containsy(label[3])


def test_a_label_without_room_lies_on_its_point():
    from matplotlib.transforms import Bbox

    covered, panel = np.array([[0.0, 0, 100, 100]]), Bbox([[0, 0], [100, 100]])
    away, box = plots._free(np.array([50.0, 50]), np.array([10.0, 5]), covered, panel)
    assert away == 0 and box.tolist() == [40, 45, 60, 55]


def test_pictures_that_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match=r"must be a \.png"):
        check_target(tmp_path / "x.pdf")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        check_target(tmp_path / "no" / "x.png")


def test_documents_are_kept_whole_and_scored_one_by_one():
    documents = [IDS[:100].tolist(), IDS[100:150].tolist(), IDS[150:190].tolist()]
    cut = setting(MODEL, documents, max_tokens=160)
    assert (cut.protocol, cut.starts, len(cut.ids)) == ("document", (0, 100), 150)
    assert cut.calibration.tolist() == IDS[150:190].tolist()
    assert [part.tolist() for part in comparing.as_text(cut.ids, cut.starts)] == documents[:2]
    first = setting(MODEL, documents, max_tokens=5)  # of a document that alone is longer, its begin
    assert (first.starts, first.ids.tolist()) == ((0,), IDS[:5].tolist())
    assert first.calibration.tolist() == IDS[5:190].tolist()
    result = compare(MODEL, ["none"], setting(MODEL, documents, max_tokens=160, threads=1))
    expected = evaluate_perplexity(MODEL, documents[:2], protocol="document", window=cut.window)
    assert result["protocol"] == "document" and result["tokens_scored"] == expected.tokens_scored
    assert result["rows"][0]["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)


def measured_rows(monkeypatch):
    """The recipes that are measured from here on, by a measurement that takes no time."""
    ran = []

    def measure(model, recipe, *args, **options):
        ran.append(recipe)
        return {"recipe": recipe, "perplexity": float(len(ran)), "tokens_scored": 9, "base_dtype": "float32"}

    monkeypatch.setattr(comparing, "_measure", measure)
    return ran


def test_rows_are_kept_and_taken_where_nothing_has_changed(monkeypatch, tmp_path):
    path, chosen, ran = tmp_path / "rows.jsonl", setting(MODEL, IDS, threads=1), measured_rows(monkeypatch)
    first = compare(MODEL, ["rtn:bits=4,group=16"], chosen, resume=path)
    assert ran == ["none", "rtn:bits=4,group=16"] and len(path.read_text("utf-8").splitlines()) == 2
    assert compare(MODEL, ["rtn:bits=4,group=16"], chosen, resume=path) == first and len(ran) == 2
    both = compare(MODEL, ["none", "rtn:bits=2,group=16", "rtn:bits=4,group=16"], chosen, resume=path)
    assert ran[2:] == ["none", "rtn:bits=2,group=16"]  # the base once more, for the others are compared with it
    assert both["rows"][::2] == [{"recipe": "none", "perplexity": 1.0}, *first["rows"]]
    assert both["base_perplexity"] == 1.0 and both["tokens_scored"] == 9


@pytest.mark.parametrize("change", ["model", "ids", "window", "threads", "version"])
def test_rows_of_another_comparison_are_not_taken(monkeypatch, tmp_path, change):
    path, ran = tmp_path / "rows.jsonl", measured_rows(monkeypatch)
    compare(MODEL, ["none"], setting(MODEL, IDS, threads=1), resume=path)
    model, ids, window, threads = MODEL, IDS, None, 1
    if change == "model":
        name, weight = next((name, w) for name, w in MODEL.weights.items() if w.ndim == 2)
        model = replace(MODEL, weights={**MODEL.weights, name: -weight})
    elif change == "version":
        monkeypatch.setattr("refllm.evaluate.kept.__version__", "another")
    else:
        ids = IDS[::-1] if change == "ids" else IDS
        window = 64 if change == "window" else None
        threads = 2 if change == "threads" else 1
    compare(model, ["none"], setting(model, ids, window=window, threads=threads), resume=path)
    assert ran == ["none", "none"] and len(path.read_text("utf-8").splitlines()) == 2


def test_a_line_that_was_not_written_to_its_end_is_cut_off(monkeypatch, tmp_path):
    path, ran = tmp_path / "rows.jsonl", measured_rows(monkeypatch)
    compare(MODEL, ["none"], setting(MODEL, IDS), resume=path)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:40])
    compare(MODEL, ["none"], setting(MODEL, IDS), resume=path)
    assert path.read_bytes() == whole and ran == ["none"]


@pytest.mark.parametrize("line", ["words", "[]", "{}", '{"of": 1, "row": {}}'])
def test_a_file_of_something_else_is_left_alone(monkeypatch, tmp_path, line):
    path, ran = tmp_path / "notes.txt", measured_rows(monkeypatch)
    path.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 1 is not a row kept by compare"):
        compare(MODEL, ["none"], setting(MODEL, IDS), resume=path)
    assert not ran and path.read_text("utf-8") == line + "\n"
