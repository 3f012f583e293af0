"""Masks at their limits: what the sampler can draw, and steps with no, all or invalid masked places."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from d2v_fast.config import BlockMaskConfig, TargetConfig, VisionConfig, VisionModelConfig
from d2v_fast.masking import block_mask_rows
from tests.helpers.small_engine import config as run_config
from tests.helpers.small_engine import plain_engine
from tests.helpers.vision_models import CONFIG, Images, images, random_images, random_pair

NORMS = [(first, last) for first in ("none", "layer", "instance", "batch") for last in ("none", "layer", "instance")]


@settings(max_examples=300, deadline=None)
@given(
    grid_size=st.integers(2, 24),
    patch_size=st.integers(1, 3),
    shares=st.tuples(*[st.floats(0, 1)] * 3),
    has_most=st.booleans(),
    # the smallest positive numbers too
    min_aspect=st.floats(0, 1, exclude_min=True) | st.sampled_from([5e-324, 1e-300, 1e-9, 1.0]),
    seed=st.integers(0, 2**32 - 1),
    epoch=st.integers(0, 10**9),
)
def test_every_mask_of_every_configuration(grid_size, patch_size, shares, has_most, min_aspect, seed, epoch) -> None:
    """Whatever the configuration admits: some patches of every image are masked, some visible, none twice."""
    num_patches = grid_size**2
    most = 1 + round(shares[0] * (num_patches - 2))
    fewest = 1 + round(shares[1] * (most - 1))
    largest = fewest + round(shares[2] * num_patches) if has_most else None
    mask = BlockMaskConfig(num_patches=most, min_patches=fewest, max_patches=largest, min_aspect=min_aspect)
    model = VisionModelConfig(image_size=grid_size * patch_size, patch_size=patch_size)
    VisionConfig(model=model, mask=mask)
    ids = np.array([0, 1, 2**62, seed], dtype=np.int64)
    rows = block_mask_rows(
        seed, epoch, ids, model.grid_size, mask.num_patches, mask.min_patches, mask.max_patches, mask.min_aspect
    )
    assert rows.dtype == np.int64
    assert (np.diff(rows) > 0).all()
    counts = np.bincount(rows // num_patches, minlength=len(ids))
    assert len(counts) == len(ids)
    assert counts.min() >= 1
    assert counts.max() <= most < num_patches


@given(grid_size=st.integers(1, 6), num_patches=st.integers(1, 60))
def test_configuration_leaves_a_patch_visible(grid_size: int, num_patches: int) -> None:
    assume(num_patches >= grid_size**2)
    with pytest.raises(ValueError, match="num_patches"):
        VisionConfig(
            model=VisionModelConfig(image_size=grid_size, patch_size=1),
            mask=BlockMaskConfig(num_patches=num_patches, min_patches=1),
        )


def masked_as(kind: str) -> Images:
    """Five images, some of which have nothing masked or nothing visible."""
    batch = random_images()
    masked = batch.masked.clone()
    if kind == "one empty, one full":
        masked[1], masked[3] = False, True
    else:
        masked[:] = kind == "all masked"
    return images(batch.inputs, masked)


@pytest.mark.parametrize(("layer_norm", "final_norm"), NORMS)
def test_loss_is_finite_whatever_is_masked(layer_norm: str, final_norm: str) -> None:
    """An image without a masked patch adds nothing; without a visible one it is as good as any."""
    target = TargetConfig(top_k=2, layer_norm=layer_norm, final_norm=final_norm)
    model, teacher = random_pair(CONFIG.model_copy(update={"target": target}))
    for kind in ("none masked", "all masked", "one empty, one full"):
        batch = masked_as(kind)
        model.zero_grad()
        output = model(batch, teacher)
        output.loss_sum.backward()
        assert output.num_rows == batch.masked.sum()
        assert output.loss_sum.isfinite()
        assert output.moments.isfinite().all()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert (output.loss_sum == 0) == (kind == "none masked")
        assert any(gradient.any() for gradient in gradients) == (kind != "none masked")
        if kind == "one empty, one full" and {layer_norm, final_norm} <= {"none", "layer"}:
            # without the image that has nothing masked
            kept = torch.arange(5) != 1
            without = model(images(batch.inputs[kept], batch.masked[kept]), teacher)
            torch.testing.assert_close(without.loss_sum, output.loss_sum)


def test_step_without_a_masked_patch_is_one_without_gradient() -> None:
    """It counts as a step, with a loss of 0, a gradient norm of 0, and no effect but that of weight decay."""
    model, teacher = random_pair()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine = plain_engine(run_config(), model)
    output = engine.forward(masked_as("none masked"), teacher)
    engine.backward(output.loss_sum, 1)
    assert engine.step(0.1)
    assert output.loss_sum == 0
    assert engine.grad_norm == 0
    for name, p in model.named_parameters():
        decay = 0.1 * 0.05 if p.ndim > 1 and p.grad is None else 0.0
        torch.testing.assert_close(p.detach(), before[name] * (1 - decay), msg=name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.ones(5, 16, dtype=torch.bool)}, r"1-d int64 tensor, but is torch.bool of shape \[5, 16\]"),
        ({"rows": torch.arange(4, dtype=torch.int32)}, "1-d int64 tensor, but is torch.int32"),
        ({"rows": torch.zeros(2, 2, dtype=torch.int64)}, r"of shape \[2, 2\]"),
        ({"rows": torch.zeros(2, dtype=torch.int64, device="meta")}, "must be on cpu as `inputs` are, but is on meta"),
        ({"inputs": torch.zeros(5, 3, 12, 9)}, r"`pixels` must be \[B, 3, 12, 12\]"),
        ({"inputs": torch.zeros(3, 12, 12)}, "`pixels` must be"),
    ],
)
def test_wrong_masks_are_refused(change: dict[str, Any], message: str) -> None:
    model, teacher = random_pair()
    batch = random_images()
    wrong = Images(**{"inputs": batch.inputs, "rows": batch.rows, "masked": batch.masked} | change)
    with pytest.raises(ValueError, match=message):
        model(wrong, teacher)


@pytest.mark.parametrize("bad", [-1, 5 * 16])
def test_rows_out_of_range_are_refused(bad: int) -> None:
    model, teacher = random_pair()
    batch = random_images()
    with pytest.raises((IndexError, RuntimeError), match="index"):
        model(Images(batch.inputs, torch.tensor([0, bad]), batch.masked), teacher)


def test_rows_with_gaps_in_memory_and_in_any_order() -> None:
    model, teacher = random_pair()
    batch = random_images()
    order = torch.randperm(len(batch.rows))
    stretched = torch.stack((batch.rows[order], batch.rows + 1000), 1)[:, 0]
    assert not stretched.is_contiguous()
    want, got = model(batch, teacher), model(Images(batch.inputs, stretched, batch.masked), teacher)
    torch.testing.assert_close(got.loss_sum, want.loss_sum)
    torch.testing.assert_close(got.moments, want.moments, rtol=1e-4, atol=1e-4)
