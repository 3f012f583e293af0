"""Commands never lose or replace a user's files at the place they write to, unless they are asked to."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from d2v_fast.commands.console import main
from d2v_fast.errors import OptionError
from d2v_fast.files import outputs
from d2v_fast.files.outputs import RECORD, model_folder, set_aside_changed
from d2v_fast.interop.export import export_run
from d2v_fast.modalities.vision import huggingface as huggingface_vision
from d2v_fast.modalities.vision.huggingface import import_vision
from tests.helpers.written_runs import CONFIG, write_run

Files = dict[str, bytes]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_run(tmp_path / "r", CONFIG, 1)
    return tmp_path / "r"


def content_of(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def fill(folder: Path, *names: str) -> Files:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(f"mine: {name}".encode())
    return content_of(folder)


def export(run: Path, to: Path, *more: str) -> int:
    return main(["export", str(run), "--to", str(to), *more])


@pytest.mark.parametrize(
    "names",
    [
        ("model-fine-tuned.safetensors", "notes.txt"),
        ("model.safetensors", "config.json"),
        ("model-00001-of-00002.safetensors", "model.safetensors.index.json"),
        ("README.md",),
    ],
)
@pytest.mark.parametrize("flags", [(), ("--overwrite",)])
def test_files_of_the_user_stay(
    names: tuple[str, ...], flags: tuple[str, ...], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the flag as with it: no export wrote them."""
    to = run.parent / "mine"
    before = fill(to, *names)
    assert export(run, to, *flags) == 2
    assert content_of(to) == before
    told = capsys.readouterr().err
    assert names[0] in told
    assert ("--overwrite" in told) == (not flags)


def test_an_earlier_export_is_replaced_when_asked(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to = run.parent / "out"
    export_run(run, to=to, max_file_bytes=8_000)
    sharded = content_of(to)
    assert len([name for name in sharded if name.startswith("model-")]) > 2
    fill(to, "notes.txt", "pytorch_model.bin")
    before = content_of(to)
    assert export(run, to) == 2
    assert "holds README.md, config.json, d2v_fast_export.json" in capsys.readouterr().err
    assert content_of(to) == before
    assert export(run, to, "--overwrite", "--weights", "teacher") == 0
    after = content_of(to)
    assert [name for name in after if name.startswith("model")] == ["model.safetensors"]
    assert {name: after[name] for name in ("notes.txt", "pytorch_model.bin")} == {
        "notes.txt": b"mine: notes.txt",
        "pytorch_model.bin": b"mine: pytorch_model.bin",
    }
    assert set(json.loads(after[RECORD])["files"]) == set(after) - {"notes.txt", "pytorch_model.bin", RECORD}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "README.md", RECORD])
def test_what_was_changed_since_an_export_is_the_users(name: str, run: Path) -> None:
    """Of the same size too, as weights are that were fine-tuned."""
    to = run.parent / "out"
    export_run(run, to=to)
    content = bytearray((to / name).read_bytes())
    content[-3] ^= 1
    (to / name).write_bytes(content)
    before = content_of(to)
    if name == RECORD:
        (to / name).write_text("{}")
        before = content_of(to)
    with pytest.raises(OptionError, match=f"{name}.*changed since"):
        export_run(run, to=to, overwrite=True)
    assert content_of(to) == before


def test_export_from_before_there_were_records(run: Path) -> None:
    """It is known by its names, card and times; whatever was written later makes it the user's."""
    to = run.parent / "out"
    export_run(run, to=to)
    (to / RECORD).unlink()
    export_run(run, to=to, overwrite=True)
    assert (to / RECORD).exists()
    for name in ("model.safetensors", "README.md"):
        (to / RECORD).unlink()
        os.utime(to / name, (2e9, 2e9))
        with pytest.raises(OptionError, match="which no export wrote"):
            export_run(run, to=to, overwrite=True)
        os.utime(to / name, (0, (to / "config.json").stat().st_mtime))
        export_run(run, to=to, overwrite=True)
    (to / RECORD).unlink()
    (to / "README.md").write_text("my own words")
    with pytest.raises(OptionError, match="which no export wrote"):
        export_run(run, to=to, overwrite=True)


