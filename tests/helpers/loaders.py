"""Loaders for tests, as a run makes them."""

from __future__ import annotations

from collections.abc import Callable

from d2v_fast.config import BatchSplit, D2VConfig
from d2v_fast.data import BatchMaker, StepLoader, step_order


def make_loader(
    maker: BatchMaker,
    config: D2VConfig,
    split: BatchSplit,
    *,
    rank: int = 0,
    seed: int | None = None,
    start_step: int = 0,
    num_steps: int | None = None,
    **options: float | Callable[[str], None],
) -> StepLoader:
    """The loader of one process; `seed` is the run's unless given, and `options` are those of `StepLoader`."""
    seed = config.run.seed if seed is None else seed
    order = step_order(maker, split, rank=rank, seed=seed, start_step=start_step, num_steps=num_steps)
    return StepLoader(maker, order, config.data, **{"timeout_s": config.run.timeout_s, **options})
