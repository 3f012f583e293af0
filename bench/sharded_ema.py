"""EMA of a sharded model: cost of an update under every ZeRO stage, compared with two common hand-written ways.

python bench/sharded_ema.py                  # prints a table and writes bench/results/sharded-ema-<machine>.md
python bench/sharded_ema.py --depth 2        # a smaller model; writes nothing

Two processes with one thread each. In every round each way runs once, and both processes start together. A time is that
of the slower process until the teacher's module could run. Ratios are formed within a round.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.bench_ema import vit_shapes
from bench.measure import compared, describe_device, quantiles
from bench.report import RESULTS, _time, machine_name
from d2v_fast.config import TeacherConfig
from d2v_fast.distributed.shards import find_shards
from d2v_fast.distributed.world import World
from d2v_fast.teacher import Teacher
from tests.helpers.runs import in_processes

DECAY = 0.9998
PROCESSES, WARM_UP = 2, 2
Ways = dict[str, Callable[[], None]]


class Parameters(nn.Module):
    """The parameters of a vision model, without a forward pass."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.all = nn.ParameterList(nn.Parameter(0.02 * torch.randn(shape)) for shape in vit_shapes(768, depth, 12))


class Collectives(TorchDispatchMode):
    """Count the collectives that are started within the context."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.count[func._opname] += 1
        return func(*args, **(kwargs or {}))


class Trial:
    """A model under a ZeRO stage with its teacher, and the ways to update the teacher."""

    def __init__(self, stage: int, dtype: torch.dtype, depth: int) -> None:
        import deepspeed

        self.stage, self.dtype, self.step = stage, dtype, 0
        self.model = Parameters(depth)
        self.numel = sum(p.numel() for p in self.model.parameters())
        copied = copy.deepcopy(self.model)
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "steps_per_print": 10**9,
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": dtype == torch.bfloat16},
            # the default buffer is 2 GB
            "zero_optimization": {"stage": stage, "reduce_bucket_size": 10**7, "allgather_bucket_size": 10**7},
        }
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.engine, *_ = deepspeed.initialize(model=self.model, optimizer=optimizer, config=settings)
            schedule = TeacherConfig(decay_start=DECAY, decay_end=DECAY, decay_steps=1)
            self.teacher = Teacher(self.model, schedule, compute_dtype=dtype, module=copied, engine=self.engine)
        self.masters = find_shards(self.model.named_parameters(), self.engine)
        self.averages = [shard.master for shard in self.teacher.shards]

    def ways(self) -> Ways:
        ways = {"ours": self.ours, "loop": self.loop}
        if self.stage in (1, 2):
            self.whole = [p.detach().float().clone() for p in self.teacher.module.parameters()]
            ways["gathered"] = self.gathered
        if self.stage == 3:
            ways["gathered"] = self.gathered_zero3
        return ways

    def ours(self) -> None:
        self.step += 1
        self.teacher.update(self.step)
        _ = self.teacher.module

    def loop(self) -> None:
        """Update the shards parameter by parameter, and then communicate as ours does."""
        with torch.no_grad():
            for average, shard in zip(self.averages, self.masters, strict=True):
                average.lerp_(shard.master, 1 - DECAY)
        self.teacher.refresh(self.step)
        _ = self.teacher.module

    @torch.no_grad()
    def gathered(self) -> None:
        """Gather every fp32 value in every process by DeepSpeed's accessor, and average all of them."""
        from deepspeed.utils import safe_get_full_fp32_param

        pairs = zip(self.whole, self.model.parameters(), self.teacher.module.parameters(), strict=True)
        for average, parameter, working in pairs:
            average.lerp_(safe_get_full_fp32_param(parameter).view_as(average), 1 - DECAY)
            working.copy_(average)

    @torch.no_grad()
    def gathered_zero3(self) -> None:
        """Follow the documentation of ZeRO-3: gather both, average in the first process, scatter."""
        import deepspeed

        for mine, other in zip(self.teacher.module.parameters(), self.model.parameters(), strict=True):
            with deepspeed.zero.GatheredParameters([mine, other], modifier_rank=0):
                if dist.get_rank() == 0:
                    mine.lerp_(other, 1 - DECAY)


