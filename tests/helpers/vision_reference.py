"""The vision model and one data2vec step, written from the paper's formulas, in the dtype of the input."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from d2v_fast.config import VisionConfig, VisionModelConfig

Weights = dict[str, Tensor]


def randomize_(module: nn.Module) -> None:
    """Give every parameter a random value, including gammas, biases and the position table."""
    for name, parameter in module.named_parameters():
        if "gamma" in name or (parameter.dim() == 1 and "norm" in name and "weight" in name):
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif parameter.dim() == 2 and "table" not in name and "token" not in name:
            nn.init.normal_(parameter, std=1.0 / math.sqrt(parameter.shape[1]))
        else:
            nn.init.normal_(parameter, std=0.5)


def encode(weights: Weights, config: VisionModelConfig, pixels: Tensor, masked: Tensor | None = None) -> list[Tensor]:
    """Return the outputs `[B, 1 + P, D]` of every block, without dropout. `masked` is bool `[B, P]`."""
    bias = position_bias(weights["position_bias.table"], config.grid_size)
    x = embed(weights, config, pixels, masked)
    outputs = []
    for index in range(config.depth):
        x = block(weights, f"encoder.blocks.{index}", config, x, bias)
        outputs.append(x)
    return outputs


def embed(weights: Weights, config: VisionModelConfig, pixels: Tensor, masked: Tensor | None) -> Tensor:
    """Embed patch by patch, with the mask token for masked ones and the class token in front."""
    grid, size = config.grid_size, config.patch_size
    images = []
    for b in range(len(pixels)):
        tokens = [weights["embedding.cls_token"]]
        for p in range(grid * grid):
            row, column = divmod(p, grid)
            patch = pixels[b, :, row * size : (row + 1) * size, column * size : (column + 1) * size]
            if masked is not None and masked[b, p]:
                tokens.append(weights["embedding.mask_token"][0])
            else:
                projection = weights["embedding.projection.weight"] @ patch.flatten()
                tokens.append(projection + weights["embedding.projection.bias"])
        images.append(torch.stack(tokens))
    return torch.stack(images)


def position_bias(table: Tensor, grid: int) -> Tensor:
    """Look up the bias `[H, T, T]` in the table `[(2 G - 1)^2 + 3, H]`, pair by pair."""
    side = 2 * grid - 1
    num_tokens = 1 + grid * grid
    rows = []
    for query in range(num_tokens):
        for key in range(num_tokens):
            if query == 0 and key == 0:
                rows.append(side * side + 2)
            elif key == 0:
                rows.append(side * side + 1)
            elif query == 0:
                rows.append(side * side)
            else:
                query_row, query_column = divmod(query - 1, grid)
                key_row, key_column = divmod(key - 1, grid)
                row_offset, column_offset = query_row - key_row, query_column - key_column
                rows.append((row_offset + grid - 1) * side + column_offset + grid - 1)
    return torch.stack([table[row] for row in rows], dim=1).view(-1, num_tokens, num_tokens)


def block(weights: Weights, name: str, config: VisionModelConfig, x: Tensor, bias: Tensor) -> Tensor:
    """`x + gamma_1 * attention(norm_1(x))`, then the same with the MLP."""
    w = {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}
    normed = layer_norm(x, config.norm_eps, w["norm1.weight"], w["norm1.bias"])
    x = x + w["gamma1"] * attention(w, config, normed, bias)
    normed = layer_norm(x, config.norm_eps, w["norm2.weight"], w["norm2.bias"])
    hidden = normed @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"]
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return x + w["gamma2"] * (hidden @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"])


def attention(w: Weights, config: VisionModelConfig, x: Tensor, bias: Tensor) -> Tensor:
    """Compute attention head by head, with the softmax written out."""
    head_width = config.width // config.heads
    q_weight, k_weight, v_weight = w["attention.qkv.weight"].split(config.width)
    q = (x @ q_weight.T + w["attention.qkv.q_bias"]) * head_width**-0.5
    k = x @ k_weight.T
    v = x @ v_weight.T + w["attention.qkv.v_bias"]
    heads = []
    for head in range(config.heads):
        part = slice(head * head_width, (head + 1) * head_width)
        logits = q[..., part] @ k[..., part].transpose(-1, -2) + bias[head]
        exponentials = (logits - logits.detach().amax(-1, keepdim=True)).exp()
        heads.append(exponentials / exponentials.sum(-1, keepdim=True) @ v[..., part])
    return torch.cat(heads, dim=-1) @ w["attention.proj.weight"].T + w["attention.proj.bias"]


def layer_norm(x: Tensor, eps: float, weight: Tensor | float = 1.0, bias: Tensor | float = 0.0) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def step(
    weights: Weights, teacher_weights: Weights, config: VisionConfig, pixels: Tensor, masked: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return summed loss, predictions `[N, D]` and targets `[N, D]`, with layer norm before and after averaging."""
    assert (config.target.layer_norm, config.target.final_norm) == ("layer", "layer")
    student = {key.removeprefix("student."): value for key, value in weights.items()}

    with torch.no_grad():
        layers = encode(teacher_weights, config.model, pixels)[-config.target.top_k :]
        average = sum(layer_norm(layer[:, 1:], config.target.eps) for layer in layers) / len(layers)
        target = layer_norm(average, config.target.eps)[masked]

    last = encode(student, config.model, pixels, masked)[-1][:, 1:][masked]
    normed = layer_norm(last, config.model.norm_eps, student["norm.weight"], student["norm.bias"])
    prediction = normed @ weights["head.weight"].T + weights["head.bias"]

    beta = config.loss.beta
    distance = (prediction - target).abs()
    loss = torch.where(distance < beta, distance.square() / (2 * beta), distance - beta / 2)
    return loss.sum(), prediction, target
