"""The speech encoder as an ONNX graph.

Inputs: `input_values` fp32 `[B, N]`, padded on the right, and `attention_mask` int32 `[B, N]`. Output:
`last_hidden_state` `[B, T, D]`. Padding does not change an utterance's output; in Transformers it changes the last
frames (https://github.com/huggingface/transformers/issues/25621).
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v_fast.interop.onnx import EXAMPLE_BATCH, Graph
from d2v_fast.modalities.speech.config import RecordingsConfig
from d2v_fast.modalities.speech.conv_stack import ConvStack
from d2v_fast.modalities.speech.encoder import ConvPositions, SpeechModel
from d2v_fast.modalities.speech.encoder2 import MaskedSpeechModel

# frames of the example input for tracing
_FRAMES = 24


def speech_graph(model: SpeechModel | MaskedSpeechModel, config: RecordingsConfig) -> Graph:
    """Return the graph of an encoder in eval mode."""
    waveforms = torch.zeros(EXAMPLE_BATCH, config.model.num_samples(_FRAMES))
    # int32, as the feature extractor of the exported folder returns it
    inputs = {"input_values": waveforms, "attention_mask": torch.ones_like(waveforms, dtype=torch.int32)}
    batch, length = torch.export.Dim("batch"), torch.export.Dim("samples", min=config.model.num_samples(2))
    return Graph(_Speech(model), inputs, {name: {0: batch, 1: length} for name in inputs})


class _Speech(nn.Module):
    """A speech encoder whose front end uses standard convolutions."""

    def __init__(self, model: SpeechModel | MaskedSpeechModel) -> None:
        super().__init__()
        self.convolutions = _Convolutions(model.front_end.convolutions)
        front_end = copy.copy(model.front_end)
        front_end._modules = {**front_end._modules, "convolutions": self.convolutions}
        self.model = copy.copy(model)
        context = copy.copy(model.context)
        if context.positions is not None:
            context._modules = {**context._modules, "positions": _Positions(context.positions)}
        self.model._modules = {**model._modules, "front_end": front_end, "context": context}

    def forward(self, input_values: Tensor, attention_mask: Tensor) -> Tensor:
        lengths = self.convolutions.num_frames(attention_mask.sum(1))
        hidden: Tensor = self.model(input_values, lengths).last_hidden
        return hidden


class _Positions(nn.Module):
    """Positional convolutions without the fused norm and GELU of data2vec 2.0, which do not exist in ONNX."""

    def __init__(self, positions: ConvPositions) -> None:
        super().__init__()
        self.positions = positions

    def forward(self, frames: Tensor, is_padding: Tensor | None) -> Tensor:
        return ConvPositions.forward(self.positions, frames, is_padding)


class _Convolutions(nn.Module):
    """`ConvStack` as standard convolutions, because its own operations do not exist in ONNX."""

    def __init__(self, stack: ConvStack) -> None:
        super().__init__()
        self.stack = stack

    def forward(self, waveforms: Tensor) -> Tensor:
        """Map `[B, N]` to `[B, T, C]`."""
        stack = self.stack
        frames = waveforms[:, None]
        layers = zip(stack.weights, stack.norm_weights, stack.norm_biases, stack.strides, strict=True)
        for weight, norm_weight, norm_bias, stride in layers:
            frames = F.conv1d(frames, weight.transpose(1, 2), stride=stride).transpose(1, 2)
            frames = F.gelu(F.layer_norm(frames, frames.shape[-1:], norm_weight, norm_bias, stack.eps))
            frames = frames.transpose(1, 2)
        return frames.transpose(1, 2)

    def num_frames(self, lengths: Tensor) -> Tensor:
        """Convert lengths in samples, int64 `[B]`, to numbers of frames, int64 `[B]`."""
        for weight, stride in zip(self.stack.weights, self.stack.strides, strict=True):
            lengths = torch.div(lengths - weight.shape[1], stride, rounding_mode="floor") + 1
        return lengths
