"""A new run replaces the folder of a run that saved nothing, and `--resume` continues it."""

from __future__ import annotations

from pathlib import Path

import pytest

from d2v_fast.errors import RunError
from d2v_fast.training import run_folder
from tests.helpers.runs import figures, leave_out_reports, run_here, tiny_file


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    leave_out_reports(monkeypatch.setattr)
    return tiny_file(tmp_path, d2v__schedule__steps=3, d2v__schedule__warmup_steps=1)


def fail_while_it_is_built(monkeypatch: pytest.MonkeyPatch, file: Path, *arguments: str) -> None:
    with monkeypatch.context() as patch:

        def fail(*arguments: object, **options: object) -> None:
            raise RunError("no")

        patch.setattr("d2v_fast.training.prepare.make_engine", fail)
        assert run_here(file, "--run", "r", *arguments) == 1


def test_new_run_after_a_failed_start(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_while_it_is_built(monkeypatch, file)
    folder = tmp_path / "runs" / "r"
    # of a run that came further, without a checkpoint; and a file of somebody else
    (folder / "log.jsonl").write_text('{"step": 1}\n')
    (folder / "probe.json").write_text('[{"step": 1}]')
    (folder / "checkpoints" / "step-3.tmp-17").mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    capsys.readouterr()
    assert run_here(file, "--run", "r") == 0
    assert "run folder: " in (said := capsys.readouterr().out)
    assert "(the run in it ended before it saved anything)" in said
    assert len(figures(tmp_path, "r")) == 3
    assert not (folder / "probe.json").exists()
    assert not (folder / "checkpoints" / "step-3.tmp-17").exists()
    assert (folder / "notes.txt").read_text() == "mine"
    # what was saved stays
    assert run_here(file, "--run", "r") == 1
    assert f"the run {folder} exists" in capsys.readouterr().err


def test_resume_after_a_failed_start(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = f"d2v.run.dir={tmp_path / 'runs'}"
    fail_while_it_is_built(monkeypatch, file)
    assert run_here("--run", "r", "--resume", "--set", root) == 0
    assert "nothing has been saved yet: starting from the beginning" in capsys.readouterr().out
    # without its configuration, as earlier versions left it
    fail_while_it_is_built(monkeypatch, file, "--run", "s")
    (tmp_path / "runs" / "s" / "config.json").unlink()
    capsys.readouterr()
    assert run_here("--run", "s", "--resume", "--set", root) == 2
    assert "Nothing was saved there: start the run with its FILE, without `--resume`." in capsys.readouterr().err
    assert run_here("--run", "t", "--resume", "--set", root) == 2
    assert f"Runs in {tmp_path / 'runs'}: r." in capsys.readouterr().err
    assert run_here(file, "--run", "s") == 0


def test_folders_that_are_not_taken(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "runs"
    (root / "mine").mkdir(parents=True)
    (root / "mine" / "thesis.tex").write_text("x")
    (root / "file").write_text("x")
    (root / "empty").mkdir()
    for name in ("mine", "file"):
        assert run_here(file, "--run", name) == 1
        assert "exists and is not the folder of a run: choose another name with --run." in capsys.readouterr().err
    assert (root / "mine" / "thesis.tex").exists()
    # a damaged checkpoint may still be worth something, and so is a result
    for name in ("checkpoints/step-3", "checkpoints/step-3.damaged", "result.json"):
        folder = root / name.replace("/", "-")
        (folder / name).mkdir(parents=True)
        (folder / "lock").write_text("")
        assert run_folder.is_saved(folder)
        with pytest.raises(RunError, match="exists: choose another name"):
            run_folder.RunFolder.create(root, folder.name, "x")
    held = run_folder.RunFolder.create(root, "empty", "x")
    assert held.replaced
    held.close()
    assert run_folder.BAD_FILES in run_folder._REPORTS


def test_name_that_is_taken_is_refused_before_the_data_are_read(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs" / "r"
    (folder / "checkpoints" / "step-3").mkdir(parents=True)
    (folder / "lock").write_text("")

    def fail(*arguments: object) -> None:
        raise AssertionError("the data are listed")

    monkeypatch.setattr("d2v_fast.training.prepare.read_data", fail)
    assert run_here(file, "--run", "r") == 1
    assert f"the run {folder} exists: choose another name with --run, or continue it: " in capsys.readouterr().err
