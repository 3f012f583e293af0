"""Recognize letters: connectionist temporal classification (Graves et al. 2006), summed over all alignments.

Shape letters: B samples, T frames, V classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from d2v_fast.config.finetune import FinetuneConfig
from d2v_fast.data import Batch
from d2v_fast.objectives.base import StepOutput
from d2v_fast.objectives.finetune import Answer, Beam, Finetune, finetuning_of, losses_of

__all__ = ["Ctc", "ctc_loss"]


class Ctc(Finetune):
    """An encoder with a classifier of frames. The head returns logits `[B, T, V]`.

    `Batch.targets` are int64, the classes of all transcripts, one after the other, and `Batch.target_lengths` their
    numbers. As published, the loss of a transcript is the sum over its letters, averaged over samples.
    """

    task = "ctc"

    def __init__(self, config: FinetuneConfig) -> None:
        super().__init__(config)
        recognizing = finetuning_of(config).recognizing
        assert recognizing is not None
        self.blank, self.decode = recognizing(config)

    def search(self, beam: Beam) -> None:
        """See `Finetune`. The probabilities of answers stay those of the likeliest letters."""
        searching = finetuning_of(self.config).searching
        if searching is None:
            super().search(beam)
        else:
            self.decode = searching(self.config, beam)

    def shape_varies(self, batch: Batch) -> str | None:
        """See `Objective`: never, as PyTorch's loss also copies all lengths to the host."""
        return "transcripts have another number of letters in every batch"

    def losses(self, predictions: Tensor, batch: Batch) -> Tensor:
        """See `Finetune`."""
        assert batch.targets is not None
        assert batch.target_lengths is not None
        return ctc_loss(predictions, batch.targets, batch.target_lengths, batch.lengths, blank=self.blank)

    def sums(self, predictions: Tensor, batch: Batch) -> Tensor:
        """See `Finetune`: the frames whose likeliest class is the blank, and all frames."""
        B, T = predictions.shape[:2]
        is_blank = predictions.argmax(-1) == self.blank
        if batch.lengths is None:
            return torch.stack((is_blank.sum(), is_blank.new_full((), B * T, dtype=torch.int64))).float()
        is_frame = torch.arange(T, device=is_blank.device) < batch.lengths[:, None]
        return torch.stack(((is_blank & is_frame).sum(), is_frame.sum())).float()

    def figures(self, moments: Tensor, num_rows: int) -> dict[str, float]:
        """See `Objective`: near 1, the model has not begun to write letters."""
        return {"blank": moments[0].item() / moments[1].item()}

    def answers(self, output: StepOutput, batch: Batch) -> list[Answer]:
        """See `Finetune`: the transcript, and the probability of the likeliest path per frame, geometric mean."""
        assert output.predictions is not None
        log_probs = output.predictions.log_softmax(-1)
        B, T = log_probs.shape[:2]
        lengths = [T] * B if batch.lengths is None else batch.lengths.tolist()
        best = log_probs.amax(-1).cpu()
        losses = losses_of(output, B)
        return [
            {"loss": loss, "transcript": text, "probability": best[index, : lengths[index]].mean().exp().item()}
            for index, (loss, text) in enumerate(zip(losses, self.decode(log_probs, lengths), strict=True))
        ]

    def columns(self, answer: Answer) -> dict[str, Any]:
        """See `Finetune`: the transcript, and its probability per frame."""
        return {"transcript": answer["transcript"], "probability": answer["probability"]}

    def joined(self, answers: Sequence[Answer]) -> Answer:
        """See `Finetune`: the transcripts of the parts, one after the other."""
        if len(answers) == 1:
            return answers[0]
        text = " ".join(answer["transcript"] for answer in answers if answer["transcript"])
        return {"loss": None, "transcript": text, "probability": min(answer["probability"] for answer in answers)}


def ctc_loss(
    logits: Tensor, targets: Tensor, target_lengths: Tensor, lengths: Tensor | None = None, *, blank: int = 0
) -> Tensor:
    """Return the negative log-likelihood of each transcript of a batch, fp32 `[B]`.

    A transcript that does not fit its frames has no alignment; its loss and gradient are 0, as in the published
    recipes (fairseq's `zero_infinity`).

    Args:
        logits: `[B, T, V]`, of any floating dtype; the loss is computed in fp32.
        targets: int64 `[sum of target_lengths]`, the classes of all transcripts, one after the other, without blanks.
        target_lengths: int64 `[B]`, classes of each transcript.
        lengths: int64 `[B]`, frames of each sample before its padding. `None` means T.
        blank: class of the blank.
    """
    B, T = logits.shape[:2]
    # fp64 stays so, for comparisons
    log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1).transpose(0, 1)
    if lengths is None:
        lengths = torch.full((B,), T, dtype=torch.int64, device=logits.device)
    if log_probs.is_meta:
        # there is no kernel of CTC for meta tensors: allocate as much as it does, for the memory that `check` predicts
        states = log_probs.new_empty(B, T, 2 * (len(targets) // B) + 1)
        return log_probs.sum((0, 2)) + states.sum((1, 2))
    # cuDNN wants other types, and its choice would depend on the lengths of a batch
    with torch.backends.cudnn.flags(enabled=False):
        return F.ctc_loss(
            log_probs, targets, lengths, target_lengths, blank=blank, reduction="none", zero_infinity=True
        )
