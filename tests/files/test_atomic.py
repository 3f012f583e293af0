"""Every written file is complete or absent and has the permissions of the umask."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from d2v_fast.commands.console import main
from d2v_fast.evaluation import run as evaluation
from d2v_fast.files.atomic import make_beside, replaced, write_tensors, write_text
from d2v_fast.modalities.speech import samples as speech
from d2v_fast.training import metrics
from tests.helpers.runs import run_here, tiny_file
from tests.helpers.speech_models import make_config
from tests.helpers.text_files import tokens_of
from tests.helpers.text_models import make_config as make_text_config
from tests.helpers.written_runs import write_run

UMASKS = [0o022, 0o027]


@pytest.fixture(params=UMASKS, ids=[f"{mask:03o}" for mask in UMASKS])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def wrong_modes(folder: Path, umask: int) -> dict[str, str]:
    """Everything below a folder whose permissions are not those of a new file or folder."""
    found = {}
    for path in folder.rglob("*"):
        expected = (0o777 if path.is_dir() else 0o666) & ~umask
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode != expected:
            found[str(path.relative_to(folder))] = f"{mode:03o} instead of {expected:03o}"
    return found


def test_a_block_that_fails_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "one\n")
    with pytest.raises(IsADirectoryError), replaced(path) as part:
        part.with_name("a.txt.part").write_text(tmp_path.read_text())
    with replaced(path) as part:
        part.unlink()
    assert path.read_text() == "one\n"
    # of a process that was killed
    (tmp_path / "a.txt.part").write_text("thr")
    (tmp_path / "a.txt.part").chmod(0o400)
    write_text(path, "two é\n")
    assert path.read_text(encoding="utf-8") == "two é\n"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_permissions_are_those_of_the_umask(umask: int, tmp_path: Path) -> None:
    tensors = {"a": torch.arange(3.0)}
    write_tensors(tmp_path / "a.safetensors", tensors)
    write_text(tmp_path / "a.txt", "")
    folders = {make_beside(tmp_path, "name") for _ in range(3)}
    assert len(folders) == 3
    assert wrong_modes(tmp_path, umask) == {}
    assert torch.equal(load_file(tmp_path / "a.safetensors")["a"], tensors["a"])


def test_what_a_run_and_the_commands_write(umask: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(metrics, "_tensorboard", lambda *arguments: None)
    monkeypatch.setattr(evaluation, "has_labels", lambda config: False)
    assert run_here("--ds_config", tiny_file(tmp_path, d2v__schedule={"steps": 1}), "--run", "r") == 0
    write_run(tmp_path / "runs" / "speech", make_config(), 2)
    write_run(tmp_path / "runs" / "text", make_text_config(), 2)
    recordings, text = tmp_path / "recordings", tmp_path / "text"
    recordings.mkdir()
    text.mkdir()
    for path in sorted(speech.FOLDER.rglob("*.flac"))[:2]:
        (recordings / path.name).write_bytes(path.read_bytes())
    (text / "a.txt").write_text("a line of words\nanother line\n" * 20)
    tokens_of(text, tmp_path / "tokens")
    commands = [
        "export runs/r --weights teacher",
        "export runs/speech --format fairseq --to a/b/speech.pt",
        "export runs/text --format fairseq",
        "import runs/text/export.pt --to imported",
        "import runs/r/export --to runs/more --ds_config tiny.json",
        "embed runs/speech recordings --to means.npy",
        "embed runs/speech recordings --to frames.npz --frames",
        "presets digits --to mine.json",
        "tokenize text --train --vocab-size 261 --to tokenizer",
    ]
    for command in commands:
        assert main(command.split()) == 0, command
    written = {path.name for path in tmp_path.rglob("*")}
    assert written >= {"shard-00000.safetensors", "model.safetensors", "export.pt", "log.jsonl", "curves.png"}
    assert wrong_modes(tmp_path, umask) == {}
    assert not list(tmp_path.rglob("*.part"))
