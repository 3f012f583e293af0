"""Block masks: time per 14x14 image (120 patches, the published ViT setting), compiled against plain Python.

One thread, in CPU time, so that what else runs on the machine does not count. The peer is the published algorithm as it
is usually written, a Python loop per image, and it stops at the boolean grid; ours goes on to the row indices that the
model needs. Times per image are in `extra_info`.
"""

from __future__ import annotations

import random
import time

import numpy as np
import pytest

from d2v_fast.masking import block_mask_reference, block_mask_rows

OPTIONS = (14, 120, 16, None, 0.3)
NUM_PATCHES = 14 * 14


def compiled(num_images: int) -> np.ndarray:
    """Masked patches per image."""
    rows = block_mask_rows(0, 0, np.arange(num_images), *OPTIONS)
    return np.bincount(rows // NUM_PATCHES, minlength=num_images)


def reference(num_images: int) -> np.ndarray:
    """Masked patches per image."""
    generator = random.Random(0)
    return np.array([np.sum(block_mask_reference(generator, *OPTIONS)) for _ in range(num_images)])


@pytest.fixture(scope="module")
def _same_distribution() -> None:
    ours, theirs = compiled(20_000), reference(2000)
    error = theirs.std() / np.sqrt(len(theirs))
    assert abs(ours.mean() - theirs.mean()) < 4 * error
    assert ours.std() == pytest.approx(theirs.std(), rel=0.15)
    assert (ours == 120).mean() == pytest.approx((theirs == 120).mean(), abs=0.04)


@pytest.mark.benchmark(group="block masks, 14x14, 120 patches", timer=time.process_time)
@pytest.mark.parametrize(("implementation", "num_images"), [("compiled", 4096), ("python", 64)])
@pytest.mark.usefixtures("_same_distribution")
def bench_block_masks(benchmark, implementation: str, num_images: int) -> None:  # type: ignore[no-untyped-def]
    if implementation == "compiled":
        ids = np.arange(num_images)
        benchmark(block_mask_rows, 0, 0, ids, *OPTIONS)
    else:
        generator = random.Random(0)
        benchmark(lambda: [block_mask_reference(generator, *OPTIONS) for _ in range(num_images)])
    if benchmark.stats is not None:
        benchmark.extra_info["us_per_image"] = benchmark.stats.stats.median / num_images * 1e6
        benchmark.extra_info["images_per_s"] = num_images / benchmark.stats.stats.median
