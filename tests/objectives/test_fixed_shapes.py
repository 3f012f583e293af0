"""Batches of fixed shapes: padded rows count for nothing, and what samples skip is drawn before the forward pass."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from d2v_fast.config import TargetConfig
from d2v_fast.data import Batch
from d2v_fast.models.encoder import Encoder
from d2v_fast.models.student import masked_places
from d2v_fast.objectives.data2vec import Data2Vec, StepOutput
from tests.helpers.static_steps import KINDS, make_trial


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def run(model: Data2Vec, teacher: nn.Module, batch: Batch) -> tuple[StepOutput, dict[str, Tensor]]:
    output = model(batch, teacher)
    output.loss_sum.backward()
    return output, gradients(model)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    error = (actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
    assert error <= tolerance, f"{what}: {error:.2e}"


def distance(actual: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference, relative to that of the expected tensor."""
    return float((actual.double() - expected).norm() / expected.double().norm().clamp_min(1e-30))


@pytest.mark.parametrize("kind", KINDS)
def test_fixed_shapes_change_neither_loss_nor_gradients(kind: str) -> None:
    """All gradients together, and each of them, equal up to 1e-6.

    Images skip branches by a smaller matrix in the plain step, which adds in another order. The gradient of a bias of
    queries is a small difference of large terms, so that each order alone is that far from the exact one.
    """
    model, teacher, batch = make_trial(kind)
    fixed = model.with_fixed_shapes(batch, fixed_counts=False)
    assert len(fixed.rows) > len(batch.rows) == fixed.num_rows
    assert isinstance(fixed.drop_keys, Tensor)
    assert not fixed.drop_keys.all()
    expected, expected_gradients = run(model, teacher, batch)
    actual, actual_gradients = run(model, teacher, fixed)
    assert_close(actual.loss_sum, expected.loss_sum, 1e-6, "loss")
    assert_close(actual.moments, expected.moments, 1e-6, "moments")
    assert actual_gradients.keys() == expected_gradients.keys()
    together = (torch.cat([x.flatten() for x in found.values()]) for found in (actual_gradients, expected_gradients))
    assert distance(*together) <= 1e-6
    rounding = dict.fromkeys(expected_gradients, 0.0)
    if kind == "vision":
        exact = run(model.double(), teacher.double(), dataclasses.replace(batch, inputs=batch.inputs.double()))[1]
        rounding = {name: distance(gradient, exact[name]) for name, gradient in expected_gradients.items()}
    for name, gradient in expected_gradients.items():
        assert distance(actual_gradients[name], gradient) <= max(1e-6, 4 * rounding[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_fixed_shapes_are_exact_in_fp64(kind: str) -> None:
    """The losses compute in fp32, so a random linear loss of the predictions takes their place."""
    model, _, batch = make_trial(kind)
    model.double()
    if kind == "speech":
        # its norms compute in fp32
        model.student.front_end.float()
        model.student.positions.float()
    elif batch.inputs.is_floating_point():
        batch = dataclasses.replace(batch, inputs=batch.inputs.double())
    number = len(batch.rows)
    direction = torch.randn(number, model.student.width, dtype=torch.float64)
    found = []
    for one in (batch, model.with_fixed_shapes(batch, fixed_counts=False)):
        prediction = model.student_forward(model.embed(one)[0], one.rows)[:number]
        (prediction * direction).sum().backward()
        found.append((prediction, gradients(model)))
    (expected, expected_gradients), (actual, actual_gradients) = found
    assert_close(actual, expected, 1e-12, "prediction")
    for name, gradient in expected_gradients.items():
        assert_close(actual_gradients[name], gradient, 1e-12 if gradient.dtype == torch.float64 else 1e-6, name)


@pytest.mark.parametrize("norms", [("layer", "instance"), ("instance", "none"), ("batch", "none"), ("none", "layer")])
def test_padded_rows_are_read_by_no_target(norms: tuple[str, str]) -> None:
    model, teacher, batch = make_trial("vision", target=TargetConfig(top_k=2, layer_norm=norms[0], final_norm=norms[1]))
    expected, _ = run(model, teacher, batch)
    actual, _ = run(model, teacher, model.with_fixed_shapes(batch, fixed_counts=False))
    assert_close(actual.loss_sum, expected.loss_sum, 1e-6, "loss")
    assert_close(actual.moments, expected.moments, 1e-6, "moments")


def test_a_batch_without_masked_rows_adds_nothing() -> None:
    model, teacher, batch = make_trial("vision")
    empty = dataclasses.replace(batch, rows=batch.rows[:0])
    fixed = model.with_fixed_shapes(empty, fixed_counts=False)
    assert len(fixed.rows) == 1
    output, found = run(model, teacher, fixed)
    assert output.loss_sum == 0
    assert not output.moments.any()
    assert not any(gradient.any() for gradient in found.values())


def test_few_lengths_of_rows() -> None:
    """Padding adds less than an eighth, and nearby numbers of rows have the same length."""
    model, _, batch = make_trial("vision")
    lengths = []
    for number in range(1, 700):
        rows = torch.arange(number)
        fixed = model.with_fixed_shapes(dataclasses.replace(batch, rows=rows), fixed_counts=False)
        assert torch.equal(fixed.rows[:number], rows)
        assert number <= len(fixed.rows) < number * 9 / 8 + 1
        lengths.append(len(fixed.rows))
    assert lengths == sorted(lengths)
    assert len(set(lengths[512:])) == 3


@pytest.mark.parametrize(("field", "value"), [("unpadded", torch.arange(3)), ("offsets", torch.tensor([0, 3]))])
def test_packed_batches_have_no_fixed_shape(field: str, value: Tensor) -> None:
    model, _, batch = make_trial("text")
    assert model.shape_varies(batch) is None
    reason = model.shape_varies(dataclasses.replace(batch, **{field: value}))
    assert reason is not None
    assert "in every batch" in reason


def test_masked_places_are_those_that_count() -> None:
    rows = torch.tensor([1, 4, 0, 2])
    for number in range(5):
        mask = masked_places(rows, torch.tensor(number), 6)
        assert mask.nonzero()[:, 0].tolist() == sorted(rows[:number].tolist())


def test_fixed_counts_are_those_of_the_scaled_branches() -> None:
    """Computing some samples equals computing all and multiplying by what a sample is kept for."""
    model, _, batch = make_trial("vision")
    assert isinstance(batch.drop_keys, np.ndarray)
    encoder = next(part for part in model.student.modules() if isinstance(part, Encoder))
    counted = model.with_fixed_shapes(batch, fixed_counts=True)
    other = model.with_fixed_shapes(dataclasses.replace(batch, drop_keys=batch.drop_keys + 9), fixed_counts=True)
    assert isinstance(counted.drop_keys, Tensor)
    assert isinstance(other.drop_keys, Tensor)
    assert counted.drop_keys.shape == other.drop_keys.shape
    assert not torch.equal(counted.drop_keys, other.drop_keys)

    x = model.student.embedding(batch.inputs).detach()
    bias = model.student.position_bias()
    actual = encoder(x, bias, drop_keys=counted.drop_keys).last_hidden
    expected = x
    parts = iter(encoder._drawn(counted.drop_keys, x))
    for block in encoder.blocks:
        for branch in ("attention", "mlp"):
            part = next(parts)
            factor = torch.ones(len(x))
            if part is not None:
                assert part.share == len(part.samples) / len(x)
                factor = torch.zeros(len(x)).index_fill_(0, part.samples, float(1 / part.share))
            if branch == "attention":
                added = block.gamma1 * block.attention(block.norm1(expected), bias)
            else:
                added = block.gamma2 * block.mlp(block.norm2(expected))
            expected = expected + added * factor[:, None, None]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_fixed_counts_keep_every_sample_alike() -> None:
    model, _, _ = make_trial("vision")
    encoder = next(part for part in model.student.modules() if isinstance(part, Encoder))
    keys, num_samples, draws = np.random.default_rng(3), 10, 2000
    total = torch.zeros(num_samples)
    for _ in range(draws):
        drawn = encoder.draw(keys.integers(0, 2**63, num_samples).astype(np.uint64), fixed_counts=True)
        assert drawn is not None
        last = drawn.split(encoder._kept_counts(num_samples))[-1]
        assert last.tolist() == sorted(set(last.tolist()))
        total[last] += 1
    expected = round(num_samples * (1 - encoder.drop_rates[-1])) / num_samples
    assert expected < 1
    assert (total / draws - expected).abs().max() < 5 * (0.25 / draws) ** 0.5


def test_layer_drop_has_no_fixed_counts() -> None:
    model, _, batch = make_trial("speech")
    drawn = model.with_fixed_shapes(batch, fixed_counts=True).drop_keys
    assert isinstance(drawn, Tensor)
    assert drawn.dtype == torch.bool
