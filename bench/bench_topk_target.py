"""The target at the sizes of the published recipes, per GPU and step: from K layers to the masked rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure import Compiled, Contest
from bench.optional_peers import layer_norms
from d2v_fast.ops import topk_target


class Size(NamedTuple):
    """B, T, D, K, share of masked rows, norm of each layer, norm of the average."""

    samples: int
    positions: int
    width: int
    top_k: int
    masked: float
    layer_norm: str
    final_norm: str


SIZES = {
    # 237 s of speech at 50 frames a second
    "v1 audio": Size(12, 992, 768, 8, 0.49, "instance", "none"),
    "v1 vision": Size(128, 196, 768, 6, 120 / 196, "layer", "layer"),
    "v1 text": Size(16, 512, 768, 10, 0.15, "layer", "none"),
    "v2 image": Size(16, 196, 768, 10, 0.8, "instance", "layer"),
    "v2 audio": Size(4, 782, 768, 8, 0.5, "instance", "none"),
}

Target = Callable[[list[Tensor], Tensor], Tensor]


def published(size: Size) -> Target:
    """Normalize every layer at every position in fp32, average, normalize, then select the masked rows."""
    shape = (size.width,)

    def target(layers: list[Tensor], rows: Tensor) -> Tensor:
        if size.layer_norm == "instance":
            normed = [F.instance_norm(x.float().transpose(1, 2)).transpose(1, 2) for x in layers]
        else:
            normed = [F.layer_norm(x.float(), shape) for x in layers]
        mean = sum(normed[1:], normed[0]) / len(normed)
        if size.final_norm == "layer":
            mean = F.layer_norm(mean, shape)
        return mean.flatten(0, 1)[rows]

    return target


def stock(size: Size, norm: Callable[[Tensor], Tensor] | None = None) -> Target:
    """Compute the same with stock operations in the best order: select rows first if the norm permits."""
    shape = (size.width,)
    layer_norm = norm or (lambda x: F.layer_norm(x, shape))

    def target(layers: list[Tensor], rows: Tensor) -> Tensor:
        total = torch.zeros(len(rows), size.width, device=rows.device)
        share = 1 / len(layers)
        for x in layers:
            if size.layer_norm == "instance":
                variance, mean = torch.var_mean(x.float(), 1, correction=0)
                scale = (variance + 1e-5).rsqrt() * share
                sample = rows // size.positions
                total += (x.flatten(0, 1)[rows] - mean[sample]) * scale[sample]
            else:
                total.add_(layer_norm(x.flatten(0, 1)[rows].float()), alpha=share)
        return layer_norm(total) if size.final_norm == "layer" else total

    return target


CASES = [(name, torch.float32) for name in SIZES] + [("v1 audio", torch.bfloat16), ("v1 vision", torch.bfloat16)]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def bench_topk_target(compete: Callable[[Contest], None], device: torch.device, name: str, dtype: torch.dtype) -> None:
    size = SIZES[name]
    layers, rows = make_inputs(size, dtype, device)
    peers: dict[str, Callable[[], tuple[Tensor]]] = {
        "published": lambda: (published(size)(layers, rows),),
        "stock": lambda: (stock(size)(layers, rows),),
    }
    missing = {}
    if dtype == torch.float32 or device.type == "cuda":
        compiled = torch.compile(published(size))
        peers["torch.compile"] = Compiled(lambda: (compiled(layers, rows),))
    else:
        missing["torch.compile"] = "measured in fp32 only on a CPU"
    if size.layer_norm == "layer":
        norms, absent = layer_norms(layers[0])
        for norm_name, norm in norms.items():
            target = stock(size, norm)
            peers[norm_name] = partial(_call, target, layers, rows)
        missing |= absent
    compete(
        Contest(
            op="topk_target",
            case=f"{name}, {_name(dtype)}, {size.layer_norm}+{size.final_norm}",
            ours=lambda: (topk_target(layers, layer_norm=size.layer_norm, final_norm=size.final_norm, rows=rows),),
            peers=peers,
            model_bytes=target_bytes(size, len(rows), dtype.itemsize) + 4 * size.width * len(rows),
            rtol=1e-3,
            atol=1e-4,
            missing=missing,
        )
    )


def make_inputs(size: Size, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """Create K layers `[B, T, D]`, and the masked rows in ascending order."""
    shape = (size.samples, size.positions, size.width)
    layers = [torch.randn(shape, device=device).to(dtype) for _ in range(size.top_k)]
    num_positions = size.samples * size.positions
    rows = torch.randperm(num_positions)[: round(size.masked * num_positions)].sort().values
    return layers, rows.to(device)


def target_bytes(size: Size, num_rows: int, item: int) -> int:
    """Return the bytes to read: all positions once for statistics over positions, otherwise the rows only."""
    read = size.samples * size.positions if size.layer_norm == "instance" else num_rows
    return size.top_k * read * size.width * item


def _call(target: Target, layers: list[Tensor], rows: Tensor) -> tuple[Tensor]:
    return (target(layers, rows),)


def _name(dtype: torch.dtype) -> str:
    return "bf16" if dtype == torch.bfloat16 else "fp32"
