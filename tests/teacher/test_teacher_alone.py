"""The teacher in users' own loops: DDP, FSDP2 and their own DeepSpeed engine."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from bench.sharded_ema import Collectives
from d2v_fast.config import TeacherConfig
from d2v_fast.distributed.shards import gather_whole
from d2v_fast.distributed.world import World
from d2v_fast.teacher import Teacher
from tests.helpers.marks import needs_deepspeed
from tests.helpers.runs import in_processes
from tests.helpers.small_net import (
    SCHEDULE,
    STEPS,
    Both,
    Net,
    Truth,
    adamw,
    engine_step,
    initialize,
    inputs,
    my_inputs,
    seen,
    shard_net,
    train,
    trained_names,
)


@pytest.fixture(scope="module")
def unsharded() -> dict[str, Any]:
    """Return average and outputs of one plain process with the whole batches."""
    net = Net()
    teacher = Teacher(net, SCHEDULE)
    outputs = train(net, teacher, adamw(net), World("cpu"))
    return {"average": teacher.state_dict()["average"], "outputs": outputs}


def report_of(teacher: Teacher, outputs: list[Tensor], world: World) -> dict[str, Any]:
    shapes = {name: shape for name, shape in teacher.shapes.items() if "frozen" not in name}
    average = gather_whole(teacher.shards, shapes, world)
    assert torch.equal(teacher.module.index, torch.arange(732))
    return {"average": {name: x.tolist() for name, x in average.items()}, "outputs": [x.tolist() for x in outputs]}


def assert_same_as(unsharded: dict[str, Any], reports: list[dict[str, Any]]) -> None:
    average = {name: torch.tensor(x) for name, x in reports[0]["average"].items()}
    assert average.keys() == unsharded["average"].keys() == set(trained_names(Net()))
    for name, expected in unsharded["average"].items():
        assert (average[name] - expected).norm() <= 1e-6 * expected.norm(), name
    for report in reports:
        for found, expected in zip(report["outputs"], unsharded["outputs"], strict=True):
            torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-5, atol=1e-6)


def test_ddp(tmp_path: Path, unsharded: dict[str, Any]) -> None:
    def work(world: World, folder: Path) -> Any:
        net = DistributedDataParallel(Net())
        teacher = Teacher(net, SCHEDULE)
        # a wrapped one would make every forward pass of the teacher a collective
        assert type(teacher.module) is Net
        return report_of(teacher, train(net, teacher, adamw(net), world), world)

    assert_same_as(unsharded, in_processes(2, tmp_path, work))


@pytest.mark.parametrize("processes", [1, 2])
def test_fsdp2(processes: int, tmp_path: Path, unsharded: dict[str, Any]) -> None:
    """FSDP2 keeps whole parameters after forward passes without a backward pass, which must not become stale."""

    def work(world: World, folder: Path) -> Any:
        net, copied = shard_net(Net()), shard_net(Net())
        with torch.no_grad():
            net(inputs(0)), copied(inputs(0))
        teacher = Teacher(net, SCHEDULE, module=copied)
        return report_of(teacher, train(net, teacher, adamw(net), world), world)

    assert_same_as(unsharded, in_processes(processes, tmp_path, work))


@needs_deepspeed
def test_what_an_update_sends(tmp_path: Path) -> None:
    """An update sends one all-gather per parameter group at stages 1 and 2, and nothing otherwise."""

    def work(world: World, folder: Path) -> Any:
        sent = {}
        for stage in range(4):
            net = Net()
            copied = copy.deepcopy(net)
            optimizer = torch.optim.AdamW([{"params": [p]} for p in (net.first.weight, net.last.weight)])
            engine = initialize(net, stage, optimizer)
            teacher = Teacher(net, SCHEDULE, module=copied, engine=engine)
            with Collectives() as sent[stage]:
                teacher.update(1)
                assert teacher.module is copied
        net, copied = shard_net(Net()), shard_net(Net())
        teacher = Teacher(net, SCHEDULE, module=copied)
        with Collectives() as sent["FSDP2"]:
            teacher.update(1)
        with Collectives() as sent["FSDP2, forward"], torch.no_grad():
            teacher.module(inputs(0))
        return {str(name): collectives.count for name, collectives in sent.items()}

    for report in in_processes(2, tmp_path, work):
        # that what is counted can be seen
        assert sum(report.pop("FSDP2, forward").values()) > 0
        two = {"_allgather_base_": 2}
        assert report == {"0": {}, "1": two, "2": two, "3": {}, "FSDP2": {}}


def move(engine: Any, stage: int) -> None:
    """Move the optimizer's fp32 values to other memory, as users do to free the device for a while."""
    if stage in (1, 2):
        engine.offload_states()
        engine.reload_states()
    elif stage == 3:
        # its offload is for FusedAdam only; this is how it puts the values back
        for value in engine.optimizer.fp32_partitioned_groups_flat:
            value.data = value.data.clone()


