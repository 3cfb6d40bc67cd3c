"""Files appear whole or not at all, whatever happens in between; JSON is read strictly."""

import errno
import os

import pytest

from refllm.formats import files
from refllm.formats.errors import FormatError
from refllm.formats.files import atomic_folder, atomic_write, cache_dir, data_path, parse_json, read_json


def test_a_written_file_is_complete_and_alone(tmp_path):
    with atomic_write(tmp_path / "a.txt", "w") as file:
        file.write("one\ntwo")
        assert not (tmp_path / "a.txt").exists()
    assert (tmp_path / "a.txt").read_bytes() == b"one\ntwo"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_the_old_file(tmp_path, error):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(type(error)), atomic_write(tmp_path / "a") as file:
        file.write(b"half")
        raise error
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_full_disk_is_one_clear_line(tmp_path, monkeypatch):
    def full(fileno):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*a\.bin: No space left on device; free some space") as caught:
        with atomic_write(tmp_path / "a.bin") as file:
            file.write(b"x")
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == []


def test_a_missing_folder_names_the_file_the_user_asked_for(tmp_path):
    with (
        pytest.raises(OSError, match=r"cannot write .*no[/\\]a\.bin: No such file"),
        atomic_write(tmp_path / "no" / "a.bin"),
    ):
        pass


def test_an_error_about_another_file_stays_as_it_is(tmp_path):
    with pytest.raises(FileNotFoundError, match="other"), atomic_write(tmp_path / "a"):
        open(tmp_path / "other")
    assert os.listdir(tmp_path) == []


def test_a_folder_appears_whole(tmp_path):
    with atomic_folder(tmp_path / "deep" / "out") as folder:
        (folder / "config.json").write_text("{}")
        assert not (tmp_path / "deep" / "out").exists()
    assert os.listdir(tmp_path / "deep") == ["out"]
    assert os.listdir(tmp_path / "deep" / "out") == ["config.json"]


def test_an_interrupted_folder_leaves_the_old_one(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "refllm.json").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_folder(out, overwrite=True) as folder:
        (folder / "refllm.json").write_text("new")
        raise KeyboardInterrupt
    assert (out / "refllm.json").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_only_model_folders_are_replaced_and_only_when_told(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with atomic_folder(out) as folder:  # an empty folder is free
        (folder / "config.json").write_text("1")
    with pytest.raises(FileExistsError, match="already holds a model"), atomic_folder(out):
        pass
    with atomic_folder(out, overwrite=True) as folder:
        (folder / "config.json").write_text("2")
    assert (out / "config.json").read_text() == "2"
    (out / "config.json").rename(out / "letters.txt")
    with pytest.raises(FileExistsError, match="not a model folder"), atomic_folder(out, overwrite=True):
        pass
    with pytest.raises(FileExistsError, match="is a file"), atomic_folder(out / "letters.txt", overwrite=True):
        pass
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("data", "message", "offset"),
    [
        (b'{"a": 1, "a": 2}', "stands twice", 9),
        (b'{"a": NaN}', "NaN", 6),
        (b'{"a": -Infinity}', "Infinity", 6),
        (b"[1]", "object", 0),
        (b'{"a": "\xff"}', "not UTF-8", 7),
        (b"\xef\xbb\xbf{}", "byte order mark", 0),
        (b'{"a": 1} x', "not valid JSON", 9),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON", 0),
        (b'{"a":' * 3000 + b"1" + b"}" * 3000, "nested too deep|brackets", 0),
        (b'{"a": [' + b"[]," * 100_000 + b"[]]}", "brackets", 0),
        (b"", "not valid JSON", 0),
    ],
)
def test_bad_json_is_refused_with_its_offset(data, message, offset):
    with pytest.raises(FormatError, match=message) as caught:
        parse_json(data, base=100)
    assert caught.value.offset == 100 + offset


@pytest.mark.parametrize("number", ["1.0", "1e0", "-0.5"])
def test_integers_only_refuses_other_numbers(number):
    with pytest.raises(FormatError, match="not allowed"):
        parse_json(f'{{"a": {number}}}'.encode(), integers_only=True)
    assert parse_json(f'{{"a": {number}}}'.encode()) == {"a": float(number)}


def test_a_json_file_beyond_the_limit_is_not_read(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1}')
    assert read_json(tmp_path / "a.json", limit=8) == {"a": 1}
    with pytest.raises(FormatError, match=r"a\.json: 8 bytes of JSON; at most 7"):
        read_json(tmp_path / "a.json", limit=7)


def test_the_cache_folder_can_be_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("REFLLM_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("REFLLM_CACHE")
    assert cache_dir().name == "refllm"


def test_missing_own_data_says_where_it_looked():
    with pytest.raises(FileNotFoundError, match=r"no/such\.file"):
        data_path("no/such.file")
