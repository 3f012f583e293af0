"""Is it learning? Two probes on frozen features, beside two baselines.

Features of an image are the last block's output, layer-normalized, averaged over the patches: over all of them, or over
those of every cell of a coarse grid, so that the classifier sees roughly where in the image something is (with 2x2, the
four quadrants of Coates, Ng and Lee, AISTATS 2011). On them, a k-nearest-neighbor classifier and a logistic regression
are fitted to the labeled images of the training part and scored on the held-out part. The baselines are the same
network before training, and the raw pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from d2v_fast.config import ProbeConfig, VisionProbeConfig
from d2v_fast.evaluation.features import patch_features
from d2v_fast.modalities.vision.digits import ProbeData
from d2v_fast.models.student import Student

PIXELS = "raw pixels"
_BATCH = 256


@dataclass(frozen=True)
class Scores:
    """Accuracies in percent on the held-out images.

    Attributes:
        few_labels: Linear probe on `labels_per_class` labeled images a class, mean over the label draws.
        few_labels_std: Standard deviation over the draws.
        linear: Linear probe on all labeled training images.
        knn: k nearest neighbors by cosine among all labeled training images.
    """

    few_labels: float
    few_labels_std: float
    linear: float
    knn: float


@dataclass(frozen=True)
class ProbeReport:
    """Scores by name of the features, in the order in which they were asked for, the baselines last; and lines that
    stand above the table."""

    scores: dict[str, Scores]
    config: ProbeConfig
    what: str = "held-out images"
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, dict[str, float]]:
        """For logs: `{name: {few_labels, few_labels_std, linear, knn}}`."""
        return {name: asdict(score) for name, score in self.scores.items()}

    def __str__(self) -> str:
        few = f"linear, {self.config.labels_per_class}/class"
        title = f"accuracy in % on {self.what}"
        width = max(34, *map(len, (title, *self.scores)))
        lines = [
            *self.notes,
            f"{title:{width}} {few:>17} {'linear, all':>12} {f'{self.config.neighbours}-NN':>7}",
        ]
        for name, s in self.scores.items():
            spread = f"{s.few_labels:.1f} ± {s.few_labels_std:.1f}"
            lines.append(f"{name:{width}} {spread:>17} {s.linear:12.1f} {s.knn:7.1f}")
        return "\n".join(lines)


@dataclass(frozen=True)
class ProbeReports:
    """One report per question."""

    reports: dict[str, ProbeReport]

    def to_dict(self) -> dict[str, dict[str, dict[str, float]]]:
        """For logs: `{question: {name: {few_labels, few_labels_std, linear, knn}}}`."""
        return {question: report.to_dict() for question, report in self.reports.items()}

    def __str__(self) -> str:
        return "\n".join(map(str, self.reports.values()))


def image_features(model: Student, images: Tensor, grid: int = 1) -> NDArray[np.float32]:
    """Features of `images` `[S, C, H, W]`: the last block's `patch_features`, averaged over the patches of each cell.

    Args:
        grid: Cells along one side. 1 averages over all patches, whose number then need not be a square.
    Returns:
        fp32 `[S, D * grid * grid]`.
    """
    pooled = [pool(patch_features(model, batch, top_k=1), grid).cpu() for batch in images.split(_BATCH)]
    return torch.cat(pooled).numpy()


class Task(NamedTuple):
    """What a probe is to tell.

    Attributes:
        labels: int64 `[S]`.
        train, test: int64, positions in `labels`.
    """

    labels: NDArray[np.int64]
    train: NDArray[np.int64]
    test: NDArray[np.int64]


def score(features: NDArray[np.float32], task: Task, config: ProbeConfig) -> Scores:
    """Fit both classifiers on the training part of `features` `[S, F]` and score them on the held-out part.

    Standardization uses the whole training part, for it needs no labels. The label draws are the same for whatever
    features.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.preprocessing import StandardScaler

    labels, train, test = task
    scaled = StandardScaler().fit(features[train]).transform(features)

    def linear(chosen: NDArray[np.int64]) -> float:
        classifier = LogisticRegression(max_iter=2000).fit(scaled[chosen], labels[chosen])
        return 100 * float(classifier.score(scaled[test], labels[test]))

    few = [linear(_draw(labels, train, config.labels_per_class, seed)) for seed in range(config.num_draws)]
    neighbors = min(config.neighbours, len(train))
    knn = KNeighborsClassifier(neighbors, metric="cosine", weights="distance").fit(features[train], labels[train])
    return Scores(
        few_labels=float(np.mean(few)),
        few_labels_std=float(np.std(few)),
        linear=linear(train),
        knn=100 * float(knn.score(features[test], labels[test])),
    )


def most_frequent(task: Task) -> Scores:
    """Score the guess that needs no features: the class of which the training part has most."""
    guess = np.bincount(task.labels[task.train]).argmax()
    accuracy = 100 * float((task.labels[task.test] == guess).mean())
    return Scores(few_labels=accuracy, few_labels_std=0.0, linear=accuracy, knn=accuracy)


def run_probe(models: Mapping[str, Student], data: ProbeData, config: VisionProbeConfig) -> ProbeReport:
    """Score every model's features, and the raw pixels.

    Args:
        models: Networks as `Student` describes them, by the name they get in the table.
        data: Images as the network takes them, labels, and the split.
        config: Cells of the features, labels per class, draws, neighbors.
    """
    images = torch.as_tensor(data.images)
    task = Task(*(np.asarray(part) for part in (data.labels, data.train_indices, data.test_indices)))
    scores = {name: score(image_features(model, images, config.grid), task, config) for name, model in models.items()}
    scores[PIXELS] = score(images.flatten(1).numpy(), task, config)
    return ProbeReport(scores, config)


def pool(patches_BPD: Tensor, grid: int) -> Tensor:
    """Average patch features `[B, P, D]` over every cell of a `grid` x `grid` division of the image.

    Returns:
        `[B, D * grid * grid]`; cells overlap where `grid` does not divide the patches.
    """
    if grid == 1:
        return patches_BPD.mean(1)
    B, P, D = patches_BPD.shape
    side = math.isqrt(P)
    return F.adaptive_avg_pool2d(patches_BPD.mT.reshape(B, D, side, side), grid).flatten(1)


def _draw(labels: NDArray[np.int64], train: NDArray[np.int64], per_class: int, seed: int) -> NDArray[np.int64]:
    """Indices of `per_class` training images of every class (all of a class that has fewer)."""
    rng = np.random.default_rng(seed)
    drawn = []
    for label in np.unique(labels[train]):
        members = train[labels[train] == label]
        drawn.append(rng.choice(members, min(per_class, len(members)), replace=False))
    return np.concatenate(drawn)
