"""The speech encoder of data2vec 2.0 (arXiv 2212.07525) for Transformers, in plain PyTorch.

Names of tensors are those of the checkpoints of the published code, without the decoder. Padding does not change the
features of a recording.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput, SequenceClassifierOutput

from .configuration_data2vec2_audio import Data2Vec2AudioConfig
from .modeling_data2vec2_blocks import Data2Vec2Block, init_weights

EPS = 1e-5


class TransposedNorm(nn.LayerNorm):
    """A layer norm over the channels of `[B, C, T]`."""

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, C, T]` to `[B, C, T]`."""
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Data2Vec2Convolutions(nn.Module):
    """Convolutions over the waveform, each with a norm and GELU."""

    def __init__(self, config: Data2Vec2AudioConfig) -> None:
        super().__init__()
        layers, channels = [], 1
        for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
            convolution = nn.Conv1d(channels, config.conv_dim, kernel, stride=stride, bias=False)
            norm = nn.Sequential(nn.Identity(), TransposedNorm(config.conv_dim, eps=EPS))
            layers.append(nn.Sequential(convolution, nn.Identity(), norm, nn.GELU()))
            channels = config.conv_dim
        self.conv_layers = nn.ModuleList(layers)

    def forward(self, waveforms: Tensor) -> Tensor:
        """Map `[B, N]` to `[B, C, T]`."""
        x = waveforms[:, None]
        for layer in self.conv_layers:
            x = layer(x)
        return x


class Data2Vec2ConvPositions(nn.Sequential):
    """Positional convolutions, numbered from 1: each with a norm without parameters and GELU."""

    def __init__(self, config: Data2Vec2AudioConfig) -> None:
        width, kernel = config.hidden_size, config.conv_pos_kernel_size
        super().__init__()
        for index in range(1, config.num_conv_pos_layers + 1):
            convolution = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=config.num_conv_pos_groups)
            self.add_module(str(index), nn.Sequential(convolution))

    def forward(self, frames: Tensor, is_padding: Tensor | None) -> Tensor:
        """Return what is added to frames `[B, T, D]`; `is_padding` is bool `[B, T]`."""
        x = frames
        for layer in self:
            if is_padding is not None:
                x = x.masked_fill(is_padding[:, :, None], 0.0)
            # an even kernel makes one frame too many
            x = layer(x.transpose(1, 2))[:, :, : frames.shape[1]].transpose(1, 2)
            x = F.gelu(F.layer_norm(x, x.shape[-1:], eps=EPS))
        return x


class Data2Vec2Context(nn.Module):
    """A norm, and the blocks of the context encoder."""

    def __init__(self, config: Data2Vec2AudioConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.context_dropout)
        self.blocks = nn.ModuleList(Data2Vec2Block(config) for _ in range(config.num_context_layers))


