"""A sweep runs every combination once, names what failed, and continues where it stopped."""

from __future__ import annotations

import io
import json
import signal
import sys
import threading
from pathlib import Path

import pytest

from d2v_fast.commands.console import main
from d2v_fast.commands.sweep import Axis, Sweep, parse_axis, without_own_options
from d2v_fast.errors import OptionError
from d2v_fast.processes.signals import StopRequest

# stands for a run: writes result.json; fails with a rate of 9; with a rate of 7 it waits for a signal and then stops
SCRIPT = """
import json, pathlib, signal, sys, time
sets = dict(w.split("=", 1) for before, w in zip(sys.argv, sys.argv[1:]) if before == "--set")
folder = pathlib.Path(sets["d2v.run.dir"]) / sys.argv[sys.argv.index("--run") + 1]
folder.mkdir(exist_ok=True)
with open(folder / "starts", "a") as file:
    file.write("resume\\n" if "--resume" in sys.argv else "new\\n")
rate, seed = float(sets["optimizer.params.lr"]), int(sets["d2v.run.seed"])
if rate == 9:
    print("error: `optimizer.params.lr` is too high")
    sys.exit(1)
if rate == 7 and not (folder / "checkpoints").exists():
    (folder / "checkpoints" / "step-1").mkdir(parents=True)
    (folder / "checkpoints" / "step-1" / "manifest.json").touch()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    print("waiting", flush=True)
    time.sleep(60)
value = rate / 10 + seed / 100
best = {"step": 10, "samples": 5, "accuracy": value, "value": value, "more_is_better": True}
result = {"step": 20, "metric": "accuracy", "best": best, "last": best}
(folder / "result.json").write_text(json.dumps(result))
"""
WORDS = ["source", "--ds_config", "file.json"]


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    (tmp_path / "script.py").write_text(SCRIPT)
    return [sys.executable, "-S", str(tmp_path / "script.py")]


def sweep(folder: Path, command: list[str], *rates: str, seeds: int = 2, words: list[str] = WORDS) -> tuple[int, str]:
    out = io.StringIO()
    status = Sweep(words, [Axis("optimizer.params.lr", rates)], seeds, folder, command).run(out)
    return status, out.getvalue()


def starts(folder: Path, name: str) -> list[str]:
    return (folder / name / "starts").read_text().split()


def test_table_marks_the_best_and_names_a_failure(tmp_path: Path, command: list[str]) -> None:
    folder = tmp_path / "runs" / "s"
    status, said = sweep(folder, command, "1", "9", "3")
    assert status == 1
    lines = [" ".join(line.split()) for line in said.splitlines()]
    assert lines[2].startswith("[3/6] lr_9_seed_0: failed: exit status 1: `optimizer.params.lr` is too high (")
    assert lines[6:10] == [
        "optimizer.params.lr accuracy runs",
        "1 0.1050 ± 0.0050 2",
        "9 no result 0 2 failed",
        "3 0.3050 ± 0.0050 2 best",
    ]
    summary = json.loads((folder / "sweep.json").read_text())
    assert [row["best"] for row in summary["table"]] == [False, False, True]
    assert summary["runs"][4] == {
        "run": "lr_3_seed_0",
        "values": {"optimizer.params.lr": "3"},
        "seed": 0,
        "status": "finished",
        "metric": "accuracy",
        "metrics": {"accuracy": 0.3},
        "best_step": 10,
    }
    # again, with one more value: finished runs are not repeated, failed ones are
    status, said = sweep(folder, command, "1", "9", "3", "5")
    assert starts(folder, "lr_1_seed_1") == ["new"]
    assert starts(folder, "lr_9_seed_1") == ["new", "new"]
    assert "lr_5_seed_1: accuracy 0.5100 at step 10" in said
    assert "[1/8] lr_1_seed_0: accuracy 0.1000 at step 10, finished before" in said


