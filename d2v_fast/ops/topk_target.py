"""The regression target of data2vec: K layers normalized, averaged and normalized again, at selected rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from d2v_fast.ops._library import CHECKED_DTYPES, check_tensors, define, tensor_list, wide

# the operations receive indices into these tuples
LAYER_NORMS = ("none", "layer", "instance", "batch")
FINAL_NORMS = ("none", "layer", "instance")
_DIMS = {"layer": (2,), "instance": (1,), "batch": (0, 1)}


def topk_target_reference(
    layers: Sequence[Tensor], layer_norm: int, final_norm: int, rows: Tensor | None, lengths: Tensor | None, eps: float
) -> Tensor:
    """Normalize every layer, average, normalize the average, select `rows`; in fp32, constant in `layers`."""
    _, num_positions, _ = layers[0].shape
    valid = None
    if lengths is not None:
        check_range("lengths", lengths, num_positions + 1)
        valid = (torch.arange(num_positions, device=lengths.device) < lengths[:, None])[:, :, None]
    normalized = (_normalize(wide(x.detach()), LAYER_NORMS[layer_norm], valid, eps) for x in layers)
    total = reduce(torch.add, normalized)
    target = _normalize(total / len(layers), FINAL_NORMS[final_norm], valid, eps)
    if rows is None:
        return target if valid is None else target.masked_fill(~valid, 0.0)
    selected = take_rows("rows", target.flatten(0, 1), rows)
    if valid is not None and _is_readable(rows) and _is_readable(valid):
        outside = rows[~valid.reshape(-1)[rows]]
        if outside.numel():
            raise IndexError(
                f"`rows` must lie within `lengths`, but {int(outside[0])} is a position past its sample's length."
            )
    return selected


def _normalize(x: Tensor, norm: str, valid: Tensor | None, eps: float) -> Tensor:
    """Normalize to zero mean and unit (biased) variance over the `valid` `[B, T, 1]` positions."""
    if norm == "none":
        return x
    if norm == "layer" or valid is None:
        variance, mean = torch.var_mean(x, dim=_DIMS[norm], correction=0, keepdim=True)
    else:
        count = valid.sum(_DIMS[norm], keepdim=True).clamp_min(1)
        mean = torch.where(valid, x, 0.0).sum(_DIMS[norm], keepdim=True) / count
        variance = torch.where(valid, x - mean, 0.0).square().sum(_DIMS[norm], keepdim=True) / count
    return (x - mean) * torch.rsqrt(variance + eps)


def check_range(name: str, values: Tensor, upper: int) -> None:
    """Raise IndexError for values outside [0, upper), if they can be read."""
    if not values.numel() or not _is_readable(values):
        return
    for value in (int(values.min()), int(values.max())):
        if not 0 <= value < upper:
            allowed = f"in [0, {upper - 1}]" if upper > 0 else "empty, as there is nothing to index"
            raise IndexError(f"`{name}` must be {allowed}, but holds {value}.")


def _is_readable(values: Tensor) -> bool:
    """Whether values can be read without waiting: not on a GPU, and not under vmap or a tracer."""
    if values.is_cuda or type(values) is not Tensor or torch._C._functorch.is_batchedtensor(values):
        return False
    return torch._C._len_torch_dispatch_stack() == 0


def take_rows(name: str, x: Tensor, rows: Tensor) -> Tensor:
    """Select rows of `x` `[M, D]`. Rows outside [0, M) raise IndexError if they can be read, else give NaN."""
    check_range(name, rows, len(x))
    if _is_readable(rows):
        return x[rows]
    inside = (rows >= 0) & (rows < len(x))
    return torch.where(inside[:, None], F.pad(x, (0, 0, 0, 1))[torch.where(inside, rows, len(x))], torch.nan)


define(
    "topk_target(Tensor[] layers, int layer_norm, int final_norm, Tensor? rows, Tensor? lengths, float eps) -> Tensor",
    topk_target_reference,
    "topk_target.topk_target",
)


@torch.library.register_fake("d2v::topk_target")
def _fake(
    layers: Sequence[Tensor], layer_norm: int, final_norm: int, rows: Tensor | None, lengths: Tensor | None, eps: float
) -> Tensor:
    shape = layers[0].shape if rows is None else (rows.shape[0], layers[0].shape[2])
    return layers[0].new_empty(shape, dtype=torch.float32)


def topk_target(
    layers: Iterable[Tensor],
    *,
    layer_norm: str = "layer",
    final_norm: str = "none",
    rows: Tensor | None = None,
    lengths: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Build the regression target: normalize each of K layers, average them, normalize the average, select rows.

    The target of data2vec (arXiv 2202.03555, section 3.3). The normalizations have no parameters; they add ``eps`` to
    the biased variance. Arithmetic is fp32 for every storage type. Besides the result, nothing of the size of a layer
    is allocated: ``none`` and ``layer`` read the selected rows only, ``instance`` and ``batch`` store statistics of
    `K * B * D` numbers, and a final ``instance`` stores partial sums over groups of positions.

    Args:
        layers: K tensors `[B, T, D]` of one shape, dtype (fp32, bf16, fp16 or fp64) and device: a list, a tuple, an
            iterator, or one tensor `[K, B, T, D]`. They are copied only if the last dimension is not contiguous or
            their strides differ, so a view such as ``x[:, 1:]`` costs nothing.
        layer_norm: For each layer ``none``, ``layer`` (over D), ``instance`` (over T, for each sample and channel) or
            ``batch`` (over B and T, for each channel).
        final_norm: For the average ``none``, ``layer`` or ``instance``.
        rows: int64 `[N]`, flat positions ``b * T + t`` in any order. ``None`` selects all.
        lengths: int64 `[B]`, number of valid positions of each sample. The statistics of ``instance`` and ``batch``
            exclude the others. By default every position counts, as in the published code.
        eps: Added to every variance, > 0.

    Returns:
        fp32 (fp64 if ``layers`` are) `[N, D]`, or `[B, T, D]` without ``rows``, with 0 past ``lengths``. It is a
        constant: ``layers`` get no derivative in any mode, as if they were detached.

    Raises:
        ValueError, TypeError: An argument is not as described above.
        IndexError: On a CPU, a row is outside [0, B * T) or past its sample's length, or a length is outside [0, T].
            On a GPU, which would have to wait for the values, and under ``torch.vmap``, a row outside [0, B * T)
            gives NaN.

    Examples:
        >>> topk_target([torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[2.0, 8.0]]])], rows=torch.tensor([0]))
        tensor([[-1.0000,  1.0000]])
    """
    every = layer_list(layers)
    check_layers(every, layer_norm, final_norm, eps)
    check_rows(every, rows, lengths)
    run = topk_target_reference if every[0].dtype == torch.float64 else torch.ops.d2v.topk_target
    with torch.no_grad():
        return run(every, LAYER_NORMS.index(layer_norm), FINAL_NORMS.index(final_norm), rows, lengths, float(eps))


