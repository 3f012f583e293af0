"""Test the speech encoder and a data2vec step: values, gradients, padding, packing and layer-drop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from d2v_fast.config import SpeechConfig, SpeechModelConfig
from d2v_fast.data import Batch
from d2v_fast.masking.streams import uniforms
from d2v_fast.modalities.speech.conv_stack import ConvStack
from d2v_fast.models.encoder import random_keys
from d2v_fast.models.post_norm import Segments, attend
from d2v_fast.objectives.build import build_model
from tests.helpers import speech_reference as reference
from tests.helpers.speech_models import make_batch, make_config, make_pair


def double_weights(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().double().requires_grad_() for name, p in module.named_parameters()}


def test_lengths() -> None:
    model = SpeechModelConfig()
    assert (model.hop, model.receptive_field) == (320, 400)
    for num_samples in (400, 719, 720, 16_000, 320_000, 320_080):
        assert model.num_frames(num_samples) == (num_samples - 400) // 320 + 1
    assert [model.num_frames(n) for n in (0, 9, 399)] == [0, 0, 0]
    assert model.num_samples(1000) == 320_080


@pytest.mark.parametrize(
    ("sizes", "count"),
    [({}, 93_754_880), ({"width": 1024, "depth": 24, "heads": 16}, 314_326_016)],
    ids=["base", "large"],
)
@pytest.mark.parametrize("positions", ["shared", "averaged"])
def test_published_parameter_counts(sizes: dict[str, int], count: int, positions: Any) -> None:
    with torch.device("meta"):
        model = build_model(SpeechConfig(model=SpeechModelConfig(**sizes, position_in_teacher=positions)))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
# the second is too wide for the path that copies windows
@pytest.mark.parametrize("width", [6, 40])
@pytest.mark.parametrize(
    ("kernels", "strides", "num_samples"),
    [
        ((10, 3, 3, 2), (5, 2, 2, 2), 333),
        ((10, 3, 3, 2), (5, 2, 2, 2), 360),
        ((7, 4, 1), (3, 3, 1), 333),
        ((2, 3, 5), (4, 4, 2), 333),
        ((10,), (5,), 10),
        ((80, 3), (5, 2), 95),
    ],
)
def test_convolutions(
    kernels: tuple[int, ...], strides: tuple[int, ...], num_samples: int, width: int, recompute: bool
) -> None:
    stack = ConvStack(width, kernels, strides, recompute=recompute)
    reference.randomize_(stack)
    waveforms = torch.randn(3, num_samples, requires_grad=True)
    actual = stack(waveforms)
    actual.square().sum().backward()

    weights = double_weights(stack)
    exact = waveforms.detach().double().requires_grad_()
    x = exact[:, None]
    for i, stride in enumerate(strides):
        x = F.conv1d(x, weights[f"weights.{i}"].transpose(1, 2), stride=stride).transpose(1, 2)
        x = F.gelu(F.layer_norm(x, (width,), weights[f"norm_weights.{i}"], weights[f"norm_biases.{i}"])).transpose(1, 2)
    expected = x.transpose(1, 2)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    expected.square().sum().backward()
    wanted = {name: weight.grad for name, weight in weights.items()} | {"waveforms": exact.grad}
    for name, tensor in [*stack.named_parameters(), ("waveforms", waveforms)]:
        assert tensor.grad is not None
        error = (tensor.grad.double() - wanted[name]).abs().max() / wanted[name].abs().max()
        assert error < 1e-5, f"{name}: {error:.1e}"


def test_recomputed_convolutions_keep_less() -> None:
    def kept(recompute: bool) -> int:
        sizes: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        stack = ConvStack(16, (10, 3, 3, 3), (5, 2, 2, 2), recompute=recompute)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            stack(torch.randn(1, 8000))
        return sum(sizes.values())

    assert kept(True) < 0.65 * kept(False)


@pytest.mark.parametrize("num_layers", [1, 2, 4])
def test_convolutions_of_one_utterance_do_not_see_another(num_layers: int) -> None:
    stack = ConvStack(40, (10, 3, 3, 2)[:num_layers], (5, 2, 2, 2)[:num_layers])
    waveforms = torch.randn(3, 437)
    waveforms[1, :20] = float("nan")
    waveforms[1, -20:] = float("inf")
    together = waveforms.clone().requires_grad_()
    frames = stack(together)
    (frames[0].square().sum() + frames[2].square().sum()).backward()
    alone = waveforms[::2].clone().requires_grad_()
    expected = stack(alone)
    expected.square().sum().backward()
    assert together.grad is not None
    assert alone.grad is not None
    torch.testing.assert_close(frames[::2], expected)
    torch.testing.assert_close(together.grad[::2], alone.grad, rtol=1e-4, atol=1e-5)


def test_convolutions_of_no_utterance() -> None:
    stack = ConvStack(40, (10, 3, 2), (5, 2, 2))
    frames = stack(torch.zeros(0, 200))
    assert frames.shape == (0, 9, 40)
    frames.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in stack.parameters())


def test_convolutions_backward_within_autocast() -> None:
    stack, waveforms = ConvStack(40, (10, 3, 3), (5, 2, 2)), torch.randn(2, 300)
    stack(waveforms).square().sum().backward()
    expected = [parameter.grad for parameter in stack.parameters()]
    stack.zero_grad()
    loss = stack(waveforms).square().sum()
    with torch.autocast("cpu", torch.bfloat16):
        loss.backward()
    for parameter, wanted in zip(stack.parameters(), expected, strict=True):
        assert parameter.grad is not None
        assert wanted is not None
        assert torch.equal(parameter.grad, wanted)


def test_waveforms_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"`waveforms` must have shape \[B, N\], but has \(400,\) instead"):
        ConvStack(4, (10,), (5,))(torch.zeros(400))


def test_too_short_a_waveform() -> None:
    with pytest.raises(ValueError, match="`waveforms` must be longer: a convolution has 9 inputs, fewer than its 10"):
        ConvStack(4, (10,), (5,))(torch.zeros(1, 9))


@pytest.mark.parametrize("positions", ["shared", "averaged"])
@pytest.mark.parametrize("num_samples", [[400, 400, 400], [431, 400, 278]], ids=["equal", "padded"])
@pytest.mark.parametrize("attention", ["padded", "packed"])
def test_step_matches_fp64_formulas(positions: str, num_samples: list[int], attention: str) -> None:
    config = make_config(position_in_teacher=positions, attention=attention)
    model, teacher = make_pair(config)
    batch = make_batch(config, num_samples)
    frames = [config.model.num_frames(n) for n in num_samples]
    masked = torch.zeros(len(frames) * max(frames), dtype=torch.bool).index_fill(0, batch.rows, True)
    masks = [mask[:n] for mask, n in zip(masked.view(len(frames), -1), frames, strict=True)]
    waveforms = [waveform[:n].double() for waveform, n in zip(batch.inputs, num_samples, strict=True)]
    weights = double_weights(model)
    expected_loss, prediction, target = reference.step(weights, double_weights(teacher), config, waveforms, masks)
    expected = torch.autograd.grad(expected_loss, list(weights.values()))

    output = model(batch, teacher)
    output.loss_sum.backward()
    torch.testing.assert_close(output.loss_sum.double(), expected_loss, rtol=2e-5, atol=0)
    for (name, parameter), grad in zip(model.named_parameters(), expected, strict=True):
        assert parameter.grad is not None, name
        error = (parameter.grad.double() - grad).abs().max() / grad.abs().max()
        assert error < 1e-4, f"{name}: relative error {error:.2e}"
    moments = torch.stack([prediction.sum(0), prediction.square().sum(0), target.sum(0), target.square().sum(0)])
    torch.testing.assert_close(output.moments.double(), moments.detach(), rtol=1e-3, atol=1e-3)
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("attention", ["padded", "packed"])
def test_padding_changes_nothing(attention: str) -> None:
    """Padding, whatever its values, does not change an utterance's features or loss."""
    config = make_config(attention=attention)
    model, teacher = make_pair(config)
    num_samples = [431, 278]
    batch = make_batch(config, num_samples)
    frames = [config.model.num_frames(n) for n in num_samples]
    garbage = batch.inputs.clone()
    # samples that no unpadded frame covers
    garbage[1, config.model.num_samples(frames[1] + 1) :] = 1e3
    together = model(Batch(garbage, batch.rows, batch.sample_ids, batch.lengths, batch.unpadded), teacher)
    alone = 0.0
    for b, (n, num_frames) in enumerate(zip(num_samples, frames, strict=True)):
        rows = batch.rows[batch.rows // frames[0] == b] - b * frames[0]
        part = Batch(batch.inputs[b : b + 1, :n], rows, batch.sample_ids[b : b + 1])
        alone = alone + model(part, teacher).loss_sum
        features = model.student.eval().features(batch.inputs, batch.lengths, top_k=2)
        expected = model.student.features(part.inputs, top_k=2)
        for actual, of_part in zip(features, expected, strict=True):
            torch.testing.assert_close(actual[b, :num_frames], of_part[0], rtol=1e-5, atol=1e-5)
        model.train()
    torch.testing.assert_close(together.loss_sum, alone, rtol=1e-5, atol=0)


def test_segments_attend_within_themselves() -> None:
    q, k, v = torch.randn(3, 1, 2, 11, 4).unbind()
    sizes = [3, 1, 7]
    offsets = torch.tensor([0, 3, 4, 11], dtype=torch.int32)
    actual = attend(q, k, v, Segments(offsets, 7))
    block = torch.block_diag(*(torch.ones(n, n) for n in sizes)).bool()
    torch.testing.assert_close(actual, attend(q, k, v, block[None, None]))
    with_dropout = attend(q, k, v, block[None, None], 0.5)
    assert with_dropout.shape == actual.shape
    assert not torch.equal(with_dropout, actual)


def test_attention_dropout_on_a_cpu_is_unbiased() -> None:
    q, k, v = torch.randn(3, 1, 1, 6, 4).unbind()
    mask = torch.arange(6) < 4
    drawn = torch.stack([attend(q, k, v, mask[None, None, None], 0.3) for _ in range(4000)])
    error = drawn.std(0) / 4000**0.5
    assert ((drawn.mean(0) - attend(q, k, v, mask[None, None, None])).abs() < 5 * error).all()


def test_layer_drop_leaves_out_samples() -> None:
    """Blocks before the last do not compute skipped samples, which are about half of eight."""
    config = make_config(layer_drop=0.5, depth=3)
    model, teacher = make_pair(config)
    batch = make_batch(config, [400] * 4 + [290] * 4)
    sizes: list[list[int]] = [[], [], []]
    for of_block, block in zip(sizes, model.student.context.encoder.blocks, strict=True):
        block.fc1.register_forward_pre_hook(lambda _, args, of_block=of_block: of_block.append(len(args[0])))
    for seed in range(30):
        torch.manual_seed(seed)
        model(batch, teacher).loss_sum.backward()
    for of_block in sizes[:2]:
        assert 90 < sum(of_block) < 150
        assert len(of_block) == 30
    assert sizes[2] == [len(batch.rows)] * 30
    model.eval()(batch, teacher)
    assert [of_block[-1] for of_block in sizes] == [8, 8, len(batch.rows)]


@pytest.mark.parametrize("attention", ["padded", "packed"])
@pytest.mark.parametrize("with_rows", [False, True], ids=["all_frames", "rows"])
def test_skipped_blocks_pass_samples_on(attention: str, with_rows: bool) -> None:
    """Each sample passes through exactly the blocks that it does not skip, and its gradient is theirs."""
    config = make_config(layer_drop=0.5, attention=attention)
    context = build_model(config).student.context.double()
    reference.randomize_(context)
    lengths = torch.tensor([7, 4, 9, 5, 9])
    places = (torch.arange(9) < lengths[:, None]).flatten()
    rows = places.nonzero()[::2, 0] if with_rows else None
    unpadded = places.nonzero()[:, 0] if attention == "packed" else None
    frames = torch.randn(5, 9, 24, dtype=torch.float64, requires_grad=True)
    keys = random_keys(5)
    keeps = uniforms(keys, 3) >= 0.5
    output = context(frames, lengths, unpadded, keys, top_k=0, output_rows=rows).last_hidden

    expected = []
    for frame, length, kept_blocks in zip(frames, lengths.tolist(), keeps, strict=True):
        x = context.norm(frame[None, :length])
        for block, keep in zip(context.encoder.blocks, kept_blocks, strict=True):
            x = block(x, None)[0] if keep else x
        expected.append(F.pad(x[0], (0, 0, 0, 9 - length)))
    truth = torch.stack(expected)
    if rows is None:
        output, truth = output.flatten(0, 1)[places], truth.flatten(0, 1)[places]
    else:
        truth = truth.flatten(0, 1)[rows]
    torch.testing.assert_close(output, truth, rtol=1e-10, atol=1e-10)
    direction, leaves = torch.randn_like(truth), [frames, *context.encoder.parameters()]
    for actual, wanted in zip(
        torch.autograd.grad(output, leaves, direction),
        torch.autograd.grad(truth, leaves, direction, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("attention", ["padded", "packed"])
def test_block_that_no_sample_keeps(attention: str) -> None:
    """If all samples skip a block, its parameters still get zero gradients, so that all processes reduce the same."""
    config = make_config(layer_drop=0.999999, attention=attention)
    model, teacher = make_pair(config)
    batch = make_batch(config, [400, 290, 333])
    for block in model.student.context.encoder.blocks:
        block.attention.register_forward_pre_hook(lambda _, args: None if len(args[0]) else pytest.fail("nothing"))
    model(batch, teacher).loss_sum.backward()
    for block in model.student.context.encoder.blocks:
        assert all(p.grad is not None and not p.grad.any() for p in block.parameters())


@pytest.mark.parametrize("working_copy", [False, True], ids=["fp32_teacher", "bf16_teacher"])
def test_bf16_autocast(working_copy: bool) -> None:
    config = make_config()
    model, teacher = make_pair(config)
    batch = make_batch(config, [431, 278])
    expected = model(batch, teacher)
    expected_grads = torch.autograd.grad(expected.loss_sum, list(model.parameters()))
    if working_copy:
        teacher.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(batch, teacher)
    grads = torch.autograd.grad(output.loss_sum, list(model.parameters()))
    torch.testing.assert_close(output.loss_sum, expected.loss_sum, rtol=0.05, atol=0)
    flat, expected_flat = (torch.cat([g.flatten() for g in group]) for group in (grads, expected_grads))
    assert torch.cosine_similarity(flat, expected_flat, dim=0) > 0.98


def test_initialization_is_the_published_one() -> None:
    torch.manual_seed(1)
    model = build_model(SpeechConfig(model=SpeechModelConfig(depth=8)))
    student = model.student
    first, second = student.front_end.convolutions.weights[:2]
    assert first.std().item() == pytest.approx((2 / 10) ** 0.5, rel=0.03)
    assert second.std().item() == pytest.approx((2 / (3 * 512)) ** 0.5, rel=0.01)
    block = student.context.encoder.blocks[0]
    for linear in (block.attention.qkv, block.attention.proj, block.fc1, block.fc2):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.01)
        assert not linear.bias.any()
    assert student.front_end.mask_token.min() >= 0
    assert student.front_end.mask_token.mean().item() == pytest.approx(0.5, abs=0.05)
