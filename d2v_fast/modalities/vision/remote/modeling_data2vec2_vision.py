"""The image encoder of data2vec 2.0 (arXiv 2212.07525) for Transformers, in plain PyTorch.

Names of tensors are those of the checkpoints of the published code, without the decoder.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, ImageClassifierOutput

from .configuration_data2vec2_vision import Data2Vec2VisionConfig
from .modeling_data2vec2_blocks import Data2Vec2Block, init_weights


class Data2Vec2Patches(nn.Module):
    """Linear embedding of patches without overlap."""

    def __init__(self, config: Data2Vec2VisionConfig) -> None:
        super().__init__()
        size = config.patch_size
        self.proj = nn.Conv2d(config.num_channels, config.hidden_size, kernel_size=size, stride=size)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map `[B, C, S, S]` to `[B, P, D]`."""
        return self.proj(pixels).flatten(2).transpose(1, 2)


class Data2Vec2Positions(nn.Module):
    """The fixed sine table of the patches' columns and rows, `[1, P, D]`."""

    def __init__(self, config: Data2Vec2VisionConfig) -> None:
        super().__init__()
        num_patches = (config.image_size // config.patch_size) ** 2
        self.positions = nn.Parameter(torch.zeros(1, num_patches, config.hidden_size), requires_grad=False)


class Data2Vec2Context(nn.Module):
    """A norm, and the blocks of the context encoder."""

    def __init__(self, config: Data2Vec2VisionConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.blocks = nn.ModuleList(Data2Vec2Block(config) for _ in range(config.num_context_layers))


class Data2Vec2ImageEncoder(nn.Module):
    """Everything before the main blocks."""

    def __init__(self, config: Data2Vec2VisionConfig) -> None:
        super().__init__()
        self.expected = (config.num_channels, config.image_size, config.image_size)
        self.local_encoder = Data2Vec2Patches(config)
        self.fixed_positional_encoder = Data2Vec2Positions(config)
        self.extra_tokens = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.context_encoder = Data2Vec2Context(config)

    def forward(self, pixels: Tensor) -> Tensor:
        """Embed images.

        Args:
            pixels: `[B, C, S, S]`, prepared by the image processor.
        Returns:
            `[B, 1 + P, D]`, class token first.
        """
        if pixels.dim() != 4 or tuple(pixels.shape[1:]) != self.expected:
            raise ValueError(
                f"`pixel_values` must be [B, *{list(self.expected)}], but is {list(pixels.shape)} instead."
            )
        x = self.local_encoder(pixels.to(self.extra_tokens.dtype)) + self.fixed_positional_encoder.positions
        x = torch.cat([self.extra_tokens.expand(len(x), -1, -1), x], dim=1)
        return self.context_encoder.norm(x)


class Data2Vec2VisionPreTrainedModel(PreTrainedModel):
    """What the models of this file share."""

    config_class = Data2Vec2VisionConfig
    base_model_prefix = "data2vec2_vision"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _supports_sdpa = True
    _no_split_modules = ["Data2Vec2Block"]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Data2Vec2ImageEncoder):
            nn.init.normal_(module.extra_tokens)
        elif isinstance(module, Data2Vec2Patches):
            nn.init.xavier_uniform_(module.proj.weight.view(module.proj.weight.shape[0], -1))
        elif isinstance(module, Data2Vec2Positions):
            with torch.no_grad():
                module.positions.copy_(sine_table(module.positions.shape[1], module.positions.shape[2]))
        else:
            init_weights(module, self.config.initializer_range)


class Data2Vec2VisionModel(Data2Vec2VisionPreTrainedModel):
    """The encoder. It reads whole images: masks, noise and decoder belong to pre-training."""

    def __init__(self, config: Data2Vec2VisionConfig) -> None:
        super().__init__(config)
        self.modality_encoders = nn.ModuleDict({"IMAGE": Data2Vec2ImageEncoder(config)})
        self.blocks = nn.ModuleList(Data2Vec2Block(config) for _ in range(config.num_hidden_layers))
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> BaseModelOutput | tuple:
        """Encode images.

        Args:
            pixel_values: `[B, C, S, S]`, prepared by the image processor.
            output_hidden_states: Also return the input of the first block and every block's output.
            return_dict: False returns a tuple.
        Returns:
            `last_hidden_state` `[B, 1 + P, D]`, class token first.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        encoder = self.modality_encoders["IMAGE"]
        x = encoder(pixel_values)
        states = [x]
        for block in (*encoder.context_encoder.blocks, *self.blocks):
            x = block(x)
            if output_hidden_states:
                states.append(x)
        output = BaseModelOutput(last_hidden_state=x, hidden_states=tuple(states) if output_hidden_states else None)
        return output.to_tuple() if return_dict is False else output


class Data2Vec2VisionForImageClassification(Data2Vec2VisionPreTrainedModel):
    """The encoder with a classifier on the normalized mean of the patches, or on the class token."""

    def __init__(self, config: Data2Vec2VisionConfig) -> None:
        super().__init__(config)
        self.data2vec2_vision = Data2Vec2VisionModel(config)
        self.fc_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> ImageClassifierOutput | tuple:
        """Classify images.

        Args:
            pixel_values: `[B, C, S, S]`.
            labels: int64 `[B]`; with a single label, the values of a regression `[B]`.
            output_hidden_states, return_dict: See `Data2Vec2VisionModel`.
        Returns:
            `logits` `[B, labels]`, and the loss if labels are given.
        """
        encoded = self.data2vec2_vision(pixel_values, output_hidden_states=output_hidden_states)
        hidden = encoded.last_hidden_state
        pooled = hidden[:, 0] if self.config.pooling == "token" else hidden[:, 1:].mean(1)
        logits = self.head(self.fc_norm(pooled))
        loss = None
        if labels is not None:
            is_regression = self.config.num_labels == 1
            loss = (
                F.mse_loss(logits[:, 0], labels.to(logits.dtype)) if is_regression else F.cross_entropy(logits, labels)
            )
        output = ImageClassifierOutput(loss=loss, logits=logits, hidden_states=encoded.hidden_states)
        return output.to_tuple() if return_dict is False else output


def sine_table(num_patches: int, width: int) -> Tensor:
    """Return the fixed positions of a square grid, `[1, P, D]`: of a patch's column, then of its row."""
    side, quarter = round(num_patches**0.5), width // 4
    omega = 10_000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * omega
    one = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns, rows = one.repeat(side, 1), one.repeat_interleave(side, 0)
    return torch.cat([columns, rows], dim=1)[None].float()
