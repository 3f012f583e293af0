"""The classifiers of the probes, and the reports of their accuracy.

A k-nearest-neighbor classifier and a logistic regression are fitted to the features of labeled samples and scored on
held-out samples.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from d2v_fast.config import ProbeConfig


@dataclass(frozen=True)
class Scores:
    """Accuracies in percent on held-out samples.

    Attributes:
        few_labels: Linear probe on `labels_per_class` labeled samples of each class, mean over the label draws.
        few_labels_std: Standard deviation over the draws.
        linear: Linear probe on all labeled training samples.
        knn: k nearest neighbors by cosine among all labeled training samples.
    """

    few_labels: float
    few_labels_std: float
    linear: float
    knn: float


@dataclass(frozen=True)
class ProbeReport:
    """A table of scores.

    Attributes:
        scores: By name of the features; the baselines come last.
        config: Of the probe.
        what: The held-out samples, in words.
        notes: Lines above the table.
    """

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
    """One report for each question."""

    reports: dict[str, ProbeReport]

    def to_dict(self) -> dict[str, dict[str, dict[str, float]]]:
        """For logs: `{question: {name: {few_labels, few_labels_std, linear, knn}}}`."""
        return {question: report.to_dict() for question, report in self.reports.items()}

    def __str__(self) -> str:
        return "\n".join(map(str, self.reports.values()))


class Task(NamedTuple):
    """Labels to predict from features.

    Attributes:
        labels: int64 `[S]`.
        train, test: int64, positions in `labels`.
    """

    labels: NDArray[np.int64]
    train: NDArray[np.int64]
    test: NDArray[np.int64]


def score(features: NDArray[np.float32], task: Task, config: ProbeConfig) -> Scores:
    """Fit both classifiers on the training part of `features` `[S, F]` and score them on the held-out part.

    Standardization uses the whole training part, because it needs no labels. The label draws do not depend on the
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
    """Score a guess without features: the most frequent class of the training part."""
    guess = np.bincount(task.labels[task.train]).argmax()
    accuracy = 100 * float((task.labels[task.test] == guess).mean())
    return Scores(few_labels=accuracy, few_labels_std=0.0, linear=accuracy, knn=accuracy)


def _draw(labels: NDArray[np.int64], train: NDArray[np.int64], per_class: int, seed: int) -> NDArray[np.int64]:
    """Draw `per_class` training samples of every class, or all of a class that has fewer."""
    rng = np.random.default_rng(seed)
    drawn = []
    for label in np.unique(labels[train]):
        members = train[labels[train] == label]
        drawn.append(rng.choice(members, min(per_class, len(members)), replace=False))
    return np.concatenate(drawn)
