"""A pipe without a writer, at any path that is read, gives an error message instead of a wait."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from d2v_fast.checkpoints.saved_weights import read_run_config
from d2v_fast.cli.train_options import read_config, train_parser
from d2v_fast.config import ConfigError, load_config
from d2v_fast.errors import DataError, RunError
from d2v_fast.files.reading import append_regular
from d2v_fast.interop.huggingface import import_model
from d2v_fast.interop.published import read_published
from d2v_fast.modalities.speech.audio import AudioDataset
from d2v_fast.modalities.speech.config import SpeechDataConfig, SpeechModelConfig
from d2v_fast.modalities.text.files import TextFiles
from d2v_fast.modalities.text.tokenizer import load_tokenizer
from d2v_fast.modalities.text.tokens import Tokens
from d2v_fast.training.metrics import read_log, read_probes
from d2v_fast.training.run_folder import RunFolder
from tests.helpers.runs import tiny_file
from tests.helpers.speech_folders import edited as edited_speech
from tests.helpers.text_files import config, sentences, small_tokenizer, tokens_of
from tests.helpers.vision_folders import edited

pytest.importorskip("tokenizers")

ERRORS = (ValueError, OSError, DataError, ConfigError, RunError)
A_PIPE = "a pipe"


def pipe(path: Path) -> Path:
    """A pipe in the place of whatever was there."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return path


def assert_refused(call: Callable[[], object], pattern: str = A_PIPE) -> None:
    with pytest.raises(ERRORS) as caught:
        call()
    assert re.search(pattern, str(caught.value)), str(caught.value)


def test_configurations(tmp_path: Path) -> None:
    path = pipe(tmp_path / "a.json")
    assert_refused(lambda: load_config(path), "'.*a.json' is not a regular file, but a pipe.*write it to a file first")
    assert_refused(lambda: load_config("/dev/zero"), "'/dev/zero' is not a regular file, but a device")
    (tmp_path / "runs" / "a").mkdir(parents=True)
    pipe(tmp_path / "runs" / "a" / "config.json")
    options = train_parser().parse_args(["--resume", "--run", "a", "--set", f"d2v.run.dir={tmp_path / 'runs'}"])
    assert_refused(lambda: read_config(options, 1), "no run|nothing to resume|config.json")
    assert_refused(lambda: read_run_config(tmp_path / "runs" / "a"))


def test_process_substitution_is_refused_and_a_redirected_file_is_read(tmp_path: Path) -> None:
    file = tiny_file(tmp_path)
    reader, writer = os.pipe()
    os.write(writer, file.read_bytes())
    os.close(writer)
    try:
        # what `--ds_config <(command)` names
        assert_refused(lambda: load_config(f"/dev/fd/{reader}"), "but a pipe. It is read more than once: write it to")
    finally:
        os.close(reader)
    with file.open("rb") as opened:
        # what `--ds_config /dev/stdin < FILE` names
        assert load_config(f"/dev/fd/{opened.fileno()}") == load_config(file)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json"])
def test_files_of_a_tokenizer(tmp_path: Path, name: str) -> None:
    small_tokenizer().save(tmp_path)
    pipe(tmp_path / name)
    assert_refused(lambda: load_tokenizer(tmp_path))


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "added_tokens.json"])
def test_files_of_a_vocabulary(tmp_path: Path, name: str) -> None:
    (tmp_path / "vocab.json").write_text(
        '{"a": 0, "b": 1, "ab": 2, "Ġ": 3, "<s>": 4, "</s>": 5, "<pad>": 6, "<mask>": 7}'
    )
    (tmp_path / "merges.txt").write_text("a b\n")
    load_tokenizer(tmp_path)
    pipe(tmp_path / name)
    assert_refused(lambda: load_tokenizer(tmp_path))
    assert_refused(lambda: load_tokenizer(tmp_path / name))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_transformers_folders(tmp_path: Path, name: str) -> None:
    folder = edited(tmp_path)
    if name.endswith("index.json"):
        (folder / "model.safetensors").unlink()
    pipe(folder / name)
    assert_refused(lambda: import_model(folder))
    assert_refused(lambda: import_model(pipe(tmp_path / "b.safetensors")), "neither a file nor a folder")


def test_preprocessors(tmp_path: Path) -> None:
    folder = edited_speech(tmp_path)
    pipe(folder / "preprocessor_config.json")
    assert_refused(lambda: import_model(folder))


@pytest.mark.parametrize("ending", ["pt", "pth", "bin"])
def test_published_checkpoints(tmp_path: Path, ending: str) -> None:
    path = pipe(tmp_path / f"a.{ending}")
    assert_refused(lambda: read_published(path))
    link = tmp_path / f"b.{ending}"
    link.symlink_to("/dev/zero")
    assert_refused(lambda: read_published(link), "a device")


def test_manifests_and_text(tmp_path: Path) -> None:
    manifest = pipe(tmp_path / "a.tsv")
    data = SpeechDataConfig.model_validate({"kind": "audio", "path": str(manifest)})
    assert_refused(lambda: AudioDataset(data, SpeechModelConfig()), "is neither")
    text = pipe(tmp_path / "a.txt")
    assert_refused(lambda: TextFiles(config(text)), "must be a folder, but '.*a.txt' is neither a file nor a folder")


@pytest.mark.parametrize("name", ["manifest.json", "tokens-00000.bin", "documents-00000.bin"])
def test_written_tokens(tmp_path: Path, name: str) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("\n".join(sentences(9)), encoding="utf-8")
    tokens = tokens_of(tmp_path / "text", tmp_path / "tokens")
    kept = tmp_path / "kept"
    shutil.copyfile(tokens.folder / name, kept)
    pipe(tokens.folder / name)
    assert_refused(lambda: Tokens(tokens.folder), "Remove that folder|not a regular file")
    # and a link to the very same bytes, which the manifest does not list
    (tokens.folder / name).unlink()
    (tokens.folder / name).symlink_to(kept)
    assert_refused(lambda: Tokens(tokens.folder), "Remove that folder|not a regular file")
    (tokens.folder / name).unlink()
    shutil.copyfile(kept, tokens.folder / name)
    assert Tokens(tokens.folder).num_tokens == tokens.num_tokens


def test_files_of_a_run(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "a", "a")
    folder.add_line("bad_files.txt", os.fsdecode(b"\xff one"))
    folder.add_line("bad_files.txt", "two")
    assert (folder.path / "bad_files.txt").read_bytes() == b"\xff one\ntwo\n"
    pipe(folder.path / "bad_files.txt")
    assert_refused(lambda: folder.lines("bad_files.txt"))
    assert_refused(lambda: folder.add_line("bad_files.txt", "three"))
    assert_refused(lambda: append_regular(folder.path / "bad_files.txt"))
    assert_refused(lambda: append_regular("/dev/full"), "a device")
    pipe(folder.path / "log.jsonl")
    assert_refused(lambda: read_log(folder.path))
    pipe(folder.path / "probe.json")
    assert read_probes(folder.path) == []
    folder.close()
    pipe(folder.path / "lock")
    assert_refused(lambda: RunFolder.reopen(tmp_path, "a"), "lock must be a regular file")
