"""Post-norm Transformer blocks of data2vec 2.0 (arXiv 2212.07525), in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Data2Vec2Attention(nn.Module):
    """Multi-head self-attention with one linear map for queries, keys and values, in this order."""

    def __init__(self, config) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.dropout = config.attention_probs_dropout_prob
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Map `[B, T, D]` to `[B, T, D]`; `bias` is added to the logits `[B, H, T, T]`."""
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
        return self.proj(y.transpose(1, 2).reshape(B, T, D))


class Data2Vec2MLP(nn.Module):
    """Two linear maps with an exact GELU between them."""

    def __init__(self, config) -> None:
        super().__init__()
        self.dropout = nn.Dropout(config.activation_dropout)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, T, D]` to `[B, T, D]`."""
        return self.fc2(self.dropout(F.gelu(self.fc1(x))))


class Data2Vec2Block(nn.Module):
    """One block: each norm comes after its residual sum."""

    def __init__(self, config) -> None:
        super().__init__()
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.attn = Data2Vec2Attention(config)
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = Data2Vec2MLP(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Map `[B, T, D]` to `[B, T, D]`; see `Data2Vec2Attention` for `bias`."""
        x = self.norm1(x + self.dropout(self.attn(x, bias)))
        return self.norm2(x + self.dropout(self.mlp(x)))


def init_weights(module: nn.Module, std: float) -> None:
    """Initialize a linear map or a norm as in pre-training."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm) and module.weight is not None:
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