def measure(stage: int, dtype: torch.dtype, depth: int, rounds: int, world: World) -> dict[str, Any]:
    """Return the seconds of every way in every round, of the slower process, and the collectives of `update`."""
    trial = Trial(stage, dtype, depth)
    ways = trial.ways()
    names = list(ways)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(WARM_UP + rounds):
        # rotate the order, so that no way always follows the same one
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            world.barrier()
            start = time.perf_counter()
            ways[name]()
            taken = torch.tensor(time.perf_counter() - start)
            dist.all_reduce(taken, dist.ReduceOp.MAX)
            if number >= WARM_UP:
                seconds[name].append(taken.item())
    collectives = Collectives()
    with collectives:
        trial.ours()
    held = sum(average.numel() for average in trial.averages)
    return {"seconds": seconds, "collectives": dict(collectives.count), "numel": trial.numel, "held": held}


def table(rows: list[dict[str, Any]], device: dict[str, Any], rounds: int) -> str:
    millions = rows[0]["numel"] / 1e6
    where = f"{device['device']}, {PROCESSES} processes with 1 thread each, torch {device['torch']}"
    lines = [
        f"# EMA of a sharded model: {where}",
        "",
        f"`python bench/sharded_ema.py`: {millions:.0f} M parameters as a vision Transformer holds them, {rounds} "
        "rounds in which every way runs once. Times are medians (20th to 80th percentile) of the slower process, until "
        "the teacher's module could run. A ratio is the other's time over ours, median of the rounds: above 1 ours is "
        "faster.",
        "",
        "- *loop*: `lerp_` per parameter on the shards and a copy into the module, then what is sent as ours sends it.",
        "- *gathered*: whole fp32 values by `safe_get_full_fp32_param`, averaged in every process (stages 1, 2); "
        "`GatheredParameters` with `modifier_rank=0`, averaged in the first process (stage 3, in the compute dtype).",
        "",
        "| stage | compute | held by a process | collectives in `update` | ours | loop | gathered |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ours = row["seconds"]["ours"]
        q = quantiles(ours)
        cells = [str(row["stage"]), row["dtype"], f"{row['held'] / 1e6:.0f} M"]
        cells.append(", ".join(f"{count} {name}" for name, count in row["collectives"].items()) or "none")
        cells.append(f"{_time(q['p50_s'])} ({_time(q['p20_s'])} to {_time(q['p80_s'])})")
        for name in ("loop", "gathered"):
            if name not in row["seconds"]:
                cells.append("")
                continue
            ratio = compared(row["seconds"][name], ours)["ratio"]
            seconds = _time(float(np.median(row["seconds"][name])))
            cells.append(f"**{ratio['p50']:.2f}** ({ratio['p20']:.2f} to {ratio['p80']:.2f}), {seconds}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="EMA of a sharded model, per ZeRO stage.")
    parser.add_argument("--depth", type=int, default=14, help="blocks of the model; 14 are 100 M parameters")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for stage in range(4):
        for dtype in (torch.float32, torch.bfloat16):

            def work(world: World, folder: Path, stage: int = stage, dtype: torch.dtype = dtype) -> Any:
                return measure(stage, dtype, arguments.depth, arguments.rounds, world)

            with tempfile.TemporaryDirectory() as folder:
                first, *_ = in_processes(PROCESSES, Path(folder), work, timeout_s=1200)
            name = "bf16" if dtype == torch.bfloat16 else "fp32"
            rows.append({**first, "stage": stage, "dtype": name})
            print(f"stage {stage}, {name}: {_time(float(np.median(first['seconds']['ours'])))}", file=sys.stderr)
    device = describe_device(torch.device("cpu"))
    text = table(rows, device, arguments.rounds)
    print(text)
    if arguments.depth == parser.get_default("depth"):
        path = RESULTS / f"sharded-ema-{machine_name([{**device, 'threads': PROCESSES}])}.md"
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
