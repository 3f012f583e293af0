"""Compare both versions of data2vec on the sample sets: accuracy of the probe over the CPU time of training.

    d2v-fast train digits2 --run digits2-0 --set d2v.run.seed=0 --set d2v.probe.every_epochs=10   # and so on
    python -m bench.two_versions runs/digits2-0 runs/digits2-1 runs/digits-0 ... --out build/two_versions.png

Runs whose configurations differ in the seed only make one curve: the mean of their student's scores, and the range. The
scores are those of the runs' probes, and of kept checkpoints, which are probed here. Each modality has a picture of its
own, whose name begins as `--out`. The time is the number of steps times the median CPU time of a step, without probes
and checkpoints. It is measured here, in one thread and in turns, so that other load slows all alike. Times and scores
are kept in files beside the pictures; delete them to measure again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from d2v_fast.checkpoints.files import complete_steps
from d2v_fast.checkpoints.saved_weights import load_encoder, load_head, open_checkpoint, read_run_config
from d2v_fast.config import PretrainConfig, RunConfig, load_config
from d2v_fast.evaluation.probing import Probed, probing_of

WARMUP, ROUNDS = 3, 40


Scores = dict[int, dict[str, Any]]


class Panel(NamedTuple):
    """A part of a picture: modality, question of the probe, its score, and the title."""

    modality: str
    question: str
    score: str
    title: str


PANELS = (
    Panel("vision", "", "few_labels", "Digits: 10 labels per class"),
    Panel("speech", "word", "few_labels", "Words by new voices: 5 labels per word"),
    Panel("text", "word", "linear", "Masked words"),
    Panel("text", "topic", "linear", "Topics of paragraphs"),
)
PICTURES = {"vision": "digits", "speech": "speech", "text": "text"}


class Group(NamedTuple):
    """Runs that differ in their seed only.

    Attributes:
        config: Of one of them.
        runs: The student's scores of every run, by step.
    """

    config: RunConfig
    runs: list[Scores]

    @property
    def label(self) -> str:
        """The version, the length of the runs, and their number."""
        version = "2.0" if self.config.d2v.objective == "data2vec2" else "1"
        seeds = f", {len(self.runs)} seeds" if len(self.runs) > 1 else ""
        return f"version {version}, {self.config.d2v.schedule.steps:,} steps{seeds}"

    def scores(self, panel: Panel) -> dict[int, list[float]]:
        """Return the scores of all runs by the steps after which every one of them was probed."""
        common = set.intersection(*map(set, self.runs))
        questions = [{step: run[step].get(panel.question, run[step]) for step in sorted(common)} for run in self.runs]
        return {step: [run[step][panel.score] for run in questions] for step in sorted(common)}


def scores_of(folder: Path, known: Scores) -> Scores:
    """Return the scores of a run by step: of the untrained network at step 0, of its probes, and of its checkpoints.

    Args:
        folder: The run's, with a probe.json.
        known: Scores of its checkpoints from a call before.
    """
    found: Scores = dict(known)
    for entry in json.loads((folder / "probe.json").read_text()):
        step = entry.pop("step")
        found[0], found[step] = by_question(entry, "untrained"), by_question(entry, "student")
    for step in set(complete_steps(folder / "checkpoints")) - set(found):
        found[step] = checkpoint_scores(folder, step)
    return dict(sorted(found.items()))


def by_question(report: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the scores of one network from a report, which has one question or several."""
    return report[name] if name in report else {question: scores[name] for question, scores in report.items()}


def checkpoint_scores(folder: Path, step: int) -> dict[str, Any]:
    """Probe the student of a checkpoint."""
    config = read_run_config(folder)
    assert isinstance(config, PretrainConfig)
    with open_checkpoint(folder, step) as checkpoint:
        student = load_encoder(checkpoint, config, "student")
        head = load_head(checkpoint, config, student)
    print(f"probing {folder}, step {step} ...", flush=True)
    report = probing_of(config).run(Probed({"student": student}, {"student": head}), config)
    return by_question(report.to_dict(), "student")


def groups_of(folders: list[Path], path: Path) -> dict[str, Group]:
    """Return the groups by their configuration without seed, name and probe.

    Args:
        folders: Of the runs.
        path: The file of scores that were made here, which is read and written.
    """
    known = json.loads(path.read_text()) if path.exists() else {}
    found: dict[str, Group] = {}
    for folder in folders:
        config = load_config(folder / "config.json")
        key = config.to_dict()
        del key["d2v"]["run"], key["d2v"]["probe"]
        of_run = {int(step): scores for step, scores in known.get(str(folder), {}).items()}
        known[str(folder)] = scores_of(folder, of_run)
        path.write_text(json.dumps(known, indent=1) + "\n")
        found.setdefault(json.dumps(key, sort_keys=True), Group(config, [])).runs.append(known[str(folder)])
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


def draw(groups: dict[str, Group], seconds: dict[str, float], out: Path) -> Iterator[Path]:
    """Draw a picture for each modality of the runs, and yield its path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    for modality, name in PICTURES.items():
        chosen = {key: group for key, group in groups.items() if group.config.d2v.modality == modality}
        panels = [panel for panel in PANELS if panel.modality == modality]
        if not chosen:
            continue
        figure, axes = plt.subplots(
            1, len(panels), figsize=(1 + 4.5 * len(panels), 3.6), squeeze=False, layout="constrained"
        )
        for axis, panel in zip(axes.flat, panels, strict=True):
            for key, group in chosen.items():
                _draw_group(axis, group, panel, seconds[key])
            axis.set_title(panel.title, fontsize=10)
            axis.set_xlabel("CPU seconds of training, one thread", fontsize=9)
            axis.set_ylabel("accuracy in % on held-out samples", fontsize=9)
            axis.set_xlim(left=0)
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8, loc="lower right")
        path = out.with_stem(f"{out.stem}_{name}")
        figure.savefig(path, dpi=110)
        plt.close(figure)
        yield path


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
                    f"| {panel.title} | {group.label} | {len(group.runs)} | {seconds[key]:.3f} "
                    f"| {last * seconds[key]:.0f} | {statistics.fmean(scores[last]):.1f} ({final}) |"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="RUN", help="run folders with a probe.json")
    parser.add_argument("--out", type=Path, default=Path("build/two_versions.png"))
    options = parser.parse_args()
    if bad := [str(folder) for folder in options.folders if not (folder / "probe.json").is_file()]:
        parser.error(f"no probe.json in {', '.join(bad)}: name run folders of `d2v-fast train` that were probed")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    groups = groups_of(options.folders, options.out.with_suffix(".scores.json"))
    seconds = timed(groups, options.out.with_suffix(".json"))
    print("\n".join([*table(groups, seconds), *map(str, draw(groups, seconds, options.out))]))


if __name__ == "__main__":
    main()
