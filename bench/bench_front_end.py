"""Forward and backward pass of the convolutions for speech, compared with the same layers in plain torch.

The peer is the form of Transformers and the published code: channels first, with a transpose before and after every
norm. Both have the same weights and must agree on the output and on every gradient. `lean` recomputes norms and GELUs
in the backward pass.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.measure import compared, describe_device, peak_bytes, quantiles
from d2v_fast.config import SpeechModelConfig
from d2v_fast.modalities.speech.conv_stack import ConvStack

SECONDS, BATCH = 5, 2
NUM_ROUNDS = 5


class PlainLayers(nn.Module):
    """The same layers with channels first."""

    def __init__(self, stack: ConvStack) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList()
        self.norms = nn.ModuleList()
        groups = zip(stack.weights, stack.norm_weights, stack.norm_biases, stack.strides, strict=True)
        for weight, norm_weight, norm_bias, stride in groups:
            width, kernel, in_width = weight.shape
            convolution = nn.Conv1d(in_width, width, kernel, stride, bias=False)
            norm = nn.LayerNorm(width)
            with torch.no_grad():
                convolution.weight.copy_(weight.transpose(1, 2))
                norm.weight.copy_(norm_weight)
                norm.bias.copy_(norm_bias)
            self.convolutions.append(convolution)
            self.norms.append(norm)

    def forward(self, waveforms: Tensor) -> Tensor:
        """`[B, N]` to `[B, T, C]`."""
        x = waveforms[:, None]
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.gelu(norm(convolution(x).transpose(1, 2)).transpose(1, 2))
        return x.transpose(1, 2)


@pytest.mark.parametrize("case", ["kept", "lean"])
@pytest.mark.timeout(300)
def bench_front_end(benchmark: Any, device: torch.device, case: str) -> None:
    torch.manual_seed(0)
    config = SpeechModelConfig()
    stack = ConvStack(config.conv_width, config.conv_kernels, config.conv_strides, recompute=case == "lean").to(device)
    plain = PlainLayers(stack).to(device)
    waveforms = torch.randn(BATCH, SECONDS * config.sample_rate, device=device)
    direction = torch.randn(BATCH, config.num_frames(waveforms.shape[1]), config.conv_width, device=device)
    assert_same(stack, plain, waveforms, direction)

    def run(layers: nn.Module) -> None:
        layers.zero_grad()
        layers(waveforms).backward(direction)
        if device.type == "cuda":
            torch.cuda.synchronize()

    run(stack)
    run(plain)
    peak, plain_peak = peak_bytes(lambda: run(stack), device), peak_bytes(lambda: run(plain), device)
    plain_seconds = []

    def run_plain() -> None:
        started = time.perf_counter()
        run(plain)
        plain_seconds.append(time.perf_counter() - started)

    benchmark.group = "front end"
    benchmark.pedantic(lambda: run(stack), setup=run_plain, rounds=NUM_ROUNDS)
    if benchmark.stats is None:
        return
    seconds = benchmark.stats.stats.data
    info = benchmark.extra_info
    info |= {"op": "front end", "case": f"{case}, {BATCH} x {SECONDS} s", **describe_device(device)}
    info |= {**quantiles(seconds), "peak_bytes": peak, "dtype": "torch.float32"}
    row = compared(plain_seconds, seconds) | {"peak_bytes": plain_peak}
    info["peers"] = {"plain torch, channels first": row}
    if peak is not None and plain_peak is not None:
        info["note"] = (
            f"{info['case']}: peak memory {peak / 1e6:.0f} MB above the inputs, plain torch {plain_peak / 1e6:.0f}."
        )


def assert_same(stack: ConvStack, plain: PlainLayers, waveforms: Tensor, direction: Tensor) -> None:
    """Check that frames and the gradients of all parameters agree."""
    outputs = stack(waveforms), plain(waveforms)
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-3)
    for output in outputs:
        output.backward(direction)
    pairs: list[tuple[Any, Any]] = [
        (own.grad.transpose(1, 2), their.weight.grad)
        for own, their in zip(stack.weights, plain.convolutions, strict=True)
    ]
    pairs += [(own.grad, their.weight.grad) for own, their in zip(stack.norm_weights, plain.norms, strict=True)]
    pairs += [(own.grad, their.bias.grad) for own, their in zip(stack.norm_biases, plain.norms, strict=True)]
    for actual, expected in pairs:
        assert (actual - expected).norm() / expected.norm() < 1e-3
