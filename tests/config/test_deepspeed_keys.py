"""Every key of the installed DeepSpeed has an effect, a line that says it has none, or a hint."""

from __future__ import annotations

import copy
import importlib
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from d2v_fast.config import ConfigError, RunConfig, apply_overrides, parse_config
from d2v_fast.config import deepspeed_extras as extras
from d2v_fast.config import deepspeed_sections as sections
from d2v_fast.config.deepspeed import _ALWAYS, _NEVER, _STAGES, REFUSED_KEYS, DeepSpeedConfig
from tests.helpers.runs import TINY, leave_out_reports, run_here, tiny_file

ZERO = "zero_optimization"


def parse(world_size: int = 1, **changes: Any) -> RunConfig:
    """The tiny configuration with dotted keys (`__` for the dot) changed."""
    overrides = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in changes.items()]
    return parse_config(apply_overrides(TINY, overrides), world_size)


def problem(world_size: int = 1, **changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(world_size, **changes)
    [found] = caught.value.problems
    return found


def idle(world_size: int = 1, **changes: Any) -> dict[str, str]:
    return parse(world_size, **changes).deepspeed.without_effect(world_size)


def theirs(module: str, name: str) -> Any:
    pytest.importorskip("deepspeed")
    return getattr(importlib.import_module(f"deepspeed.{module}"), name)


@pytest.mark.parametrize(
    ("section", "module", "name"),
    [
        (sections.OffloadOptimizerConfig, "runtime.zero.offload_config", "DeepSpeedZeroOffloadOptimizerConfig"),
        (sections.OffloadParamConfig, "runtime.zero.offload_config", "DeepSpeedZeroOffloadParamConfig"),
        (sections.Bf16Config, "runtime.precision_config", "DeepSpeedBF16Config"),
        (sections.Fp16Config, "runtime.precision_config", "DeepSpeedFP16Config"),
        (extras.TensorBoardConfig, "monitor.config", "TensorBoardConfig"),
        (extras.CsvMonitorConfig, "monitor.config", "CSVConfig"),
        (extras.WandbConfig, "monitor.config", "WandbConfig"),
        (extras.CometConfig, "monitor.config", "CometConfig"),
        (extras.CommsLoggerConfig, "comm.config", "CommsLoggerConfig"),
        (extras.CompileConfig, "compile.config", "CompileConfig"),
        (extras.ThroughputTimerConfig, "utils.config", "DeepSpeedThroughputTimerConfig"),
    ],
)
def test_keys_and_defaults_of_their_models(section: type[sections.Section], module: str, name: str) -> None:
    model = theirs(module, name)
    assert set(section.model_fields) == set(model.model_fields)
    for key, field in section.model_fields.items():
        default = model.model_fields[key].default
        mine = list(field.default) if isinstance(field.default, tuple) else field.default
        assert mine == getattr(default, "value", default), key


def test_keys_of_zero() -> None:
    model = theirs("runtime.zero.config", "DeepSpeedZeroConfig")
    known = set(sections.ZeroConfig.model_fields)
    for name, field in model.model_fields.items():
        key = field.alias or name
        extra = field.json_schema_extra or {}
        if key in known:
            assert not extra.get("deprecated"), key
            default = field.default
            mine = sections.ZeroConfig.model_fields[key].default
            assert mine == getattr(default, "value", default), key
        else:
            said = problem(**{f"{ZERO}__{key}": True})
            assert sections.ZeroConfig.hints[key] in said
            new = (extra.get("new_param") or "").partition(" ")[0]
            assert not extra.get("deprecated") or new in said or "export" in said, key
        if field.alias:
            # DeepSpeed takes it by this name, too
            assert f"`{ZERO}.{field.alias}`" in problem(**{f"{ZERO}__{name}": 1})
    assert known <= {field.alias or name for name, field in model.model_fields.items()}
    for key in theirs("runtime.config", "_REMOVED_ZERO_CONFIG_KEYS"):
        assert "DeepSpeed has removed" in problem(**{f"{ZERO}__{key}": 1})


def constants(module: str, prefix: str) -> set[str]:
    """The values of the constants of a module that begin with `prefix` and name keys."""
    found = vars(importlib.import_module(f"deepspeed.{module}"))
    return {
        value
        for name, value in found.items()
        if name.startswith(prefix) and isinstance(value, str) and not name.endswith(("DEFAULT", "FORMAT", "ALIGN"))
    }


def test_keys_of_the_sections_without_a_model() -> None:
    pytest.importorskip("deepspeed")
    default = theirs("runtime.activation_checkpointing.config", "ACT_CHKPT_DEFAULT")
    assert set(extras.ActivationCheckpointingConfig.model_fields) == set(default)
    assert set(extras.AioConfig.model_fields) == set(theirs("runtime.swap_tensor.aio_config", "AIO_DEFAULT_DICT"))
    assert set(extras.FlopsProfilerConfig.model_fields) == constants("profiling.constants", "FLOPS_PROFILER_")
    read = theirs("runtime.model_checkpointing.config", "get_checkpoint_writer_config")({"writer": {}})
    assert set(extras.CheckpointWriterConfig.model_fields) == set(read)
    checkpoint = set(theirs("runtime.model_checkpointing.config", "CHECKPOINT_DEFAULT_DICT"))
    more = {"load_universal", "use_node_local_storage", "parallel_write"}
    assert more <= constants("runtime.constants", "")
    assert set(extras.CheckpointConfig.model_fields) == checkpoint | more
    assert set(extras.DataTypesConfig.model_fields) == {
        *constants("runtime.constants", "GRAD_ACCUM_DTYPE"),
        *constants("runtime.constants", "PARAM_DTYPE"),
        *constants("runtime.constants", "BUFFER_DTYPE"),
        *constants("runtime.constants", "KEEP_IN_FP32"),
    }


class Recording(dict[str, Any]):
    """A file that remembers which keys are looked for."""

    seen: ClassVar[set[str]] = set()

    def __contains__(self, key: object) -> bool:
        self.seen.add(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.seen.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return self

    def __copy__(self) -> Recording:
        return self


def test_every_key_that_deepspeed_looks_for_is_known() -> None:
    config = theirs("runtime.config", "DeepSpeedConfig")
    file = Recording(train_batch_size=1)
    config(file)
    removed = set(theirs("runtime.config", "_REMOVED_TOP_LEVEL_CONFIG_KEYS"))
    assert len(file.seen) > 40
    known = {*DeepSpeedConfig.model_fields, *REFUSED_KEYS}
    assert file.seen | removed <= known, (file.seen | removed) - known
    for key in REFUSED_KEYS:
        assert "is not available here. " in problem(**{key: {}})


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        (f"{ZERO}__cpu_offload", True, 'Write it as `zero_optimization.offload_optimizer.device`: "cpu".'),
        (f"{ZERO}__cpu_offload_params", True, 'Write it as `zero_optimization.offload_param.device`: "cpu".'),
        ("aio__blok_size", 1, "`aio.blok_size` (value 1) is not a known key. Did you mean `aio.block_size`?"),
        (
            "activation_checkpointing__partitioned_activations",
            True,
            "`activation_checkpointing.partition_activations`?",
        ),
        ("wandb__projekt", "x", "Did you mean `wandb.project`?"),
        ("tensorboard__output_dir", "x", "Did you mean `tensorboard.output_path`?"),
        ("comms_logger__prof_al", True, "Did you mean `comms_logger.prof_all`?"),
        ("flops_profiler__profile_steps", 3, "Did you mean `flops_profiler.profile_step`?"),
        ("checkpoint__writer__typ", "FAST", "Did you mean `checkpoint.writer.type`?"),
        ("timers__throughput__enable", True, "Did you mean `timers.throughput.enabled`?"),
        ("data_types__grad_accum_dtyp", "fp32", "Did you mean `data_types.grad_accum_dtype`?"),
        ("data_types__grad_accum_dtype", "float32", "must be 'fp32', 'fp16' or 'bf16'"),
        ("communication_data_type", "fp8", "must be 'fp32', 'fp16' or 'bf16'"),
        ("log_level", "loud", "must be 'debug', 'info', 'warning', 'error' or 'critical'"),
        ("wandb__enabled", "yes", "`wandb.enabled` must be true or false"),
        ("wandb", True, "`wandb` must be a section {...}"),
        ("optimizer__params__max_grad_norm", 1.0, "Write it as `gradient_clipping`."),
        ("optimizer__params__torch_adam", True, "`optimizer.type` selects the implementation."),
        ("max_grad_norm", 1.0, "Write it as `gradient_clipping`."),
        ("gradient_clipping", "auto", "Only Transformers' Trainer fills in `auto`: write the value."),
        (f"{ZERO}__reduce_bucket_size", "auto", "Only Transformers' Trainer fills in `auto`: write the value."),
        (f"{ZERO}__legacy_stage1", True, "`zero_optimization.legacy_stage1` must be false"),
        ("d2v__run__compile", "yes", '`d2v.run.compile` must be true, false or "auto"'),
        ("d2v__compile", {}, "`d2v.run.compile` compiles the blocks."),
    ],
)
def test_hints(key: str, value: Any, sentence: str) -> None:
    assert sentence in problem(**{key: value})