def test_a_stopped_sweep_continues(tmp_path: Path, command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "s"
    requests: list[StopRequest] = []
    enter = StopRequest.__enter__
    monkeypatch.setattr(StopRequest, "__enter__", lambda self: (requests.append(self), enter(self))[1])

    def stop() -> None:
        log = folder / "lr_7_seed_0.log"
        while not (log.exists() and b"waiting" in log.read_bytes()):
            pass
        requests[0]._receive(signal.SIGTERM, None)

    thread = threading.Thread(target=stop)
    thread.start()
    status, said = sweep(folder, command, "1", "7", "8", seeds=1)
    thread.join()
    assert status == 130
    assert said.splitlines()[1:] == ["[2/3] lr_7_seed_0: stopped", "stopped; the same command continues"]
    status, said = sweep(folder, command, "1", "7", "8", seeds=1)
    assert status == 0
    assert starts(folder, "lr_7_seed_0") == ["new", "resume"]
    assert starts(folder, "lr_1_seed_0") == ["new"]


def test_a_folder_holds_one_sweep(tmp_path: Path, command: list[str]) -> None:
    sweep(tmp_path / "s", command, "1", seeds=1)
    with pytest.raises(
        OptionError, match=r"a sweep of the same command, but .* another: source --ds_config file\.json"
    ):
        sweep(tmp_path / "s", command, "1", seeds=1, words=[*WORDS, "--set", "train_batch_size=2"])


def test_a_grid_has_every_combination(tmp_path: Path) -> None:
    axes = [Axis("a.lr", ("1", "2")), Axis("b.lr", ("x/y", "x y")), Axis("c", ("[1,2]",))]
    cells = Sweep(WORDS, axes, 2, tmp_path, []).cells
    assert [cell.values for cell in cells[::2]] == [
        (first, second, "[1,2]") for first in ("1", "2") for second in ("x/y", "x y")
    ]
    # names are unique and hold no letter that a run's name must not have
    assert cells[0].name == "a.lr_1_b.lr_x.y_c_.1.2._seed_0"
    assert cells[2].name == "a.lr_1_b.lr_x.y_c_.1.2._seed_0.2"
    with pytest.raises(OptionError, match="every key once"):
        Sweep(WORDS, [axes[0], axes[0]], 1, tmp_path, [])
    with pytest.raises(OptionError, match="at most 10,000 runs"):
        Sweep(WORDS, [Axis("a", tuple(map(str, range(101)))), Axis("b", tuple(map(str, range(100))))], 1, tmp_path, [])


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("a.lr=1e-5,2e-5", ("1e-5", "2e-5")),
        ("a.b=[1,2],[3,4]", ("[1, 2]", "[3, 4]")),
        ("a.b=x, y", ("x", "y")),
        ("a.b=null,0.5", ("null", "0.5")),
    ],
)
def test_values_are_separated_by_commas(text: str, values: tuple[str, ...]) -> None:
    assert parse_axis(text).values == values


@pytest.mark.parametrize("text", ["a.b", "=1,2", "a..b=1", "a.b=", "a.b=1,,2", "a.b=1,1"])
def test_other_forms_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match="must be of the form KEY=VALUE,VALUE"):
        parse_axis(text)


def test_runs_get_all_other_options() -> None:
    words = ["S", "--ds_config", "f", "--sweep", "a=1", "--sweep=b=2", "--seeds", "3", "--run=x", "--resume"]
    words += ["--set", "d2v.run.dir=/tmp", "--set=c=4", "--set", "d=5", "--weights", "teacher"]
    expected = ["S", "--ds_config", "f", "--set", "c=4", "--set", "d=5", "--weights", "teacher"]
    assert without_own_options(words) == expected


@pytest.mark.parametrize(
    "words",
    [
        ["--sweep", "d2v.run.seed=1,2"],
        ["--sweep", "d2v.run.dir=/a,/b"],
        ["--sweep", 'd2v.run={"keep":1}'],
        ["--set", "d2v.run.seed=3", "--sweep", "optimizer.params.lr=1e-3"],
        ["--set", "d2v.run.name=a", "--sweep", "optimizer.params.lr=1e-3"],
    ],
    ids=str,
)
def test_keys_of_the_sweep_itself_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", "--ds_config", "configs/finetune_digits.json", *words]) == 2
    assert "must be left out, because a sweep sets `d2v.run." in capsys.readouterr().err


def test_a_sweep_has_no_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--ds_config", "configs/finetune_digits.json", "--sweep", "optimizer.params.lr=1e-3", "--dry-run"]
    assert main(["finetune", *words]) == 2
    assert "`--dry-run` is for one run: leave `--sweep` out." in capsys.readouterr().err


def test_a_value_that_no_run_can_have_ends_the_sweep_before_its_first_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["finetune", "--ds_config", "configs/finetune_digits.json", "--set", f"d2v.run.dir={tmp_path}"]
    assert main([*words, "--sweep", "optimizer.params.lr=1e-3,-1"]) == 2
    assert "`optimizer.params.lr` must be in (0, 1000000.0], but is -1 instead" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
