"""What somebody meant who typed a name that is not there."""

import difflib
from collections.abc import Iterable


def meant(text: str, names: Iterable[str]) -> str:
    """ "; did you mean NAME?" where a name, or its part behind the last "/", is close to the text; else nothing.

    Examples
    --------
    >>> meant("gpqt", ["gptq", "rtn"]), meant("rtn", ["quant/gptq", "quant/rtn"]), meant("x", ["rtn"])
    ('; did you mean gptq?', '; did you mean quant/rtn?', '')
    """
    names = list(names)
    last = [name.rpartition("/")[2] for name in names]
    near = difflib.get_close_matches(text, names, n=1)
    near = near or [names[last.index(part)] for part in difflib.get_close_matches(text, last, n=1)]
    return f"; did you mean {near[0]}?" if near else ""
