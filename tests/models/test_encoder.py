"""The Transformer: position bias, block, stochastic depth, kept layers, recomputation, initialization."""

from __future__ import annotations

import math
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from d2v_fast.config import VisionModelConfig
from d2v_fast.models.encoder import Encoder, random_keys
from d2v_fast.models.layers import drop
from d2v_fast.models.pre_norm import (
    PreNormBlock,
    RelativePositionBias,
    attention_with_bias_gradient,
    relative_position_index,
)
from tests.helpers import vision_reference as reference

SMALL = VisionModelConfig(
    image_size=9, patch_size=3, channels=1, width=24, depth=4, heads=3, drop_path=0.0, attention_dropout=0.0
)


def small(**changes: object) -> VisionModelConfig:
    return SMALL.model_copy(update=changes)


def make_encoder(config: VisionModelConfig) -> Encoder:
    blocks = (PreNormBlock(config, index) for index in range(config.depth))
    return Encoder(blocks, gradient_checkpointing=config.gradient_checkpointing)


def inputs(config: VisionModelConfig, batch_size: int = 5) -> tuple[Tensor, Tensor]:
    """Tokens `[B, T, D]` and a bias `[1, H, T, T]`."""
    num_tokens = 1 + config.num_patches
    x = torch.randn(batch_size, num_tokens, config.width)
    return x, torch.randn(1, config.heads, num_tokens, num_tokens)


def random_rows(x: Tensor) -> Tensor:
    """Flat rows of about half the tokens, another count in every sample."""
    return (torch.rand(x.shape[:2]) < 0.5).flatten().nonzero()[:, 0]


def draw_kept(num_samples: int, rate: float, branches: int = 2) -> list[Tensor]:
    """The samples that keep each branch."""
    return [(torch.rand(num_samples) >= rate).nonzero()[:, 0] for _ in range(branches)]


@pytest.mark.parametrize("grid_size", [1, 2, 3, 5])
def test_position_bias_matches_its_definition(grid_size: int) -> None:
    bias = RelativePositionBias(grid_size, num_heads=3)
    torch.nn.init.normal_(bias.table)
    torch.testing.assert_close(bias()[0], reference.position_bias(bias.table, grid_size), rtol=0, atol=0)

    bias().sum().backward()
    counts = relative_position_index(grid_size).flatten().bincount(minlength=len(bias.table))
    torch.testing.assert_close(bias.table.grad, counts[:, None].expand(-1, 3).to(torch.float32))


def test_position_bias_starts_at_zero_and_is_aligned() -> None:
    bias = RelativePositionBias(grid_size=14, num_heads=12)
    assert not bias().any()
    assert bias().shape == (1, 12, 197, 197)
    assert all(stride % 8 == 0 for stride in bias().stride()[:-1])
    assert bias().stride(-1) == 1
    assert list(bias.state_dict()) == ["table"]


def test_position_bias_is_in_the_dtype_of_attention() -> None:
    bias = RelativePositionBias(grid_size=3, num_heads=2)
    with torch.autocast("cpu", torch.bfloat16):
        assert bias().dtype == torch.bfloat16
        assert all(stride % 8 == 0 for stride in bias().stride()[:-1])
    assert bias().dtype == torch.float32
    assert bias.to(torch.bfloat16)().dtype == torch.bfloat16
    assert bias.index.dtype == torch.int64


def test_block_matches_formula() -> None:
    block = PreNormBlock(SMALL, index=2).double()
    reference.randomize_(block)
    x, bias = (tensor.double().requires_grad_() for tensor in inputs(SMALL))
    weights = {f"block.{name}": parameter for name, parameter in block.named_parameters()}
    leaves = {"x": x, "bias": bias, **weights}

    actual, feature = block(x, bias)
    assert feature is actual
    expected = reference.block(weights, "block", SMALL, x, bias[0])
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)

    direction = torch.randn_like(actual)
    actual_grads = torch.autograd.grad(actual, list(leaves.values()), direction)
    expected_grads = torch.autograd.grad(expected, list(leaves.values()), direction)
    for name, actual_grad, expected_grad in zip(leaves, actual_grads, expected_grads, strict=True):
        torch.testing.assert_close(
            actual_grad, expected_grad, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_attention_with_bias_gradient_is_attention() -> None:
    q, k, v = (torch.randn(2, 3, 7, 5, dtype=torch.float64, requires_grad=True) for _ in range(3))
    bias = torch.randn(1, 3, 7, 7, dtype=torch.float64, requires_grad=True)
    actual = attention_with_bias_gradient(q, k, v, bias, dropout=0.0)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    direction = torch.randn_like(actual)
    for actual_grad, expected_grad in zip(
        torch.autograd.grad(actual, [q, k, v, bias], direction),
        torch.autograd.grad(expected, [q, k, v, bias], direction),
        strict=True,
    ):
        torch.testing.assert_close(actual_grad, expected_grad, rtol=1e-11, atol=1e-11)

    # the weights of a query sum to one: dropping half of them and doubling the rest keeps the mean
    dropped = attention_with_bias_gradient(q, k, torch.ones_like(v), bias, dropout=0.5)
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.2)
    assert (dropped - 1).abs().max() > 0.1


