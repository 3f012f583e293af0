"""A step has the same loss and gradient for every split over processes and micro-steps, with stochastic depth and
layer drop at the published rates."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from d2v_fast.config import BatchSplit, D2VConfig, parse_config
from d2v_fast.data import Batch, BatchMaker, batch_maker
from d2v_fast.models.encoder import Encoder
from d2v_fast.objectives.build import build_model
from tests.helpers.loaders import make_loader
from tests.helpers.runs import TINY, TINY_2, TINY_2_SPEECH, TINY_2_TEXT, TINY_SPEECH, TINY_TEXT, tiny_file

# of one global batch of 24; steps of samples of unlike length hold fewer, in uneven shares
PROCESSES, ACCUMULATION = 2, 6

SMOOTH = {"d2v__model__dropout": 0.0, "d2v__model__attention_dropout": 0.0}
PRE_NORM = {**SMOOTH, "d2v__model__drop_path": 0.25, "d2v__model__depth": 4}
POST_NORM = {**SMOOTH, "d2v__model__layer_drop": 0.05, "d2v__model__depth": 4}
SMOOTH_2 = {**SMOOTH, "d2v__model__context_dropout": 0.0, "d2v__model__decoder__dropout": 0.0}
# every second block of a sample is left out: a micro-batch in which none keeps a block is common
OFTEN = {**POST_NORM, "d2v__model__layer_drop": 0.5}

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "images": (TINY, PRE_NORM),
    "images, checkpointed": (TINY, {**PRE_NORM, "d2v__model__gradient_checkpointing": True}),
    "images, instance norm": (TINY, {**PRE_NORM, "d2v__target__layer_norm": "instance"}),
    "speech, cropped": (TINY_SPEECH, {**POST_NORM, "d2v__data__lengths": "crop"}),
    "speech, padded": (TINY_SPEECH, OFTEN),
    "speech, packed": (TINY_SPEECH, {**OFTEN, "d2v__model__attention": "packed"}),
    "speech, equal counts": (TINY_SPEECH, {**OFTEN, "d2v__mask__equal_counts": True}),
    "speech, own positions": (TINY_SPEECH, {**OFTEN, "d2v__model__position_in_teacher": "averaged"}),
    "text": (TINY_TEXT, POST_NORM),
    "text, checkpointed": (TINY_TEXT, {**OFTEN, "d2v__model__gradient_checkpointing": True}),
    "text, separate documents": (TINY_TEXT, {**OFTEN, "d2v__data__separate_documents": True}),
    "text, packed documents": (
        TINY_TEXT,
        {**OFTEN, "d2v__data__separate_documents": True, "d2v__model__attention": "packed"},
    ),
    "images 2.0": (TINY_2, {**SMOOTH_2, "d2v__model__layer_drop": 0.3}),
    "speech 2.0, cropped": (TINY_2_SPEECH, {**SMOOTH_2, "d2v__data__lengths": "crop"}),
    "speech 2.0, padded": (TINY_2_SPEECH, {**SMOOTH_2, "d2v__model__layer_drop": 0.5}),
    "text 2.0": (TINY_2_TEXT, {**SMOOTH_2, "d2v__model__layer_drop": 0.5}),
    "text, packed stream": (TINY_TEXT, {**OFTEN, "d2v__data__packing": "stream", "d2v__model__attention": "packed"}),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("tokens"))


def make_config(case: str, folder: Path, cache: str) -> D2VConfig:
    base, changes = CASES[case]
    if base["d2v"].get("modality") == "text":
        changes = changes | {"d2v__data__tokens_path": cache}
    return parse_config(json.loads(tiny_file(folder, base, **changes).read_text())).d2v


def steps_of(maker: BatchMaker, config: D2VConfig, processes: int, accumulation: int, count: int) -> list[list[Batch]]:
    """Return all micro-batches of all processes, step by step."""
    split = BatchSplit.of(24 // (processes * accumulation), accumulation, processes)
    ranks = [make_loader(maker, config, split, rank=rank, num_steps=count) for rank in range(processes)]
    steps = []
    for parts in zip(*ranks, strict=True):
        batches = [batch for part in parts for batch in part.micro_batches]
        assert {part.num_rows for part in parts} == {sum(len(batch.rows) for batch in batches)}
        steps.append(batches)
    return steps


@pytest.mark.parametrize("case", CASES)
def test_any_split_has_the_same_loss_and_gradient(case: str, tmp_path: Path, cache: str) -> None:
    config = make_config(case, tmp_path, cache)
    maker = batch_maker(config)
    model = build_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    teacher = copy.deepcopy(model.student.averaged).eval().requires_grad_(False)
    [blocks] = (part.blocks for part in model.student.averaged.modules() if isinstance(part, Encoder))

    def of_step(batches: list[Batch]) -> tuple[float, Tensor]:
        model.zero_grad()
        loss = 0.0
        for batch in batches:
            output = model(batch, teacher)
            output.loss_sum.backward()
            loss += output.loss_sum.item()
            assert all(p.grad is not None for block in blocks for p in block.parameters())
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return loss, torch.cat([gradient.flatten() for gradient in gradients])

    [whole] = steps_of(maker, config, 1, 1, 1)
    expected_loss, expected_gradient = of_step(whole)
    [batches] = steps_of(maker, config, PROCESSES, ACCUMULATION, 1)
    loss, gradient = of_step(batches)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert (gradient - expected_gradient).norm() < 1e-5 * expected_gradient.norm()
    # what was left out is not nothing
    model.eval()
    assert of_step(whole)[0] != pytest.approx(expected_loss, rel=1e-5)
