"""Damaged files of a run folder are repaired and reported, and nothing is lost."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from d2v_fast.commands.console import main
from d2v_fast.errors import RunError
from d2v_fast.training.metrics import read_log, read_probes
from d2v_fast.training.run_folder import RunFolder, find_supervised
from tests.helpers.runs import figures, leave_out_reports, logged_steps, run_here, tiny_file

Damage = Callable[[Path], Any]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with a checkpoint each, which no test changes."""
    root = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        leave_out_reports(patch.setattr)
        file = tiny_file(root, d2v__schedule={"steps": 4, "warmup_steps": 1}, d2v__run__save_every=1, d2v__run__keep=4)
        assert run_here(file, "--run", "r") == 0
    return root / "runs" / "r"


@pytest.fixture
def run(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run without its last step."""
    leave_out_reports(monkeypatch.setattr)
    folder = tmp_path / "runs" / "r"
    shutil.copytree(finished, folder)
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "step-4")
    return folder


def resume(run: Path) -> int:
    return run_here("--run", "r", "--resume", "--set", f"d2v.run.dir={run.parent}")


def edit(name: str, change: Callable[[bytes], bytes]) -> Damage:
    return lambda run: (run / name).write_bytes(change((run / name).read_bytes()))


def line(number: int, change: Callable[[bytes], bytes]) -> Damage:
    """Change one line of the log, counted from 0."""

    def damage(run: Path) -> None:
        lines = (run / "log.jsonl").read_bytes().splitlines(keepends=True)
        lines[number] = change(lines[number])
        (run / "log.jsonl").write_bytes(b"".join(lines))

    return damage


LOGS: dict[str, tuple[Damage, int]] = {
    "byte that is no UTF-8": (line(1, lambda old: old[:9] + b"\xff" + old[9:]), 1),
    "number": (line(0, lambda old: b"7\n"), 1),
    "list": (line(1, lambda old: b"[1, 2]\n"), 1),
    "text": (line(1, lambda old: b'"step"\n'), 1),
    "step that is no number": (line(1, lambda old: old.replace(b'"step": 2', b'"step": "2"')), 1),
    "step that is true": (line(0, lambda old: old.replace(b'"step": 1', b'"step": true')), 1),
    "without a figure": (line(1, lambda old: old.replace(b'"loss"', b'"lass"')), 1),
    "figure that is text": (line(1, lambda old: old.replace(b'"lr": ', b'"lr": "a", "x": ')), 1),
    "cut off in the middle": (line(1, lambda old: old[:30] + b"\n"), 1),
    "cut off at its end": (edit("log.jsonl", lambda old: old + b'{"step": 4, "lo'), 0),
    "zero bytes before a line": (line(1, lambda old: b"\0" * 4096 + old), 0),
    "zero bytes at its end": (edit("log.jsonl", lambda old: old + b"\0" * 512), 0),
    "long number": (line(1, lambda old: old.replace(b'"skipped": ', b'"skipped": ' + b"9" * 5000)), 1),
    "nested deeply": (line(1, lambda old: b"[" * 100_000 + b"\n"), 1),
    "no end": (line(0, lambda old: b"a" * 3_000_000 + old), 1),
    "empty": (edit("log.jsonl", lambda old: b""), 3),
    "binary": (edit("log.jsonl", lambda old: bytes(range(256)) * 64), 3),
}


@pytest.mark.parametrize("what", LOGS)
def test_damaged_log(what: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every good line stays in the log, every damaged one moves to a file beside it, and the run goes on."""
    damage, lost = LOGS[what]
    before = (run / "log.jsonl").read_bytes()
    damage(run)
    damaged = (run / "log.jsonl").read_bytes()
    read_log(run)
    assert resume(run) == 0
    assert logged_steps(run.parent.parent, "r") == 4 - lost
    good = [json.loads(text) for text in before.splitlines() if text in damaged.splitlines()]
    kept = [json.loads(text) for text in (run / "log.jsonl").read_bytes().splitlines()]
    assert [one for one in good if one["step"] <= 3] == [one for one in kept if one in good and one["step"] <= 3]
    said = capsys.readouterr().out
    if damaged.strip(b"\0\n") in before or not damaged.strip(b"\0"):
        assert "moved to log.bad.txt" not in said
        return
    beside = (run / "log.bad.txt").read_bytes() if (run / "log.bad.txt").exists() else b""
    missing = [text for text in damaged.split(b"\n") if text.strip(b"\0") and text not in before and text not in beside]
    # what a power cut put before a line is not worth keeping
    assert missing == [] or what == "zero bytes before a line"
    assert ("moved to log.bad.txt; the rest is kept" in said) == bool(beside)


REPORTS: dict[str, tuple[str, Damage]] = {
    "result empty": ("result.json", lambda run: (run / "result.json").write_text("")),
    "result of nothing": ("result.json", lambda run: (run / "result.json").write_text('{"probe": null}')),
    "result that is a list": ("result.json", lambda run: (run / "result.json").write_text("[4]")),
    "result that is a folder": ("result.json", lambda run: (run / "result.json").mkdir()),
    "result that is a pipe": ("result.json", lambda run: os.mkfifo(run / "result.json")),
    "result that leads nowhere": ("result.json", lambda run: (run / "result.json").symlink_to(run / "none")),
    "probe empty": ("probe.json", lambda run: (run / "probe.json").write_text("")),
    "probe cut off": ("probe.json", lambda run: (run / "probe.json").write_text('[{"step": 2, "stu')),
    "probe of other things": ("probe.json", lambda run: (run / "probe.json").write_text('[{"step": 2, "student": 3}]')),
    "probe that is no UTF-8": ("probe.json", lambda run: (run / "probe.json").write_bytes(b"\xff")),
    "log that is a folder": ("log.jsonl", lambda run: ((run / "log.jsonl").unlink(), (run / "log.jsonl").mkdir())),
    "curves that are a folder": ("curves.png", lambda run: (run / "curves.png").mkdir()),
    "profile that is a folder": ("profile.json", lambda run: (run / "profile.json").mkdir()),
    "events that are a file": ("tensorboard", lambda run: (run / "tensorboard").write_text("")),
    "export that is a file": ("export", lambda run: (run / "export").write_text("")),
    "bad files that are a folder": ("bad_files.txt", lambda run: (run / "bad_files.txt").mkdir()),
}


@pytest.mark.parametrize("what", REPORTS)
def test_damaged_report(what: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, damage = REPORTS[what]
    damage(run)
    assert resume(run) == 0
    said = capsys.readouterr().out
    assert f"{name} of the run " in said
    assert f"renamed to {name}.damaged-1" in said
    assert os.path.lexists(run / f"{name}.damaged-1")
    assert json.loads((run / "result.json").read_text())["step"] == 4


def test_second_damage_does_not_replace_the_first(run: Path) -> None:
    for content in (b"one", b"two"):
        (run / "probe.json").write_bytes(content)
        folder = RunFolder.reopen(run.parent, "r")
        assert len(folder.repair()) == 1
        assert folder.repair() == []
        folder.close()
    assert [(run / f"probe.json.damaged-{number}").read_bytes() for number in (1, 2)] == [b"one", b"two"]


def test_probes_that_cannot_be_read_are_not_drawn(tmp_path: Path) -> None:
    good = [{"step": 2, "student": {"linear": 1.0, "knn": 2}}, {"step": 3, "a": {"student": {"linear": 1.0}}}]
    (tmp_path / "probe.json").write_text(json.dumps(good))
    assert read_probes(tmp_path) == good
    for content in ("", "{}", "[7]", '[{"step": "a"}]', '[{"step": 1, "a": {"b": {"c": {"linear": 1}}}}]'):
        (tmp_path / "probe.json").write_text(content)
        assert read_probes(tmp_path) == []


CONFIGS: dict[str, tuple[str, Damage]] = {
    "empty": ("is empty", edit("config.json", lambda old: b"")),
    "zero bytes": ("is empty", edit("config.json", lambda old: b"\0" * len(old))),
    "cut off": ("is cut off", edit("config.json", lambda old: old[: len(old) // 2])),
    "no UTF-8": ("is not UTF-8", edit("config.json", lambda old: b"\xff" + old)),
    "partial": ("holds no configuration", edit("config.json", lambda old: b'{"train_batch_size": 24}')),
    "missing": ("is missing", lambda run: (run / "config.json").unlink()),
    "folder": ("is ", lambda run: ((run / "config.json").unlink(), (run / "config.json").mkdir())),
    "pipe": ("is ", lambda run: ((run / "config.json").unlink(), os.mkfifo(run / "config.json"))),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_damaged_configuration(what: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A resume and all commands fall back to the configuration in the newest checkpoint."""
    reason, damage = CONFIGS[what]
    before = json.loads((run / "config.json").read_text())
    damage(run)
    assert main(["export", str(run), "--to", str(run.parent / "out")]) == 0
    assert resume(run) == 0
    told = capsys.readouterr().err
    assert told.count("its content is taken from the checkpoint step-3") == 2
    assert f"config.json {reason}" in told
    after = json.loads((run / "config.json").read_text())
    before["d2v"]["run"]["dir"] = after["d2v"]["run"]["dir"]
    assert after == before


@pytest.mark.parametrize("what", CONFIGS)
def test_damaged_configuration_without_a_checkpoint(what: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run / "checkpoints")
    CONFIGS[what][1](run)
    assert resume(run) == 2
    assert ("give the file that the run began with" if what != "missing" else "start the run with its FILE") in (
        capsys.readouterr().err
    )


def test_what_somebody_mistyped_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A configuration with a typing mistake is refused, not silently replaced by the copy in the checkpoint."""
    for change, words in (
        (lambda old: old.replace(b'"seed": 0,', b'"seed": 0,,'), "not valid JSON"),
        (lambda old: old.replace(b'"seed": 0,', b'"sead": 0,'), "Did you mean `d2v.run.seed`?"),
    ):
        content = (run / "config.json").read_bytes()
        (run / "config.json").write_bytes(change(content))
        assert resume(run) == 2
        assert words in capsys.readouterr().err
        (run / "config.json").write_bytes(content)


def test_places_that_cannot_be_repaired_are_named(run: Path, tmp_path: Path) -> None:
    (run / "lock").unlink()
    os.mkfifo(run / "lock")
    with pytest.raises(RunError, match="lock must be a regular file, but is not: remove it"):
        RunFolder.reopen(run.parent, "r")
    elsewhere = tmp_path / "of the user"
    for content in ("kept", None):
        # it would be emptied, or made
        (run / "lock").unlink()
        (run / "lock").symlink_to(elsewhere)
        elsewhere.write_text(content) if content else elsewhere.unlink()
        with pytest.raises(RunError, match="lock must be a regular file, but is not: remove it"):
            RunFolder.reopen(run.parent, "r")
        assert (elsewhere.read_text() if elsewhere.exists() else None) == content
    (run / "lock").unlink()
    (run / "lock").write_bytes(b"pid \xff\n")
    RunFolder.reopen(run.parent, "r").close()
    (run / "checkpoints").rename(tmp_path / "elsewhere")
    (run / "checkpoints").write_text("")
    with pytest.raises(RunError, match="checkpoints must be a folder, but is not: restore the original one"):
        RunFolder.reopen(run.parent, "r")


def test_damaged_mark_of_another_run(tmp_path: Path) -> None:
    for name, content in (("a", b"\xff"), ("b", b"x" * 5000), ("d", b"the mark")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "supervision").write_bytes(content)
    (tmp_path / "c" / "supervision").mkdir(parents=True)
    assert find_supervised(tmp_path, "the mark") == tmp_path / "d"
    assert find_supervised(tmp_path, "another") is None


def test_undamaged_run_says_nothing(run: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert resume(run) == 0
    said = capsys.readouterr()
    assert ".damaged" not in said.out + said.err
    assert "log.bad" not in said.out
    assert figures(run.parent.parent, "r") == figures(finished.parent.parent, "r")
