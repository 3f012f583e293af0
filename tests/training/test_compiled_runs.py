"""Whole runs with compiled blocks: of both versions of every modality, and in bf16 under DeepSpeed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tests.helpers.marks import needs_deepspeed
from tests.helpers.runs import (
    TINY,
    TINY_2,
    TINY_2_SPEECH,
    TINY_2_TEXT,
    TINY_SPEECH,
    TINY_TEXT,
    leave_out_reports,
    run_forked,
    tiny_file,
)

BASES = {
    "images": TINY,
    "speech": TINY_SPEECH,
    "text": TINY_TEXT,
    "images 2.0": TINY_2,
    "speech 2.0": TINY_2_SPEECH,
    "text 2.0": TINY_2_TEXT,
}


def trace_only() -> None:
    """Let blocks be traced with their backward passes, in one graph each, without the compiler of kernels."""
    made = nn.Module.compile
    nn.Module.compile = lambda block: made(block, backend="aot_eager", fullgraph=True)  # type: ignore[method-assign]
    leave_out_reports()


def train(folder: Path, base: dict[str, Any], **changes: Any) -> list[float]:
    """Run 3 steps with compiled blocks and return the losses."""
    schedule = {"steps": 3, "warmup_steps": 1}
    file = tiny_file(folder, base, d2v__schedule=schedule, d2v__run__compile=True, **changes)
    output = folder / "output"
    assert run_forked("--ds_config", file, "--run", "r", output=output, before=trace_only) == [0], output.read_text()
    said = output.read_text()
    assert "the blocks are compiled" in said
    assert "Warning" not in said
    lines = (folder / "runs" / "r" / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


# slow: each traces the blocks of student and teacher
@pytest.mark.slow
@pytest.mark.parametrize("base", BASES.values(), ids=BASES.keys())
def test_blocks_of_a_run_are_one_graph(base: dict[str, Any], tmp_path: Path) -> None:
    """Also with dropout, which a CPU draws by operations that a compiler does not know."""
    changes = {"d2v__model__attention_dropout": 0.1}
    if base["d2v"].get("modality", "vision") != "vision":
        changes["d2v__model__dropout"] = 0.1
    assert len(train(tmp_path, base, **changes)) == 3


# slow: DeepSpeed is imported, and blocks are traced
@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("base", [TINY_TEXT, TINY_2_SPEECH], ids=["text", "speech 2.0"])
def test_bf16_under_deepspeed(base: dict[str, Any], tmp_path: Path) -> None:
    losses = train(tmp_path, base, zero_optimization__stage=2, bf16__enabled=True)
    assert len(losses) == 3
