"""DeepSpeed's part of the configuration file: an allow-list, and models of the sections that d2v_fast reads.

DeepSpeed 0.19.8 ignores a misspelt top-level key in silence. Here every top-level key is known by name; the
sections that decide what is computed (optimizer, precision, ZeRO with offload) are validated key by key;
reporting and transport sections are handed through as they are.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field, model_validator
from typing_extensions import Self

from d2v_fast.config_errors import ConfigError, PathText, Problem, Section, refuse_if, say, show

# what DeepSpeed would accept, and why a run here does not
REFUSED_KEYS = {
    "scheduler": "The learning-rate schedule is `d2v.schedule`, the same under every engine.",
    "amp": 'Use "bf16": {"enabled": "auto"}.',
    "bfloat16": "Write it as `bf16`.",
    "torch_autocast": 'Use "bf16": {"enabled": "auto"}.',
    "managed_gradient_accumulation": "The training loop drives the accumulation itself.",
    "gradient_allreduce_op": "The loss is normalised over all ranks and needs the mean.",
    "data_efficiency": "The order of the data is d2v_fast's own, so that a run can be resumed exactly.",
    "curriculum_learning": "The order of the data is d2v_fast's own, so that a run can be resumed exactly.",
    "autotuning": "The batch sizes are fixed by the file.",
    "hybrid_engine": "It serves generation, not pre-training.",
    "pipeline": "Pipeline parallelism is not supported.",
    "tensor_parallel": "Tensor parallelism is not supported.",
    "expert_parallel": "Expert parallelism is not supported.",
    "sequence_parallel_size": "Sequence parallelism is not supported.",
    "seq_parallel_communication_data_type": "Sequence parallelism is not supported.",
    "weight_quantization": "Quantised weights are for inference.",
}


def _integral(value: Any) -> Any:
    # DeepSpeed files write element counts as 5e8, which JSON reads as a float
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _auto_or_bool(value: Any) -> Any:
    if isinstance(value, bool) or value == "auto":
        return value
    raise ValueError('be true, false or "auto"')


Count = Annotated[int, BeforeValidator(_integral), Field(ge=0)]
AutoBool = Annotated[Any, BeforeValidator(_auto_or_bool)]


class BatchSplit(NamedTuple):
    """`global_batch` samples per optimizer step = `micro_batch` x `accumulation` x `world_size`."""

    global_batch: int
    micro_batch: int
    accumulation: int
    world_size: int


class AdamWParams(Section):
    """Adam with decoupled weight decay. `d2v.decay_1d` says whether 1-D parameters have it as well."""

    lr: float = Field(gt=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.999), strict=False
    )
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)


class OptimizerConfig(Section):
    """`AdamW` is torch's fused one, `FusedAdam` DeepSpeed's for GPUs, `CPUAdam` DeepSpeed's for an optimizer that is
    offloaded to the host, `ApexFusedAdam` that of NVIDIA's apex. DeepSpeed compiles its own at their first use."""

    type: Literal["AdamW", "FusedAdam", "CPUAdam", "ApexFusedAdam"] = "AdamW"
    params: AdamWParams


class Bf16Config(Section):
    """`enabled` "auto" means: on a GPU that computes in bf16, and nowhere else."""

    enabled: AutoBool = False
    immediate_grad_update: bool = False
    check_grad_overflow: bool = True
    bf16_master_weights_and_grads: bool = False
    bf16_optimizer_states: bool = False


class Fp16Config(Section):
    """Loss-scaled half precision, DeepSpeed's own: `loss_scale` 0 is dynamic."""

    enabled: bool = False
    auto_cast: bool = False
    loss_scale: float = Field(default=0, ge=0)
    initial_scale_power: int = Field(default=16, ge=0)
    loss_scale_window: int = Field(default=1000, gt=0)
    hysteresis: int = Field(default=2, ge=1)
    consecutive_hysteresis: bool = False
    min_loss_scale: float = Field(default=1, gt=0)
    fp16_master_weights_and_grads: bool = False


