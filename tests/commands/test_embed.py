"""`d2v-fast embed` writes the features of files in order, and names files that cannot be read."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from d2v_fast.commands.console import main
from d2v_fast.config import D2VConfig, SpeechConfig, TextConfig, TextDataConfig, check_d2v
from d2v_fast.evaluation.features import sequence_features
from d2v_fast.interop.export import export_run
from d2v_fast.modalities.text.config import TextModelConfig
from d2v_fast.modalities.text.embed import Lines
from d2v_fast.modalities.text.encoder import TextModel
from d2v_fast.modalities.text.huggingface import export_text
from d2v_fast.modalities.text.tokenizer import Tokenizer, load_tokenizer
from d2v_fast.modalities.vision.images import ImagesDataset
from d2v_fast.modalities.vision.probe import image_features
from tests.helpers.command_line import complaint
from tests.helpers.runs import TINY_SPEECH
from tests.helpers.text_files import sentences, small_tokenizer
from tests.helpers.tokenizer_folders import word_pieces
from tests.helpers.written_runs import CONFIG, write_run

RATE = 8000


def embed(*arguments: object) -> None:
    assert main(["embed", *map(str, arguments), "--device", "cpu"]) == 0


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Seven images in two folders, gray and in color."""
    rng = np.random.default_rng(0)
    for index, name in enumerate(["b/2.png", "b/10.png", "a/x.jpg", "a/y.webp", "c.png", "d.png", "ä.png"]):
        path = tmp_path / "photographs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (20 + index, 30, 3) if index % 2 else (20, 20 + index)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(path)
    return tmp_path / "photographs"


