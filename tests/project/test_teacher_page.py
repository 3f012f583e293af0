"""The example of docs/teacher.md runs as it stands, at every ZeRO stage."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch

from d2v_fast.distributed.world import World
from tests.helpers.marks import needs_deepspeed
from tests.helpers.places import ROOT
from tests.helpers.runs import in_processes

PAGE = (ROOT / "docs" / "teacher.md").read_text()
(EXAMPLE,) = [block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "deepspeed.initialize" in block]


def test_example_is_short() -> None:
    assert len([line for line in EXAMPLE.splitlines() if not line.startswith(("import", "from")) and line]) <= 20
    assert "tests/teacher/test_teacher_traps.py" in PAGE
    assert (ROOT / "tests" / "teacher" / "test_teacher_traps.py").exists()


@needs_deepspeed
def test_example_runs_at_every_stage(tmp_path: Path) -> None:
    def work(world: World, folder: Path) -> Any:
        import deepspeed

        report = {}
        for stage in range(4):
            torch.manual_seed(world.rank)
            assert EXAMPLE.count('"stage": 3') == 1
            # the default is a buffer of 2 GB
            buckets = '"reduce_bucket_size": 10_000, "allgather_bucket_size": 10_000'
            code = EXAMPLE.replace('"stage": 3', f'"stage": {stage}, {buckets}')
            names: dict[str, Any] = {}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exec(code, names)
            student, teacher = names["engine"].module, names["teacher"].module
            apart = []
            for mine, other in zip(teacher.parameters(), student.parameters(), strict=True):
                with deepspeed.zero.GatheredParameters([mine, other], enabled=stage == 3):
                    apart.append((mine - other).norm().item() / other.norm().item())
                    values = mine.flatten()[:5].tolist()
            report[stage] = {"apart": apart, "values": values, "last step": names["teacher"].last_step}
        return report

    first, second = in_processes(2, tmp_path, work, timeout_s=240)
    for stage in ("0", "1", "2", "3"):
        assert first[stage] == second[stage]
        assert first[stage]["last step"] == 20
        # it lags behind the student, and has come along
        assert all(1e-5 < distance < 0.2 for distance in first[stage]["apart"]), first[stage]
