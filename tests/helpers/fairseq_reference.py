"""data2vec's speech model with fairseq's module names, for eval mode without padding, and the changes that fairseq's
fine-tuning makes to the configuration of a checkpoint."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Transpose(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = (p(x).view(B, T, self.heads, -1).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        weights = (q @ k.transpose(2, 3) * (D // self.heads) ** -0.5).softmax(-1)
        return self.out_proj((weights @ v).transpose(1, 2).reshape(B, T, D))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads)
        self.self_attn_layer_norm, self.final_layer_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.self_attn_layer_norm(x + self.self_attn(x))
        return self.final_layer_norm(x + self.fc2(F.gelu(self.fc1(x))))


class ConvFeatureExtraction(nn.Module):
    def __init__(self, layers: list[tuple[int, int, int]]) -> None:
        super().__init__()
        inputs = [1, *(width for width, _, _ in layers)]
        self.conv_layers = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(num_inputs, width, kernel, stride, bias=False),
                nn.Dropout(0.0),
                nn.Sequential(Transpose(), nn.LayerNorm(width), Transpose()),
                nn.GELU(),
            )
            for num_inputs, (width, kernel, stride) in zip(inputs, layers, strict=False)
        )


class TransformerEncoder(nn.Module):
    def __init__(self, cfg: dict[str, Any]) -> None:
        super().__init__()
        width, depth = cfg["encoder_embed_dim"], cfg["pos_conv_depth"]
        kernel = max(3, cfg["conv_pos"] // depth)
        self.pos_conv = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=cfg["conv_pos_groups"]),
                    nn.Identity(),
                    Transpose(),
                    nn.LayerNorm(width, elementwise_affine=False),
                    Transpose(),
                    nn.GELU(),
                )
                for _ in range(depth)
            )
        )
        self.layers = nn.ModuleList(
            Layer(width, cfg["encoder_attention_heads"], cfg["encoder_ffn_embed_dim"])
            for _ in range(cfg["encoder_layers"])
        )
        self.layer_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer_norm(x + self.pos_conv(x.transpose(1, 2)).transpose(1, 2))
        for layer in self.layers:
            x = layer(x)
        return x


class Data2VecAudio(nn.Module):
    """Build the model from the `model` section of a checkpoint's `cfg`; `layers` replaces an expression in it."""

    def __init__(self, cfg: dict[str, Any], layers: list[tuple[int, int, int]]) -> None:
        super().__init__()
        width = cfg["encoder_embed_dim"]
        self.feature_extractor = ConvFeatureExtraction(layers)
        self.post_extract_proj = nn.Linear(layers[-1][0], width)
        self.mask_emb = nn.Parameter(torch.rand(width))
        self.encoder = TransformerEncoder(cfg)
        self.layer_norm = nn.LayerNorm(layers[-1][0])
        self.final_proj = nn.Linear(width, width)

    def forward(self, source: Tensor) -> Tensor:
        x = source[:, None]
        for layer in self.feature_extractor.conv_layers:
            x = layer(x)
        return self.encoder(self.post_extract_proj(self.layer_norm(x.transpose(1, 2))))


class Closed(dict[str, Any]):
    """A section to which no key can be added, as in fairseq."""

    def __setitem__(self, key: str, value: Any) -> None:
        if key not in self:
            raise KeyError(f"Key '{key}' is not in struct")
        super().__setitem__(key, value)


def closed(value: Any) -> Any:
    return Closed({key: closed(inner) for key, inner in value.items()}) if isinstance(value, dict) else value


def closed_as_fine_tuning_sets_it(cfg: dict[str, Any], data: str) -> dict[str, Any]:
    """Assign to the keys that fairseq's fine-tuning for CTC and for classification sets before it builds the model."""
    found: dict[str, Any] = closed(cfg)
    found["criterion"] = None
    found["lr_scheduler"] = None
    found["task"]["data"] = data
    return found
