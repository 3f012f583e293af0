"""Mask samplers: time per mask of the compiled samplers and of data2vec's public algorithms.

Times are CPU times of one thread, so that other load on the machine does not count; samplers and peers alternate within
rounds. The peers are the published algorithms in numpy, sample by sample, and return boolean masks; ours also compute
the row indices that the model needs. Both must draw from the same distribution before they are timed.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from bench.measure import compared, describe_device, quantiles
from d2v_fast.masking import block_mask_1d_rows, block_mask_rows, inverse_block_mask_rows, span_mask_rows


def published_spans(
    generator: np.random.Generator, num_rows: int, num_positions: int, prob: float, length: int
) -> np.ndarray:
    """Draw masks sample by sample, with spans assembled in Python; then reduce every sample to the smallest count."""
    chosen = []
    for _ in range(num_rows):
        num_spans = max(1, int(prob * num_positions / length + generator.random()))
        starts = generator.choice(num_positions - length, num_spans, replace=False)
        covered = np.asarray([start + offset for start in starts for offset in range(length)])
        chosen.append(np.unique(covered[covered < num_positions]))
    fewest = min(len(frames) for frames in chosen)
    masks = np.zeros((num_rows, num_positions), dtype=bool)
    for row, frames in enumerate(chosen):
        masks[row, generator.choice(frames, fewest, replace=False)] = True
    return masks


def vectorized_spans(
    generator: np.random.Generator, num_rows: int, num_positions: int, prob: float, length: int
) -> np.ndarray:
    """Draw starts sample by sample, and write all spans of the batch at once; counts differ between samples."""
    counts = (prob * num_positions / length + generator.random(num_rows)).astype(int).clip(min=1)
    starts = np.empty((num_rows, counts.max()), dtype=np.int64)
    for row, count in enumerate(counts):
        drawn = generator.choice(num_positions - length, count, replace=False)
        starts[row, :count], starts[row, count:] = drawn, drawn[0]
    masks = np.zeros((num_rows, num_positions), dtype=bool)
    np.put_along_axis(masks, (starts[:, :, None] + np.arange(length)).reshape(num_rows, -1), True, axis=1)
    return masks


def published_blocks(
    generator: random.Random, num_images: int, side: int, num_patches: int, min_patches: int, min_aspect: float
) -> np.ndarray:
    """Draw masks image by image and cell by cell."""
    masks = np.zeros((num_images, side, side), dtype=bool)
    spread = -math.log(min_aspect)
    for mask in masks:
        count, new = 0, 1
        while count < num_patches and new > 0:
            room, new = num_patches - count, 0
            for _ in range(10):
                area = generator.uniform(min_patches, room)
                aspect = math.exp(generator.uniform(-spread, spread))
                height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
                if height < side and width < side:
                    top, left = generator.randint(0, side - height), generator.randint(0, side - width)
                    wanted = height * width - mask[top : top + height, left : left + width].sum()
                    if 0 < wanted <= room:
                        for row in range(top, top + height):
                            for col in range(left, left + width):
                                if not mask[row, col]:
                                    mask[row, col] = True
                                    new += 1
                        break
            count += new
    return masks.reshape(num_images, -1)


def published_fixed_blocks(
    generator: np.random.Generator,
    num_samples: int,
    num_masks: int,
    shape: tuple[int, int],
    block: tuple[int, int],
    share: float,
    adjust: float,
    inverse: bool,
) -> np.ndarray:
    """Draw the blocks of all masks of a sample together, then reach the exact count mask by mask."""
    size = shape[0] * shape[1]
    num_blocks, num_marked = int(size * (share + adjust) / (block[0] * block[1])), int(size * share)
    samples = []
    for _ in range(num_samples):
        marked = np.zeros((num_masks, size), dtype=bool)
        centers = generator.integers(0, size, (num_masks, num_blocks))
        rows = centers[:, :, None, None] // shape[1] + (np.arange(block[0]) - block[0] // 2)[:, None]
        cols = centers[:, :, None, None] % shape[1] + (np.arange(block[1]) - block[1] // 2)
        cells = rows.clip(0, shape[0] - 1) * shape[1] + cols.clip(0, shape[1] - 1)
        np.put_along_axis(marked, cells.reshape(num_masks, -1), True, axis=1)
        for mask in marked:
            excess = int(mask.sum()) - num_marked
            mask[generator.choice(np.flatnonzero(mask == (excess > 0)), abs(excess), replace=False)] = excess <= 0
        samples.append(marked != inverse)
    return np.concatenate(samples)


@dataclass(frozen=True)
class Case:
    """One sampler and its peer.

    Attributes:
        ours: epoch -> rows of `num_ours` masks.
        peer: () -> bool `[num_peer, num_positions]`.
        num_batches: calls of `ours` that are timed together, to make a round long enough.
        neighbors: distances of positions that lie side by side.
    """

    name: str
    peer_name: str
    ours: Callable[[int], np.ndarray]
    num_ours: int
    num_batches: int
    peer: Callable[[], np.ndarray]
    num_peer: int
    num_positions: int
    neighbors: tuple[int, ...]


GENERATOR, PYTHON_GENERATOR = np.random.default_rng(0), random.Random(0)
IDS = np.arange(1024)

CASES = [
    Case(
        "spans 0.65/10, equal counts, 32 x 1000",
        "published",
        lambda epoch: span_mask_rows(0, epoch, IDS[:32], 1000, 0.65, 10),
        num_ours=32,
        num_batches=25,
        peer=lambda: published_spans(GENERATOR, 32, 1000, 0.65, 10),
        num_peer=32,
        num_positions=1000,
        neighbors=(1,),
    ),
    Case(
        "spans 0.65/10, ragged, 32 x 1000",
        "numpy, a batch at once",
        lambda epoch: span_mask_rows(0, epoch, IDS[:32], 1000, 0.65, 10, equal_counts=False),
        num_ours=32,
        num_batches=25,
        peer=lambda: vectorized_spans(GENERATOR, 32, 1000, 0.65, 10),
        num_peer=32,
        num_positions=1000,
        neighbors=(1,),
    ),
    Case(
        "rectangles, 14 x 14, 120 patches",
        "published",
        lambda epoch: block_mask_rows(0, epoch, IDS, 14, 120, 16, None, 0.3),
        num_ours=1024,
        num_batches=2,
        peer=lambda: published_blocks(PYTHON_GENERATOR, 64, 14, 120, 16, 0.3),
        num_peer=64,
        num_positions=196,
        neighbors=(1, 14),
    ),
    Case(
        "inverse blocks of 3, 14 x 14, 16 masks of 0.8",
        "published",
        lambda epoch: inverse_block_mask_rows(0, epoch, IDS[:64], 14, 0.8, 3, 0.07, num_masks=16),
        num_ours=1024,
        num_batches=4,
        peer=lambda: published_fixed_blocks(GENERATOR, 16, 16, (14, 14), (3, 3), 0.2, 0.07, inverse=True),
        num_peer=256,
        num_positions=196,
        neighbors=(1, 14),
    ),
    Case(
        "blocks of 5, 1000 frames, 8 masks of 0.5",
        "published",
        lambda epoch: block_mask_1d_rows(0, epoch, IDS[:12], 1000, 0.5, 5, 0.05, num_masks=8),
        num_ours=96,
        num_batches=8,
        peer=lambda: published_fixed_blocks(GENERATOR, 12, 8, (1, 1000), (1, 5), 0.5, 0.05, inverse=False),
        num_peer=96,
        num_positions=1000,
        neighbors=(1,),
    ),
]


def as_masks(case: Case, epoch: int) -> np.ndarray:
    masks = np.zeros(case.num_ours * case.num_positions, dtype=bool)
    masks[case.ours(epoch)] = True
    return masks.reshape(case.num_ours, case.num_positions)


def figures(case: Case, masks: np.ndarray) -> list[float]:
    """Return the masked share at all positions, at both ends and in the middle, and how often neighbors differ."""
    middle = case.num_positions // 2
    parts = (masks, masks[:, 0], masks[:, -1], masks[:, middle : middle + 5])
    differ = (masks[:, distance:] != masks[:, :-distance] for distance in case.neighbors)
    return [float(part.mean()) for part in (*parts, *differ)]


def assert_same_distribution(case: Case) -> None:
    ours = np.array([figures(case, as_masks(case, epoch)) for epoch in range(100)])
    theirs = np.array([figures(case, case.peer()) for _ in range(25)])
    error = np.sqrt(ours.var(axis=0) / len(ours) + theirs.var(axis=0) / len(theirs))
    difference = np.abs(ours.mean(axis=0) - theirs.mean(axis=0))
    assert (difference <= 5 * error + 1e-9).all(), f"{case.name}: {ours.mean(axis=0)} against {theirs.mean(axis=0)}"


@pytest.mark.benchmark(group="masks", timer=time.process_time)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def bench_masks(benchmark, case: Case) -> None:  # type: ignore[no-untyped-def]
    assert_same_distribution(case)
    peer_seconds: list[float] = []

    def time_peer() -> None:
        start = time.process_time()
        case.peer()
        peer_seconds.append(time.process_time() - start)

    def ours() -> None:
        for epoch in range(case.num_batches):
            case.ours(epoch)

    warmup_rounds = 2
    benchmark.pedantic(ours, setup=time_peer, rounds=21, warmup_rounds=warmup_rounds)
    if benchmark.stats is not None:
        # seconds per mask
        mine = [seconds / (case.num_batches * case.num_ours) for seconds in benchmark.stats.stats.data]
        peer = [seconds / case.num_peer for seconds in peer_seconds[warmup_rounds:]]
        benchmark.extra_info |= {"op": "masks", "case": case.name, **describe_device(torch.device("cpu"))}
        benchmark.extra_info |= {**quantiles(mine), "peers": {case.peer_name: compared(peer, mine)}}
        benchmark.extra_info["note"] = "Masks: time per mask, one thread, CPU time."
