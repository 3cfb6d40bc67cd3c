"""Tables: aligned, with units, not too wide."""

import pytest

from refllm.evaluate.tables import compare_table, nbytes, significant, table


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (999_499, "999 kB"), (999_500, "1.00 MB"), (98_362_432, "98.4 MB"),
     (2_500_000_000, "2.50 GB"), (None, "-")],
)  # fmt: skip
def test_bytes_in_decimal_units(count, text):
    assert nbytes(count) == text


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(28.62447, 4, "28.62"), (9.999, 3, "10.0"), (1234.4, 3, "1,234"), (0.004567, 3, "0.00457"), (0.5, 3, "0.5"),
     (1e-7, 3, "1.00e-07"),
     (2.5e9, 3, "2.50e+09"), (float("inf"), 3, "inf"), (float("nan"), 3, "-"), (None, 3, "-"), (0, 3, "0")],
)  # fmt: skip
def test_significant_digits(value, digits, text):
    assert significant(value, digits) == text


def test_columns_are_aligned_under_headers_of_two_lines():
    text = table(["recipe", "bits/\nweight"], [["none", "32.00"], ["rtn:bits=4", "4.50"]])
    lines = ["             bits/", "recipe      weight", "-" * 18, "none         32.00", "rtn:bits=4    4.50"]
    assert text.split("\n") == lines


def test_the_comparison_fits_a_terminal():
    row = {
        "recipe": "wanda:pattern=2:4+rtn:bits=4", "family": "prune+quant", "bits_per_weight": 11.97,
        "weight_bytes": 389_000, "peak_rss_bytes": None, "kv_bytes_per_token": 1280.0, "prefill_tokens_per_s": 4495.3,
        "decode_tokens_per_s": float("nan"), "perplexity": 76.6, "kl_to_base": 2.9927, "top1_agreement": 0.135,
    }  # fmt: skip
    result = {"rows": [row], "protocol": "gptq", "window": 512, "tokens_scored": 2044, "prompt_tokens": 256,
              "new_tokens": 48, "threads": 1, "activations": "float32"}  # fmt: skip
    lines = compare_table(result).split("\n")
    assert max(len(line) for line in lines) <= 120
    cells = lines[3].split()
    assert cells == ["wanda:pattern=2:4+rtn:bits=4", "11.97", "389", "kB", "-", "1,280", "4,495", "-",
                     "76.60", "2.9927", "13.5%"]  # fmt: skip
    assert "protocol gptq" in lines[-2] and "2,044 tokens" in lines[-2] and "1 thread," in lines[-1]
