"""The table of `refllm compare` on the front page is what the command prints: every column but speed and memory."""

from pathlib import Path

import pytest

from refllm.cli import main

README = Path(__file__).parent.parent / "README.md"
RECIPES = ("none", "rtn:bits=4,group=32", "kivi:bits=2")  # a dense, a packed and a cache row; all would take a minute


def test_table_of_the_front_page(capsys):
    assert main(["compare", "--recipes", *RECIPES]) == 0
    printed = rows(capsys.readouterr().out)
    page = rows(README.read_text("utf-8").split("$ refllm compare\n")[1].split("```")[0])
    assert set(printed) == set(RECIPES) <= set(page)
    for recipe, columns in printed.items():
        for name, value in columns.items():
            assert value == pytest.approx(page[recipe][name], rel=0.01, abs=0.001), (recipe, name)


def rows(table: str) -> dict[str, dict[str, float]]:
    """The columns that do not depend on the machine, by recipe."""
    found = {}
    for line in table.split("-----\n")[1].splitlines():
        if line.startswith("protocol"):
            break
        recipe, bits, size, unit, _, _, kv, _, _, perplexity, kl, same = line.split()
        weights = float(size) * {"kB": 1e3, "MB": 1e6}[unit]
        numbers = (bits, weights, kv.replace(",", ""), perplexity, kl, float(same.rstrip("%")) / 100)
        names = ("bits", "weights", "kv", "perplexity", "kl", "same")
        found[recipe] = {name: float(number) for name, number in zip(names, numbers, strict=True)}
    return found
