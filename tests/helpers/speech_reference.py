"""The speech model and one data2vec step, written from the paper's formulas, utterance by utterance, in the dtype of
the input."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from d2v_fast.config import SpeechConfig, SpeechModelConfig
from tests.helpers.vision_reference import layer_norm

Weights = dict[str, Tensor]


def randomize_(module: nn.Module) -> None:
    """Give every parameter a random value that changes the output."""
    for name, parameter in module.named_parameters():
        if parameter.dim() == 1 and "norm" in name and ("weight" in name):
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif parameter.dim() >= 2:
            nn.init.normal_(parameter, std=1.0 / math.sqrt(parameter[0].numel()))
        else:
            nn.init.normal_(parameter, std=0.5)


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def windows(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Map `[T, C]` to windows `[T', kernel, C]`."""
    return torch.stack([x[start : start + kernel] for start in range(0, len(x) - kernel + 1, stride)])


def front_end(w: Weights, config: SpeechModelConfig, waveform: Tensor) -> Tensor:
    """Map samples `[N]` to frames `[T, D]`."""
    x = waveform[:, None]
    for i, (kernel, stride) in enumerate(zip(config.conv_kernels, config.conv_strides, strict=True)):
        name = "front_end.convolutions"
        x = torch.einsum("tkc,okc->to", windows(x, kernel, stride), w[f"{name}.weights.{i}"])
        x = gelu(layer_norm(x, 1e-5, w[f"{name}.norm_weights.{i}"], w[f"{name}.norm_biases.{i}"]))
    x = layer_norm(x, config.norm_eps, w["front_end.norm.weight"], w["front_end.norm.bias"])
    return x @ w["front_end.projection.weight"].T + w["front_end.projection.bias"]


def positions(w: Weights, config: SpeechModelConfig, frames: Tensor) -> Tensor:
    """Map `[T, D]` to positions `[T, D]`; `w` holds `convolutions.*`."""
    x, half, size = frames, config.position_kernel // 2, config.width // config.position_groups
    for i in range(config.position_depth):
        padded = torch.cat((x.new_zeros(half, config.width), x, x.new_zeros(half, config.width)))
        window = windows(padded, config.position_kernel, 1)
        groups = []
        for g in range(config.position_groups):
            part = slice(g * size, (g + 1) * size)
            groups.append(torch.einsum("tkc,ock->to", window[..., part], w[f"convolutions.{i}.weight"][part]))
        x = torch.cat(groups, -1) + w[f"convolutions.{i}.bias"]
        x = gelu(layer_norm(x, 1e-5))
    return x


def blocks(w: Weights, config: SpeechModelConfig, frames: Tensor, normed: bool = False) -> tuple[Tensor, list[Tensor]]:
    """Map `[T, D]` with positions to the output and all FFN outputs; `w` holds `norm.*` and `encoder.*`."""
    x = frames if normed else layer_norm(frames, config.norm_eps, w["norm.weight"], w["norm.bias"])
    head_width, features = config.width // config.heads, []
    for index in range(config.depth):
        b = sub(w, f"encoder.blocks.{index}")
        q, k, v = (x @ b["attention.qkv.weight"].T + b["attention.qkv.bias"]).split(config.width, dim=-1)
        heads = []
        for head in range(config.heads):
            part = slice(head * head_width, (head + 1) * head_width)
            logits = q[:, part] @ k[:, part].T * head_width**-0.5
            heads.append(logits.softmax(-1) @ v[:, part])
        attended = torch.cat(heads, -1) @ b["attention.proj.weight"].T + b["attention.proj.bias"]
        x = layer_norm(x + attended, config.norm_eps, b["norm1.weight"], b["norm1.bias"])
        f = gelu(x @ b["fc1.weight"].T + b["fc1.bias"]) @ b["fc2.weight"].T + b["fc2.bias"]
        features.append(f)
        x = layer_norm(x + f, config.norm_eps, b["norm2.weight"], b["norm2.bias"])
    return x, features


def sub(weights: Weights, name: str) -> Weights:
    return {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}


def step(
    weights: Weights, teacher: Weights, config: SpeechConfig, waveforms: list[Tensor], masks: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the summed squared error, predictions `[N, D]` and targets `[N, D]`.

    Args:
        weights: of the whole model; teacher: of the averaged part.
        waveforms: `[N]` each; masks: bool `[T]` each.
    """
    student = sub(weights, "student")
    predictions, targets = [], []
    for waveform, masked in zip(waveforms, masks, strict=True):
        frames = front_end(student, config.model, waveform)
        hidden = torch.where(masked[:, None], student["front_end.mask_token"], frames)
        shared = config.model.position_in_teacher == "shared"
        mine = sub(student, "positions") if shared else sub(student, "context.positions")
        output, _ = blocks(sub(student, "context"), config.model, hidden + positions(mine, config.model, hidden))
        predictions.append(output[masked] @ weights["head.weight"].T + weights["head.bias"])
        with torch.no_grad():
            theirs = mine if shared else sub(teacher, "positions")
            _, features = blocks(teacher, config.model, frames + positions(theirs, config.model, frames))
            normed = [layer_norm(f.T, config.target.eps).T for f in features[-config.target.top_k :]]
            targets.append((sum(normed) / len(normed))[masked])
    prediction, target = torch.cat(predictions), torch.cat(targets)
    return (prediction - target).square().sum(), prediction, target
