"""Regress a score: the squared error between the head's output and the number of each sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from d2v_fast.data import Batch
from d2v_fast.objectives.base import StepOutput
from d2v_fast.objectives.finetune import Answer, Finetune, losses_of


class Regress(Finetune):
    """An encoder with a head that returns a score for each sample. `Batch.targets` are fp32 `[B]`."""

    task = "regress"

    def losses(self, predictions: Tensor, batch: Batch) -> Tensor:
        """See `Finetune`."""
        assert batch.targets is not None
        return (predictions - batch.targets.float()) ** 2

    def sums(self, predictions: Tensor, batch: Batch) -> Tensor:
        """See `Finetune`: the sum of the absolute errors."""
        assert batch.targets is not None
        return (predictions - batch.targets.float()).abs().sum(dtype=torch.float32).view(1)

    def figures(self, moments: Tensor, num_rows: int) -> dict[str, float]:
        """See `Objective`."""
        return {"mean_error": moments[0].item() / num_rows}

    def answers(self, output: StepOutput, batch: Batch) -> list[Answer]:
        """See `Finetune`: the scores."""
        assert output.predictions is not None
        scores = output.predictions.tolist()
        losses = losses_of(output, len(scores))
        return [{"loss": loss, "score": score} for loss, score in zip(losses, scores, strict=True)]

    def columns(self, answer: Answer) -> dict[str, Any]:
        """See `Finetune`: the score."""
        return {"score": answer["score"]}
