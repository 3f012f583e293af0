"""A passing error of the machine or network does not count a good file as unreadable."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from d2v_fast.config import TextDataConfig
from d2v_fast.data.files import PathList
from d2v_fast.data.samples import file_sizes
from d2v_fast.errors import DataError
from d2v_fast.files import reading
from d2v_fast.modalities.speech.decode import AudioLimits, UnreadableAudio, read_header
from d2v_fast.modalities.text.files import TextFiles
from d2v_fast.modalities.text.parquet import parquet_rows
from d2v_fast.modalities.vision.decode import Limits, UnreadableImage, check_header

PASSING = ("EMFILE", "ENFILE", "ENOMEM", "ESTALE", "ENOTCONN", "ETIMEDOUT")
OF_THE_FILE = ("EACCES", "EPERM", "ELOOP")


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch):
    """Let the opening of samples fail with an error, by its name."""
    opening = os.open

    def fail_with(name: str) -> None:
        number = getattr(errno, name)

        def fail(path: Any, *arguments: Any, **options: Any) -> int:
            if str(path).endswith((".png", ".wav", ".txt", ".jsonl", ".parquet")):
                raise OSError(number, os.strerror(number), str(path))
            return opening(path, *arguments, **options)

        monkeypatch.setattr(reading.os, "open", fail)

    return fail_with


@pytest.mark.parametrize("name", [*PASSING, *OF_THE_FILE, "EIO"])
def test_image(name: str, failing, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((9, 9), dtype=np.uint8)).save(tmp_path / "a.png")
    limits = Limits(max_pixels=1000, max_bytes=10**6, min_side=1)
    failing(name)
    with pytest.raises(DataError if name in PASSING else UnreadableImage) as caught:
        check_header(str(tmp_path / "a.png"), limits)
    if name in PASSING:
        assert "a.png' could not be read because of a system error that may be temporary: " in str(caught.value)


@pytest.mark.parametrize("name", [*PASSING, *OF_THE_FILE, "EIO"])
def test_recording(name: str, failing, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(800), 8000)
    failing(name)
    with pytest.raises(DataError if name in PASSING else UnreadableAudio):
        read_header(str(tmp_path / "a.wav"), AudioLimits(8000, 10**6, 0.0))


@pytest.mark.parametrize("ending", ["txt", "jsonl", "parquet"])
@pytest.mark.parametrize("name", [*PASSING, "EIO", *OF_THE_FILE])
def test_text_is_not_left_out_for_good(name: str, ending: str, failing, tmp_path: Path) -> None:
    """Tokens are made once, so that a fault of the disk that passes would leave the file out of them for ever."""
    if ending == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        table = pytest.importorskip("pyarrow").table({"text": ["a", "b"]})
        parquet.write_table(table, tmp_path / "a.parquet")
    else:
        (tmp_path / f"a.{ending}").write_text('{"text": "a"}\n')
    files = TextFiles(TextDataConfig(kind="text", tokenizer="x", path=str(tmp_path), max_bad_fraction=1.0))
    failing(name)
    words = "none of 1 files" if name in OF_THE_FILE else "because of a system error that may be temporary"
    with pytest.raises(DataError, match=words):
        list(files.pieces())


@pytest.mark.parametrize("name", [*PASSING, "EIO"])
def test_parquet_file_that_fails_in_the_middle(name: str, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pytest.importorskip("pyarrow").table({"text": ["a", "b"]}), tmp_path / "a.parquet")
    number = getattr(errno, name)

    class Failing(io.FileIO):
        def read(self, size: int = -1) -> bytes:
            if self.tell() < 20:
                raise OSError(number, os.strerror(number))
            return super().read(size)

    with Failing(tmp_path / "a.parquet") as file, pytest.raises(OSError, match=os.strerror(number)):
        list(parquet_rows(file, {"text": "`d2v.data.field`"}))


def test_sizes_that_are_not_to_be_had_are_no_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("abc")
    paths = PathList(["a", "gone"])
    assert file_sizes(str(tmp_path), paths).tolist() == [3, -1]
    stat = os.stat

    def fail(path: Any, *arguments: Any, **options: Any) -> os.stat_result:
        if str(path).endswith("/a"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return stat(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", fail)
    with pytest.raises(OSError, match="Input/output error"):
        file_sizes(str(tmp_path), paths)