def test_default_place_is_the_runs_own(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is replaced without a flag, but what somebody changed there is kept beside it."""
    assert main(["export", str(run)]) == main(["export", str(run)]) == 0
    assert "kept" not in capsys.readouterr().out
    (run / "export" / "model.safetensors").write_bytes(b"fine-tuned")
    for number in (1, 2):
        assert main(["export", str(run)]) == 0
        assert f"kept what was in {run / 'export'} as {run / f'export.old-{number}'}" in capsys.readouterr().out
        assert (run / f"export.old-{number}" / "model.safetensors").read_bytes() == b"fine-tuned"
        import_vision(run / "export")
        (run / "export" / "model.safetensors").write_bytes(b"fine-tuned")
    # a file in its place, too
    (run / "file").write_text("mine")
    assert set_aside_changed(run / "file") is not None
    assert (run / "file.old-1").read_text() == "mine"
    assert set_aside_changed(run / "none") is None


def test_an_export_that_fails_changes_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    to = run.parent / "out"
    export_run(run, to=to)
    before = content_of(to)
    monkeypatch.setattr(huggingface_vision, "_model_card", lambda *arguments: 1 / 0)
    for target in (to, run.parent / "new"):
        with pytest.raises(ZeroDivisionError):
            export_run(run, to=target, overwrite=True)
    assert content_of(to) == before
    assert not (run.parent / "new").exists()
    assert not [path for path in run.parent.rglob("*") if ".tmp-" in path.name]


def test_an_export_that_dies_while_files_are_moved_can_be_repeated(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old and new files together are those of exports, whichever have been moved."""
    to = run.parent / "out"
    real, left = os.replace, 0

    def replace(source: Path, target: Path) -> None:
        nonlocal left
        if Path(target).parent == to and ".part" not in str(source):
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
        real(source, target)

    for die_after in range(4):
        export_run(run, to=to, overwrite=True, weights="teacher")
        left = die_after
        with monkeypatch.context() as patch:
            patch.setattr(outputs.os, "replace", replace)
            with pytest.raises(KeyboardInterrupt):
                export_run(run, to=to, overwrite=True)
        export_run(run, to=to, overwrite=True)
        import_vision(to)


def test_leftovers_of_a_dead_export_are_removed(run: Path) -> None:
    dead, young = run / ".export.tmp-1", run / ".export.tmp-2"
    for folder in (dead, young):
        fill(folder, "model.safetensors")
    os.utime(dead, (0, 0))
    with ExitStack() as stack:
        alive = stack.enter_context(model_folder(run / "export"))
        os.utime(alive, (0, 0))
        # beside one that is alive, and holds its lock
        export_run(run, to=run / "export")
        assert alive.is_dir()
        assert not dead.exists()
        assert young.exists()
        with pytest.raises(OptionError):
            # the other one was there first
            stack.close()
    assert not alive.exists()
    import_vision(run / "export")


def test_file_targets(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command that writes one file: refused before any work, replaced when asked, a folder never."""
    folder = run.parent
    commands = [
        (["export", str(run), "--format", "beit"], "--to", "a.pth"),
        (["draw", str(run), "--count", "1"], "--out", "a.png"),
        (["presets", "digits"], "--to", "a.json"),
    ]
    for words, option, name in commands:
        target = folder / name
        target.write_bytes(b"mine")
        assert main([*words, option, str(target)]) == 2
        assert (
            f"`{option}` must be a new file, but {target} exists. `--overwrite` replaces it." in capsys.readouterr().err
        )
        assert target.read_bytes() == b"mine"
        assert main([*words, option, str(target), "--overwrite"]) == 0
        assert target.read_bytes() != b"mine"
        target.unlink()
        target.mkdir()
        (target / "b").write_text("mine")
        assert main([*words, option, str(target), "--overwrite"]) == 2
        assert f"must be a file, but {target} is a folder" in capsys.readouterr().err
        # a link that leads nowhere is something that is there
        (folder / f"link-{name}").symlink_to(folder / "nowhere")
        assert main([*words, option, str(folder / f"link-{name}")]) == 2
        assert main([*words, option, str(run / "config.json" / name)]) == 2
        assert f"must be in a folder, but {run / 'config.json'} is not a folder" in capsys.readouterr().err


def test_nothing_is_written_into_a_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = next((run / "checkpoints").iterdir())
    before = content_of(checkpoint)
    (run.parent / "link").symlink_to(checkpoint)
    for words in (
        ["export", str(run), "--to", str(checkpoint), "--overwrite"],
        ["export", str(run), "--to", str(run.parent / "link" / "deep" / "below")],
        ["export", str(run), "--format", "beit", "--to", str(checkpoint / "a.pth")],
        ["embed", str(run), str(run), "--to", str(checkpoint / "a.npy")],
        ["draw", str(run), "--out", str(checkpoint / "a.png")],
        ["presets", "digits", "--to", str(run.parent / "link" / "a.json")],
    ):
        assert main(words) == 2
        assert "must be outside of checkpoints" in capsys.readouterr().err
    assert content_of(checkpoint) == before


def test_a_file_in_the_place_of_a_folder(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run.parent / "file").write_text("mine")
    for more in ([], ["--overwrite"]):
        assert main(["export", str(run), "--to", str(run.parent / "file"), *more]) == 2
        assert "must be a new or empty folder, but" in capsys.readouterr().err
    assert (run.parent / "file").read_text() == "mine"


def test_default_place_that_cannot_be_written(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run on read-only media is exported and drawn elsewhere."""
    access = os.access
    monkeypatch.setattr(
        outputs.os, "access", lambda path, mode: run not in (path, *path.parents) and access(path, mode)
    )
    for words, option in ((["export", str(run)], "--to"), (["draw", str(run), "--count", "1"], "--out")):
        assert main(words) == 1
        assert f"`{run}` cannot be written: name another place with `{option}`." in capsys.readouterr().err
    assert export(run, run.parent / "out") == 0


def test_features_and_the_names_beside_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("f.npy", "f.paths.txt"):
        for other in tmp_path.iterdir():
            other.unlink()
        (tmp_path / name).write_text("mine")
        assert main(["embed", str(tmp_path / "model"), str(tmp_path / "in"), "--to", str(tmp_path / "f.npy")]) == 2
        assert f"{tmp_path / name} exists. `--overwrite` replaces it." in capsys.readouterr().err
        assert content_of(tmp_path) == {name: b"mine"}


def test_import_asks_as_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = fill(tmp_path / "out", "model.safetensors")
    (tmp_path / "a.pth").write_bytes(b"")
    assert main(["import", str(tmp_path / "a.pth"), "--to", str(tmp_path / "out")]) == 2
    assert "must be a new or empty folder" in capsys.readouterr().err
    assert content_of(tmp_path / "out") == before
    words = ["import", str(tmp_path / "a.pth"), "--to", str(tmp_path / "out"), "--ds_config", "digits", "--overwrite"]
    assert main(words) == 2
    assert "the folder of a run is never replaced" in capsys.readouterr().err