def test_images_of_a_run(photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Row by row what the probe would take, whatever is encoded together."""
    model = write_run(tmp_path / "r", CONFIG, 2)
    to = tmp_path / "features.npy"
    embed(tmp_path / "r", photographs, "--to", to, "--batch-size", 2)
    said = capsys.readouterr()
    assert f"{to} (7 images x 16 features, by the student of {tmp_path / 'r'}, step 7, their names in" in said.out
    assert said.err == ""
    names = (tmp_path / "features.paths.txt").read_text().splitlines()
    assert names == ["a/x.jpg", "a/y.webp", "b/10.png", "b/2.png", "c.png", "d.png", "ä.png"]
    data = CONFIG.data.model_copy(update={"kind": "images", "path": str(photographs)})
    pixels = ImagesDataset(data, CONFIG.model).plain(np.arange(7))
    found = np.load(to)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, image_features(model.student, pixels), atol=1e-5)
    assert not list(tmp_path.glob("*.part"))


def test_exported_folder_gives_the_same(photographs: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "r", CONFIG, 1)
    export_run(tmp_path / "r", weights="teacher", to=tmp_path / "exported")
    embed(tmp_path / "r", photographs, "--to", tmp_path / "a.npy", "--weights", "teacher", "--step", 7)
    embed(tmp_path / "exported", photographs, "--to", tmp_path / "b.npy")
    np.testing.assert_allclose(np.load(tmp_path / "b.npy"), np.load(tmp_path / "a.npy"), atol=1e-5)
    embed(tmp_path / "r", photographs, "--to", tmp_path / "c.npy")
    assert np.abs(np.load(tmp_path / "c.npy") - np.load(tmp_path / "a.npy")).max() > 1e-3


def test_frames(photographs: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "r", CONFIG, 1)
    embed(tmp_path / "r", photographs, "--to", tmp_path / "mean.npy")
    embed(tmp_path / "r", photographs, "--to", tmp_path / "all.npz", "--frames")
    with np.load(tmp_path / "all.npz") as arrays:
        assert len(arrays.files) == 7
        assert arrays.files == (tmp_path / "mean.paths.txt").read_text().splitlines()
        assert all(arrays[name].shape == (16, 16) for name in arrays.files)
        means = np.stack([arrays[name].mean(0) for name in arrays.files])
    np.testing.assert_allclose(means, np.load(tmp_path / "mean.npy"), atol=1e-6)


def test_unreadable_files_are_left_out_and_named(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "r", CONFIG, 1)
    embed(tmp_path / "r", photographs, "--to", tmp_path / "whole.npy")
    (photographs / "b/1.png").write_bytes(b"no image")
    (photographs / "zzz\n.jpg").write_bytes((photographs / "a/x.jpg").read_bytes()[:200])
    capsys.readouterr()
    embed(tmp_path / "r", photographs, "--to", tmp_path / "some.npy")
    said = capsys.readouterr()
    assert "7 images x 16" in said.out
    assert (
        "2 of 9 images are unreadable and left out:\n  b/1.png: not a JPEG, PNG, WebP, TIFF, BMP or GIF image\n"
        in said.err
    )
    assert "zzz\\n.jpg: " in said.err
    np.testing.assert_array_equal(np.load(tmp_path / "some.npy"), np.load(tmp_path / "whole.npy"))
    for path in photographs.rglob("*.*"):
        path.write_bytes(b"")
    said_then = complaint(capsys, "embed", tmp_path / "r", photographs, "--to", tmp_path / "none.npy")
    assert "none of the images in" in said_then
    assert "b/1.png: an empty file" in said_then
    assert not list(tmp_path.glob("none*"))


def test_parquet(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "r", CONFIG, 1)
    to = tmp_path / "features.parquet"
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "pyarrow", None)
        said = complaint(capsys, "embed", tmp_path / "r", photographs, "--to", to)
        assert "pip install 'd2v_fast[parquet]'" in said
    parquet = pytest.importorskip("pyarrow.parquet")
    embed(tmp_path / "r", photographs, "--to", to)
    embed(tmp_path / "r", photographs, "--to", tmp_path / "features.npy")
    table = parquet.read_table(to)
    assert table.column_names == ["path", "feature"]
    assert table["path"].to_pylist() == (tmp_path / "features.paths.txt").read_text().splitlines()
    np.testing.assert_array_equal(
        np.array(table["feature"].to_pylist(), np.float32), np.load(tmp_path / "features.npy")
    )


def test_recordings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each as if it were alone; a long one in parts, frame after frame."""
    config, _ = check_d2v(TINY_SPEECH["d2v"])
    assert isinstance(config, SpeechConfig)
    model = write_run(tmp_path / "r", config, 1)
    rng = np.random.default_rng(0)
    folder = tmp_path / "recordings"
    folder.mkdir()
    waves = {}
    for name, seconds in {"a": 0.5, "b": 0.31, "c": 0.45, "long": 2.0}.items():
        waves[name] = rng.normal(0, 0.1, int(seconds * RATE)).astype(np.float32)
        soundfile.write(folder / f"{name}.wav", waves[name], RATE, subtype="FLOAT")
    soundfile.write(folder / "silent.wav", np.zeros(RATE), RATE)
    soundfile.write(folder / "tiny.wav", rng.normal(0, 0.1, 10), RATE)
    embed(tmp_path / "r", folder, "--to", tmp_path / "all.npz", "--frames", "--batch-size", 3)
    assert "2 of 6 recordings are unreadable and left out:\n  silent.wav: " in capsys.readouterr().err
    whole = [torch.nn.functional.layer_norm(torch.from_numpy(wave), wave.shape) for wave in waves.values()]
    with np.load(tmp_path / "all.npz") as found:
        assert found.files == ["a.wav", "b.wav", "c.wav", "long.wav"]
        for name, wave in zip("abc", whole, strict=False):
            (expected,) = sequence_features(model.student, [wave], num_places=config.model.num_frames)
            torch.testing.assert_close(torch.from_numpy(found[f"{name}.wav"]), expected, atol=1e-4, rtol=1e-4)
        parts = sequence_features(model.student, list(whole[3].tensor_split(4)), num_places=config.model.num_frames)
        torch.testing.assert_close(torch.from_numpy(found["long.wav"]), torch.cat(parts), atol=1e-4, rtol=1e-4)


def text_run(folder: Path) -> tuple[D2VConfig, torch.nn.Module]:
    """A run on text, and its model."""
    (folder / "tokenizer").mkdir()
    small_tokenizer().save(folder / "tokenizer")
    section = {
        "modality": "text",
        "model": {"vocab_size": 360, "max_positions": 32, "width": 16, "depth": 2, "heads": 2},
        "target": {"top_k": 2},
        "data": {"kind": "text", "path": "x", "tokenizer": str(folder / "tokenizer"), "block_size": 32},
    }
    config, problems = check_d2v(section)
    assert config is not None, problems
    return config, write_run(folder / "r", config, 1)


def tokens(tokenizer: Tokenizer, line: str) -> torch.Tensor:
    ids, _ = tokenizer.encode([line])
    return torch.tensor([[tokenizer.specials.bos, *ids.tolist()[:30], tokenizer.specials.eos]])


def test_lines_with_zero_bytes_are_left_out_or_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """UTF-16 without a byte order mark is valid UTF-8 with zero bytes."""
    config, model = text_run(tmp_path)
    assert isinstance(config, TextConfig)
    folder = tmp_path / "text"
    folder.mkdir()
    first, second = (line[:40] for line in sentences(2))
    (folder / "a.txt").write_bytes(f"{first}\n".encode() + b"one \0 two\n")
    (folder / "b.txt").write_bytes(second.encode("utf-16-be"))
    embed(tmp_path / "r", folder, "--to", tmp_path / "features.npy")
    said = capsys.readouterr().err
    assert "2 of 3 lines are unreadable and left out:\n  a.txt:2: not text: it has zero bytes\n  b.txt:1: no" in said
    assert (tmp_path / "features.paths.txt").read_text() == "a.txt:1\n"
    data = TextDataConfig(encoding_errors="replace")
    lines = Lines(model.student, "", folder / "a.txt", config.model, data, small_tokenizer())
    _, two = lines.samples()
    assert not isinstance(two, str)
    assert torch.equal(two.parts[0], tokens(small_tokenizer(), "one \ufffd two")[0])


def test_lines_of_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, model = text_run(tmp_path)
    lines = [line[:40] for line in sentences(4)]
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "b.txt").write_text("\n".join([lines[0], "", lines[1]]))
    (folder / "a.txt").write_bytes(lines[2].encode() + b"\n\xff\xfe wrong\n" + " ".join(lines).encode())
    to = tmp_path / "features.npy"
    embed(tmp_path / "r", folder, "--to", to)
    said = capsys.readouterr().err
    assert "1 of 5 lines are unreadable and left out:\n  a.txt:2: not UTF-8" in said
    assert "only the beginning is read of 1 line longer than the model reads" in said
    assert (tmp_path / "features.paths.txt").read_text().splitlines() == ["a.txt:1", "a.txt:3", "b.txt:1", "b.txt:3"]
    student = model.student.eval()
    texts = [lines[2], " ".join(lines), lines[0], lines[1]]
    with torch.no_grad():
        expected = [student(tokens(small_tokenizer(), text)).last_hidden[0].mean(0) for text in texts]
    torch.testing.assert_close(torch.from_numpy(np.load(to)), torch.stack(expected), atol=1e-4, rtol=1e-4)
    # exported, it is the same
    assert main(["export", str(tmp_path / "r"), "--to", str(tmp_path / "exported")]) == 0
    embed(tmp_path / "exported", folder, "--to", tmp_path / "again.npy")
    np.testing.assert_allclose(np.load(tmp_path / "again.npy"), np.load(to), atol=1e-4)
    # a file by itself, and it stays what it is
    embed(tmp_path / "r", folder / "b.txt", "--to", folder / "b.npy")
    np.testing.assert_allclose(np.load(folder / "b.npy"), np.load(to)[2:], atol=1e-4)
    assert (folder / "b.txt").read_text().startswith(lines[0])