class OffloadOptimizerConfig(Section):
    device: Literal["none", "cpu", "nvme"] = "none"
    nvme_path: PathText | None = None
    buffer_count: Count = 4
    pin_memory: bool = True
    pipeline_read: bool = False
    pipeline_write: bool = False
    fast_init: bool = False
    ratio: float = Field(default=1.0, ge=0, le=1)
    super_offload: bool = False
    cpuadam_cores_perc: float = Field(default=0.8, ge=0, le=1)


class OffloadParamConfig(Section):
    device: Literal["none", "cpu", "nvme"] = "none"
    nvme_path: PathText | None = None
    buffer_count: Count = 5
    buffer_size: Count = 100_000_000
    max_in_cpu: Count = 1_000_000_000
    pin_memory: bool = True


class ZeroConfig(Section):
    """ZeRO: which of optimizer state (1), gradients (2) and parameters (3) are sharded over the ranks."""

    stage: int = Field(default=0, ge=0, le=3)
    offload_optimizer: OffloadOptimizerConfig | None = None
    offload_param: OffloadParamConfig | None = None
    contiguous_gradients: bool = True
    reduce_scatter: bool = True
    reduce_bucket_size: Count = 500_000_000
    use_multi_rank_bucket_allreduce: bool = True
    allgather_partitions: bool = True
    allgather_bucket_size: Count = 500_000_000
    overlap_comm: bool | None = None
    load_from_fp32_weights: bool = True
    sub_group_size: Count = 1_000_000_000
    ignore_unused_parameters: bool = True
    legacy_stage1: bool = False
    round_robin_gradients: bool = False
    parameter_alignment: bool = False
    zero_hpz_partition_size: Count = 1
    zero_quantized_weights: bool = False
    zero_quantized_nontrainable_weights: bool = False
    zero_quantized_gradients: bool = False
    memory_efficient_linear: bool = True
    override_module_apply: bool = True
    log_trace_cache_warnings: bool = False
    enable_sanity_checks: bool = False
    stage3_prefetch_bucket_size: Count = 50_000_000
    stage3_param_persistence_threshold: Count = 100_000
    stage3_model_persistence_threshold: Count = 2**63 - 1
    stage3_max_live_parameters: Count = 1_000_000_000
    stage3_max_reuse_distance: Count = 1_000_000_000
    stage3_gather_16bit_weights_on_model_save: bool = False
    stage3_module_granularity_threshold: Count = 0
    stage3_use_all_reduce_for_fetch_params: bool = False
    stage3_allgather_sequential: bool = False

    @property
    def offloads(self) -> bool:
        """True where anything is asked to live outside the accelerator."""
        sections = (self.offload_optimizer, self.offload_param)
        return any(section is not None and section.device != "none" for section in sections)

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = []
        for name in ("offload_param", "offload_optimizer"):
            section = getattr(self, name)
            if section is not None and section.device == "nvme":
                hint = "The teacher follows fp32 values that are in memory."
                problems.append(Problem(f"{name}.device", 'be "cpu" or "none"', "nvme", hint))
        if self.offload_param is not None and self.offload_param.device == "cpu" and self.stage != 3:
            hint = "Parameters can only be offloaded in stage 3."
            problems.append(Problem("stage", "be 3 with `offload_param`", self.stage, hint))
        if self.offload_optimizer is not None and self.offload_optimizer.device == "cpu" and self.stage == 0:
            hint = "Offloading the optimizer shards it first: use stage 1, 2 or 3."
            problems.append(Problem("stage", "be 1, 2 or 3 with `offload_optimizer`", 0, hint))
        refuse_if(problems)
        return self


