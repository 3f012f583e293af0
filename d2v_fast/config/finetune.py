"""Sections that the configurations of fine-tuning share. A modality adds its head, its data and its defaults."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field
from typing_extensions import Self

from d2v_fast.config.errors import MAX_SAMPLES, MAX_STEPS, PathText, Problem, Section
from d2v_fast.config.model_keys import FREE_MODEL_KEYS
from d2v_fast.config.schema import D2VConfig

_log = logging.getLogger(__name__)


class FinetuneSection(Section):
    """The weights that a run begins with, and how they are trained.

    Attributes:
        source: The encoder: a run, one of its checkpoints, an export, a Transformers folder, or a `.pt` or `.pth` file
            of the published code. Null begins with new weights.
        weights: Whose weights of a source that has both: "student" or "teacher".
        step: Step of the checkpoint of a run; null takes the best one of a fine-tuned run, and else the newest.
        freeze_encoder_steps: Optimizer steps in which only the head is trained.
        layer_decay: Learning rate of a block over that of the block above it; 1 is the same rate for all.
        average_decay: Decay of a moving average of all weights, which is evaluated and exported in their place; null
            keeps none.
    """

    source: PathText | None = None
    weights: Literal["student", "teacher"] = "student"
    step: int | None = Field(default=None, ge=0, le=MAX_STEPS)
    freeze_encoder_steps: int = Field(default=0, ge=0, le=MAX_STEPS)
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    average_decay: float | None = Field(default=None, ge=0, lt=1)


class ValidSection(Section):
    """Held-out samples, and when they are scored. They are scored at the end of a run in any case.

    Attributes:
        path: Held-out samples; null holds out a share of `d2v.data.path`, or of a sample set its held-out part.
        fraction: Share of every class that is held out without a `path`.
        seed: Seed of the choice of that share.
        every_epochs: Epochs between two validations; 0 leaves it to `every_steps`.
        every_steps: Optimizer steps between two validations; 0 leaves it to `every_epochs`.
        metric: The metric whose best value decides which checkpoint is the best one.
        patience: End the run after so many validations in a row without a better value; null runs to the end.
        batch_size: Samples per process that are scored together.
    """

    path: PathText | None = None
    fraction: float = Field(default=0.1, gt=0, lt=1)
    seed: int = Field(default=0, ge=0, lt=2**32)
    every_epochs: int = Field(default=1, ge=0, le=10**6)
    every_steps: int = Field(default=0, ge=0, le=MAX_STEPS)
    metric: str = "accuracy"
    patience: int | None = Field(default=None, ge=1, le=10**6)
    batch_size: int = Field(default=64, ge=1, le=MAX_SAMPLES)

    def is_due(self, step: int, steps_per_epoch: int, num_steps: int) -> bool:
        """Return whether the held-out samples are scored after optimizer step `step`, counted from 1."""
        return (
            step == num_steps
            or (self.every_steps > 0 and step % self.every_steps == 0)
            or (self.every_epochs > 0 and step % (self.every_epochs * steps_per_epoch) == 0)
        )


class FinetuneConfig(D2VConfig):
    """The `"d2v"` section of fine-tuning.

    Attributes:
        encoder: Version of the encoder, which decides the keys of `d2v.model`. A source fills in the version and the
            sizes.
        finetune: The weights that the run begins with, and how they are trained.
        head: What turns the encoder's output into predictions.
        valid: Held-out samples.
        labels: Names of the classes in the order of the head's outputs; null takes those of the data, sorted.
    """

    # metric -> whether more is better, which each objective defines
    metrics: ClassVar[dict[str, bool]] = {}
    # class of the section by version of the encoder
    by_encoder: ClassVar[dict[str, type[FinetuneConfig]]] = {}

    encoder: Literal["data2vec", "data2vec2"] = "data2vec"
    finetune: FinetuneSection = FinetuneSection()
    head: Section
    valid: ValidSection = ValidSection()
    labels: tuple[str, ...] | None = Field(default=None, strict=False)

    @classmethod
    def chosen(cls, raw: Mapping[str, Any]) -> type[Self]:
        """See `D2VConfig`: the class for the version of the encoder."""
        found: Any = cls.by_encoder.get(str(raw.get("encoder", "data2vec")), cls.by_encoder.get("data2vec", cls))
        return found

    @classmethod
    def model_like(cls, given: Mapping[str, Any], encoder: str, other: Mapping[str, Any]) -> dict[str, Any]:
        """Return the section `d2v.model` of a run that begins with the weights of another model.

        Its sizes are those of the other model. Keys that change no tensor, such as the rates of dropout, are the given
        ones; those that only another version of the encoder has are reported and left out.

        Args:
            given: The section in the file, not checked. A key that no version has stays, to be refused.
            encoder: Version of the encoder.
            other: The whole section of the other model.
        """
        versions = cls.by_encoder.values() or (cls,)
        sections: list[Any] = [one.model_fields["model"].annotation for one in versions]
        known = {key for section in sections for key in section.model_fields}
        if idle := [f"`d2v.model.{key}`" for key in given if key in FREE_MODEL_KEYS & known and key not in other]:
            text = 'no effect of %s: the encoder that the run begins with is of "%s" and has no such key'
            _log.warning(text, ", ".join(idle), encoder)
        free = {key for key in given if key not in known or (key in FREE_MODEL_KEYS and key in other)}
        return {**other, **{key: given[key] for key in given if key in free}}

    @classmethod
    def problems_across(cls, sections: Mapping[str, Any]) -> Iterator[Problem]:
        """See `D2VConfig`."""
        yield from super().problems_across(sections)
        valid, labels = sections.get("valid"), sections.get("labels")
        if valid and valid.metric not in cls.metrics:
            known = " or ".join(f'"{name}"' for name in cls.metrics)
            yield Problem("valid.metric", f"be {known}", valid.metric)
        if labels is not None and len(labels) < 2:
            yield Problem("labels", "hold at least 2 names", list(labels))
        if labels is not None and len(set(labels)) < len(labels):
            yield Problem("labels", "hold every name once", list(labels))


class FewLabelsSection(Section):
    """Which of the labeled samples are trained on.

    Attributes:
        labels_per_class: Most samples of a class that are trained on; null takes all.
        labels_seed: Seed of their choice.
    """

    labels_per_class: int | None = Field(default=None, ge=1, le=MAX_SAMPLES)
    labels_seed: int = Field(default=0, ge=0, lt=2**32)


class ClassHeadSection(Section):
    """A classifier on the encoder's output.

    Attributes:
        label_smoothing: Share of the target that is spread over all classes.
        dropout: Dropout of the classifier's input.
    """

    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)


class ClassifyConfig(FinetuneConfig):
    """The `"d2v"` section of classification."""

    metrics: ClassVar[dict[str, bool]] = {
        "accuracy": True,
        "top5": True,
        "f1": True,
        "macro_f1": True,
        "matthews": True,
        "loss": False,
    }

    head: ClassHeadSection