def layer_list(layers: Iterable[Tensor]) -> list[Tensor]:
    """Return the layers as a list, from a sequence, an iterator (consumed once) or one tensor `[K, B, T, D]`.

    Raises:
        TypeError: `layers` is a single layer, a dict or a module, or contains an element that is not a tensor.
    """
    # Tensor's `isinstance` is slow for other types
    if type(layers) is not list and isinstance(layers, Tensor) and layers.ndim == 4:
        return list(layers)
    found = tensor_list("layers", layers)
    check_tensors("layers", found)
    return found


def check_layers(layers: list[Tensor], layer_norm: str, final_norm: str, eps: float) -> None:
    """Raise ValueError for layers that differ in shape, dtype or device, and for unknown norms."""
    if not layers:
        raise ValueError("`layers` must hold at least one tensor, but is empty instead.")
    first = layers[0]
    shape, dtype, device = first.shape, first.dtype, first.device
    if len(shape) != 3:
        raise ValueError(f"`layers[0]` must have shape [B, T, D], but has {tuple(shape)} instead.")
    if dtype not in CHECKED_DTYPES:
        raise ValueError(f"`layers[0]` must be fp32, bf16, fp16 or fp64, but is {dtype} instead.")
    for i, x in enumerate(layers[1:], 1):
        if x.shape != shape or x.dtype != dtype or x.device != device:
            raise ValueError(
                f"`layers[{i}]` must be as `layers[0]` is, {dtype} {tuple(shape)} on {device}, "
                f"but is {x.dtype} {tuple(x.shape)} on {x.device} instead."
            )
    if layer_norm not in LAYER_NORMS:
        raise ValueError(f"`layer_norm` must be one of {', '.join(LAYER_NORMS)}, but is {layer_norm!r} instead.")
    if final_norm not in FINAL_NORMS:
        raise ValueError(f"`final_norm` must be one of {', '.join(FINAL_NORMS)}, but is {final_norm!r} instead.")
    if not 0 < eps < math.inf:
        raise ValueError(f"`eps` must be finite and > 0, but is {eps} instead.")


def check_rows(layers: list[Tensor], rows: Tensor | None, lengths: Tensor | None) -> None:
    """Raise for index tensors of a wrong shape, dtype or device. The kernels check their values."""
    if rows is not None:
        check_indices("rows", rows, layers[0].device)
    if lengths is not None:
        check_indices("lengths", lengths, layers[0].device)
        if lengths.shape[0] != layers[0].shape[0]:
            raise ValueError(
                f"`lengths` must have one entry per sample ({layers[0].shape[0]}), but has {lengths.shape[0]} instead."
            )


def check_indices(name: str, x: Tensor, device: torch.device) -> None:
    """Raise unless `x` is a 1-d int64 tensor on `device`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"`{name}` must be a 1-d int64 tensor, but is {type(x).__name__} instead.")
    if x.dtype != torch.int64 or x.ndim != 1:
        raise ValueError(f"`{name}` must be a 1-d int64 tensor, but is {x.dtype} of shape {tuple(x.shape)} instead.")
    if x.device != device:
        raise ValueError(f"`{name}` must be on {device}, but is on {x.device} instead.")
