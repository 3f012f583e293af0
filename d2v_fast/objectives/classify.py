"""Classify samples: cross entropy between the head's outputs and the class of each sample, or a mixture of classes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from d2v_fast.config.finetune import ClassifyConfig
from d2v_fast.data import Batch
from d2v_fast.objectives.base import StepOutput
from d2v_fast.objectives.finetune import Answer, Finetune, losses_of

# classes of an answer
TOP = 5


class Classify(Finetune):
    """An encoder with a classifier. The head returns logits `[B, C]`.

    `Batch.targets` are int64 `[B]`, the classes; or fp32 `[B, C]`, their shares in mixed samples.
    """

    task = "classify"

    def __init__(self, config: ClassifyConfig) -> None:
        super().__init__(config)
        self.smoothing = config.head.label_smoothing

    def losses(self, predictions: Tensor, batch: Batch) -> Tensor:
        """See `Finetune`."""
        assert batch.targets is not None
        smoothing = self.smoothing if self.training else 0.0
        return F.cross_entropy(predictions, batch.targets, reduction="none", label_smoothing=smoothing)

    def sums(self, predictions: Tensor, batch: Batch) -> Tensor:
        """See `Finetune`: the number of samples whose first class is the right one."""
        targets = batch.targets
        assert targets is not None
        classes = targets if targets.dim() == 1 else targets.argmax(1)
        return (predictions.argmax(1) == classes).sum(dtype=torch.float32).view(1)

    def figures(self, moments: Tensor, num_rows: int) -> dict[str, float]:
        """See `Objective`."""
        return {"accuracy": moments[0].item() / num_rows}

    def answers(self, output: StepOutput, batch: Batch) -> list[Answer]:
        """See `Finetune`: the most probable classes, and their probabilities."""
        assert output.predictions is not None
        top = output.predictions.softmax(1).topk(min(TOP, output.predictions.shape[1]), dim=1)
        classes, probabilities = top.indices.tolist(), top.values.tolist()
        return [
            {"loss": loss, "classes": of_sample, "probabilities": found}
            for loss, of_sample, found in zip(losses_of(output, len(classes)), classes, probabilities, strict=True)
        ]

    def columns(self, answer: Answer) -> dict[str, Any]:
        """See `Finetune`: the most probable class, its probability, and the classes that follow."""
        names = self.config.labels or ()
        top = [
            {"label": names[number], "probability": probability}
            for number, probability in zip(answer["classes"], answer["probabilities"], strict=True)
        ]
        return {**top[0], "top": top}
