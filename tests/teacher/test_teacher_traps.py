"""Three known mistakes in averaging a ZeRO-3 model by hand, and the check that finds them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from d2v_fast.distributed.world import World
from d2v_fast.teacher import Teacher, decay_at
from tests.helpers.marks import needs_deepspeed
from tests.helpers.runs import in_processes
from tests.helpers.small_net import (
    SCHEDULE,
    Both,
    Net,
    Truth,
    engine_step,
    initialize,
    my_inputs,
    seen,
)


class ByHand:
    """A frozen teacher under the student's engine, which keeps small parameters whole."""

    def __init__(self, both: Both) -> None:
        self.module = both.teacher
        self.pairs = list(zip(both.teacher.parameters(), both.student.parameters(), strict=True))


class ShardsOnly(ByHand):
    """Mistake: average the shards but not the parameters that are kept whole."""

    @torch.no_grad()
    def update(self, step: int) -> None:
        for mine, other in self.pairs:
            mine.ds_tensor.lerp_(other.ds_tensor, 1 - decay_at(SCHEDULE, step))


class GatheredWithoutRank(ByHand):
    """Mistake: average gathered parameters without `modifier_rank`, so that the change is dropped."""

    @torch.no_grad()
    def update(self, step: int) -> None:
        import deepspeed

        for mine, other in self.pairs:
            with deepspeed.zero.GatheredParameters([mine, other]):
                mine.lerp_(other, 1 - decay_at(SCHEDULE, step))


class Gathered(ByHand):
    """Slow but right if the caller checks that the step was applied."""

    @torch.no_grad()
    def update(self, step: int) -> None:
        import deepspeed

        for mine, other in self.pairs:
            with deepspeed.zero.GatheredParameters([mine, other], modifier_rank=0):
                if dist.get_rank() == 0:
                    mine.lerp_(other, 1 - decay_at(SCHEDULE, step))


def check(make: Callable[[Any, Both], Any], asks: bool = True) -> list[str]:
    """Train, with one step that is skipped, and list what is wrong with the teacher's module on this process."""
    both = Both()
    engine = initialize(both, 3)
    average, truth = make(engine, both), Truth(engine, both.student)
    problems, step = [], 0
    for number in range(1, 7):
        x = my_inputs(number)
        if number == 4:
            x[0, 0] = torch.nan
        before = seen(average.module)
        applied = engine_step(engine, x)
        assert applied == (number != 4)
        if applied or not asks:
            step += 1
            average.update(step)
        if applied:
            truth.update(decay_at(SCHEDULE, step))
        elif any(not torch.equal(p, before[name]) for name, p in seen(average.module).items()):
            problems.append("a skipped step changed it")
    return problems + truth.problems(average.module)


@needs_deepspeed
def test_the_check_finds_the_known_mistakes(tmp_path: Path) -> None:
    def work(world: World, folder: Path) -> Any:
        def ours(engine: Any, both: Both) -> Teacher:
            return Teacher(both.student, SCHEDULE, module=both.teacher, engine=engine)

        def ours_apart(engine: Any, both: Both) -> Teacher:
            return Teacher(both.student, SCHEDULE, module=Net(), engine=engine)

        return {
            "shards only": check(lambda _, both: ShardsOnly(both)),
            "gathered without rank": check(lambda _, both: GatheredWithoutRank(both)),
            "gathered at every step": check(lambda _, both: Gathered(both), asks=False),
            "gathered": check(lambda _, both: Gathered(both)),
            "ours": check(ours),
            "ours, apart": check(ours_apart),
        }

    trained = [name for name, p in Net().named_parameters() if p.requires_grad]
    for found in in_processes(2, tmp_path, work, timeout_s=240):
        # all of these parameters are small, so that a forward pass sees none of the last updates
        assert {f"{name} is off" for name in trained} <= set(found["shards only"])
        assert {f"{name} is still" for name in trained} <= set(found["gathered without rank"])
        assert "a skipped step changed it" in found["gathered at every step"]
        # what is checked is not more than can be had
        assert found["gathered"] == found["ours"] == found["ours, apart"] == []
