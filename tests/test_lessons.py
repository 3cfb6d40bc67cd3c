"""Every lesson and every snippet of the README runs and prints what stands on the page."""

from pathlib import Path

import pytest

from refllm.evaluate.lessons import lessons, run

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.parametrize("page", [README, *lessons()], ids=lambda page: page.stem)
def test_page(page):
    run(page)
