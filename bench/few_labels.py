"""Does pre-training help? Accuracy by number of labels: trained from scratch, linear probes, and fine-tuned.

    python bench/few_labels.py configs/finetune_digits.json runs/digits-1 --out bench/results/few_labels_digits.json

All four methods get the same labeled samples. The last step of a run is scored, so that the held-out samples choose
nothing. A cell that the output file holds is not computed again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from d2v_fast.config import D2VConfig, load_config
from d2v_fast.config.finetune import FinetuneConfig
from d2v_fast.data import BatchMaker, batch_maker, resolved
from d2v_fast.data.order import MicroStep
from d2v_fast.evaluation.features import evaluating
from d2v_fast.files.atomic import write_text
from d2v_fast.models.post_norm import mean_of_places
from d2v_fast.models.student import Student
from d2v_fast.objectives.build import build_objective
from d2v_fast.objectives.finetune import finetuning_of

SCRATCH, UNTRAINED, PROBE, FINETUNED = (
    "trained from scratch",
    "linear probe, untrained",
    "linear probe, pre-trained",
    "fine-tuned, pre-trained",
)
METHODS = (SCRATCH, UNTRAINED, PROBE, FINETUNED)


def main() -> int:
    """Compute what is missing, and print the table."""
    options = _options()
    results: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    results |= {"source": options.source.name, "config": options.config.name, "steps": options.steps}
    cells = results.setdefault("cells", {})
    torch.set_num_threads(1)
    for seed in range(options.seeds):
        for labels in options.labels:
            for method in METHODS:
                key = f"{method}|{labels}|{seed}"
                if key in cells:
                    continue
                since = time.process_time()
                measure = _probed if method in (UNTRAINED, PROBE) else _trained
                accuracy = measure(options, method, labels, seed)
                cells[key] = accuracy
                write_text(options.out, json.dumps(results, indent=1) + "\n")
                print(f"{key}: {accuracy:.4f} ({time.process_time() - since:.0f} s of this process)", flush=True)
    print(table(cells))
    if options.picture is not None:
        draw(cells, options.picture)
    return 0


def table(cells: dict[str, float]) -> str:
    """Return a Markdown table of accuracies in %: mean ± standard deviation over the seeds, and their number."""
    found, columns = _grouped(cells)
    lines = ["| labels per class | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for method in METHODS:
        shown = []
        for labels in columns:
            values = found.get((method, labels), [])
            spread = f" ± {np.std(values):.1f}" if len(values) > 1 else ""
            each = f"{np.mean(values):.1f}{spread} ({len(values)})" if values else "not measured"
            shown.append(each)
        lines.append(f"| {method} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def draw(cells: dict[str, float], to: Path) -> None:
    """Draw the accuracies over the number of labels: mean of the seeds, and lowest and highest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found, columns = _grouped(cells)
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for method, style in zip(METHODS, ("o-", "s:", "s--", "D-"), strict=True):
        places = [place for place, labels in enumerate(columns) if (method, labels) in found]
        values = [found[method, columns[place]] for place in places]
        means = [float(np.mean(one)) for one in values]
        # the mean of equal values may be off by a rounding
        spread = [
            [max(0.0, mean - min(one)), max(0.0, max(one) - mean)] for mean, one in zip(means, values, strict=True)
        ]
        axes.errorbar(places, means, np.array(spread).T, fmt=style, capsize=3, label=method)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_xlabel("labels per class")
    axes.set_ylabel("accuracy on held-out samples in %")
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)
    axes.legend(loc="best")
    figure.savefig(to, dpi=100)


def _grouped(cells: dict[str, float]) -> tuple[dict[tuple[str, str], list[float]], list[str]]:
    """Return the accuracies in % by method and number of labels, and these numbers in ascending order."""
    found: dict[tuple[str, str], list[float]] = {}
    for key, accuracy in cells.items():
        method, labels, _ = key.split("|")
        found.setdefault((method, labels), []).append(100 * accuracy)
    columns = {labels for _, labels in found}
    return found, sorted(columns, key=lambda labels: float("inf") if labels == "all" else int(labels))


