"""The step that the benchmark measures: on a GPU it is captured, as in a run."""

from __future__ import annotations

import copy

import pytest
import torch

from bench import bench_step
from d2v_fast.config import parse_config
from d2v_fast.training.capture import WARM_UP_RUNS
from tests.helpers.dry_capture import DryCapture
from tests.helpers.runs import TINY
from tests.helpers.static_steps import make_batch


def test_a_captured_step_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(bench_step, "compile_blocks", lambda *networks: compiled.extend(networks))
    config, capture = parse_config(copy.deepcopy(TINY), 1), DryCapture()
    ours = bench_step.OurStep(config, torch.device("cpu"), capture)
    batch = make_batch("vision", config.d2v)
    ours.loss(batch).backward()
    ours.model.zero_grad()
    before = ours.teacher.state_dict()["average"]["embedding.cls_token"].clone()
    for _ in range(WARM_UP_RUNS + bench_step.NUM_WARMUP):
        ours(batch)
    # a micro-step without moments, and the update
    assert (capture.records, capture.replays) == (2, 2 * bench_step.NUM_WARMUP)
    assert compiled == [ours.model, ours.teacher.module]
    assert set(ours.shares()) == {"captured micro-steps", "captured update"}
    assert not torch.equal(ours.teacher.state_dict()["average"]["embedding.cls_token"], before)