@pytest.mark.parametrize("prob", [0.0, 0.05, 0.5, 0.999999])
def test_drop_is_dropout(prob: float) -> None:
    x = torch.rand(3, 101, 333, dtype=torch.float64).add_(1).requires_grad_()
    y = drop(x, prob)
    kept = y != 0
    rounded = math.floor(prob * 2**16) / 2**16
    deviation = math.sqrt(rounded * (1 - rounded) / x.numel())
    assert abs(kept.double().mean().item() - (1 - rounded)) <= 4 * deviation
    torch.testing.assert_close(y, torch.where(kept, x / (1 - rounded), 0.0))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, kept.double() / (1 - rounded))
    # neighbors are independent: lanes of one drawn number are
    pairs = kept.flatten()[:-1] & kept.flatten()[1:]
    assert abs(pairs.double().mean().item() - (1 - rounded) ** 2) <= 8 * deviation


def test_drop_path_keeps_or_drops_whole_samples() -> None:
    block = PreNormBlock(small(drop_path=0.5, depth=2), index=1).double()
    reference.randomize_(block)
    torch.nn.init.zeros_(block.gamma2)  # one branch, so that its factor can be read off
    x, bias = (tensor.double() for tensor in inputs(SMALL, batch_size=64))
    branch = block.eval()(x, bias)[0] - x
    kept = draw_kept(64, 0.5)
    factor = (block.train()(x, bias, None, kept)[0] - x) / branch
    per_sample = factor.flatten(1).mean(1)
    torch.testing.assert_close(factor, per_sample[:, None, None].expand_as(factor), rtol=1e-6, atol=1e-6)
    expected = torch.zeros(64, dtype=torch.float64).index_fill_(0, kept[0], 2.0)
    torch.testing.assert_close(per_sample, expected, rtol=1e-6, atol=1e-6)
    # without being told what is kept, all is
    whole = block(x, bias)[0]
    torch.testing.assert_close(whole, x + branch)


@pytest.mark.parametrize("with_rows", [False, True], ids=["all_tokens", "rows"])
def test_dropped_samples_are_multiplied_by_zero(with_rows: bool) -> None:
    """Values and gradients are those of a branch that is computed for every sample and then scaled by 0 or 1 / keep."""
    block = PreNormBlock(small(drop_path=0.4, depth=2), index=1).double()
    reference.randomize_(block)
    x, bias = (tensor.double().requires_grad_() for tensor in inputs(SMALL, batch_size=7))
    rows = random_rows(x) if with_rows else None
    leaves = [x, bias, *block.parameters()]

    kept = [torch.tensor([0, 3, 4, 6]), torch.tensor([1, 3, 5])]
    actual, _ = block(x, bias, rows, kept)
    scale1, scale2 = (torch.zeros(7, 1, 1).double().index_fill_(0, part, 1 / 0.6) for part in kept)
    assert 0 < scale1.count_nonzero() < len(x)
    expected = x + scale1 * block.gamma1 * block.attention(block.norm1(x), bias)
    expected = expected + scale2 * block.gamma2 * block.mlp(block.norm2(expected))
    if rows is not None:
        expected = expected.flatten(0, 1)[rows]
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)

    direction = torch.randn_like(actual)
    for actual_grad, expected_grad in zip(
        torch.autograd.grad(actual, leaves, direction), torch.autograd.grad(expected, leaves, direction), strict=True
    ):
        torch.testing.assert_close(actual_grad, expected_grad, rtol=1e-10, atol=1e-10)


