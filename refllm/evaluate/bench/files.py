"""`refllm bench files`: the GGUF files to measure on, made from one model by llama.cpp's own quantiser.

Both programs then read a file that neither has chosen for itself, with llama.cpp's mixture of types (Q4_K_M keeps some
matrices in Q6_K, and takes Q5_0 or Q8_0 where rows are no multiple of 256).
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from refllm.evaluate.bench.peers import check_peers, open_peer
from refllm.formats.files import cache_dir
from refllm.model.load import resolve

TYPES = ("Q4_0", "Q4_K_M", "Q8_0")


def files_folder() -> Path:
    """Where they are kept unless another folder is asked for."""
    return cache_dir() / "bench"


def default_files() -> list[Path]:
    """The files of `make_files` in the user's cache, and SmolLM2 as it was fetched.

    Raises
    ------
    FileNotFoundError
        There are none; the message says how to make them.
    """
    found = sorted(files_folder().glob("*.gguf"))
    if not found:
        raise FileNotFoundError(
            "no files to measure on: name a .gguf file, or make some with: refllm fetch smollm2 && refllm bench files"
        )
    try:
        return [*found, resolve("smollm2")]
    except FileNotFoundError:
        return found


def make_files(
    source: str = "smollm2",
    folder: Path | None = None,
    types: Sequence[str] = TYPES,
    threads: int = 1,
    on_step: Callable[[str], None] | None = None,
) -> list[Path]:
    """Quantise a GGUF file anew, with llama.cpp.

    Parameters
    ----------
    source : str
        A .gguf file or a built-in name of one.
    folder : Path, optional
    types : sequence of str
        llama.cpp's names of mixtures: Q4_0, Q4_K_M ...
    threads : int
    on_step : callable, optional
        Called with a line of progress.

    Returns
    -------
    list of Path
        SOURCE.TYPE.gguf; a file that is there already stays.
    """
    check_peers(["llama.cpp"], "quantize")
    path = resolve(source)
    if path.is_dir():
        raise ValueError(f"{source} is a folder; llama.cpp needs a .gguf file, see refllm convert")
    peer = open_peer("llama.cpp", threads)
    kinds = {name: peer.file_type(name) for name in types}
    folder = files_folder() if folder is None else Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, kind in kinds.items():
        target = folder / f"{path.stem.split('.')[0]}.{name}.gguf"
        if not target.is_file():
            if on_step is not None:
                on_step(f"making {target.name}")
            peer.quantize_file(path, target, kind)
        made.append(target)
    return made
