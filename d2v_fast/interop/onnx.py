"""Encoders as ONNX files, for runtimes without torch.

Each modality defines its graph, whose inputs and output have the names, shapes and meanings of its Transformers model.
B, the batch size, is free, and so is the length of a sequence. `attention_mask` is 1 at samples or tokens and 0 at
padding, where the output has no meaning.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from d2v_fast.config import D2VConfig
from d2v_fast.files.atomic import replaced
from d2v_fast.interop.formats import require_format
from d2v_fast.modalities import modality_of
from d2v_fast.models.student import Student
from d2v_fast.packages import install_command

OUTPUT = "last_hidden_state"
OPSET = 18
_NEEDED = ("onnx", "onnxscript")
# of the example that is traced; an exporter takes a size of 1 for a constant
EXAMPLE_BATCH = 2


class Graph(NamedTuple):
    """The module to trace.

    Attributes:
        module: Takes the inputs as arguments and returns one tensor.
        inputs: An example of each input, by name.
        free: The free dimensions of each input, by name and index.
    """

    module: nn.Module
    inputs: dict[str, Tensor]
    free: dict[str, dict[int, Any]]


def export_onnx(model: Student, config: D2VConfig, path: Path) -> None:
    """Write an encoder as one `.onnx` file, complete or not at all.

    Args:
        model: Put into eval mode.
        config: The run's.
        path: Replaced if it exists.
    Raises:
        ValueError: The modality has no graph, a package is missing, or the weights exceed the limit of a file.
    """
    modality = modality_of(config)
    graph_of = require_format(modality, modality.onnx, "ONNX graph")
    for name in _NEEDED:
        _require(name)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if size >= 2**31:
        raise ValueError(f"`--format` must be transformers for weights of {size:,} bytes: an .onnx file holds 2 GiB.")
    graph = graph_of(model.eval(), config)
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)
        # the exporter prints its progress
        # with a gradient to a bias of attention, another kernel is traced, whose output has no free sizes
        with (
            torch.no_grad(),
            replaced(path) as part,
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            # traced here: the exporter alone would fall back to fixed sizes where free ones cannot be traced
            program = torch.export.export(
                graph.module,
                tuple(graph.inputs.values()),
                dynamic_shapes=graph.free,
                strict=False,
                # sizes that hold for all lengths, but that no prover shows
                prefer_deferred_runtime_asserts_over_guards=True,
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


def _require(name: str) -> None:
    try:
        importlib.import_module(name)
    except Exception as error:
        raise ValueError(
            f"an .onnx file is written with {name}, which cannot be imported ({type(error).__name__}: {error}): "
            f"`{install_command(name)}`."
        ) from None
