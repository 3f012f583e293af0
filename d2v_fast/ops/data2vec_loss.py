"""The target and the loss of data2vec in one operation: the target is never written to memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from d2v_fast.ops._library import define
from d2v_fast.ops.autograd import register_autograd
from d2v_fast.ops.masked_loss import (
    LossFunction,
    MaskedLoss,
    check_pred,
    check_target_rows,
    fake_loss,
    masked_smooth_l1_reference,
)
from d2v_fast.ops.topk_target import (
    FINAL_NORMS,
    LAYER_NORMS,
    check_indices,
    check_layers,
    check_rows,
    layer_list,
    topk_target_reference,
)


def data2vec_loss_reference(
    pred: Tensor,
    layers: Sequence[Tensor],
    layer_norm: int,
    final_norm: int,
    rows: Tensor,
    lengths: Tensor | None,
    eps: float,
    target_rows: Tensor | None,
    beta: float,
    scale: float,
    mean: bool,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``masked_smooth_l1`` of ``topk_target``."""
    target = topk_target_reference(layers, layer_norm, final_norm, rows, lengths, eps)
    return masked_smooth_l1_reference(pred, target, target_rows, beta, scale, mean, need_grad)


define(
    "data2vec_loss(Tensor pred, Tensor[] layers, int layer_norm, int final_norm, Tensor rows, Tensor? lengths, "
    "float eps, Tensor? target_rows, float beta, float scale, bool mean, bool need_grad) -> (Tensor, Tensor, Tensor)",
    data2vec_loss_reference,
    "data2vec_loss.data2vec_loss",
)


@torch.library.register_fake("d2v::data2vec_loss")
def _fake(
    pred: Tensor,
    layers: Sequence[Tensor],
    layer_norm: int,
    final_norm: int,
    rows: Tensor,
    lengths: Tensor | None,
    eps: float,
    target_rows: Tensor | None,
    beta: float,
    scale: float,
    mean: bool,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_loss(pred, need_grad)


_run = register_autograd("data2vec_loss", 1, LossFunction.apply, data2vec_loss_reference)


def data2vec_loss(
    pred: Tensor,
    layers: Sequence[Tensor],
    *,
    layer_norm: str = "layer",
    final_norm: str = "none",
    rows: Tensor,
    lengths: Tensor | None = None,
    eps: float = 1e-5,
    beta: float = 0.0,
    scale: float = 1.0,
    reduction: str = "mean",
    target_rows: Tensor | None = None,
) -> MaskedLoss:
    """The data2vec objective: ``masked_smooth_l1(pred, topk_target(layers, rows=rows))``, the target kept on the chip.

    Each row of the target is computed where it is compared and then forgotten (arXiv 2202.03555, sections 3.3 and 3.4).
    What is kept besides the result are statistics: `K * B * D` numbers for ``instance`` and ``batch``, partial sums
    over groups of positions for a final ``instance``. Equal to the two operations one after the other up to rounding.

    Args:
        pred: `[N, D]`, fp32, bf16 or fp16, on the device of ``layers``; the prediction for ``rows[i]``, or for
            ``rows[target_rows[i]]``.
        layers: K tensors `[B, T, D]`, as for ``topk_target``; so are ``layer_norm``, ``final_norm``, ``lengths`` and
            ``eps``.
        rows: int64 `[M]`, flat positions ``b * T + t``; `M = N` without ``target_rows``.
        beta: Where the loss turns from quadratic to linear; 0 is the squared error. As for ``masked_smooth_l1``; so are
            ``scale`` and ``reduction``.
        target_rows: int64 `[N]`, which entry of ``rows`` each prediction belongs to, where several share a target.

    Returns:
        ``loss``, 0-d fp32, and ``moments``, fp32 `[4, D]` (in which a target counts as often as it is used).

    Backward:
        Gradient to ``pred`` only, saved by the forward pass. Higher derivatives, forward mode and ``torch.func`` as for
        ``masked_smooth_l1``; ``layers`` are constants.

    Raises:
        ValueError: What is not as described above.
        IndexError: On a CPU, ``rows``, ``lengths`` or ``target_rows`` out of range. A GPU is not waited for: there a
            row out of range gives NaN, as it does under ``torch.vmap``.
    """
    layers = layer_list(layers)
    check_layers(layers, layer_norm, final_norm, eps)
    check_rows(layers, rows, lengths)
    check_pred(pred, beta, scale, reduction)
    if pred.shape[1] != layers[0].shape[2]:
        raise ValueError(
            f"`pred` must have shape [N, {layers[0].shape[2]}] as `layers` have, but is {tuple(pred.shape)} instead."
        )
    check_indices("rows", rows, pred.device)
    if target_rows is None and rows.shape[0] != pred.shape[0]:
        raise ValueError(
            f"`rows` must have one entry per row of `pred` ({pred.shape[0]}), but has {rows.shape[0]} instead; "
            "`target_rows` maps one to the other."
        )
    check_target_rows(pred, target_rows)
    need_grad = pred.requires_grad and torch.is_grad_enabled()
    loss, moments, _ = _run(
        pred,
        layers,
        LAYER_NORMS.index(layer_norm),
        FINAL_NORMS.index(final_norm),
        rows,
        lengths,
        float(eps),
        target_rows,
        float(beta),
        float(scale),
        reduction == "mean",
        need_grad,
    )
    return MaskedLoss(loss, moments)
