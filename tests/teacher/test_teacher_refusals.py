"""Cases that the teacher refuses, each with advice."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from d2v_fast.distributed.world import World
from d2v_fast.teacher import Teacher
from tests.helpers.marks import needs_deepspeed
from tests.helpers.runs import in_processes
from tests.helpers.small_net import SCHEDULE, Net, initialize, shard_net


def message_of(make: Callable[[], Any]) -> str:
    try:
        make()
    except ValueError as error:
        return str(error)
    return "was accepted"


def refusals(world: World) -> dict[str, str]:
    """Return the message of every case, caused by DeepSpeed or by a stand-in for it."""
    import deepspeed

    messages = {}
    net = Net()
    copied = copy.deepcopy(net)
    for stage in (1, 3):
        net = Net()
        engine = initialize(net, stage)
        messages[f"no engine, stage {stage}"] = message_of(lambda net=net: Teacher(net, SCHEDULE, module=copied))
        messages[f"no module, stage {stage}"] = message_of(
            lambda net=net, engine=engine: Teacher(net, SCHEDULE, engine=engine)
        )
        other = Net()
        other_engine = initialize(other, stage)
        messages[f"another's engine, stage {stage}"] = message_of(
            lambda net=net, engine=other_engine: Teacher(net, SCHEDULE, module=copy.deepcopy(copied), engine=engine)
        )

    student = Net()
    engine = initialize(student, 3)

    def partitioned(change: Callable[[Any], None], **options: Any) -> str:
        module = Net().requires_grad_(False)
        initialize(module, 3)
        change(module.first.weight)
        return message_of(lambda: Teacher(student, SCHEDULE, module=module, engine=engine, **options))

    def second_partition(parameter: Any) -> None:
        parameter.ds_secondary_tensor = torch.zeros(1)

    def on_a_disk(parameter: Any) -> None:
        parameter.ds_tensor.final_location = "nvme"

    messages["second partition"] = partitioned(second_partition)
    messages["partition on a disk"] = partitioned(on_a_disk)
    messages["other dtype"] = partitioned(lambda parameter: None, compute_dtype=torch.bfloat16)
    alone = [dist.new_group([rank]) for rank in range(world.size)][world.rank]
    with deepspeed.zero.Init(data_parallel_group=alone, config_dict_or_path=engine.config):
        module = Net()
    # as if its hooks were there
    module.ds_recompute_parameters = set()
    messages["other processes"] = message_of(lambda: Teacher(student, SCHEDULE, module=module, engine=engine))
    engine.optimizer._swappable_optimizer_subgroup = lambda group: True
    messages["optimizer on a disk"] = message_of(
        lambda: Teacher(student, SCHEDULE, module=copy.deepcopy(copied), engine=engine)
    )

    net = Net()
    engine = initialize(net, 1, bf16={"enabled": True}, data_types={"grad_accum_dtype": "fp32"})
    messages["fp32 accumulation"] = message_of(lambda: Teacher(net, SCHEDULE, module=copied, engine=engine))
    return messages


@needs_deepspeed
def test_deepspeed(tmp_path: Path) -> None:
    expected = {
        "no engine, stage 1": "pass the engine",
        "no engine, stage 3": "`engine` must be the DeepSpeed engine that trains first.weight",
        "no module, stage 1": "`module` must be given together with `engine`",
        "no module, stage 3": "`module` must be given together with `engine`",
        "another's engine, stage 1": "its optimizer has none of the 6 parameters",
        "another's engine, stage 3": "its optimizer has none of the 6 parameters",
        "second partition": "ZeRO++ or MiCS has made a second one of first.weight",
        "partition on a disk": "first.weight is offloaded to NVMe",
        "other dtype": "partitioned in, torch.float32, but is torch.bfloat16 instead",
        "other processes": "`module` must be partitioned over the same processes as the student",
        "optimizer on a disk": '`offload_optimizer.device` must be "cpu" or "none", but is "nvme" instead',
        "fp32 accumulation": "bf16 parameters with fp32 gradient accumulation are not supported in stage 1",
    }
    for found in in_processes(2, tmp_path, lambda world, folder: refusals(world)):
        assert found.keys() == expected.keys()
        for case, words in expected.items():
            assert words in found[case], (case, found[case])


def test_fsdp2(tmp_path: Path) -> None:
    def work(world: World, folder: Path) -> Any:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import Shard

        net, mesh = shard_net(Net()), init_device_mesh("cpu", (world.size,))
        by_columns = [
            fully_shard(nn.Linear(4, 4, bias=False), mesh=mesh, shard_placement_fn=lambda p: Shard(1)) for _ in range(2)
        ]
        whole = fully_shard(nn.Linear(4, 4), mesh=mesh)
        with torch.no_grad():
            # it shows whole parameters now
            whole(torch.zeros(1, 4))
        return {
            "no module": message_of(lambda: Teacher(net, SCHEDULE)),
            "no module, shown whole": message_of(lambda: Teacher(whole, SCHEDULE)),
            "plain module": message_of(lambda: Teacher(net, SCHEDULE, module=Net())),
            "plain student": message_of(lambda: Teacher(Net(), SCHEDULE, module=shard_net(Net()))),
            "bf16": message_of(lambda: Teacher(net, SCHEDULE, module=shard_net(Net()), compute_dtype=torch.bfloat16)),
            "columns": message_of(lambda: Teacher(by_columns[0], SCHEDULE, module=by_columns[1])),
        }

    expected = {
        "no module": "a copy of the student that was made before it was sharded",
        "no module, shown whole": "a copy of the student that was made before it was sharded",
        "plain module": "`module` must be sharded as the student is, but first.weight is None there",
        "plain student": "`module` must be sharded as the student is",
        "bf16": "`compute_dtype` must be torch.float32 with FSDP2",
        "columns": "`weight` must be sharded over its first dimension",
    }
    for found in in_processes(2, tmp_path, work):
        for case, words in expected.items():
            assert words in found[case], (case, found[case])


@needs_deepspeed
def test_zero_optimizer_of_an_unknown_kind() -> None:
    """An unknown ZeRO optimizer is an error instead of an average of rounded values."""
    for stage, words in {
        0: "or with one of ZeRO's optimizers, but its optimizer is object instead",
        1: "with the ZeRO optimizer of stages 1 and 2, but its optimizer is object instead",
        2: "with the ZeRO optimizer of stages 1 and 2, but its optimizer is object instead",
        3: "but its optimizer is object: an engine of stage 3 that was made without an optimizer trains nothing",
    }.items():
        net = Net()
        engine: Any = SimpleNamespace(
            optimizer=object(), basic_optimizer=None, _config=None, zero_optimization_stage=lambda stage=stage: stage
        )
        assert words in message_of(lambda net=net, engine=engine: Teacher(net, SCHEDULE, module=Net(), engine=engine))
