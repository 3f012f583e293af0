"""The target and the loss of data2vec in one operation, which writes no target to memory for a single prediction."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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
    run_loss,
    run_reference,
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
    need_moments: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``masked_smooth_l1`` of ``topk_target``."""
    target = topk_target_reference(layers, layer_norm, final_norm, rows, lengths, eps)
    return masked_smooth_l1_reference(pred, target, target_rows, beta, scale, mean, need_grad, need_moments)


define(
    "data2vec_loss(Tensor pred, Tensor[] layers, int layer_norm, int final_norm, Tensor rows, Tensor? lengths, "
    "float eps, Tensor? target_rows, float beta, float scale, bool mean, bool need_grad, bool need_moments) -> "
    "(Tensor, Tensor, Tensor)",
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
    need_moments: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_loss(pred, need_grad, need_moments)


_data2vec_loss = torch.ops.d2v.data2vec_loss.default
register_autograd("data2vec_loss", 1, LossFunction.apply, data2vec_loss_reference)


def data2vec_loss(
    pred: Tensor,
    layers: Iterable[Tensor],
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
    moments: bool = True,
) -> MaskedLoss:
    """Compute ``masked_smooth_l1(pred, topk_target(layers, rows=rows))`` without storing the target.

    Each row of the target is computed when it is compared (arXiv 2202.03555, sections 3.3 and 3.4). Besides the result,
    only statistics are stored: `K * B * D` numbers for ``instance`` and ``batch``, partial sums over groups of
    positions for a final ``instance``. The result equals that of the two operations up to rounding. With
    ``target_rows``, a GPU computes the target once, in `4 * M * D` bytes, which are free again when the call returns.

    Args:
        pred: `[N, D]`, fp32, bf16, fp16 or fp64, on the device of ``layers``; the prediction for ``rows[i]``, or for
            ``rows[target_rows[i]]``.
        layers: K tensors `[B, T, D]`; see ``topk_target``, also for ``layer_norm``, ``final_norm``, ``lengths`` and
            ``eps``.
        rows: int64 `[M]`, flat positions ``b * T + t``; `M = N` without ``target_rows``.
        beta: Error at which the loss turns from quadratic to linear; 0 is the squared error. See
            ``masked_smooth_l1``, also for ``scale`` and ``reduction``.
        target_rows: int64 `[N]`, the entry of ``rows`` of each prediction, if several predictions share a target.
        moments: Whether to compute the moments. The gradient and, on a CPU, the loss are the same bit for bit without
            them; a GPU adds the loss in another order.

    Returns:
        ``loss``, 0-d, and ``moments``, `[4, D]`, which count a target as often as it is used, or None if not asked for;
        see ``MaskedLoss``.

    Backward:
        Gradient to ``pred`` only, saved by the forward pass. ``layers`` are constants. For higher derivatives, forward
        mode and ``torch.func`` see ``masked_smooth_l1``.

    Raises:
        ValueError, TypeError: An argument is not as described above.
        IndexError: On a CPU, ``rows``, ``lengths`` or ``target_rows`` are out of range. On a GPU, which would have to
            wait for the values, and under ``torch.vmap``, a row out of range gives NaN.

    Examples:
        >>> pred = torch.zeros(1, 2, requires_grad=True)
        >>> layers = [torch.tensor([[[1.0, 3.0], [4.0, 8.0]]])]
        >>> loss = data2vec_loss(pred, layers, rows=torch.tensor([1])).loss
        >>> loss.backward()
        >>> loss.detach(), pred.grad
        (tensor(1.0000), tensor([[ 1.0000, -1.0000]]))
    """
    every = layer_list(layers)
    check_layers(every, layer_norm, final_norm, eps)
    check_rows(every, rows, lengths)
    check_pred(pred, beta, scale, reduction)
    shape, width = pred.shape, every[0].shape[2]
    if shape[1] != width:
        raise ValueError(f"`pred` must have shape [N, {width}] as `layers` have, but is {tuple(shape)} instead.")
    if rows is None or rows.device != pred.device:
        check_indices("rows", rows, pred.device)
    if target_rows is None and rows.shape[0] != shape[0]:
        raise ValueError(
            f"`rows` must have one entry per row of `pred` ({pred.shape[0]}), but has {rows.shape[0]} instead; "
            "`target_rows` maps one to the other."
        )
    check_target_rows(pred, target_rows)
    need_grad = pred.requires_grad and torch.is_grad_enabled()
    others = (
        every,
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
        moments,
    )
    if torch.float64 in (pred.dtype, every[0].dtype):
        return run_reference(data2vec_loss_reference, pred, others)
    return run_loss(_data2vec_loss, pred, others)