def _overrides(options: argparse.Namespace, method: str, labels: str, seed: int) -> list[str]:
    """Return the settings of a cell, as for `--set`."""
    source = method in (PROBE, FINETUNED)
    # all methods have the model section of the run in common
    run = json.loads((options.source / "config.json").read_text())["d2v"]
    model = dict(run["model"])
    settings = {
        "d2v.data.labels_per_class": "null" if labels == "all" else labels,
        "d2v.data.labels_seed": str(seed),
        "d2v.run.seed": str(seed),
        "d2v.schedule.epochs": "null",
        "d2v.schedule.warmup_epochs": "null",
        "d2v.schedule.steps": str(options.steps),
        "d2v.schedule.warmup_steps": str(options.steps // 10),
        "d2v.valid.every_epochs": "0",
        "d2v.run.save_every": str(10 * options.steps),
        "d2v.encoder": run.get("objective", "data2vec"),
        **({"d2v.finetune.source": json.dumps(str(options.source.resolve()))} if source else {}),
        # lower layers that are new must learn as fast as the upper ones, and from the first step on
        **({} if source else {"d2v.finetune.layer_decay": "1.0", "d2v.finetune.freeze_encoder_steps": "0"}),
    }
    if labels != "all" and options.classes * int(labels) < options.batch:
        settings["train_batch_size"] = str(options.classes * int(labels))
    added = [*options.overrides, *(options.scratch if method == SCRATCH else [])]
    for setting in added:
        key, value = setting.split("=", 1)
        if key.startswith("d2v.model."):
            model[key.removeprefix("d2v.model.")] = json.loads(value)
        else:
            settings[key] = value
    settings.setdefault("d2v.model", json.dumps(model))
    return [f"{key}={value}" for key, value in settings.items()]


def _probed(options: argparse.Namespace, method: str, labels: str, seed: int) -> float:
    """Fit a logistic regression to frozen features of the labeled samples; return the accuracy on held-out ones."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    settings = [*_overrides(options, method, labels, seed), *options.plain]
    d2v = resolved(load_config(options.config, settings)).d2v
    assert isinstance(d2v, FinetuneConfig)
    torch.manual_seed(d2v.run.seed)
    model = build_objective(d2v)
    model.begin()
    train = _features(model.student, batch_maker(d2v), d2v)
    test = _features(model.student, finetuning_of(d2v).held_out(d2v), d2v)
    scaler = StandardScaler().fit(train[0])
    classifier = LogisticRegression(max_iter=2000).fit(scaler.transform(train[0]), train[1])
    return float(classifier.score(scaler.transform(test[0]), test[1]))


def _features(student: Student, maker: BatchMaker, d2v: D2VConfig) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the mean of the encoder's output over the places of each sample `[S, D]`, and the classes `[S]`."""
    rows, classes = [], []
    for first in range(0, maker.num_samples, 64):
        ids = np.arange(first, min(first + 64, maker.num_samples), dtype=np.int64)
        batch = maker.make(MicroStep(0, ids, ids), d2v.run.seed).batch.to("cpu")
        with torch.no_grad(), evaluating(student):
            hidden = student.finish(student.encode(batch))
        rows.append(mean_of_places(hidden[:, student.num_prefix_tokens :], batch.lengths))
        assert batch.targets is not None
        classes.append(batch.targets)
    return torch.cat(rows).numpy(), torch.cat(classes).numpy()


def _trained(options: argparse.Namespace, method: str, labels: str, seed: int) -> float:
    """Train in a forked process, which need not import anything again; return the accuracy after the last step."""
    from d2v_fast.commands.console import main as command

    with tempfile.TemporaryDirectory() as folder:
        words = ["finetune", "--ds_config", str(options.config), "--run", "cell"]
        for setting in (*_overrides(options, method, labels, seed), f"d2v.run.dir={json.dumps(folder)}"):
            words += ["--set", setting]
        log = Path(folder) / "log"
        child = os.fork()
        if child == 0:
            with open(log, "wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            os._exit(command(words))
        _, status = os.waitpid(child, 0)
        if status != 0:
            raise SystemExit(f"{method}, {labels} labels, seed {seed}:\n{log.read_text()[-3000:]}")
        result = json.loads((Path(folder) / "cell" / "result.json").read_text())
        return float(result["last"]["accuracy"])


def _options(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="configuration of fine-tuning")
    parser.add_argument("source", type=Path, help="folder of the pre-trained run")
    parser.add_argument("--labels", nargs="+", default=["1", "5", "10", "50", "all"], help="labels per class")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of a run")
    parser.add_argument("--classes", type=int, default=10, help="classes of the data, to fit the batch to few labels")
    parser.add_argument("--batch", type=int, default=64, help="train_batch_size of the configuration")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--scratch", action="append", default=[], metavar="KEY=VALUE", help="of training from scratch")
    parser.add_argument("--plain", action="append", default=[], metavar="KEY=VALUE", help="settings of the probes")
    parser.add_argument("--out", type=Path, required=True, help="file of the results, read if it exists")
    parser.add_argument("--picture", type=Path, help="PNG file to draw the results into")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(main())
