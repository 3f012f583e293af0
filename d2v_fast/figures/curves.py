"""`curves.png`: the logged values of a run over its steps, the limits of the collapse check, and the probes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2v_fast.config import StepGuardConfig
from d2v_fast.figures.saving import write_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Entry = Mapping[str, Any]
Scores = Mapping[str, Mapping[str, float]]

# title and log key of the panels besides the deviations
_PANELS = (("loss", "loss"), ("learning rate", "lr"), ("gradient norm", "grad_norm"))
_DEVIATIONS = {"target": "C0", "prediction": "C1"}
# networks that train; other names in a probe are baselines
_TRAINED = {"student": "C0", "teacher": "C1"}
_PANELS_PER_ROW = 3
# inches
_PANEL_WIDTH, _PANEL_HEIGHT = 4.6, 3.1
# the deviations' axis is linear up to this value, so that it can show zero
_LINEAR_UP_TO = 0.01


def draw_curves(
    entries: Sequence[Entry],
    path: Path,
    guard: StepGuardConfig | None = None,
    probes: Sequence[Entry] = (),
    validations: Sequence[Entry] = (),
) -> None:
    """Write `curves_figure` to the PNG file `path`."""
    write_figure(curves_figure(entries, guard, probes, validations), path, dpi=100)


def curves_figure(
    entries: Sequence[Entry],
    guard: StepGuardConfig | None = None,
    probes: Sequence[Entry] = (),
    validations: Sequence[Entry] = (),
) -> Figure:
    """Draw loss, deviations or metrics of held-out samples, learning rate, gradient norm and probes over the steps.

    Args:
        entries: entries of `log.jsonl`.
        guard: limits to draw in the panel of the deviations; None draws none.
        probes: entries of `probe.json`.
        validations: entries of `valid.jsonl`. If there are any, they take the place of the deviations.
    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    questions = _questions(probes)
    num_panels = 1 + len(_PANELS) + len(questions)
    columns = 2 if num_panels == 4 else _PANELS_PER_ROW
    rows = math.ceil(num_panels / columns)
    width, height = columns * _PANEL_WIDTH, rows * _PANEL_HEIGHT
    figure = Figure(figsize=(width, height))
    # an automatic layout would draw everything twice
    figure.subplots_adjust(
        left=0.6 / width, right=1 - 0.15 / width, bottom=0.55 / height, top=1 - 0.35 / height, hspace=0.4, wspace=0.2
    )
    panels = iter(figure.subplots(rows, columns, squeeze=False).flat)
    (first, key), *others = _PANELS
    loss = next(panels)
    _plot(loss, first, entries, key)
    if validations:
        loss.plot(*_points(validations, key), marker="o", markersize=3, label="held out")
        loss.legend(fontsize=8)
        _plot_metrics(next(panels), validations)
    else:
        _plot_deviations(next(panels), entries, guard)
    for title, key in others:
        _plot(next(panels), title, entries, key)
    for question, by_step in questions.items():
        _plot_probe(next(panels), question, by_step)
    for unused in panels:
        unused.remove()
    return figure


def _plot(axes: Axes, title: str, entries: Sequence[Entry], key: str) -> None:
    axes.plot(*_points(entries, key))
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 4))
    _finish(axes, title)


def _plot_metrics(axes: Axes, validations: Sequence[Entry]) -> None:
    """Draw the metrics of held-out samples."""
    known = (name for entry in validations for name, value in entry.items() if isinstance(value, float))
    for name in dict.fromkeys(name for name in known if name not in ("loss", "value")):
        axes.plot(*_points(validations, name), marker="o", markersize=3, label=name)
    axes.legend(fontsize=8)
    _finish(axes, "held-out samples")


def _plot_deviations(axes: Axes, entries: Sequence[Entry], guard: StepGuardConfig | None) -> None:
    """Draw both deviations on an axis that is logarithmic above `_LINEAR_UP_TO`, and their limits as dashed lines."""
    highest = 1.0
    for what, color in _DEVIATIONS.items():
        steps, values = _points(entries, f"{what}_std")
        axes.plot(steps, values, color=color, label=what)
        highest = max(highest, *values, 0.0)
        limit = 0.0 if guard is None else guard.limits.get(what, 0.0)
        if limit > 0:
            axes.axhline(limit, color=color, linestyle="--", linewidth=1, label=f"collapse: {what} < {limit:g}")
    axes.set_yscale("symlog", linthresh=_LINEAR_UP_TO, linscale=0.6)
    axes.set_ylim(0, 1.5 * highest)
    ticks = [tick for tick in (0, 0.005, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100) if tick <= 1.5 * highest]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_yticks([], minor=True)
    axes.legend(fontsize=8)
    _finish(axes, "standard deviation")


def _plot_probe(axes: Axes, question: str, by_step: Mapping[int, Scores]) -> None:
    """Draw the accuracy of the linear probe with all labels over the steps, and baselines as dotted lines."""
    names = dict.fromkeys(name for scores in by_step.values() for name in scores)
    last = by_step[max(by_step)]
    for name in names:
        if name in _TRAINED:
            points = [(step, scores[name]["linear"]) for step, scores in sorted(by_step.items()) if name in scores]
            axes.plot(*zip(*points, strict=True), color=_TRAINED[name], marker="o", markersize=4, label=name)
    for number, name in enumerate(name for name in last if name not in _TRAINED):
        axes.axhline(last[name]["linear"], color=f"C{number + 2}", linestyle=":", label=name)
    axes.legend(fontsize=8)
    _finish(axes, f"linear probe{f', {question}' if question else ''}, accuracy in %")


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("optimizer step", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)


def _points(entries: Sequence[Entry], key: str) -> tuple[list[int], list[float]]:
    points = [(entry["step"], entry[key]) for entry in entries if entry.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _questions(probes: Sequence[Entry]) -> dict[str, dict[int, Scores]]:
    """Return the scores by question and step; the question of a probe with only one is ""."""
    found: dict[str, dict[int, Scores]] = {}
    for probe in probes:
        step, scores = probe["step"], {key: value for key, value in probe.items() if key != "step"}
        is_nested = all(isinstance(inner, Mapping) for value in scores.values() for inner in value.values())
        for question, of_question in (scores if is_nested else {"": scores}).items():
            found.setdefault(question, {})[step] = of_question
    return found
