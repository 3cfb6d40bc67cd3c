"""The one error of everything that reads files."""


class FormatError(ValueError):
    """A file is not what it claims to be.

    Parameters
    ----------
    message : str
        What was expected and what came.
    path : str, optional
        The file.
    offset : int, optional
        Byte offset in the file at which the reading stopped.
    """

    def __init__(self, message: str, *, path: object = None, offset: int | None = None):
        where = "" if path is None else f"{path}: "
        at = "" if offset is None else f" (byte {offset})"
        super().__init__(f"{where}{message}{at}")
        self.offset = offset