def test_dropped_samples_are_not_computed() -> None:
    encoder = make_encoder(small(drop_path=0.5, depth=2))
    seen = []
    for block in encoder.blocks:
        for module in (block.attention, block.mlp):
            module.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    encoder(*inputs(SMALL, batch_size=64))
    assert seen[:2] == [64, 64]
    assert all(16 < size < 48 for size in seen[2:])
    assert len(seen) == 4
    encoder.eval()(*inputs(SMALL, batch_size=64))
    assert seen[4:] == [64] * 4


def test_what_a_sample_drops_is_its_own() -> None:
    """A function of its key: neither of the other samples, nor of their order, nor of torch's generator."""
    encoder = make_encoder(small(drop_path=0.5)).double()
    reference.randomize_(encoder)
    x, bias = (tensor.double() for tensor in inputs(SMALL, batch_size=8))
    keys = random_keys(8)
    whole = encoder(x, bias, drop_keys=keys).last_hidden
    chosen = [6, 2, 3]
    state = torch.get_rng_state()
    part = encoder(x[chosen], bias, drop_keys=keys[chosen]).last_hidden
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(part, whole[chosen], rtol=1e-12, atol=1e-12)
    other = encoder(x, bias, drop_keys=random_keys(8)).last_hidden
    assert not torch.allclose(other, whole)


def test_decisions_have_their_rates_and_are_independent() -> None:
    encoder = make_encoder(small(drop_path=0.6, depth=4))
    num_samples = 4000
    kept = encoder._active(random_keys(num_samples), torch.empty(num_samples))
    keeps = np.zeros((8, num_samples), dtype=bool)
    for decision, samples in enumerate(samples for block in kept for samples in block):
        assert (samples.diff() > 0).all()
        keeps[decision, samples] = True
    expected = 1 - np.repeat([0.0, 0.2, 0.4, 0.6], 2)
    deviation = 5 * np.sqrt(0.25 / num_samples)
    np.testing.assert_allclose(keeps.mean(1), expected, atol=deviation)
    correlations = np.corrcoef(keeps[2:]) - np.eye(6)
    assert np.abs(correlations).max() < 5 / np.sqrt(num_samples)


def test_every_sample_dropped() -> None:
    block = PreNormBlock(small(drop_path=0.999999, depth=2), index=1)
    x, bias = inputs(SMALL, batch_size=3)
    bias.requires_grad_()
    nothing = torch.empty(0, dtype=torch.int64)
    output, _ = block(x, bias, None, [nothing, nothing])
    assert torch.equal(output, x)
    output.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in block.parameters())


def test_attention_never_runs_on_an_empty_batch() -> None:
    """Flash attention refuses one."""
    encoder = make_encoder(small(drop_path=0.999999, depth=3))
    sizes: list[int] = []
    for block in encoder.blocks:
        block.attention.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    encoder(*inputs(SMALL, batch_size=3))
    assert (sizes[0], sizes[2]) == (3, 1)


def test_drop_path_rises_linearly() -> None:
    encoder = make_encoder(small(drop_path=0.3, depth=4))
    assert [block.drop_path for block in encoder.blocks] == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert [block.drop_path for block in make_encoder(small(drop_path=0.3, depth=1)).blocks] == [0.0]


def test_dropouts_act_in_training_only() -> None:
    x, bias = inputs(SMALL)
    for rate in ("drop_path", "attention_dropout", "dropout"):
        encoder = make_encoder(small(**{rate: 0.5}))
        reference.randomize_(encoder)
        assert not torch.equal(encoder(x, bias).last_hidden, encoder(x, bias).last_hidden), rate
        encoder.eval()
        assert torch.equal(encoder(x, bias).last_hidden, encoder(x, bias).last_hidden), rate


