"""Connectionist temporal classification (Graves et al. 2006): letters without a place, summed over all alignments."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ctc_loss"]


def ctc_loss(
    logits: Tensor, targets: Tensor, target_lengths: Tensor, lengths: Tensor | None = None, *, blank: int = 0
) -> Tensor:
    """Return the negative log-likelihood of transcripts, summed over a batch, 0-d fp32.

    A transcript that does not fit its frames has no alignment; it adds nothing to the loss or to the gradient, as in
    the published recipes (fairseq's `zero_infinity`).

    Args:
        logits: `[B, T, V]`, of any floating dtype; the loss is computed in fp32.
        targets: int64 `[sum of target_lengths]`, the classes of all transcripts, one after the other, without blanks.
        target_lengths: int64 `[B]`, classes of each transcript.
        lengths: int64 `[B]`, frames of each sample before its padding. `None` means T.
        blank: class of the blank.
    """
    B, T = logits.shape[:2]
    # logits that are fp64 stay so, for comparisons
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_probs = logits.to(dtype).log_softmax(-1).transpose(0, 1)
    if lengths is None:
        lengths = torch.full((B,), T, dtype=torch.int64, device=logits.device)
    # cuDNN takes other types of arguments and has a limit of 256 labels
    with torch.backends.cudnn.flags(enabled=False):
        return F.ctc_loss(log_probs, targets, lengths, target_lengths, blank=blank, reduction="sum", zero_infinity=True)
