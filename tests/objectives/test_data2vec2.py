"""One step of data2vec 2.0: what it does not depend on, and its errors. The numbers are compared in tests/golden2."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from d2v_fast.config import MaskedSpeechConfig, MaskedTextConfig, MaskedVisionConfig, check_d2v
from d2v_fast.modalities import build_student, modality_of
from d2v_fast.models.visible import alibi_slopes
from d2v_fast.objectives.build import build_model
from tests.helpers.masked_models import masked_config, random_masked_batch, random_masked_pair

MODALITIES = ("vision", "speech", "text")


@pytest.mark.parametrize(
    ("config", "whole", "averaged"),
    [
        (MaskedVisionConfig(), 88_233_216, 85_647_360),
        (MaskedSpeechConfig(), 93_783_308, 88_561_932),
        (MaskedTextConfig(), 152_961_792, 85_054_464),
    ],
    ids=MODALITIES,
)
def test_published_parameter_counts(config: Any, whole: int, averaged: int) -> None:
    with torch.device("meta"):
        model = build_model(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == whole
    assert sum(parameter.numel() for parameter in model.student.averaged.parameters()) == averaged


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return {name: torch.zeros(()) if grad is None else grad for name, grad in found.items()}


@pytest.mark.parametrize("modality", MODALITIES)
def test_the_split_of_a_batch_changes_nothing(modality: str) -> None:
    """Also with padding, which another split distributes otherwise."""
    config = masked_config(modality)
    model, teacher = random_masked_pair(config)
    lengths = [9, 12, 12, 5]
    whole = model.double()(as_double(random_masked_batch(config, lengths)), teacher.double())
    whole.loss_sum.backward()
    expected = gradients(model)
    parts = [(lengths[:1], 0), (lengths[1:3], 1), (lengths[3:], 3)]
    total, rows = torch.zeros(()), 0
    for some, first in parts:
        output = model(as_double(random_masked_batch(config, some, first)), teacher)
        output.loss_sum.backward()
        total, rows = total + output.loss_sum.detach(), rows + output.num_rows
    assert rows == whole.num_rows
    # the noise is drawn in fp32
    torch.testing.assert_close(total, whole.loss_sum.detach(), rtol=1e-7, atol=0)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-6, atol=1e-6 * float(expected[name].abs().max()))
    if modality == "vision":
        assert whole.class_loss is not None
        assert whole.class_loss > 0


def as_double(batch: Any) -> Any:
    return batch if batch.inputs.dtype == torch.int64 else replace(batch, inputs=batch.inputs.double())


def test_the_published_class_weight_counts_rows_of_the_micro_batch() -> None:
    config = masked_config("vision")
    model, teacher = random_masked_pair(config)
    batch = random_masked_batch(config, [16] * 4)
    output = model(batch, teacher)
    model.cls_per_batch, model.cls_weight = True, model.cls_weight / len(batch.visible)
    published = model(batch, teacher)
    torch.testing.assert_close(published.class_loss, output.class_loss)
    half = model(random_masked_batch(config, [16] * 2), teacher)
    # half of the rows, and half of the factor
    assert float(half.class_loss.detach() / published.class_loss.detach()) == pytest.approx(0.25, rel=0.2)


@pytest.mark.parametrize("modality", MODALITIES)
def test_the_teacher_sees_the_whole_input_and_gets_no_gradient(modality: str) -> None:
    config = masked_config(modality)
    model, teacher = random_masked_pair(config)
    batch = random_masked_batch(config, [12, 12])
    _, unmasked = model.embed(batch)
    features = model.teacher_features(unmasked, teacher, batch.rows)
    whole = model.student.with_averaged(teacher).eval()
    expected = whole.features(batch.inputs, top_k=2)
    for found, feature in zip(features, expected, strict=True):
        torch.testing.assert_close(found, feature)
        assert not found.requires_grad


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropping_layers_and_recomputing(modality: str, checkpointing: bool) -> None:
    """Every parameter gets a finite gradient, and a recomputed one is the same."""
    changes = {"layer_drop": 0.5, "dropout": 0.1, "gradient_checkpointing": checkpointing}
    config = masked_config(modality, model=changes)
    model, teacher = random_masked_pair(config)
    batch = random_masked_batch(config, [12, 7, 12, 7])
    torch.manual_seed(1)
    output = model.train()(batch, teacher)
    output.loss_sum.backward()
    assert torch.isfinite(output.loss_sum)
    assert all(torch.isfinite(grad).all() and grad.abs().max() > 0 for grad in gradients(model).values())


def test_a_batch_of_the_first_version_is_refused() -> None:
    config = masked_config("vision")
    model, teacher = random_masked_pair(config)
    with pytest.raises(ValueError, match=r"`batch` must have `visible` and `noise_keys`"):
        model(replace(random_masked_batch(config, [16]), visible=None), teacher)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"objective": "data2vec3"}, r'`d2v.objective` must be "data2vec" or "data2vec2" '),
        ({"objective": ["data2vec2"]}, r"`d2v.objective` must be"),
        ({"mask": {"num_masks": 0}}, r"`d2v.mask.num_masks`"),
        ({"mask": {"prob": 0.99}, "model": {"image_size": 64}}, r"leave at least one patch masked and one visible"),
        ({"model": {"width": 90, "heads": 9, "decoder": {"groups": 3, "width": 9}}}, r"multiple of 4"),
        ({"model": {"decoder": {"groups": 5, "width": 20}}}, r"`d2v.model.decoder.groups` must divide `width`"),
        ({"model": {"layer_scale": 0.1}}, r"layer_scale"),
        ({"modality": "text", "data": {"separate_documents": True}}, r"be false with data2vec 2.0"),
        ({"modality": "speech", "data": {"min_seconds": 0.03}, "mask": {"prob": 0.2}}, r"leave at least one frame"),
    ],
)
def test_errors_of_a_configuration(raw: dict[str, Any], message: str) -> None:
    config, problems = check_d2v({"objective": "data2vec2", **raw})
    assert config is None
    assert any(re.search(message, problem) for problem in problems), problems


def test_an_objective_has_its_own_record() -> None:
    for modality in MODALITIES:
        config = masked_config(modality)
        record = modality_of(config)
        assert (record.name, record.objective) == (modality, "data2vec2")
        assert type(build_student(config)) is record.encoder()


@pytest.mark.parametrize("modality", MODALITIES)
def test_sixteen_bits(modality: str) -> None:
    """In bf16 throughout, as with DeepSpeed, and by autocast with a teacher in bf16; ALiBi stays in fp32."""
    config = masked_config(modality)
    model, teacher = random_masked_pair(config)
    batch = random_masked_batch(config, [12, 7])
    expected = model(batch, teacher).loss_sum.detach()
    teacher.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(batch, teacher)
    output.loss_sum.backward()
    torch.testing.assert_close(output.loss_sum.detach(), expected, rtol=0.05, atol=0)
    model.bfloat16()
    if modality == "speech":
        alibi = model.student.averaged.alibi
        places = torch.tensor([[0, 301, 999]])
        assert alibi(places).dtype == torch.float32
        slope = alibi_slopes(2)[0] * float(alibi.scale[0].detach())
        assert float(alibi(places)[0, 0, 1, 2].detach()) == pytest.approx(-698 * slope, rel=1e-6)
    output = model(batch, teacher)
    output.loss_sum.backward()
    torch.testing.assert_close(output.loss_sum.detach(), expected, rtol=0.05, atol=0)
