"""Image encoders as ONNX files, for runtimes without torch."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from d2v_fast.atomic import replaced
from d2v_fast.config import VisionConfig
from d2v_fast.modalities import Student

INPUT, OUTPUT = "pixel_values", "last_hidden_state"
OPSET = 18
_NEEDED = ("onnx", "onnxscript")


def export_onnx(model: Student, config: VisionConfig, path: Path) -> None:
    """Write an image encoder as one `.onnx` file, complete or not at all.

    It takes `pixel_values`, fp32 `[B, C, H, W]` as Transformers' folder prepares them, for any B, and gives
    `last_hidden_state`, fp32 `[B, 1 + P, D]`, class token first, as `Data2VecVisionModel` does.

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
    sizes = config.model
    # one would be taken for a constant
    example = torch.zeros(2, sizes.channels, sizes.image_size, sizes.image_size)
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)
        # the exporter prints its progress
        with replaced(path) as part, warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            # by itself: the exporter would take a fixed number of images where a free one cannot be traced
            free = {INPUT: {0: torch.export.Dim("batch")}}
            program = torch.export.export(_Whole(model).eval(), (example,), dynamic_shapes=free, strict=False)
            torch.onnx.export(
                program,
                (example,),
                part,
                input_names=[INPUT],
                output_names=[OUTPUT],
                opset_version=OPSET,
                dynamo=True,
                external_data=False,
                dynamic_shapes=free,
            )
    finally:
        logger.setLevel(level)


class _Whole(nn.Module):
    """An encoder with one input and one output."""

    def __init__(self, model: Student) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        hidden: Tensor = self.model(pixel_values).last_hidden
        return hidden


def _require(name: str) -> None:
    try:
        importlib.import_module(name)
    except Exception as error:
        raise ValueError(
            f"an .onnx file is written with {name}, which cannot be imported ({type(error).__name__}: {error}): "
            f"`pip install 'd2v_fast[onnx]'`."
        ) from None