def test_a_part_of_the_optimizer_is_offloaded_in_stage_3_only() -> None:
    offload = {"device": "cpu", "ratio": 0.5}
    assert "`zero_optimization.offload_optimizer.ratio` must be 1" in problem(
        **{f"{ZERO}__stage": 2, f"{ZERO}__offload_optimizer": offload}
    )
    parse(**{f"{ZERO}__stage": 3, f"{ZERO}__offload_optimizer": offload})


def test_one_process_without_zero_reads_nothing_of_deepspeed() -> None:
    why = "one process without ZeRO runs without DeepSpeed"
    assert idle(gradient_clipping=2.0, **{f"{ZERO}__stage": 0, "bf16__enabled": "auto"}) == {}
    assert idle(wandb={"enabled": True}, steps_per_print=5) == {"steps_per_print": why, "wandb": why}
    assert idle(**{f"{ZERO}__reduce_bucket_size": 5e7}) == {f"{ZERO}.reduce_bucket_size": why}
    assert idle(**{f"{ZERO}__offload_optimizer": {"device": "none", "pin_memory": False}}) == {
        f"{ZERO}.offload_optimizer.pin_memory": why
    }
    assert idle(fp16__loss_scale=8.0) == {"fp16.loss_scale": why}
    # a default that is written out asks for nothing
    assert idle(aio={}, wandb={"enabled": False}, steps_per_print=None, prescale_gradients=False) == {}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_stages(stage: int, world_size: int) -> None:
    if world_size == 1 and stage == 0:
        return
    at = {f"{ZERO}__stage": stage}
    found = idle(
        world_size,
        **at,
        activation_checkpointing={"cpu_checkpointing": True},
        aio={"block_size": 4096},
        checkpoint={"tag_validation": "FAIL"},
        compile={"deepcompile": True},
        disable_allgather=True,
        dataloader_drop_last=False,
    )
    assert found == {
        key: _NEVER[key]
        for key in (
            "disable_allgather",
            "dataloader_drop_last",
            "activation_checkpointing",
            "aio",
            "checkpoint",
            "compile",
        )
    }
    assert "`d2v.model.gradient_checkpointing` is the key for it" in found["activation_checkpointing"]
    for key, stages in {**_STAGES, "overlap_comm": (1, 2, 3), "reduce_scatter": (1, 2, 3)}.items():
        if not key.startswith("offload"):
            default = sections.ZeroConfig.model_fields[key].default
            value = (not default) if isinstance(default, bool) or default is None else 7
            found = idle(world_size, **at, **{f"{ZERO}__{key}": value})
            assert found == ({} if stage in stages else {f"{ZERO}.{key}": f"stage {stage} does not read it"}), key
    alone = {"prescale_gradients": "one process exchanges no gradients"} if world_size == 1 else {}
    assert idle(world_size, **at, prescale_gradients=True) == alone
    enabled = {"wandb": {"enabled": True}, "tensorboard": {"enabled": True}, "flops_profiler": {"enabled": True}}
    assert idle(world_size, **at, **enabled, wall_clock_breakdown=True, steps_per_print=3) == {}
    assert idle(world_size, **at, wandb={"project": "x"}) == {"wandb": "`wandb.enabled` is false"}
    assert idle(world_size, **at, fp16__loss_scale=4.0) == {"fp16.loss_scale": "`fp16.enabled` is false"}
    fixed = idle(world_size, **at, fp16={"enabled": True, "loss_scale": 4.0, "hysteresis": 3})
    assert fixed == {"fp16.hysteresis": "`fp16.loss_scale` is fixed"}
    if stage:
        offload = {
            "device": "cpu",
            "nvme_path": "/x",
            "buffer_count": 5,
            "pin_memory": False,
            "cpuadam_cores_perc": 0.5,
        }
        found = idle(world_size, **at, **{f"{ZERO}__offload_optimizer": offload})
        assert set(found) == {
            f"{ZERO}.offload_optimizer.{key}" for key in ("nvme_path", "buffer_count", "cpuadam_cores_perc")
        }


