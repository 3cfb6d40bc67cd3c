"""The lesson runner notices what must be noticed: drift, quotations that are no longer the source, errors."""

import traceback

import pytest

from refllm.evaluate.lessons import LessonError, blocks, lessons, quotation, run, same_output, title


def page(tmp_path, text):
    path = tmp_path / "07-page.md"
    path.write_text(text, encoding="utf-8")
    return path


def test_blocks_share_one_namespace_and_output_is_compared(tmp_path):
    code = "```python\nx = 2\nprint('a')\n```\n```python\nprint(x + 1.5)\n```\n"
    path = page(tmp_path, f"# A title\n{code}```text\na\n3.5\n```\n")
    assert run(path) == "a\n3.5\n"
    assert title(path) == "A title"


@pytest.mark.parametrize(
    ("expected", "actual", "same"),
    [
        ("loss 2.000", "loss 2.019", True),
        ("loss 2.000", "loss 2.021", False),
        ("loss -2.0", "loss 2.0", False),
        ("[1. 2.]", "[ 1.005  2. ]", True),
        ("1,000 tokens", "1,005 tokens", True),
        ("1e-3", "1.02e-3", False),
        ("0.0", "1e-9", False),  # 1% of nothing is nothing: round what is meant to be zero
        ("same logits: True", "same logits: False", False),
        ("a", "a\nb", False),
        ("a\nb", "a", False),
        ("\na\n\n", "a\n", True),
    ],
)
def test_numbers_may_drift_by_one_percent_and_words_may_not(expected, actual, same):
    assert (same_output(expected, actual) is None) == same


def test_drift_is_reported_with_file_and_line(tmp_path):
    path = page(tmp_path, "text\n\n```python\nprint(2.1)\n```\n\n```text\n2.0\n```\n")
    with pytest.raises(LessonError, match=r"07-page\.md:8: expected '2\.0', got '2\.1'"):
        run(path)


def test_lines_that_only_one_side_has_are_counted():
    assert same_output("a", "a\nb") == "the code prints one more line than the page: 'b'"
    assert same_output("a\nb\nc", "a") == "the code prints 2 fewer lines than the page: 'b'"


def test_a_block_of_text_belongs_to_the_code_since_the_last_one(tmp_path):
    run(page(tmp_path, "```python\nprint(1)\n```\n```text\n1\n```\n```python\nprint(2)\n```\n```text\n2\n```\n"))


def test_shown_code_and_other_languages_do_not_run(tmp_path):
    assert run(page(tmp_path, "~~~python\nraise SystemExit\n~~~\n```bash\nrm x\n```\n```\nplain\n```\n")) == ""


QUOTED = "<!-- source: refllm/kernels/nn.py:silu -->\n```python\n{}```\n"


def test_a_quotation_must_be_the_source(tmp_path):
    text = quotation("refllm/kernels/nn.py:silu")
    assert text.startswith("def silu(")
    run(page(tmp_path, QUOTED.format(text)))
    with pytest.raises(LessonError, match=r":3: this is no longer the source of refllm/kernels/nn.py:silu"):
        run(page(tmp_path, QUOTED.format(text.replace("silu", "swish"))))


def test_methods_are_quoted_without_their_indentation():
    assert quotation("refllm/model/cache.py:KVCache.truncate").startswith("def truncate(")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("refllm/kernels/nn.py:nothing", "there is no source"),
        ("refllm/kernels/nowhere.py:x", "there is no source"),
        ("refllm/kernels/nn.py:np.pi", "there is no source"),
        ("tests/models.py:random_model", "not a file of refllm"),
        ("refllm/../os.py:path", "not a file of refllm"),
    ],
)
def test_quotations_of_what_is_not_there(source, message):
    with pytest.raises(LessonError, match=message):
        quotation(source)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```python\nx = 1\n", "1: this fence is not closed"),
        ("<!-- source: refllm/kernels/nn.py:silu -->\ntext\n```python\n```\n", "2: the source comment above"),
        ("<!-- source: refllm/kernels/nn.py:silu -->\n", "a source comment without a block"),
    ],
)
def test_pages_that_are_not_well_formed(text, message):
    with pytest.raises(LessonError, match=message):
        list(blocks(text))


def test_tracebacks_point_into_the_page(tmp_path):
    path = page(tmp_path, "# T\n\ntext\n\n```python\nx = 1\n1 / 0\n```\n")
    with pytest.raises(ZeroDivisionError) as error:
        run(path)
    frame = traceback.extract_tb(error.value.__traceback__)[-1]
    assert (frame.filename, frame.lineno) == (str(path.resolve()), 7)


def test_write_fills_outputs_and_quotations(tmp_path):
    path = page(tmp_path, "```python\nprint(1)\nprint(2)\n```\n```text\nold\n```\n" + QUOTED.format("") + "end\n")
    run(path, write=True)
    text = path.read_text(encoding="utf-8")
    assert "```text\n1\n2\n```\n" in text and "def silu(" in text and text.endswith("```\nend\n")
    assert run(path) == "1\n2\n"


def test_the_chapters_are_found_in_order():
    names = [path.name for path in lessons()]
    assert names == sorted(names) and names[0].startswith("00-")