class DeepSpeedConfig(Section):
    """Everything outside `"d2v"`: DeepSpeed's own keys, read by both engines."""

    train_batch_size: int | None = Field(default=None, ge=1)
    train_micro_batch_size_per_gpu: int | None = Field(default=None, ge=1)
    gradient_accumulation_steps: int | None = Field(default=None, ge=1)
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
    communication_data_type: str | None = None
    disable_allgather: bool = False
    disable_python_gc: bool = False
    dataloader_drop_last: bool = True
    dump_state: bool = False
    log_level: str | None = None
    memory_breakdown: bool = False
    wall_clock_breakdown: bool = False
    activation_checkpointing: dict[str, Any] | None = None
    aio: dict[str, Any] | None = None
    checkpoint: dict[str, Any] | None = None
    comet: dict[str, Any] | None = None
    comms_logger: dict[str, Any] | None = None
    compile: dict[str, Any] | None = None
    csv_monitor: dict[str, Any] | None = None
    data_types: dict[str, Any] | None = None
    flops_profiler: dict[str, Any] | None = None
    tensorboard: dict[str, Any] | None = None
    timers: dict[str, Any] | None = None
    wandb: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = []
        if self.train_batch_size is None and self.train_micro_batch_size_per_gpu is None:
            hint = "Give it, or `train_micro_batch_size_per_gpu`."
            problems.append(Problem("train_batch_size", "be the number of samples per optimizer step", None, hint))
        if not self.bf16.check_grad_overflow:
            hint = "Without this check one NaN would reach student, teacher and optimizer."
            problems.append(Problem("bf16.check_grad_overflow", "be true", False, hint))
        kind, stage = self.optimizer.type, self.zero_optimization.stage
        if kind != "AdamW" and stage == 0:
            hint = "Only torch's AdamW can leave out a step that is not finite; with ZeRO, DeepSpeed does that."
            problems.append(Problem("optimizer.type", 'be "AdamW" without ZeRO', kind, hint))
        offload = self.zero_optimization.offload_optimizer
        if kind == "CPUAdam" and (offload is None or offload.device != "cpu"):
            hint = 'Set `zero_optimization.offload_optimizer.device` to "cpu", or take another.'
            problems.append(Problem("optimizer.type", "be another without an offloaded optimizer", kind, hint))
        if kind in ("FusedAdam", "ApexFusedAdam") and offload is not None and offload.device == "cpu":
            hint = 'Its kernels run on a GPU: take "CPUAdam" or "AdamW".'
            problems.append(Problem("optimizer.type", "be another with an offloaded optimizer", kind, hint))
        if kind == "ApexFusedAdam" and stage == 3:
            hint = "It counts steps per group, and ZeRO-3 steps a group in several parts."
            problems.append(Problem("optimizer.type", "be another in stage 3", kind, hint))
        if self.fp16.enabled and self.bf16.enabled is True:
            problems.append(Problem("fp16.enabled", "be false while `bf16.enabled` is true", True, "Choose one."))
        refuse_if(problems)
        return self

    def batch_split(self, world_size: int) -> BatchSplit:
        """The batch sizes of a run over `world_size` processes; ConfigError where they do not fit together.

        DeepSpeed's rule: global = micro x accumulation x processes, and whichever number is missing follows.
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
            # the smallest step by which the global batch can change, given what the file fixes
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
        """True for more than one process, ZeRO, or offload; otherwise plain torch does it."""
        return world_size > 1 or self.zero_optimization.stage > 0 or self.zero_optimization.offloads

    def without_effect(self, world_size: int) -> list[str]:
        """Keys of the file that only DeepSpeed reads, where a run does without it."""
        if self.needs_deepspeed(world_size):
            return []
        read = {"optimizer", "bf16", "fp16", "zero_optimization", "gradient_clipping", "steps_per_print"}
        return sorted(key for key in self.model_fields_set - read if not key.startswith(("train_", "gradient_acc")))

    def asked_for(self) -> dict[str, Any]:
        """The keys as they stood in the file, without defaults."""
        return self.model_dump(mode="json", exclude_unset=True)


def refused(raw: dict[str, Any]) -> list[str]:
    """Sentences for the DeepSpeed keys in `raw` that a run here refuses on purpose."""
    return [
        f"`{key}` (value {show(raw[key])}) is not available here. {why}"
        for key, why in REFUSED_KEYS.items()
        if key in raw
    ]
