"""DeepSpeed's part of the configuration file: its keys, and which of them affect a run.

DeepSpeed 0.19.8 silently ignores misspelled top-level keys, and some of its sections do as well. Here an unknown key is
an error. A key without effect is reported and not passed to DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from pydantic import Field, model_validator
from typing_extensions import Self

from d2v_fast.config.deepspeed_extras import (
    ActivationCheckpointingConfig,
    AioConfig,
    CheckpointConfig,
    CometConfig,
    CommsLoggerConfig,
    CompileConfig,
    CsvMonitorConfig,
    DataTypesConfig,
    FlopsProfilerConfig,
    TensorBoardConfig,
    TimersConfig,
    WandbConfig,
)
from d2v_fast.config.deepspeed_sections import Bf16Config, Fp16Config, OptimizerConfig, ZeroConfig
from d2v_fast.config.errors import MAX_SAMPLES, ConfigError, Problem, Section, refuse_if, say, show

# keys that DeepSpeed accepts and d2v_fast refuses -> reason or advice
REFUSED_KEYS = {
    "scheduler": "The learning-rate schedule is `d2v.schedule`, the same under every engine.",
    "amp": 'Use "bf16": {"enabled": "auto"}.',
    "bfloat16": "Write it as `bf16`.",
    "torch_autocast": 'Use "bf16": {"enabled": "auto"}.',
    "managed_gradient_accumulation": "The training loop drives the accumulation itself.",
    "gradient_allreduce_op": "The loss is normalized over all ranks and needs the mean.",
    "data_efficiency": "The order of the data is d2v_fast's own, so that a run can be resumed exactly.",
    "curriculum_learning": "The order of the data is d2v_fast's own, so that a run can be resumed exactly.",
    "autotuning": "The batch sizes are fixed by the file.",
    "hybrid_engine": "It serves generation, not pre-training.",
    "pipeline": "Pipeline parallelism is not supported.",
    "tensor_parallel": "Tensor parallelism is not supported.",
    "expert_parallel": "Expert parallelism is not supported.",
    "sequence_parallel_size": "Sequence parallelism is not supported.",
    "seq_parallel_communication_data_type": "Sequence parallelism is not supported.",
    "weight_quantization": "Quantized weights are for inference.",
    "use_data_before_expert_parallelism": "Expert parallelism is not supported.",
    "datastates_ckpt": "Checkpoints are d2v_fast's own.",
    "zenflow": "ZenFlow applies gradients late, and the teacher follows what is applied.",
    "nebula": "DeepSpeed has removed it, and checkpoints are d2v_fast's own.",
    "compression_training": "DeepSpeed has removed it.",
    "quantize_training": "DeepSpeed has removed it.",
    "sparse_gradients": "DeepSpeed has removed it.",
    "eigenvalue": "DeepSpeed has removed it.",
    "sparse_attention": "DeepSpeed has removed it.",
    "elasticity": "DeepSpeed has removed it: a run of d2v_fast can be resumed with any number of processes.",
    "graph_harvesting": "DeepSpeed has removed it.",
    "progressive_layer_drop": "DeepSpeed has removed it: use `d2v.model.drop_path` or `d2v.model.layer_drop`.",
    "allgather_size": "Write it as `zero_optimization.allgather_bucket_size`.",
    "fp32_allreduce": 'Write it as `communication_data_type`: "fp32".',
    "vocabulary_size": "Write it as `d2v.model.vocab_size`.",
    "max_grad_norm": "Write it as `gradient_clipping`.",
}

_OWN_CHECKPOINTS = "checkpoints are d2v_fast's own"
_NOT_READ = "DeepSpeed does not read it"
# keys without effect under every engine -> reason
_NEVER = {
    "activation_checkpointing": "`d2v.model.gradient_checkpointing` is the key for it",
    "aio": "it is for offload to NVMe, which is not supported",
    "checkpoint": _OWN_CHECKPOINTS,
    "compile": "`d2v.run.compile` compiles the model",
    "dataloader_drop_last": "the loader is d2v_fast's own",
    "disable_allgather": _NOT_READ,
    "zero_optimization.allgather_partitions": _NOT_READ,
    "zero_optimization.load_from_fp32_weights": _OWN_CHECKPOINTS,
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": _OWN_CHECKPOINTS,
    **{
        f"zero_optimization.{section}.{key}": "it is for offload to NVMe, which is not supported"
        for section, keys in (
            (
                "offload_optimizer",
                ("nvme_path", "buffer_count", "pipeline_read", "pipeline_write", "fast_init"),
            ),
            ("offload_param", ("nvme_path", "buffer_count", "buffer_size", "max_in_cpu")),
        )
        for key in keys
    },
}
# keys of zero_optimization that not all stages read -> the stages that do
_STAGES = {
    **dict.fromkeys(
        (
            *("use_multi_rank_bucket_allreduce", "allgather_bucket_size", "ignore_unused_parameters"),
            *("round_robin_gradients", "parameter_alignment"),
        ),
        (1, 2),
    ),
    **dict.fromkeys(
        (
            *("sub_group_size", "zero_hpz_partition_size", "zero_quantized_weights"),
            *("zero_quantized_nontrainable_weights", "zero_quantized_gradients", "memory_efficient_linear"),
            *("override_module_apply", "log_trace_cache_warnings", "enable_sanity_checks"),
            *("stage3_prefetch_bucket_size", "stage3_param_persistence_threshold", "stage3_max_live_parameters"),
            *("stage3_model_persistence_threshold", "stage3_max_reuse_distance", "stage3_allgather_sequential"),
            *("stage3_module_granularity_threshold", "stage3_use_all_reduce_for_fetch_params"),
            *("offload_optimizer.super_offload", "offload_optimizer.cpuadam_cores_perc"),
        ),
        (3,),
    ),
}
# keys of fp16 that only a dynamic loss scale reads
_DYNAMIC = ("initial_scale_power", "loss_scale_window", "hysteresis", "consecutive_hysteresis", "min_loss_scale")
# keys whose reports need level "info" of DeepSpeed's log
_REPORTS = ("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "comms_logger")
# DeepSpeed's monitors -> package that each needs
_MONITORS = {"wandb": "wandb", "comet": "comet_ml", "tensorboard": "torch.utils.tensorboard"}
# keys that every engine reads
_ALWAYS = (
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    "optimizer",
)
_READ_BY_PLAIN_TORCH = ("zero_optimization.stage", "bf16.enabled", "bf16.check_grad_overflow", "fp16.enabled")


class BatchSplit(NamedTuple):
    """`global_batch` samples per optimizer step = `micro_batch` x `accumulation` x `world_size`."""

    global_batch: int
    micro_batch: int
    accumulation: int
    world_size: int

    @classmethod
    def of(cls, micro_batch: int, accumulation: int = 1, world_size: int = 1) -> BatchSplit:
        """Return the split with these factors."""
        return cls(micro_batch * accumulation * world_size, micro_batch, accumulation, world_size)


class DeepSpeedConfig(Section):
    """Everything outside `"d2v"`: DeepSpeed's own keys, read with and without DeepSpeed.

    Attributes:
        train_batch_size: Samples per optimizer step: the micro-batch x accumulation x processes. Whichever of the three
            is missing follows.
        train_micro_batch_size_per_gpu: Samples per process in one forward and backward pass.
        gradient_accumulation_steps: Forward and backward passes per optimizer step.
        gradient_clipping: Largest norm of all gradients; 0 does not clip.
        optimizer: The optimizer.
        bf16: Training in bf16.
        fp16: Training in fp16.
        zero_optimization: Sharding and offload.
        steps_per_print: Steps between two lines of DeepSpeed's own log.
        zero_allow_untested_optimizer: Let ZeRO use an optimizer that DeepSpeed does not know.
        zero_force_ds_cpu_optimizer: Require DeepSpeed's own optimizer if it is offloaded.
        prescale_gradients: Divide gradients before they are summed over the processes.
        gradient_predivide_factor: Divisor of `prescale_gradients`.
        communication_data_type: Dtype in which gradients are exchanged; null takes the compute dtype.
        disable_allgather: No effect: DeepSpeed does not read it.
        disable_python_gc: Run Python's garbage collection between steps only.
        dataloader_drop_last: No effect: the loader is d2v_fast's own.
        dump_state: Log the state of the engine at its start.
        log_level: Level of DeepSpeed's log.
        memory_breakdown: Log memory by step phase.
        wall_clock_breakdown: Log time by step phase.
        activation_checkpointing: No effect: `d2v.model.gradient_checkpointing` is the key for it.
        aio: No effect: it is for offload to NVMe, which is not supported.
        checkpoint: No effect: checkpoints are d2v_fast's own.
        comet: Report to Comet.
        comms_logger: Log collectives.
        compile: No effect: `d2v.run.compile` compiles the model.
        csv_monitor: Report to CSV files.
        data_types: Dtypes of gradients, parameters and buffers.
        flops_profiler: Count operations of a step.
        tensorboard: Report to TensorBoard, beside d2v_fast's own log.
        timers: DeepSpeed's timers.
        wandb: Report to Weights & Biases.
    """

    train_batch_size: int | None = Field(default=None, ge=1, le=MAX_SAMPLES)
    train_micro_batch_size_per_gpu: int | None = Field(default=None, ge=1, le=MAX_SAMPLES)
    gradient_accumulation_steps: int | None = Field(default=None, ge=1, le=MAX_SAMPLES)
    gradient_clipping: float = Field(default=0.0, ge=0)
    optimizer: OptimizerConfig
    bf16: Bf16Config = Bf16Config()
    fp16: Fp16Config = Fp16Config()
    zero_optimization: ZeroConfig = ZeroConfig()

    steps_per_print: int | None = Field(default=None, ge=1)
    zero_allow_untested_optimizer: bool = True
    zero_force_ds_cpu_optimizer: bool = False
    prescale_gradients: bool = False
    gradient_predivide_factor: float = Field(default=1.0, gt=0)
    communication_data_type: Literal["fp32", "fp16", "bf16"] | None = None
    disable_allgather: bool = False
    disable_python_gc: bool = False
    dataloader_drop_last: bool = True
    dump_state: bool = False
    log_level: Literal["debug", "info", "warning", "error", "critical"] | None = None
    memory_breakdown: bool = False
    wall_clock_breakdown: bool = False
    activation_checkpointing: ActivationCheckpointingConfig | None = None
    aio: AioConfig | None = None
    checkpoint: CheckpointConfig | None = None
    comet: CometConfig | None = None
    comms_logger: CommsLoggerConfig | None = None
    compile: CompileConfig | None = None
    csv_monitor: CsvMonitorConfig | None = None
    data_types: DataTypesConfig | None = None
    flops_profiler: FlopsProfilerConfig | None = None
    tensorboard: TensorBoardConfig | None = None
    timers: TimersConfig | None = None
    wandb: WandbConfig | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = []
        if self.train_batch_size is None and self.train_micro_batch_size_per_gpu is None:
            hint = "Set it, or `train_micro_batch_size_per_gpu`."
            problems.append(Problem("train_batch_size", "be the number of samples per optimizer step", None, hint))
        if not self.bf16.check_grad_overflow:
            hint = "Without this check one NaN would spoil student, teacher and optimizer."
            problems.append(Problem("bf16.check_grad_overflow", "be true", False, hint))
        kind, stage = self.optimizer.type, self.zero_optimization.stage
        if kind != "AdamW" and stage == 0:
            hint = "Without ZeRO, only torch's AdamW can skip a step with a non-finite gradient."
            problems.append(Problem("optimizer.type", 'be "AdamW" without ZeRO', kind, hint))
        offload = self.zero_optimization.offload_optimizer
        if kind == "CPUAdam" and (offload is None or offload.device != "cpu"):
            hint = 'Set `zero_optimization.offload_optimizer.device` to "cpu", or choose another type.'
            problems.append(Problem("optimizer.type", "be another type without an offloaded optimizer", kind, hint))
        if kind in ("FusedAdam", "ApexFusedAdam") and offload is not None and offload.device == "cpu":
            hint = 'Its kernels run on a GPU: use "CPUAdam" or "AdamW".'
            problems.append(Problem("optimizer.type", "be another type with an offloaded optimizer", kind, hint))
        if kind == "ApexFusedAdam" and stage == 3:
            hint = "It counts steps per parameter group, and ZeRO-3 steps a group in several parts."
            problems.append(Problem("optimizer.type", "be another type in stage 3", kind, hint))
        if self.fp16.enabled and self.bf16.enabled is True:
            problems.append(Problem("fp16.enabled", "be false while `bf16.enabled` is true", True, "Choose one."))
        refuse_if(problems)
        return self

    def batch_split(self, world_size: int) -> BatchSplit:
        """Return the batch sizes of a run; missing ones follow from global = micro x accumulation x processes.

        Args:
            world_size: number of processes.
        Raises:
            ConfigError: the sizes contradict each other.
        """
        total, micro = self.train_batch_size, self.train_micro_batch_size_per_gpu
        accumulation = self.gradient_accumulation_steps
        if total is not None and micro is not None:
            accumulation = accumulation or max(1, total // (micro * world_size))
        accumulation = accumulation or 1
        if micro is None:
            assert total is not None
            micro = max(1, total // (accumulation * world_size))
        product = micro * accumulation * world_size
        if total is not None and total != product:
            # smallest step by which the global batch can change, given the sizes in the file
            unit = (self.train_micro_batch_size_per_gpu or 1) * world_size * (self.gradient_accumulation_steps or 1)
            fixes = sorted({max(1, total // unit) * unit, -(-total // unit) * unit})
            must = (
                "be `train_micro_batch_size_per_gpu` x `gradient_accumulation_steps` x processes "
                f"({micro} x {accumulation} x {world_size} = {product})"
            )
            hint = f"Set it to {' or '.join(map(str, fixes))}, or change one of the three."
            raise ConfigError([say(Problem("train_batch_size", must, total, hint))])
        return BatchSplit(product, micro, accumulation, world_size)

    def needs_deepspeed(self, world_size: int) -> bool:
        """Return whether a run needs DeepSpeed (several processes, ZeRO or offload) instead of plain torch."""
        return world_size > 1 or self.zero_optimization.stage > 0 or self.zero_optimization.offloads

    def without_effect(self, world_size: int) -> dict[str, str]:
        """Return the dotted keys that differ from their defaults but have no effect, each with the reason.

        Args:
            world_size: number of processes.
        """
        changed = self._changed()
        if self.needs_deepspeed(world_size):
            reasons = {key: self._why_idle(key, world_size) for key in changed}
        else:
            why = "one process without ZeRO runs without DeepSpeed"
            reasons = {key: _NEVER.get(key, why) for key in changed if key not in _READ_BY_PLAIN_TORCH}
        return {key: reason for key, reason in reasons.items() if reason is not None}

    def for_deepspeed(self, world_size: int) -> dict[str, Any]:
        """Return the keys of the file that have an effect, for DeepSpeed."""
        settings = self.asked_for()
        for key in self.without_effect(world_size):
            *sections, name = key.split(".")
            place = settings
            for section in sections:
                place = place[section]
            place.pop(name, None)
        reports = [key for key in _REPORTS if settings.get(key)]
        if reports and self.log_level is None:
            settings["log_level"] = "info"
        return settings

    def monitor_packages(self) -> dict[str, str]:
        """Return the package of each enabled monitor, by the name of the monitor."""
        enabled = {name: getattr(self, name) for name in _MONITORS}
        return {name: _MONITORS[name] for name, section in enabled.items() if section is not None and section.enabled}

    def asked_for(self) -> dict[str, Any]:
        """Return the keys in the file, without defaults."""
        return self.model_dump(mode="json", exclude_unset=True)

    def _changed(self) -> list[str]:
        """Return the dotted keys that differ from their defaults; sections that only DeepSpeed reads count as one."""
        return [key for name in type(self).model_fields if name not in _ALWAYS for key in _changed_in(self, name)]

    def _why_idle(self, key: str, world_size: int) -> str | None:
        """Return why a key has no effect under DeepSpeed, or None if it has one."""
        if key in _NEVER:
            return _NEVER[key]
        section, _, name = key.partition(".")
        if not name:
            value = getattr(self, key)
            if isinstance(value, Section) and getattr(value, "enabled", True) is False and key != "comms_logger":
                return f"`{key}.enabled` is false"
            if key == "zero_force_ds_cpu_optimizer" and not self.zero_optimization.offloads:
                return "nothing is offloaded"
            alone = world_size == 1 and key in ("prescale_gradients", "gradient_predivide_factor")
            return "one process exchanges no gradients" if alone else None
        if section == "zero_optimization":
            return self._why_idle_in_zero(name)
        if section in ("fp16", "bf16") and name != "enabled":
            half = getattr(self, section)
            if half.enabled is False:
                return f"`{section}.enabled` is false"
            if name in _DYNAMIC and half.loss_scale > 0:
                return "`fp16.loss_scale` is fixed"
        return None

    def _why_idle_in_zero(self, name: str) -> str | None:
        zero = self.zero_optimization
        section, _, key = name.partition(".")
        if key and key != "device" and getattr(zero, section).device == "none":
            return f'`zero_optimization.{section}.device` is "none"'
        stages = _STAGES.get(name, (1, 2, 3))
        if name != "stage" and not key.startswith("device") and zero.stage not in stages:
            return f"stage {zero.stage} does not read it"
        if key == "cpuadam_cores_perc" and zero.offload_optimizer is not None:
            return None if zero.offload_optimizer.super_offload else "`super_offload` is false"
        return None


def _changed_in(section: Section, name: str, prefix: str = "") -> Iterable[str]:
    value, default = getattr(section, name), type(section).model_fields[name].default
    if value == default:
        return
    nested = name in ("bf16", "fp16", "zero_optimization", "offload_optimizer", "offload_param")
    if not nested or not isinstance(value, Section):
        if not isinstance(value, Section) or value != type(value)():
            yield prefix + name
        return
    for key in type(value).model_fields:
        yield from _changed_in(value, key, f"{prefix}{name}.")


def refused(raw: dict[str, Any]) -> list[str]:
    """Return a sentence for each key in `raw` that DeepSpeed accepts and d2v_fast refuses."""
    return [
        f"`{key}` (value {show(raw[key])}) is not available here. {'Leave it out.' if _is_off(raw[key]) else why}"
        for key, why in REFUSED_KEYS.items()
        if key in raw
    ]


def _is_off(value: Any) -> bool:
    return value is False or (isinstance(value, dict) and value.get("enabled") is False)