@needs_deepspeed
def test_own_engine_at_every_stage(tmp_path: Path) -> None:
    """Check average, frozen parameters, state, decay 1 and moved memory in a user's loop with accumulation."""

    def work(world: World, folder: Path) -> Any:
        report = {}
        for stage in range(4):
            net = Net()
            copied, still = copy.deepcopy(net), copy.deepcopy(net)
            frozen = {name: p.clone() for name, p in net.named_parameters() if not p.requires_grad}
            engine = initialize(net, stage, gradient_accumulation_steps=2)
            teacher = Teacher(engine.module, SCHEDULE, module=copied, engine=engine)
            fixed = Teacher(engine.module, TeacherConfig(decay_start=1.0, decay_end=1.0), module=still, engine=engine)
            truth, start, step = Truth(engine, net), seen(fixed.module), 0
            applied, saved, middle = [], {}, {}
            averaged = [p for name, p in teacher.module.named_parameters() if name in trained_names(net)]
            noticed = []
            for micro_step in range(12):
                applied.append(engine_step(engine, my_inputs(micro_step)))
                if applied[-1]:
                    step += 1
                    versions = [p._version for p in averaged]
                    teacher.update(step)
                    noticed.append(all(p._version > v for p, v in zip(averaged, versions, strict=True)))
                    fixed.update(step)
                    truth.update(teacher.decay(step))
                if micro_step == 5:
                    saved, middle = copy.deepcopy(teacher.state_dict()), seen(teacher.module)
                    move(engine, stage)
            moved_on, problems = seen(teacher.module), truth.problems(teacher.module)
            teacher.load_state_dict(saved)
            again = seen(teacher.module)
            report[stage] = {
                "applied": applied == [False, True] * 6,
                "problems": problems,
                "frozen": all(torch.equal(moved_on[name], p) for name, p in frozen.items()),
                "buffer": torch.equal(teacher.module.index, torch.arange(732)),
                "decay 1": all(torch.equal(p, start[name]) for name, p in seen(fixed.module).items()),
                "went back": all(torch.equal(p, middle[name]) for name, p in again.items()),
                "had gone on": all(not torch.equal(moved_on[name], middle[name]) for name in trained_names(net)),
                "last step": teacher.last_step == 3,
                "autograd notices": all(noticed),
                "keys": sorted(saved["average"]),
            }
        return report

    first, second = in_processes(2, tmp_path, work, timeout_s=240)
    for report in (first, second):
        for stage, found in report.items():
            found = {key: value for key, value in found.items() if key != "keys"}
            assert found.pop("problems") == [], stage
            assert all(found.values()), (stage, found)
    # without ZeRO both hold everything, otherwise ranges that are named by where they begin
    assert first["0"]["keys"] == second["0"]["keys"] == sorted(trained_names(Net()))
    for stage in ("1", "2", "3"):
        assert set(first[stage]["keys"]) != set(second[stage]["keys"])
        assert any("@" in key for key in first[stage]["keys"] + second[stage]["keys"])


@needs_deepspeed
def test_parameters_that_nobody_trains(tmp_path: Path) -> None:
    """Parameters that require a gradient but are not in the optimizer stay as they are."""

    def work(world: World, folder: Path) -> Any:
        report = {}
        for stage in range(4):
            net = Net()
            net.frozen.requires_grad_(True)
            copied = copy.deepcopy(net)
            optimizer = torch.optim.AdamW([*net.first.parameters(), *net.norm.parameters()], lr=0.01)
            engine = initialize(net, stage, optimizer)
            teacher = Teacher(engine.module, SCHEDULE, module=copied, engine=engine)
            start = seen(teacher.module)
            for step in range(1, 4):
                assert engine_step(engine, my_inputs(step))
                teacher.update(step)
            now = seen(teacher.module)
            report[stage] = sorted(name for name in start if not torch.equal(start[name], now[name]))
        return report

    moved = ["first.bias", "first.weight", "norm.bias", "norm.weight"]
    for report in in_processes(2, tmp_path, work, timeout_s=240):
        assert report == {str(stage): moved for stage in range(4)}


@needs_deepspeed
@pytest.mark.parametrize("way", ["initialize", "zero.Init", "zero.Init, initialize", "one engine"])
def test_teacher_partitioned_by_its_user(way: str, tmp_path: Path) -> None:
    """With DeepSpeed's default threshold all these parameters are kept whole and must not become stale."""

    def work(world: World, folder: Path) -> Any:
        import deepspeed

        if way == "one engine":
            both = Both()
            engine = initialize(both, 3)
            student, module = both.student, both.teacher
            engine_step(engine, my_inputs(0))
        else:
            student = Net()
            engine = initialize(student, 3)
            if way.startswith("zero.Init"):
                with deepspeed.zero.Init(config_dict_or_path=engine.config):
                    module = Net()
            else:
                module = Net()
            if way.endswith("initialize"):
                initialize(module.requires_grad_(False), 3)
        if way.endswith("initialize"):
            for _ in range(2):
                module(inputs(0))
        kept_whole = sum(p.ds_status.name == "AVAILABLE" for p in module.parameters())
        teacher = Teacher(student, SCHEDULE, module=module, engine=engine)
        truth = Truth(engine, student)
        outputs = []
        for step in range(1, STEPS + 1):
            assert engine_step(engine, my_inputs(step))
            teacher.update(step)
            truth.update(teacher.decay(step))
            with torch.no_grad():
                outputs.append(teacher.module(inputs(0)))
        plain = Net()
        plain.load_state_dict(seen(teacher.module), strict=False)
        return {
            "kept whole": kept_whole,
            "problems": truth.problems(teacher.module),
            "as the plain module": torch.equal(plain(inputs(0)), outputs[-1]),
        }

    for report in in_processes(2, tmp_path, work, timeout_s=240):
        if way != "zero.Init":
            assert report["kept whole"] > 0
        assert report["problems"] == []
        assert report["as the plain module"]
