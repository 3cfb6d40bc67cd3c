"""The agreement table: what was compared with which oracle, printed at the end of `pytest -m oracle`.

A test asks for the fixture `agreement` and calls it once for every comparison it has made, before it asserts, so that a
disagreement is in the table as well:

    agreement("ml_dtypes", ml_dtypes.__version__, "FP8_E4M3FN", compared=4_194_560, different=0, note="decode, encode")
"""

import pytest

_ROWS = pytest.StashKey[list]()
_COLUMNS = ("oracle", "version", "format", "compared", "different", "note")


@pytest.fixture
def agreement(request: pytest.FixtureRequest, record_property):
    """Function (oracle, version, format, compared, different, note="") that adds one row to the agreement table.

    `different` counts every value that differs, documented exceptions included; `note` says which those are. The row
    also goes into the test's properties (a JUnit report shows them as "agreement").
    """

    def add(oracle: str, version: str, format: str, compared: int, different: int, note: str = "") -> None:
        row = dict(zip(_COLUMNS, (oracle, version, format, int(compared), int(different), note), strict=True))
        record_property("agreement", row)
        request.config.stash.setdefault(_ROWS, []).append(row)

    return add


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """One table of all rows, sorted by oracle and format."""
    rows = sorted(config.stash.get(_ROWS, []), key=lambda row: (row["oracle"], row["format"], row["note"]))
    if not rows:
        return
    cells = [tuple(f"{v:,}" if isinstance(v, int) else v for v in row.values()) for row in rows]
    widths = [max(map(len, column)) for column in zip(_COLUMNS, *cells, strict=True)]
    terminalreporter.section("agreement with oracles")
    for line in (_COLUMNS, *cells):
        text = "  ".join(
            cell.rjust(width) if name in ("compared", "different") else cell.ljust(width)
            for name, cell, width in zip(_COLUMNS, line, widths, strict=True)
        )
        terminalreporter.write_line(text.rstrip())
    compared, different = (sum(row[name] for row in rows) for name in ("compared", "different"))
    terminalreporter.write_line(f"{len(rows)} comparisons, {compared:,} values, {different:,} differ")