def test_the_stages_are_those_of_the_installed_version() -> None:
    """What the optimizers of stages 1 and 2, and of stage 3, take as arguments."""
    both = inspect.signature(theirs("runtime.zero.stage_1_and_2", "DeepSpeedZeroOptimizer")).parameters
    third = inspect.signature(theirs("runtime.zero.stage3", "DeepSpeedZeroOptimizer_Stage3")).parameters
    for key, stages in _STAGES.items():
        name = key.removeprefix("offload_optimizer.").removeprefix("stage3_")
        assert stages == ((1, 2) if name in both else (3,)), key
        if name in third:
            assert stages == (3,), key


def changed_keys_of_file(section: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in section.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from changed_keys_of_file(value, f"{prefix}{key}.")


def test_what_has_no_effect_is_not_handed_over() -> None:
    changes = {
        f"{ZERO}__stage": 2,
        f"{ZERO}__sub_group_size": 1000,
        f"{ZERO}__overlap_comm": True,
        f"{ZERO}__offload_optimizer": {"device": "cpu", "nvme_path": "/x"},
        "aio": {"block_size": 4096},
        "csv_monitor": {"enabled": True, "output_path": "/x"},
        "checkpoint": {"load_universal": True},
    }
    deepspeed = parse(**changes).deepspeed
    handed = set(changed_keys_of_file(deepspeed.for_deepspeed(1)))
    assert handed.isdisjoint(deepspeed.without_effect(1))
    assert {f"{ZERO}.overlap_comm", f"{ZERO}.offload_optimizer.device", "csv_monitor.output_path"} <= handed
    assert set(changed_keys_of_file(deepspeed.asked_for())) - handed == {
        f"{ZERO}.sub_group_size",
        f"{ZERO}.offload_optimizer.nvme_path",
        *("aio", "aio.block_size", "checkpoint", "checkpoint.load_universal"),
    }
    # the file itself is kept as it is
    assert deepspeed.asked_for()[ZERO]["sub_group_size"] == 1000
    assert set(_ALWAYS) <= set(DeepSpeedConfig.model_fields)


@pytest.mark.parametrize("report", ["steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state"])
def test_reports_are_heard(report: str) -> None:
    """DeepSpeed writes them to its log at a level that is silenced otherwise."""
    zero = {f"{ZERO}__stage": 1}
    assert parse(**zero, **{report: 1 if "steps" in report else True}).deepspeed.for_deepspeed(1)["log_level"] == "info"
    assert "log_level" not in parse(**zero).deepspeed.for_deepspeed(1)
    quiet = parse(**zero, **{report: 1 if "steps" in report else True}, log_level="error").deepspeed
    assert quiet.for_deepspeed(1)["log_level"] == "error"


def test_a_run_says_what_has_no_effect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_out_reports(monkeypatch.setattr)
    file = tiny_file(tmp_path, wandb={"enabled": True}, activation_checkpointing={"profile": True})
    assert run_here(file, "--set", "d2v.schedule.steps=1", "--set", "d2v.schedule.warmup_steps=0") == 0
    said = capsys.readouterr().out
    assert "no effect of `wandb`: one process without ZeRO runs without DeepSpeed" in said
    assert "no effect of `activation_checkpointing`: `d2v.model.gradient_checkpointing` is the key for it" in said
    assert run_here(file, "--dry-run") == 0
    assert "no effect of `wandb`" in capsys.readouterr().out


def test_sections_survive_the_run_folder() -> None:
    """What is written to config.json means the same when it is read again."""
    raw = copy.deepcopy(TINY) | {
        "comms_logger": {"enabled": True, "prof_ops": ["all_reduce"]},
        "data_types": {"keep_in_fp32_modules": ["norm"]},
        "timers": {"throughput": {"enabled": False}},
        "flops_profiler": {"enabled": True, "output_file": "x"},
    }
    once = parse_config(raw)
    again = parse_config(json.loads(json.dumps(once.to_dict())))
    assert again.to_dict() == once.to_dict()
    assert again.digest() == once.digest()


def test_hints_for_what_older_files_hold() -> None:
    assert "`aio.intra_op_parallelism`" in problem(aio={"thread_count": 1})
    assert "apex" in problem(fp16={"opt_level": "O2"})
    for name in ("Adam", "adam", "adamw"):
        found = problem(optimizer__type=name)
        assert f'`optimizer.type` must be "AdamW", but is "{name}" instead' in found
    assert "ApexFusedAdam" in problem(optimizer__type="Lamb")


def test_what_is_switched_off_is_to_be_left_out() -> None:
    for key, value in (("amp", {"enabled": False}), ("fp32_allreduce", False), ("sparse_gradients", False)):
        assert problem(**{key: value}).endswith("is not available here. Leave it out.")
    assert "communication_data_type" in problem(fp32_allreduce=True)
    assert 'False is "none" there.' in problem(zero_optimization__cpu_offload=False)
