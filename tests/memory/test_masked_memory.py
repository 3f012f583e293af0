"""Predicted activations of data2vec 2.0: those of all masks of a sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from d2v_fast.memory.step import step_memory
from d2v_fast.ops import attention
from tests.helpers.masked_models import masked_config, random_masked_batch, random_masked_pair
from tests.helpers.saved_tensors import Saved

BF16 = torch.bfloat16


def num_places(config: Any) -> int:
    """Places of the largest sample of a run."""
    if config.modality == "speech":
        return int(config.model.num_frames(int(config.data.max_seconds * config.model.sample_rate)))
    return 16


@pytest.mark.parametrize("modality", ["vision", "speech", "text"])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_activations_are_what_autograd_saves(modality: str, autocast: bool) -> None:
    config = masked_config(modality, model={"width": 32})
    dtype = BF16 if autocast else torch.float32
    predicted = step_memory(config, 4, dtype, autocast=autocast)
    model, teacher = random_masked_pair(config)
    batch, saved = random_masked_batch(config, [num_places(config)] * 4), Saved(model)
    with (
        torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda x: x),
        torch.autocast("cpu", BF16, enabled=autocast),
    ):
        loss = model(batch, teacher.to(dtype)).loss_sum
    loss.backward()
    assert predicted.saved == pytest.approx(saved.bytes, rel=0.05)
    assert sum(arrival.elements for arrival in predicted.arrivals) == sum(p.numel() for p in model.parameters())


def test_fused_attention_saves_no_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels compute the bias of ALiBi from the places; the operation saves the same tensors on every device."""
    config, stock = (masked_config("speech", model={"width": 32, "attention": kind}) for kind in ("fused", "stock"))
    predicted = step_memory(config, 4, torch.float32, device_type="cuda")
    assert predicted.saved < step_memory(stock, 4, torch.float32, device_type="cuda").saved
    model, teacher = random_masked_pair(config)
    batch, saved = random_masked_batch(config, [num_places(config)] * 4), Saved(model)
    monkeypatch.setattr(attention, "_WITH_KERNELS", {"cpu"})
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda x: x):
        loss = model(batch, teacher).loss_sum
    loss.backward()
    assert predicted.saved == pytest.approx(saved.bytes, rel=0.05)


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("modality", ["vision", "speech", "text"])
def test_more_masks_need_more(modality: str, device_type: str) -> None:
    few, many = (
        step_memory(masked_config(modality, mask={"num_masks": masks}), 4, BF16, device_type=device_type).saved
        for masks in (2, 8)
    )
    # the front end, and what is computed once per sample, does not grow
    assert 2 < many / few <= 4