class Data2Vec2AudioEncoder(nn.Module):
    """Everything before the main blocks."""

    def __init__(self, config: Data2Vec2AudioConfig) -> None:
        super().__init__()
        self.local_encoder = Data2Vec2Convolutions(config)
        norm, projection = nn.LayerNorm(config.conv_dim, eps=EPS), nn.Linear(config.conv_dim, config.hidden_size)
        # the first part of the published code swaps dimensions
        self.project_features = nn.Sequential(nn.Identity(), norm, projection)
        self.relative_positional_encoder = Data2Vec2ConvPositions(config)
        self.alibi_scale = nn.Parameter(torch.ones(1, 1, config.num_attention_heads, 1, 1))
        self.context_encoder = Data2Vec2Context(config)

    def forward(self, waveforms: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """Embed recordings.

        Args:
            waveforms: `[B, N]`, of zero mean and unit variance each.
            lengths: int64 `[B]`, frames of each recording; None means all.
        Returns:
            Frames `[B, T, D]`, and what is added to the logits of attention, `[1 or B, H, T, T]`.
        """
        frames = self.project_features(self.local_encoder(waveforms.to(self.alibi_scale.dtype)).transpose(1, 2))
        places = torch.arange(frames.shape[1], device=frames.device)
        is_padding = None if lengths is None else places >= lengths[:, None]
        x = frames + self.relative_positional_encoder(frames, is_padding)
        context = self.context_encoder
        bias = self.bias(places)
        if is_padding is not None:
            bias = bias.masked_fill(is_padding[:, None, None, :], torch.finfo(bias.dtype).min)
        return context.dropout(context.norm(x)), bias

    def bias(self, places: Tensor) -> Tensor:
        """Return the ALiBi bias `[1, H, T, T]`: minus the distance of frames, times slope and learned scale."""
        distances = (places[:, None] - places).abs()
        slopes = torch.tensor(alibi_slopes(self.alibi_scale.shape[2]), device=places.device)[:, None, None]
        scale = self.alibi_scale[0, 0].clamp(min=0).float()
        return (-distances * slopes * scale)[None].to(self.alibi_scale.dtype)


class Data2Vec2AudioPreTrainedModel(PreTrainedModel):
    """What the models of this file share."""

    config_class = Data2Vec2AudioConfig
    base_model_prefix = "data2vec2_audio"
    main_input_name = "input_values"
    input_modalities = ("audio",)
    _supports_sdpa = True
    _no_split_modules = ["Data2Vec2Block"]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Data2Vec2AudioEncoder):
            nn.init.ones_(module.alibi_scale)
            module.project_features[2].reset_parameters()
        elif isinstance(module, nn.Conv1d):
            module.reset_parameters()
            if module.bias is None:
                nn.init.kaiming_normal_(module.weight)
        else:
            init_weights(module, self.config.initializer_range)

    def frames_of(self, num_samples: Tensor) -> Tensor:
        """Return the number of frames of recordings with so many samples, int64."""
        for kernel, stride in zip(self.config.conv_kernel, self.config.conv_stride, strict=True):
            num_samples = torch.div(num_samples - kernel, stride, rounding_mode="floor") + 1
        return num_samples


