"""Standard deviations, the log and its plots."""

from __future__ import annotations

import inspect
import json
import math
import time
from pathlib import Path

import pytest
import torch

from d2v_fast.config import GuardConfig, parse_config
from d2v_fast.data.progress import Progress, duration
from d2v_fast.figures.curves import curves_figure
from d2v_fast.objectives.build import build_model
from d2v_fast.objectives.deviations import deviations
from d2v_fast.training import metrics
from d2v_fast.training.metrics import RunLog, draw_curves, read_log
from d2v_fast.training.prepare import prepare
from d2v_fast.training.run_folder import RunFolder
from d2v_fast.training.stepclock import StepClock
from tests.helpers.runs import TINY


def moments_of(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return torch.stack((prediction.sum(0), (prediction**2).sum(0), target.sum(0), (target**2).sum(0)))


@pytest.mark.parametrize(("rows", "width"), [(2, 1), (37, 5), (501, 16)])
def test_deviations_match_torch(rows: int, width: int) -> None:
    prediction, target = torch.randn(rows, width), 3 + 0.5 * torch.randn(rows, width)
    found = deviations(moments_of(prediction, target), rows)
    for value, tensor in ((found.prediction, prediction), (found.target, target)):
        assert value == pytest.approx((tensor.double().var(0) + 1e-6).sqrt().mean().item(), rel=1e-4)


def test_deviations_of_a_collapse() -> None:
    constant = torch.full((64, 3), 7.0)
    assert deviations(moments_of(constant, constant), 64) == pytest.approx((1e-3, 1e-3), rel=1e-3)
    assert all(math.isnan(value) for value in deviations(torch.zeros(4, 3), 1))


def test_loss_is_per_value() -> None:
    model = build_model(parse_config(TINY).pretraining)
    sums = torch.cat((torch.tensor([64.0]), torch.zeros(4 * 16)))
    assert model.logged(sums, num_rows=2)["loss"] == 2.0


def entry(step: int, **changes: float) -> dict[str, float]:
    usual = {"loss": 0.5, "target_std": 0.9, "prediction_std": 0.4, "lr": 1e-3, "grad_norm": 1.0, "samples_per_s": 9.0}
    return {"step": step, **usual, **changes}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def test_log_continues_after_the_checkpoint(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(folder, num_steps=10, start_step=0)
    for step in (1, 2, 3, 4):
        log.write(entry(step, loss=math.nan if step == 2 else step))
    log.close()
    # a crash cut the last line
    with (folder.path / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "los')
    assert [line["step"] for line in read_log(folder.path)] == [1, 2, 3, 4]
    log = RunLog(folder, num_steps=10, start_step=3)
    log.write(entry(4, loss=40.0))
    log.close()
    lines = [json.loads(line) for line in (folder.path / "log.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == [1, None, 3, 40.0]
    assert "step 4/10  loss 40.0000" in capsys.readouterr().out
    assert any((folder.path / "tensorboard").iterdir())


def test_progress_bar_on_a_terminal(folder: RunFolder, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    log = RunLog(folder, num_steps=3, start_step=0)
    log.advance(1)
    log.write(entry(2))
    log.say("a line")
    log.close()
    output = capsys.readouterr().out
    assert "a line" in output


def test_curves_are_drawn_and_replaced(folder: RunFolder) -> None:
    path = folder.path / "curves.png"
    draw_curves([entry(1), entry(2, loss=None), entry(3)], path)  # type: ignore[arg-type]
    first = path.read_bytes()
    assert first.startswith(b"\x89PNG")
    draw_curves([entry(step) for step in range(20)], path)
    assert path.read_bytes() != first
    assert [name.name for name in folder.path.iterdir()] == ["curves.png"]
    draw_curves([], path)


def test_curves_show_zero_and_the_limits_of_the_collapse_check() -> None:
    entries = [entry(step, prediction_std=0.002) for step in range(1, 9)]
    guard = GuardConfig(min_target_std=0.2, min_prediction_std=0.03)
    axes = {panel.get_title(): panel for panel in curves_figure(entries, guard).axes}  # type: ignore[arg-type]
    panel = axes["standard deviation"]
    bottom, top = panel.get_ylim()
    assert bottom == 0
    assert top > 0.9
    # a collapsed prediction has a height between zero and its limit that can be seen
    heights = panel.transData.transform([(1, y) for y in (0, 0.002, 0.03, 0.9)])[:, 1]
    assert (heights[1:] - heights[:-1] > 8).all()
    limits = {line.get_ydata()[0] for line in panel.lines if line.get_linestyle() == "--"}
    assert limits == {0.2, 0.03}
    assert len(axes) == 4


def test_curves_show_the_probes() -> None:
    def scores(value: float) -> dict[str, dict[str, float]]:
        return {
            name: {"linear": value + i, "knn": 0.0} for i, name in enumerate(("untrained", "student", "raw pixels"))
        }

    one = [{"step": 5, **scores(50.0)}, {"step": 9, **scores(60.0)}]
    panels = curves_figure([entry(1)], None, one).axes  # type: ignore[list-item]
    assert len(panels) == 5
    lines = {line.get_label(): list(line.get_ydata()) for line in panels[-1].lines}
    assert lines == {"student": [51.0, 61.0], "untrained": [60.0, 60.0], "raw pixels": [62.0, 62.0]}
    two = [{"step": 5, "word": scores(1.0), "voice": scores(2.0)}]
    titles = [panel.get_title() for panel in curves_figure([entry(1)], None, two).axes]  # type: ignore[list-item]
    assert ["word" in title for title in titles[-2:]] == [True, False]
    assert "voice" in titles[-1]


def test_missing_packages_are_a_line_each(folder: RunFolder, monkeypatch, capsys) -> None:
    monkeypatch.setattr(metrics, "_said", set())
    for package in ("matplotlib.backends.backend_agg", "torch.utils.tensorboard"):
        monkeypatch.setitem(__import__("sys").modules, package, None)
    log = RunLog(folder, num_steps=3, start_step=0)
    log.write(entry(1))
    log.draw_curves()
    log.draw_curves()
    log.close()
    output = capsys.readouterr().out
    assert output.count("matplotlib is not installed") == 1
    assert output.count("tensorboard is not installed") == 1


class Clock:
    """A clock that a test advances."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


def test_imports_of_reports_are_not_memory_of_a_run(monkeypatch) -> None:
    """Reports are imported before memory is measured; a missing or broken package is no error at that point."""
    order: list[str] = []
    monkeypatch.setattr(metrics.importlib, "import_module", lambda name: order.append(name) or int("broken"))
    metrics.import_reports()
    assert order[0] == "torch.utils.tensorboard"
    assert len(order) == 3
    source = inspect.getsource(prepare)
    assert source.index("import_reports()") < source.index("PeakMemory(world.device)")


def test_step_number_moves_with_the_bar(folder: RunFolder, monkeypatch) -> None:
    clock = Clock(monkeypatch)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    log = RunLog(folder, num_steps=50, start_step=10)
    assert log._progress is not None

    def shown() -> str:
        return str(log._progress._bar.tasks[0].description)  # type: ignore[union-attr]

    assert shown() == "step 10/50  making the first batch"
    # much else has happened in the time of the first step
    clock.now += 500
    log.advance(11)
    log.write(entry(11))
    assert shown() == "step 11/50  loss 0.5000  target std 0.900  prediction std 0.400  9 samples/s"
    for step in range(12, 17):
        clock.now += 2
        log.advance(step)
        assert shown().startswith(f"step {step}/50  loss 0.5000")
        assert log._progress._bar.tasks[0].completed == step
    # two seconds a step, and 34 steps
    assert shown().endswith("samples/s  1:08 left")
    log.close()


def test_time_left_is_not_said_before_it_is_known(folder: RunFolder, monkeypatch, capsys) -> None:
    clock = Clock(monkeypatch)
    log = RunLog(folder, num_steps=1000, start_step=0)
    for step in range(1, 21):
        # the first step waits for the workers, and for what is compiled
        clock.now += 100 if step == 1 else 0.5
        log.advance(step)
        if step in (1, 2, 20):
            log.write(entry(step))
    log.close()
    first, second, twentieth = capsys.readouterr().out.splitlines()[-3:]
    assert first.startswith("step 1/1000 ")
    assert first.endswith("9 samples/s")
    assert "left" not in second
    assert twentieth.endswith("  8:10 left")


def test_preparation_says_no_time_before_it_is_known(monkeypatch, capsys) -> None:
    clock = Clock(monkeypatch)
    with Progress("reading", 1_000_000_000) as progress:
        for done in (0, 1, 200_000_000):
            clock.now += 35
            progress.show(done, "documents")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "reading  0 of 1,000 MB  documents"
    assert lines[2].endswith("  7:00 left")


def test_preparation_of_little_data_is_reported_in_fractions_of_megabytes(monkeypatch, capsys) -> None:
    clock = Clock(monkeypatch)
    with Progress("encoding", 3_480_000) as progress:
        clock.now += 35
        progress.show(256_000, "0 unreadable")
    assert capsys.readouterr().out.startswith("encoding  0.26 of 3.5 MB  0 unreadable")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *[(0, "0:00"), (61.4, "1:01"), (3723, "1:02:03"), (-1, "0:00"), (47.5 * 3600, "47:30:00")],
        *[(48 * 3600, "2 days 0 h"), (101.6 * 3600, "4 days 6 h"), (1e7, "115 days 18 h")],
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_clock_divides_the_whole_step(monkeypatch) -> None:
    time_s = iter(range(1000))
    clock = StepClock(torch.device("cpu"), enabled=True)
    monkeypatch.setattr(clock, "_now", lambda: next(time_s))
    for item in clock.each(range(7), "data"):
        if item < 6:
            with clock.part("backward"):
                pass
            clock.end_step()
    report = clock.report()
    # readings of the clock in a step: two for the data, two for backward, one at the end
    assert report["steps"] == 3
    assert report["ms_per_step"]["data"] == report["ms_per_step"]["backward"] == 1000
    assert report["ms_per_step"]["everything else"] == 3000
    assert sum(report["percent"].values()) == pytest.approx(100)
    assert "backward" in str(clock)


def test_clock_that_is_off_costs_nothing(monkeypatch) -> None:
    clock = StepClock(torch.device("cpu"), enabled=False)
    monkeypatch.setattr(clock, "_now", lambda: pytest.fail("looked at the time"))
    for _ in clock.each([1], "data"):
        with clock.part("EMA"):
            clock.end_step()
