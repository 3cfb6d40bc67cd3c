"""Names of peers are checked before anything runs; the peers that are installed compute what refllm computes."""

import numpy as np
import pytest

from refllm.evaluate.bench import peers
from refllm.evaluate.bench.peers import PEERS, Peer, check_peers, missing_packages, open_peer
from refllm.evaluate.bench.peers.onnxruntime import block_codes
from refllm.evaluate.bench.products import Task, packed_weight

SHAPE = (64, 512)


@pytest.fixture
def installed(monkeypatch):
    """installed(names): only these packages are found."""
    return lambda *names: monkeypatch.setattr(peers, "find_spec", lambda module: module if module in names else None)


def test_names(installed):
    installed("llama_cpp", "torch", "onnxruntime", "onnx", "libgguf")
    assert check_peers(["torch", "llama.cpp", "torch"], "kernels") == ["torch", "llama.cpp"]
    assert check_peers(["all"], "kernels") == ["llama.cpp", "onnxruntime", "torch"]
    assert check_peers(["all"], "quantize") == ["llama.cpp", "libgguf"]
    with pytest.raises(ValueError, match=r"unknown peer 'ggml'; known: llama\.cpp, onnxruntime, torch, libgguf, all"):
        check_peers(["ggml"], "kernels")
    with pytest.raises(ValueError, match=r"torch is no peer of bench decode; peers of it: llama\.cpp"):
        check_peers(["torch"], "decode")


def test_what_is_not_installed(installed):
    installed("onnxruntime")
    assert check_peers(["all"], "kernels") == []
    with pytest.raises(ValueError, match=r"peer onnxruntime: the package onnx is not installed; .*pip install"):
        check_peers(["onnxruntime"], "kernels")
    assert missing_packages("llama.cpp") == ["llama-cpp-python"]


def test_a_package_that_cannot_be_loaded(monkeypatch):
    def broken(name):
        raise OSError("libfoo.so: no such file")

    monkeypatch.setattr(peers, "import_module", broken)
    with pytest.raises(ValueError, match=r"peer torch is installed but cannot be loaded: libfoo\.so"):
        open_peer("torch", 1)


def test_every_entry_names_its_class():
    for name, entry in PEERS.items():
        module, _, cls = entry.adapter.rpartition(".")
        assert issubclass(getattr(__import__(f"{peers.__name__}.{module}", fromlist=[cls]), cls), Peer), name


def test_block_codes_round_to_the_nearest():
    W = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    W[0, :32] = 0
    codes, scale = block_codes(W, 4)
    decoded = (codes.astype(np.float32) - 8) * np.repeat(scale, 32, axis=1)
    assert codes.min() >= 1 and codes.max() <= 15 and scale.shape == (4, 2)
    assert (np.abs(decoded - W) <= np.repeat(scale, 32, axis=1) * 0.5001).all()


def open_or_skip(name: str, threads: int = 1) -> Peer:
    if missing := missing_packages(name):
        pytest.skip(f"{missing[0]} is not installed")
    return open_peer(name, threads)


@pytest.mark.oracle
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["llama.cpp", "onnxruntime", "torch"])
def test_products_of_peers_are_right(name, threads, tokens):
    peer = open_or_skip(name, threads)
    rng = np.random.default_rng(0)
    W, x = rng.standard_normal(SHAPE, np.float32), rng.standard_normal((tokens, SHAPE[1]), np.float32)
    task = Task(W, x, threads, share=300_000)
    found = [build(task) for build in peer.products(("Q4_0", "Q4_K", "Q8_0", "Q6_K", "w4"))]
    assert len(found) >= 3 and len({product.name for product in found}) == len(found)
    for product in found:
        product.run()
        product.run()
        assert product.error() < 0.03 and (product.copies > 1 or tokens > 1), product.name


@pytest.mark.oracle
def test_every_copy_of_ggml_and_the_repacked_layout():
    from refllm.evaluate.bench.peers.ggml import Products

    peer = open_or_skip("llama.cpp")
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, SHAPE[1]), np.float32)
    weights = [packed_weight("Q4_0", rng.standard_normal(SHAPE, np.float32)) for _ in range(3)]
    products = Products(peer.ggml, 2, [weight.data for weight in weights], x, threads=1)
    products.run()
    for i, weight in enumerate(weights):
        expected = x @ weight.dense().T
        assert np.linalg.norm(products.output(i) - expected) < 0.02 * np.linalg.norm(expected)
    assert products.layout.startswith("CPU")
    products.close()
    products.close()  # twice does no harm


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["llama.cpp", "libgguf"])
@pytest.mark.parametrize("type_name", ["Q4_0", "Q8_0", "Q4_K"])
def test_encoders_of_peers_give_refllms_bytes(name, type_name):
    from refllm.formats.blocks import BLOCKS

    W = np.random.default_rng(2).standard_normal((5, 512)).astype(np.float32)
    for threads in (1, 2):
        np.testing.assert_array_equal(open_or_skip(name, threads).encoder(type_name)(W), BLOCKS[type_name].encode(W))


@pytest.mark.oracle
def test_llama_cpp_makes_and_runs_a_file(tmp_path):
    from refllm.evaluate.bench import files
    from refllm.evaluate.bench.generation import RefllmModel, agreements, text_ids
    from refllm.model.load import load, resolve

    peer = open_or_skip("llama.cpp")
    try:
        resolve("smollm2")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    made = files.make_files("smollm2", tmp_path, ("Q8_0",))
    assert made == [*tmp_path.iterdir()] == [tmp_path / "SmolLM2-135M-Instruct.Q8_0.gguf"]
    model = load(made[0])
    programs = [RefllmModel(model), peer.open_model(made[0], 48)]
    assert agreements(programs, text_ids(model, 48))["llama.cpp"] > 0.85
    programs[1].close()
    with pytest.raises(ValueError, match=r"llama\.cpp knows no file type 'Q9'; known: .*Q4_K_M"):
        files.make_files("smollm2", tmp_path, ("Q9",))
    with pytest.raises(ValueError, match=r"llama\.cpp cannot load .*none\.gguf"):
        peer.open_model(tmp_path / "none.gguf", 64)
