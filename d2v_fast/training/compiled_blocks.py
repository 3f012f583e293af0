"""Compile the blocks of student and teacher by `torch.compile`.

Blocks are compiled one by one: they are alike, so that one program serves all of them and compiling takes seconds. The
embedding, the choice of rows and the loss stay as they are, since they are fused operations or cheap.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import nn

from d2v_fast.distributed.deepspeed_internals import zero_stage
from d2v_fast.models.encoder import Encoder
from d2v_fast.training.engine import Engine

# programs of a block: student and teacher, all tokens and some rows, with and without padding, other sizes
_PROGRAMS = 64


def reason_not_to_compile(engine: Engine, device: torch.device) -> str | None:
    """Return why blocks cannot be compiled, as the end of a sentence; None if they can."""
    if engine.deepspeed is not None and zero_stage(engine.deepspeed) == 3:
        return "ZeRO stage 3 gathers and drops parameters by hooks within the blocks"
    if device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "Triton is not installed: `pip install triton`"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "there is no C++ compiler"
    return None


def compile_blocks(*networks: nn.Module) -> None:
    """Compile the blocks of all encoders in `networks` at their first use."""
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, _PROGRAMS)
    for network in networks:
        for encoder in network.modules():
            if isinstance(encoder, Encoder):
                encoder.is_compiled = True
                for block in encoder.blocks:
                    block.compile()