def test_mistakes_are_named(photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "r", CONFIG, 1)
    export_run(tmp_path / "r", to=tmp_path / "exported")

    def said(*arguments: object) -> str:
        return complaint(capsys, "embed", *arguments)

    to = ("--to", tmp_path / "x.npy")
    assert "`MODEL` must be a run folder or a Transformers folder" in said(tmp_path, photographs, *to)
    assert "must end with .npy or .parquet, but is" in said(tmp_path / "r", photographs, "--to", "x.npz")
    assert "must end with .npz with `--frames`" in said(tmp_path / "r", photographs, *to, "--frames")
    assert "must be in a folder that exists" in said(tmp_path / "r", photographs, "--to", tmp_path / "no/x.npy")
    assert "`INPUTS` must be a folder of images" in said(tmp_path / "r", tmp_path / "none", *to)
    assert "`INPUTS` must hold images (.jpg" in said(tmp_path / "r", tmp_path / "exported", *to)
    assert "must be of a checkpoint in" in said(tmp_path / "r", photographs, *to, "--step", 3)
    assert "are for run folders" in said(tmp_path / "exported", photographs, *to, "--weights", "teacher")
    assert "is for models of text" in said(tmp_path / "r", photographs, *to, "--tokenizer", tmp_path)
    (tmp_path / "exported/preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2]}')
    assert "must hold 1 values, but holds 2" in said(tmp_path / "exported", photographs, *to)
    (tmp_path / "exported/preprocessor_config.json").write_text('{"image_mean": "gray"}')
    assert "is not a valid preprocessor configuration" in said(tmp_path / "exported", photographs, *to)
    (tmp_path / "exported/config.json").write_text("[")
    assert "not valid JSON" in said(tmp_path / "exported", photographs, *to)
    if not torch.cuda.is_available():
        assert 'must be "cpu" or "auto"' in said(tmp_path / "r", photographs, *to, "--device", "cuda")


def test_lost_letters_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By a tokenizer of another language."""
    tokenizer = load_tokenizer(word_pieces(tmp_path / "tokenizer"))
    config = TextModelConfig(vocab_size=tokenizer.vocab_size, max_positions=32, width=16, depth=1, heads=2)
    export_text(TextModel(config), config, tmp_path / "model", tokenizer=tokenizer)
    (tmp_path / "a.txt").write_text("the student\nдом student\n")
    embed(tmp_path / "model", tmp_path / "a.txt", "--to", tmp_path / "a.npy")
    assert "% of the characters of this text (of a sample of 24): 'дом' becomes ''" in capsys.readouterr().err
