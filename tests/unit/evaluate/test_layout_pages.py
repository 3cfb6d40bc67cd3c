"""docs/formats is what the descriptions say today, and its pages and pictures hold together."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from refllm.evaluate import layout_pages
from refllm.formats.blocks import BLOCKS
from refllm.formats.checkpoints import STORED
from refllm.formats.layouts import Layout, codes

FOLDER = Path(__file__).parents[3] / "docs" / "formats"


@pytest.fixture(scope="module")
def pages():
    return layout_pages.pages()


def test_the_committed_pages_are_current(pages):
    found = {path.relative_to(FOLDER).as_posix(): path for path in FOLDER.rglob("*") if path.is_file()}
    assert sorted(found) == sorted(pages)
    stale = [name for name, text in pages.items() if found[name].read_text("utf-8") != text]
    assert not stale, "run: python -m refllm.evaluate.layout_pages docs/formats"


def test_every_layout_has_a_page_with_a_picture(pages):
    text = "".join(page for name, page in pages.items() if name.endswith(".md"))
    layouts = [form.layout for form in BLOCKS.values()]
    layouts += [tensor.layout for form in STORED for tensor in form.tensors if tensor.layout]
    for layout in layouts:
        assert f"![bits of {layout.name}](img/{layout_pages.file_name(layout.name)}.svg)" in text


def test_the_example_of_a_property_test_runs(pages):
    """On a reader that is right, and on one that is not."""
    (example,) = re.findall(r"```python\n(.*?)```", pages["README.md"], re.S)
    names = {"my_reader": BLOCKS["Q4_0"].decode}
    exec(example, names)
    names["test_my_reader"]()
    names["my_reader"] = lambda units: BLOCKS["Q4_0"].decode(units)[..., ::2]
    with pytest.raises(AssertionError):
        names["test_my_reader"]()


def test_links_lead_somewhere(pages):
    for name, page in pages.items():
        for target in re.findall(r"\]\(([^)#]*)(?:#[^)]*)?\)", page) if name.endswith(".md") else ():
            assert not target or target in pages or (FOLDER / target).resolve().exists(), (name, target)
        for anchor in re.findall(r"\]\(#([^)]*)\)", page):
            headings = [layout_pages._anchor(line.lstrip("# ")) for line in page.splitlines() if line.startswith("#")]
            assert anchor in headings, (name, anchor)


def test_pictures_show_every_bit_once(pages):
    """The areas of the boxes of all fields add up to the bits of the fields; a base-3 byte counts once."""
    for form in BLOCKS.values():
        svg = ElementTree.fromstring(pages[f"img/{layout_pages.file_name(form.name)}.svg"])
        ns = "{http://www.w3.org/2000/svg}"
        boxes = [box for group in svg.iter(f"{ns}g") for box in group.findall(f"{ns}g/{ns}rect")]
        drawn = sum(int(box.get("width")) for box in boxes) // layout_pages.BIT
        places = {place for field in form.layout.fields for place in bits_of(form.layout, field)}
        assert drawn == len(places)


def bits_of(layout, field):
    if hasattr(field.parts, "place"):
        return {8 * byte + k for byte, _ in layout.digit_places(field.name) for k in range(8)}
    return set(layout.positions(field.name).reshape(-1).tolist())


def test_a_small_picture_by_hand():
    layout = Layout("pair", 1, 2, (codes("q", 2, 4, "0", "4 * i"),))
    svg = layout_pages.picture(layout)
    left, right = (32 + k * layout_pages.BIT for k in (0, 4))
    assert f'<rect x="{right}" y="18" width="56" height="18"/>' in svg  # number 0: the low bits, on the right
    assert f'<text x="{right + 28}" y="31">q0</text>' in svg and f'<text x="{left + 28}" y="31">q1</text>' in svg


def test_files_that_are_no_longer_made_go(tmp_path, pages):
    (tmp_path / "old.md").write_text("old")
    layout_pages.write(tmp_path)
    assert not (tmp_path / "old.md").exists() and (tmp_path / "README.md").read_text("utf-8") == pages["README.md"]