def test_features_are_the_last_block_outputs() -> None:
    encoder = make_encoder(SMALL).eval()
    reference.randomize_(encoder)
    x, bias = inputs(SMALL)
    outputs = [x]
    for block in encoder.blocks:
        outputs.append(block(outputs[-1], bias)[0])
    for top_k in range(SMALL.depth + 1):
        last_hidden, features = encoder(x, bias, top_k)
        assert torch.equal(last_hidden, outputs[-1])
        assert len(features) == top_k
        assert all(map(torch.equal, features, outputs[len(outputs) - top_k :]))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_rows_are_those_of_the_whole_output(checkpointing: bool) -> None:
    encoder = make_encoder(small(drop_path=0.3, gradient_checkpointing=checkpointing)).double()
    reference.randomize_(encoder)
    x, bias = (tensor.double().requires_grad_() for tensor in inputs(SMALL))
    rows = random_rows(x)
    leaves = [x, bias, *encoder.parameters()]

    def run(wanted: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        torch.manual_seed(5)
        last_hidden, features = encoder(x, bias, 2, wanted)
        assert features[1] is last_hidden
        picked = last_hidden if wanted is not None else last_hidden.flatten(0, 1)[rows]
        loss = picked.square().sum() + features[0].sin().sum()
        return picked, list(torch.autograd.grad(loss, leaves))

    (actual, actual_grads), (expected, expected_grads) = run(rows), run(None)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    for actual_grad, expected_grad in zip(actual_grads, expected_grads, strict=True):
        torch.testing.assert_close(actual_grad, expected_grad, rtol=1e-10, atol=1e-10)


def test_last_mlp_sees_the_rows_only() -> None:
    encoder = make_encoder(SMALL)
    x, bias = inputs(SMALL)
    rows = random_rows(x)
    seen = []
    for block in encoder.blocks:
        block.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    assert encoder(x, bias, rows=rows).last_hidden.shape == (len(rows), SMALL.width)
    assert seen == [x.shape] * 3 + [(len(rows), SMALL.width)]
    assert encoder(x, bias, rows=rows[:0]).last_hidden.shape == (0, SMALL.width)


@pytest.mark.parametrize("top_k", [-1, 5])
def test_top_k_out_of_range_is_refused(top_k: int) -> None:
    with pytest.raises(ValueError, match=r"`top_k` must be in \[0, 4\].* but is -?\d instead"):
        make_encoder(SMALL)(*inputs(SMALL), top_k)


def test_only_kept_layers_stay_alive() -> None:
    encoder = make_encoder(SMALL).eval()
    alive: list[weakref.ref[Tensor]] = []
    for block in encoder.blocks:
        block.register_forward_hook(lambda block, args, output: alive.append(weakref.ref(output[0])))
    with torch.no_grad():
        output = encoder(*inputs(SMALL), top_k=2)
    assert [ref() is not None for ref in alive] == [False, False, True, True]
    assert output.features[-1] is output.last_hidden


def test_gradient_checkpointing_changes_memory_only() -> None:
    config = small(drop_path=0.5, attention_dropout=0.3, dropout=0.2)
    plain, checkpointed = make_encoder(config), make_encoder(config.model_copy(update={"gradient_checkpointing": True}))
    reference.randomize_(plain)
    checkpointed.load_state_dict(plain.state_dict())
    x, bias = inputs(config)
    bias.requires_grad_()

    def run(encoder: Encoder) -> tuple[int, list[Tensor]]:
        saved_bytes = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal saved_bytes
            saved_bytes += tensor.nbytes
            return tensor

        torch.manual_seed(7)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            last_hidden, features = encoder(x, bias, top_k=2)
            loss = last_hidden.square().sum() + features[0].sum()
        return saved_bytes, list(torch.autograd.grad(loss, [bias, *encoder.parameters()]))

    plain_bytes, plain_grads = run(plain)
    checkpointed_bytes, checkpointed_grads = run(checkpointed)
    assert all(map(torch.equal, plain_grads, checkpointed_grads))
    assert checkpointed_bytes < plain_bytes / 3


def test_published_initialization() -> None:
    config = VisionModelConfig(depth=3, layer_scale=1e-5)
    encoder = make_encoder(config)
    deviation = 0.02 * 0.5396  # of a unit normal cut off at one deviation
    for index, block in enumerate(encoder.blocks):
        shrunk = 1 / math.sqrt(2 * (index + 1))
        weights = {
            "qkv": (block.attention.qkv.weight, 1.0),
            "proj": (block.attention.proj.weight, shrunk),
            "fc1": (block.mlp.fc1.weight, 1.0),
            "fc2": (block.mlp.fc2.weight, shrunk),
        }
        for name, (weight, scale) in weights.items():
            assert weight.abs().max() <= 0.02 * scale * 1.001, name
            assert weight.std().item() == pytest.approx(deviation * scale, rel=0.01), name
            assert abs(weight.mean().item()) < 1e-4 * scale, name
        for name, parameter in block.named_parameters():
            if "bias" in name:
                assert not parameter.any(), name
            if "gamma" in name:
                assert (parameter == 1e-5).all(), name


def test_compiles_without_graph_breaks() -> None:
    encoder = make_encoder(small(drop_path=0.2))
    compiled = torch.compile(encoder.eval(), fullgraph=True, backend="aot_eager")
    x, bias = inputs(SMALL)
    torch.testing.assert_close(compiled(x, bias, 2).features, encoder(x, bias, 2).features)
