"""One step of data2vec: the objective and its gradients, and who may influence them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from d2v_fast.config import TargetConfig, VisionConfig, VisionModelConfig
from d2v_fast.objectives.build import build_model
from d2v_fast.objectives.data2vec import Data2Vec
from tests.helpers import vision_reference as reference
from tests.helpers.vision_models import CONFIG, Images, images, random_images, random_pair


def pixel_mask(batch: Images, config: VisionModelConfig = CONFIG.model) -> Tensor:
    """The mask per pixel, bool `[B, 1, H, W]`."""
    grid = batch.masked.view(-1, 1, config.grid_size, config.grid_size)
    return grid.repeat_interleave(config.patch_size, 2).repeat_interleave(config.patch_size, 3)


def features_of(model: Data2Vec, batch: Images, teacher: torch.nn.Module) -> list[Tensor]:
    return model.teacher_features(model.embed(batch)[1], teacher, batch.rows)


def double_weights(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().double().requires_grad_() for name, p in module.named_parameters()}


@pytest.mark.parametrize(
    ("sizes", "count"),
    [({}, 86_256_720), ({"width": 1024, "depth": 24, "heads": 16}, 304_186_816)],
    ids=["base", "large"],
)
def test_published_parameter_counts(sizes: dict[str, int], count: int) -> None:
    with torch.device("meta"):
        model = build_model(VisionConfig(model=VisionModelConfig(**sizes)))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_step_matches_fp64_formulas() -> None:
    model, teacher = random_pair()
    batch = random_images()
    weights = double_weights(model)
    expected_loss, prediction, target = reference.step(
        weights, double_weights(teacher), CONFIG, batch.inputs.double(), batch.masked
    )
    expected_grads = torch.autograd.grad(expected_loss, list(weights.values()))

    output = model(batch, teacher)
    output.loss_sum.backward()
    assert output.loss_sum.dtype == torch.float32
    torch.testing.assert_close(output.loss_sum.double(), expected_loss, rtol=1e-5, atol=0)
    for (name, parameter), expected in zip(model.named_parameters(), expected_grads, strict=True):
        error = (parameter.grad.double() - expected).abs().max() / expected.abs().max()
        assert error < 2e-5, f"{name}: relative error {error:.2e}"

    moments = torch.stack([prediction.sum(0), prediction.square().sum(0), target.sum(0), target.square().sum(0)])
    torch.testing.assert_close(output.moments.double(), moments.detach(), rtol=1e-4, atol=1e-4)
    assert output.num_rows == len(batch.rows)
    assert not output.moments.requires_grad
    without = model(batch, teacher, moments=False)
    assert without.moments is None
    assert torch.equal(without.loss_sum, output.loss_sum)


def test_teacher_is_read_only() -> None:
    model, teacher = random_pair()
    teacher.requires_grad_(True)  # even then
    before = copy.deepcopy(teacher.state_dict())
    batch = random_images()
    assert not any(feature.requires_grad for feature in features_of(model, batch, teacher))
    model(batch, teacher).loss_sum.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert {name.split(".")[0] for name in model.state_dict()} == {"student", "head"}


def test_teacher_in_training_mode_is_refused() -> None:
    model, teacher = random_pair()
    with pytest.raises(ValueError, match="`teacher` must be in eval mode"):
        model(random_images(), teacher.train())


def test_unmasked_positions_contribute_nothing() -> None:
    model, teacher = random_pair()
    batch = random_images()
    features = features_of(model, batch, teacher)
    prediction = model.student_forward(model.embed(batch)[0], batch.rows)
    expected = model.objective(prediction, features, batch.rows)

    spoilt = [feature.masked_fill(~batch.masked[..., None], float("nan")) for feature in features]
    actual = model.objective(prediction, spoilt, batch.rows)
    assert torch.equal(actual.loss_sum, expected.loss_sum)
    assert torch.equal(actual.moments, expected.moments)


def test_head_and_norm_see_masked_rows_only() -> None:
    model, teacher = random_pair()
    batch = random_images()
    seen = []
    for module in (model.student.norm, model.head):
        module.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    model(batch, teacher)
    assert seen == [(len(batch.rows), CONFIG.model.width)] * 2


def test_teacher_sees_what_the_student_does_not() -> None:
    model, teacher = random_pair()
    batch = random_images()
    other = images(batch.inputs.masked_fill(pixel_mask(batch), 3.0), batch.masked)
    assert torch.equal(
        model.student_forward(model.embed(batch)[0], batch.rows),
        model.student_forward(model.embed(other)[0], other.rows),
    )
    for one, two in zip(features_of(model, batch, teacher), features_of(model, other, teacher), strict=True):
        assert not torch.equal(one, two)


@pytest.mark.parametrize("layer_norm", ["none", "layer", "instance", "batch"])
@pytest.mark.parametrize("final_norm", ["none", "layer", "instance"])
def test_teacher_features_are_the_last_layers(layer_norm: str, final_norm: str) -> None:
    target = TargetConfig(top_k=3, layer_norm=layer_norm, final_norm=final_norm)
    model, teacher = random_pair(CONFIG.model_copy(update={"target": target}))
    batch = random_images()
    features = features_of(model, batch, teacher)
    outputs = reference.encode(double_weights(teacher), CONFIG.model, batch.inputs.double())
    assert len(features) == 3
    per_row = layer_norm in ("none", "layer") and final_norm in ("none", "layer")
    for index, (feature, output) in enumerate(zip(features, outputs[1:], strict=True)):
        assert feature.stride(-1) == 1
        expected = output[:, 1:].detach()
        if index == 2 and per_row:
            # a target that looks at one row at a time needs the last layer at the masked rows only
            feature, expected = feature[batch.masked], expected[batch.masked]
        torch.testing.assert_close(feature.double(), expected, rtol=1e-4, atol=1e-4)


def test_output_rows_are_those_of_the_whole_output() -> None:
    model, _ = random_pair()
    batch = random_images()
    whole, (first, last) = model.student(batch.inputs, batch.rows, top_k=2)
    picked, (same, also_picked) = model.student(batch.inputs, batch.rows, top_k=2, output_rows=batch.rows)
    assert also_picked is picked
    torch.testing.assert_close(same, first)
    torch.testing.assert_close(picked, whole[:, 1:][batch.masked])
    torch.testing.assert_close(picked, last[:, 1:][batch.masked])


def test_loss_does_not_depend_on_the_split() -> None:
    model, teacher = random_pair()
    batch = random_images(batch_size=6)
    whole = model(batch, teacher)
    parts = [model(batch[start : start + 2], teacher) for start in range(0, 6, 2)]
    torch.testing.assert_close(sum(part.loss_sum for part in parts), whole.loss_sum)
    torch.testing.assert_close(sum(part.moments for part in parts), whole.moments, rtol=1e-5, atol=1e-5)
    assert sum(part.num_rows for part in parts) == whole.num_rows


def test_no_masked_row_gives_zero() -> None:
    model, teacher = random_pair()
    batch = random_images()
    output = model(images(batch.inputs, torch.zeros_like(batch.masked)), teacher)
    output.loss_sum.backward()
    assert output.num_rows == 0
    assert output.loss_sum.item() == 0.0
    assert all(not parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("working_copy", [False, True], ids=["fp32_teacher", "bf16_teacher"])
def test_bf16_autocast(working_copy: bool) -> None:
    model, teacher = random_pair()
    batch = random_images()
    expected = model(batch, teacher)
    expected_grads = torch.autograd.grad(expected.loss_sum, list(model.parameters()))
    if working_copy:
        teacher = copy.deepcopy(teacher).to(torch.bfloat16)
    autocast_in_teacher = []
    teacher.encoder.register_forward_pre_hook(lambda *_: autocast_in_teacher.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(batch, teacher)
        features = features_of(model, batch, teacher)
    assert {feature.dtype for feature in features} == {torch.bfloat16 if working_copy else torch.float32}
    # a working copy is in the compute dtype already
    assert autocast_in_teacher == [not working_copy] * 2
    grads = torch.autograd.grad(output.loss_sum, list(model.parameters()))
    torch.testing.assert_close(output.loss_sum, expected.loss_sum, rtol=0.03, atol=0)
    flat, expected_flat = (torch.cat([g.flatten() for g in group]) for group in (grads, expected_grads))
    assert torch.cosine_similarity(flat, expected_flat, dim=0) > 0.99


def test_bf16_parameters() -> None:
    model, teacher = random_pair()
    batch = random_images()
    expected = model(batch, teacher).loss_sum
    output = model.to(torch.bfloat16)(batch, teacher.to(torch.bfloat16))
    output.loss_sum.backward()
    assert output.loss_sum.dtype == torch.float32
    torch.testing.assert_close(output.loss_sum, expected, rtol=0.03, atol=0)


# autocast adds conversions to the same graph, and compiles as long again
@pytest.mark.parametrize("autocast", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["fp32", "bf16"])
def test_compiles_without_graph_breaks(autocast: bool) -> None:
    shallow = CONFIG.model.model_copy(update={"depth": 2})
    model, teacher = random_pair(CONFIG.model_copy(update={"model": shallow, "target": TargetConfig(top_k=1)}))
    batch = random_images()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected, actual = model(batch, teacher), compiled(batch, teacher)
    torch.testing.assert_close(actual.loss_sum, expected.loss_sum, rtol=1e-5 if not autocast else 0.01, atol=0)
    expected_grads = torch.autograd.grad(expected.loss_sum, list(model.parameters()))
    actual_grads = torch.autograd.grad(actual.loss_sum, list(model.parameters()))
    tolerance = 0.05 if autocast else 1e-4
    for actual_grad, expected_grad in zip(actual_grads, expected_grads, strict=True):
        torch.testing.assert_close(actual_grad, expected_grad, rtol=tolerance, atol=tolerance)


def test_seed_decides_the_initialization() -> None:
    def build(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return build_model(CONFIG).state_dict()

    first, same, other = build(3), build(3), build(4)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])
    assert first["head.weight"].abs().max() <= 0.02
    assert not first["head.bias"].any()


def test_a_few_steps_lower_the_loss() -> None:
    model, teacher = random_pair()
    batch = random_images(batch_size=16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        output = model(batch, teacher)
        loss = output.loss_sum / (output.num_rows * CONFIG.model.width)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_features_of_the_teacher_lie_alike() -> None:
    """Layers of different strides would be copied, K times the size of a batch, before the loss reads them."""
    model, teacher = random_pair()
    features = features_of(model, random_images(), teacher)
    assert len({feature.stride() for feature in features}) == 1
    assert features[0].stride(-1) == 1
