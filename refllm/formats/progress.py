"""One line of progress on a terminal; silence everywhere else."""

import sys
from typing import TextIO


class Progress:
    """A line on stderr that is written over and wiped at the end; nothing is written where stderr is no terminal.

    Parameters
    ----------
    stream : text stream, optional
        None takes the current sys.stderr.

    Examples
    --------
    >>> import io
    >>> with Progress(io.StringIO()) as progress:
    ...     progress.show("1 of 2")
    """

    def __init__(self, stream: TextIO | None = None):
        self.stream = sys.stderr if stream is None else stream
        self.active = self.stream is not None and self.stream.isatty()
        self._width = 0

    def show(self, text: str) -> None:
        """Replace the line by this text."""
        if self.active:
            print("\r" + text.ljust(self._width), end="", file=self.stream, flush=True)
            self._width = len(text)

    def close(self) -> None:
        """Wipe the line."""
        if self.active and self._width:
            print("\r" + " " * self._width + "\r", end="", file=self.stream, flush=True)
        self._width = 0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception) -> None:
        self.close()
