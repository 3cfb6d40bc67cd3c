"""The bundled model in transformers: the same tokens, the same logits."""

import numpy as np
import pytest

from refllm.formats.files import data_path
from refllm.model.llama import forward
from refllm.model.load import load

pytestmark = pytest.mark.oracle


def test_tiny_loads_in_transformers_with_the_same_logits():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = data_path("tiny")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ours = load("tiny")
    text = data_path("tiny/eval.txt").read_text("utf-8").split("\n\n")[0]
    ids = ours.tokenizer.encode(text, add_bos=True)
    assert tokenizer(text)["input_ids"] == ids
    with torch.no_grad():
        want = theirs(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(forward(ours, ids) - want).max() <= 1e-4 * np.abs(want).max()