class Data2Vec2AudioModel(Data2Vec2AudioPreTrainedModel):
    """The encoder. It reads whole recordings: masks, noise and decoder belong to pre-training."""

    def __init__(self, config: Data2Vec2AudioConfig) -> None:
        super().__init__(config)
        self.modality_encoders = nn.ModuleDict({"AUDIO": Data2Vec2AudioEncoder(config)})
        self.blocks = nn.ModuleList(Data2Vec2Block(config) for _ in range(config.num_hidden_layers))
        self.post_init()

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> BaseModelOutput | tuple:
        """Encode recordings.

        Args:
            input_values: `[B, N]`, prepared by the feature extractor, padded at the end.
            attention_mask: `[B, N]`, 1 at samples and 0 at padding; None means no padding.
            output_hidden_states: Also return the input of the first block and every block's output.
            return_dict: False returns a tuple.
        Returns:
            `last_hidden_state` `[B, T, D]`, without meaning at padding.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        lengths = None if attention_mask is None else self.frames_of(attention_mask.sum(1).long())
        encoder = self.modality_encoders["AUDIO"]
        x, bias = encoder(input_values, lengths)
        states = [x]
        for block in (*encoder.context_encoder.blocks, *self.blocks):
            if not (self.training and self.config.layerdrop > 0 and torch.rand(()) < self.config.layerdrop):
                x = block(x, bias)
            if output_hidden_states:
                states.append(x)
        output = BaseModelOutput(last_hidden_state=x, hidden_states=tuple(states) if output_hidden_states else None)
        return output.to_tuple() if return_dict is False else output


class Data2Vec2AudioForCTC(Data2Vec2AudioPreTrainedModel):
    """The encoder with a linear map to the tokens of a transcript."""

    def __init__(self, config: Data2Vec2AudioConfig) -> None:
        super().__init__(config)
        self.data2vec2_audio = Data2Vec2AudioModel(config)
        self.dropout = nn.Dropout(config.final_dropout)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def freeze_feature_encoder(self) -> None:
        """Keep the convolutions over the waveform as they are while the rest is trained."""
        self.data2vec2_audio.modality_encoders["AUDIO"].local_encoder.requires_grad_(False)

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> CausalLMOutput | tuple:
        """Predict tokens for each frame.

        Args:
            input_values, attention_mask, output_hidden_states, return_dict: See `Data2Vec2AudioModel`.
            labels: int64 `[B, L]`, tokens of the transcripts; values below 0 are padding.
        Returns:
            `logits` `[B, T, vocab_size]`, and the CTC loss if labels are given.
        """
        encoded = self.data2vec2_audio(input_values, attention_mask, output_hidden_states=output_hidden_states)
        logits = self.lm_head(self.dropout(encoded.last_hidden_state))
        loss = None if labels is None else self._loss(logits, labels, attention_mask)
        output = CausalLMOutput(loss=loss, logits=logits, hidden_states=encoded.hidden_states)
        return output.to_tuple() if return_dict is False else output

    def _loss(self, logits: Tensor, labels: Tensor, attention_mask: Tensor | None) -> Tensor:
        if labels.max() >= self.config.vocab_size:
            raise ValueError(f"`labels` must be < vocab_size ({self.config.vocab_size}), but hold {int(labels.max())}.")
        lengths = logits.new_full((len(logits),), logits.shape[1], dtype=torch.long)
        if attention_mask is not None:
            lengths = self.frames_of(attention_mask.sum(1).long())
        is_label = labels >= 0
        return F.ctc_loss(
            logits.float().log_softmax(-1).transpose(0, 1),
            labels.masked_select(is_label),
            lengths,
            is_label.sum(1),
            blank=self.config.pad_token_id,
            reduction=self.config.ctc_loss_reduction,
            zero_infinity=self.config.ctc_zero_infinity,
        )


class Data2Vec2AudioForSequenceClassification(Data2Vec2AudioPreTrainedModel):
    """The encoder with a classifier: a projection of every frame, their mean, and a linear map to the classes."""

    def __init__(self, config: Data2Vec2AudioConfig) -> None:
        super().__init__(config)
        self.data2vec2_audio = Data2Vec2AudioModel(config)
        self.projector = nn.Linear(config.hidden_size, config.classifier_proj_size)
        self.classifier = nn.Linear(config.classifier_proj_size, config.num_labels)
        self.post_init()

    def freeze_feature_encoder(self) -> None:
        """Keep the convolutions over the waveform as they are while the rest is trained."""
        self.data2vec2_audio.modality_encoders["AUDIO"].local_encoder.requires_grad_(False)

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput | tuple:
        """Classify recordings.

        Args:
            input_values, attention_mask, output_hidden_states, return_dict: See `Data2Vec2AudioModel`.
            labels: int64 `[B]`, the classes.
        Returns:
            `logits` `[B, num_labels]`, and the cross entropy if labels are given.
        """
        encoded = self.data2vec2_audio(input_values, attention_mask, output_hidden_states=output_hidden_states)
        frames = self.projector(encoded.last_hidden_state)
        lengths = torch.full((len(frames),), frames.shape[1], device=frames.device)
        if attention_mask is not None:
            lengths = self.frames_of(attention_mask.sum(1).long())
        is_padding = torch.arange(frames.shape[1], device=frames.device) >= lengths[:, None]
        pooled = frames.masked_fill(is_padding[:, :, None], 0.0).sum(1) / lengths[:, None].to(frames.dtype)
        logits = self.classifier(pooled)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        output = SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=encoded.hidden_states)
        return output.to_tuple() if return_dict is False else output


def alibi_slopes(num_heads: int) -> list[float]:
    """Return the slopes of ALiBi (arXiv 2108.12409) for any number of heads."""
    power = 2 ** int(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (index + 1) / power) for index in range(power)]
    between = [2.0 ** (-4.0 * (index + 1) / power) for index in range(0, 2 * power, 2)]
    return slopes + between[: num_heads - power]
