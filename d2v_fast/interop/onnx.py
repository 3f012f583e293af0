"""Encoders as ONNX files, for runtimes without torch.

The inputs and the output have the names, shapes and meanings of Transformers' models:

| | inputs | `last_hidden_state` |
|---|---|---|
| vision | `pixel_values` fp32 `[B, C, H, W]` | `[B, 1 + P, D]`, class token first, after the last norm |
| speech | `input_values` fp32 `[B, N]`, `attention_mask` int32 `[B, N]` | `[B, T, D]` |
| text | `input_ids` int64 `[B, T]`, `attention_mask` int64 `[B, T]` | `[B, T, D]` |

B, N and T are free. `attention_mask` is 1 at samples or tokens and 0 at padding, where the output has no meaning.
Speech must be padded on the right. A padded utterance gets the output that it gets alone, whereas Transformers changes
the frames at its end (https://github.com/huggingface/transformers/issues/25621). Text may be padded on either side:
positions count the tokens that are not padding.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v_fast.config import D2VConfig, SpeechConfig, VisionConfig
from d2v_fast.files.atomic import replaced
from d2v_fast.modalities.speech.conv_stack import ConvStack
from d2v_fast.modalities.speech.encoder import SpeechModel
from d2v_fast.modalities.text.config import POSITION_OFFSET
from d2v_fast.modalities.text.encoder import TextModel
from d2v_fast.models.student import Student
from d2v_fast.packages import install_command

OUTPUT = "last_hidden_state"
OPSET = 18
_NEEDED = ("onnx", "onnxscript")
# of the example that is traced: none is 1, which would be taken for a constant
_BATCH, _FRAMES, _TOKENS = 2, 24, 6


class _Graph(NamedTuple):
    """What is traced.

    Attributes:
        module: with the inputs as arguments, and one output.
        inputs: examples by name.
        free: the axes of each input that may have another size, by name.
    """

    module: nn.Module
    inputs: dict[str, Tensor]
    free: dict[str, dict[int, Any]]


def export_onnx(model: Student, config: D2VConfig, path: Path) -> None:
    """Write an encoder as one `.onnx` file, complete or not at all; the table above lists its inputs and output.

    Args:
        model: put into eval mode.
        config: of the run.
        path: replaced if it is there.
    Raises:
        ValueError: a package is missing, or the weights are more than an `.onnx` file holds.
    """
    for name in _NEEDED:
        _require(name)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if size >= 2**31:
        raise ValueError(f"`--format` must be transformers for weights of {size:,} bytes: an .onnx file holds 2 GiB.")
    graph = _graph_of(model.eval(), config)
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)
        # the exporter prints its progress
        with replaced(path) as part, warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            # by itself: the exporter would take fixed sizes where free ones cannot be traced
            program = torch.export.export(
                graph.module, tuple(graph.inputs.values()), dynamic_shapes=graph.free, strict=False
            )
            torch.onnx.export(
                program,
                tuple(graph.inputs.values()),
                part,
                input_names=list(graph.inputs),
                output_names=[OUTPUT],
                opset_version=OPSET,
                dynamo=True,
                external_data=False,
                dynamic_shapes=graph.free,
            )
    finally:
        logger.setLevel(level)


def _graph_of(model: Student, config: D2VConfig) -> _Graph:
    batch = torch.export.Dim("batch")
    if isinstance(config, VisionConfig):
        sizes = config.model
        pixels = torch.zeros(_BATCH, sizes.channels, sizes.image_size, sizes.image_size)
        return _Graph(_Vision(model), {"pixel_values": pixels}, {"pixel_values": {0: batch}})
    if isinstance(model, TextModel):
        tokens = torch.zeros(_BATCH, min(_TOKENS, model.embedding.max_positions), dtype=torch.int64)
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        length = torch.export.Dim("sequence", max=model.embedding.max_positions)
        return _Graph(_Text(model), inputs, {name: {0: batch, 1: length} for name in inputs})
    assert isinstance(model, SpeechModel)
    assert isinstance(config, SpeechConfig)
    waveforms = torch.zeros(_BATCH, config.model.num_samples(_FRAMES))
    # int32, as the feature extractor of the exported folder returns it
    inputs = {"input_values": waveforms, "attention_mask": torch.ones_like(waveforms, dtype=torch.int32)}
    length = torch.export.Dim("samples", min=config.model.num_samples(2))
    return _Graph(_Speech(model), inputs, {name: {0: batch, 1: length} for name in inputs})


class _Vision(nn.Module):
    """An image encoder and its last norm."""

    def __init__(self, model: Student) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model.finish(self.model(pixel_values).last_hidden)


class _Speech(nn.Module):
    """A speech encoder, whose convolutions are those of ONNX."""

    def __init__(self, model: SpeechModel) -> None:
        super().__init__()
        self.convolutions = _Convolutions(model.front_end.convolutions)
        front_end = copy.copy(model.front_end)
        front_end._modules = {**front_end._modules, "convolutions": self.convolutions}
        self.model = copy.copy(model)
        self.model._modules = {**model._modules, "front_end": front_end}

    def forward(self, input_values: Tensor, attention_mask: Tensor) -> Tensor:
        lengths = self.convolutions.num_frames(attention_mask.sum(1))
        hidden: Tensor = self.model(input_values, lengths).last_hidden
        return hidden


class _Convolutions(nn.Module):
    """What `ConvStack` computes, by convolutions: its own operations are not ONNX's."""

    def __init__(self, stack: ConvStack) -> None:
        super().__init__()
        self.stack = stack

    def forward(self, waveforms: Tensor) -> Tensor:
        """`[B, N]` to `[B, T, C]`."""
        stack = self.stack
        frames = waveforms[:, None]
        layers = zip(stack.weights, stack.norm_weights, stack.norm_biases, stack.strides, strict=True)
        for weight, norm_weight, norm_bias, stride in layers:
            frames = F.conv1d(frames, weight.transpose(1, 2), stride=stride).transpose(1, 2)
            frames = F.gelu(F.layer_norm(frames, frames.shape[-1:], norm_weight, norm_bias, stack.eps))
            frames = frames.transpose(1, 2)
        return frames.transpose(1, 2)

    def num_frames(self, lengths: Tensor) -> Tensor:
        """int64 `[B]`, frames of utterances of int64 `lengths` `[B]`, in samples."""
        for weight, stride in zip(self.stack.weights, self.stack.strides, strict=True):
            lengths = torch.div(lengths - weight.shape[1], stride, rounding_mode="floor") + 1
        return lengths


class _Text(nn.Module):
    """A text encoder whose positions count the tokens that are not padding."""

    def __init__(self, model: TextModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        embedding = self.model.embedding
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0) + POSITION_OFFSET
        x = embedding.norm(embedding.token(input_ids) + F.embedding(positions, embedding.position))
        hidden: Tensor = self.model.context.encoder(x, attention_mask[:, None, None, :] != 0).last_hidden
        return hidden


def _require(name: str) -> None:
    try:
        importlib.import_module(name)
    except Exception as error:
        raise ValueError(
            f"an .onnx file is written with {name}, which cannot be imported ({type(error).__name__}: {error}): "
            f"`{install_command(name)}`."
        ) from None
