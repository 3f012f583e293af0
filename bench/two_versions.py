"""Compare both versions of data2vec on the sample sets: accuracy of the probe over the CPU time of training.

    d2v-fast train digits2 --run digits2-0 --set d2v.run.seed=0 --set d2v.probe.every_epochs=10   # and so on
    python -m bench.two_versions runs/digits2-0 runs/digits2-1 runs/digits-0 ... --out build/two_versions.png

Runs whose configurations differ in the seed only make one curve: the mean of their student's scores, and the range. The
scores are those of the runs' probes. The time is the number of steps times the median CPU time of a step, without
probes and checkpoints. It is measured here, in one thread and in turns, so that other load slows all alike. The times
are kept in a file beside the picture; delete it to measure again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from d2v_fast.config import RunConfig, load_config

WARMUP, ROUNDS = 3, 40


class Panel(NamedTuple):
    """A part of the picture: modality, question of the probe, its score, and the title."""

    modality: str
    question: str
    score: str
    title: str


PANELS = (
    Panel("vision", "", "few_labels", "Digits: 10 labels per class"),
    Panel("speech", "word", "few_labels", "Words by new voices: 5 labels per word"),
    Panel("text", "word", "linear", "Masked words"),
    Panel("text", "topic", "linear", "Topics"),
)


class Group(NamedTuple):
    """Runs that differ in their seed only.

    Attributes:
        config: Of one of them.
        folders: All of them.
    """

    config: RunConfig
    folders: list[Path]

    @property
    def label(self) -> str:
        """The version and the length of the runs."""
        version = "2.0" if self.config.d2v.objective == "data2vec2" else "1"
        return f"version {version}, {self.config.d2v.schedule.steps:,} steps"

    def scores(self, panel: Panel) -> dict[int, list[float]]:
        """Return the student's scores of all runs by step."""
        found: dict[int, list[float]] = {}
        for folder in self.folders:
            for entry in json.loads((folder / "probe.json").read_text()):
                by_name = entry[panel.question] if panel.question else entry
                found.setdefault(entry["step"], []).append(by_name["student"][panel.score])
        return dict(sorted(found.items()))


def groups_of(folders: list[Path]) -> dict[str, Group]:
    """Return the groups by their configuration without seed, name and probe."""
    found: dict[str, Group] = {}
    for folder in folders:
        config = load_config(folder / "config.json")
        key = config.to_dict()
        del key["d2v"]["run"], key["d2v"]["probe"]
        found.setdefault(json.dumps(key, sort_keys=True), Group(config, [])).folders.append(folder)
    return found


def step_seconds(configs: list[RunConfig]) -> list[float]:
    """Return the median CPU seconds of a step of each configuration, its batch included, in one thread."""
    import torch

    torch.set_num_threads(1)
    times: list[list[float]] = [[] for _ in configs]
    steppers = [steps(config) for config in configs]
    for number in range(WARMUP + ROUNDS):
        for stepper, found in zip(steppers, times, strict=True):
            start = time.process_time()
            next(stepper)
            if number >= WARMUP:
                found.append(time.process_time() - start)
    return [statistics.median(found) for found in times]


def steps(config: RunConfig) -> Iterator[None]:
    """Train, one step for each element."""
    import torch

    from bench.bench_step import OurStep
    from d2v_fast.data import batch_maker, resolved, step_order

    config = resolved(config)
    maker, seed = batch_maker(config.d2v), config.d2v.run.seed
    step = OurStep(config, torch.device("cpu"))
    for micro_step in step_order(maker, config.deepspeed.batch_split(1), seed=seed):
        step(maker.make(micro_step, seed).batch)
        yield


def timed(groups: dict[str, Group], path: Path) -> dict[str, float]:
    """Return the seconds of a step of each group, from the file or measured and written to it."""
    known: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    missing = [key for key in groups if key not in known]
    if missing:
        # all of them, since those of another day are not comparable
        known = dict(zip(groups, step_seconds([group.config for group in groups.values()]), strict=True))
        path.write_text(json.dumps(known, indent=1) + "\n")
    return known


def draw(groups: dict[str, Group], seconds: dict[str, float], path: Path) -> None:
    """Draw the panels for which there are runs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = [
        panel for panel in PANELS if any(group.config.d2v.modality == panel.modality for group in groups.values())
    ]
    rows = (len(panels) + 1) // 2
    figure, grid = plt.subplots(
        rows, min(2, len(panels)), figsize=(10, 3.6 * rows), squeeze=False, layout="constrained"
    )
    for axis, panel in zip(grid.flat, panels, strict=False):
        for key, group in groups.items():
            if group.config.d2v.modality == panel.modality:
                _draw_group(axis, group, panel, seconds[key])
        axis.set_title(panel.title, fontsize=10)
        axis.set_xlabel("CPU seconds of training, one thread", fontsize=9)
        axis.set_ylabel("accuracy in %", fontsize=9)
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="lower right")
    for axis in grid.flat[len(panels) :]:
        axis.remove()
    figure.savefig(path, dpi=110)


def _draw_group(axis: Any, group: Group, panel: Panel, seconds: float) -> None:
    scores = group.scores(panel)
    x = [step * seconds for step in scores]
    is_second = group.config.d2v.objective == "data2vec2"
    color = "tab:red" if is_second else "tab:blue"
    axis.plot(
        x,
        [statistics.fmean(of_step) for of_step in scores.values()],
        color=color,
        marker="o",
        markersize=3,
        label=group.label,
    )
    axis.fill_between(x, list(map(min, scores.values())), list(map(max, scores.values())), color=color, alpha=0.2)


def table(groups: dict[str, Group], seconds: dict[str, float]) -> Iterator[str]:
    """Yield a Markdown table: the cost of every group, and its scores after the last step."""
    yield "| probe | runs | seeds | CPU s per step | CPU s | accuracy after the last step |"
    yield "|---|---|---|---|---|---|"
    for panel in PANELS:
        for key, group in groups.items():
            if group.config.d2v.modality == panel.modality:
                scores = group.scores(panel)
                last = max(scores)
                final = ", ".join(f"{score:.1f}" for score in scores[last])
                yield (
                    f"| {panel.title} | {group.label} | {len(group.folders)} | {seconds[key]:.3f} "
                    f"| {last * seconds[key]:.0f} | {statistics.fmean(scores[last]):.1f} ({final}) |"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="RUN", help="run folders with a probe.json")
    parser.add_argument("--out", type=Path, default=Path("build/two_versions.png"))
    options = parser.parse_args()
    if bad := [str(folder) for folder in options.folders if not (folder / "probe.json").is_file()]:
        parser.error(f"no probe.json in {', '.join(bad)}: name run folders of `d2v-fast train` that were probed")
    groups = groups_of(options.folders)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    seconds = timed(groups, options.out.with_suffix(".json"))
    draw(groups, seconds, options.out)
    print("\n".join(table(groups, seconds)))


if __name__ == "__main__":
    main()
