"""The sections of DeepSpeed's part of the configuration file.

`tests/config/test_deepspeed_keys.py` compares the keys with those of the installed DeepSpeed. An unknown key is refused
with the nearest known key, or with the advice in `hints` of its section.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator
from typing_extensions import Self

from d2v_fast.config.errors import PathText, Problem, Section, refuse_if


def _integral(value: object) -> object:
    # DeepSpeed files write element counts as 5e8, which JSON reads as a float
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _auto_or_bool(value: object) -> object:
    if isinstance(value, bool) or value == "auto":
        return value
    raise ValueError('be true, false or "auto"')


Count = Annotated[int, BeforeValidator(_integral), Field(ge=0)]
AutoBool = Annotated[bool | Literal["auto"], BeforeValidator(_auto_or_bool)]


class AdamWParams(Section):
    """Adam with decoupled weight decay, which `d2v.decay_1d` extends to 1-D parameters."""

    hints: ClassVar[dict[str, str]] = {
        "max_grad_norm": "Write it as `gradient_clipping`.",
        "torch_adam": "`optimizer.type` selects the implementation.",
        "adam_w_mode": "Weight decay is always decoupled.",
        "adamw_mode": "Weight decay is always decoupled.",
        "bias_correction": "Bias correction is always on.",
        "amsgrad": "AMSGrad is not supported.",
        "fused": '`optimizer.type` "AdamW" is always torch\'s fused implementation.',
    }

    lr: float = Field(gt=0, le=1e6)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.999), strict=False
    )
    eps: float = Field(default=1e-8, gt=0, le=1)
    weight_decay: float = Field(default=0.0, ge=0, le=1e6)


class OptimizerConfig(Section):
    """The optimizer. DeepSpeed compiles its own types at their first use.

    Attributes:
        type: "AdamW" is torch's fused implementation, "FusedAdam" DeepSpeed's for GPUs, "CPUAdam" DeepSpeed's for
            offload to the host, and "ApexFusedAdam" that of NVIDIA's apex.
    """

    hints: ClassVar[dict[str, str]] = {"legacy_fusion": '`type` "ApexFusedAdam" is the optimizer of NVIDIA\'s apex.'}

    type: Literal["AdamW", "FusedAdam", "CPUAdam", "ApexFusedAdam"] = "AdamW"
    params: AdamWParams

    @field_validator("type", mode="before")
    @classmethod
    def _name_adamw(cls, value: object) -> object:
        # DeepSpeed ignores case here, and its "Adam" has decoupled weight decay as well
        if isinstance(value, str) and value != "AdamW" and value.lower() in ("adam", "adamw"):
            hint = 'Weight decay is decoupled, as in DeepSpeed\'s "Adam" with its default `adam_w_mode`.'
            refuse_if([Problem("", 'be "AdamW"', value, hint)])
        return value


class Bf16Config(Section):
    """bf16 compute. `enabled` "auto" enables it on GPUs that support bf16."""

    enabled: AutoBool = False
    immediate_grad_update: bool = False
    check_grad_overflow: bool = True
    bf16_master_weights_and_grads: bool = False
    bf16_optimizer_states: bool = False


class Fp16Config(Section):
    """DeepSpeed's fp16 compute with loss scaling; `loss_scale` 0 is dynamic."""

    hints: ClassVar[dict[str, str]] = dict.fromkeys(
        ("opt_level", "fp16_opt_level"), "It belongs to NVIDIA's apex, which is not used: leave it out."
    )

    enabled: bool = False
    auto_cast: bool = False
    loss_scale: float = Field(default=0, ge=0)
    initial_scale_power: int = Field(default=16, ge=0, le=126)
    loss_scale_window: int = Field(default=1000, gt=0)
    hysteresis: int = Field(default=2, ge=1, le=10**6)
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
    """ZeRO: stage 1 shards the optimizer state over the ranks, stage 2 also gradients, stage 3 also parameters."""

    hints: ClassVar[dict[str, str]] = {
        # deprecated names of DeepSpeed, and aliases
        "cpu_offload": 'Write it as `zero_optimization.offload_optimizer.device`: "cpu". False is "none" there.',
        "cpu_offload_param": 'Write it as `zero_optimization.offload_param.device`: "cpu". False is "none" there.',
        "cpu_offload_params": 'Write it as `zero_optimization.offload_param.device`: "cpu". False is "none" there.',
        "cpu_offload_use_pin_memory": "Write it as `pin_memory` in `offload_optimizer` or `offload_param`.",
        "allgather_size": "Write it as `zero_optimization.allgather_bucket_size`.",
        "stage3_gather_fp16_weights_on_model_save": (
            "Checkpoints are d2v_fast's own: `d2v-fast export` gathers the weights of any of them."
        ),
        **{
            name: f"Write it as `zero_optimization.stage3_{name}`."
            for name in (
                *("prefetch_bucket_size", "param_persistence_threshold", "model_persistence_threshold"),
                *("max_live_parameters", "max_reuse_distance", "gather_16bit_weights_on_model_save"),
                *("module_granularity_threshold", "use_all_reduce_for_fetch_params", "allgather_sequential"),
            )
        },
        # keys that DeepSpeed accepts and d2v_fast refuses
        "compute_grad_norm": "The norm of the gradient is always computed: it decides whether a step is applied.",
        "elastic_checkpoint": "A checkpoint of d2v_fast can be resumed with any number of processes and any stage.",
        "leaf_module": "The encoders have no modules that must be gathered as a whole.",
        "pipeline_loading_checkpoint": "Checkpoints are d2v_fast's own.",
        "save_muon_momentum_buffer_in_memory": "The Muon optimizer is not supported.",
        "zenflow": "ZenFlow applies gradients late, and the teacher follows what is applied.",
        # keys that DeepSpeed has removed
        "mics_shard_size": "DeepSpeed has removed MiCS.",
        "mics_hierarchical_params_gather": "DeepSpeed has removed MiCS.",
        "zeropp_loco_param": "DeepSpeed has removed LoCo: `zero_quantized_gradients` works without it.",
    }

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
        """Whether optimizer state or parameters are offloaded to the host."""
        sections = (self.offload_optimizer, self.offload_param)
        return any(section is not None and section.device != "none" for section in sections)

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = []
        if self.legacy_stage1:
            problems.append(Problem("legacy_stage1", "be false", True, "DeepSpeed has removed its old stage 1."))
        if self.offload_optimizer is not None and self.offload_optimizer.ratio < 1 and self.stage != 3:
            hint = "Only stage 3 can offload a part of the optimizer."
            problems.append(Problem("offload_optimizer.ratio", "be 1", self.offload_optimizer.ratio, hint))
        for name in ("offload_param", "offload_optimizer"):
            section = getattr(self, name)
            if section is not None and section.device == "nvme":
                hint = "The teacher needs the fp32 values in memory."
                problems.append(Problem(f"{name}.device", 'be "cpu" or "none"', "nvme", hint))
        if self.offload_param is not None and self.offload_param.device == "cpu" and self.stage != 3:
            hint = "Only stage 3 can offload parameters."
            problems.append(Problem("stage", "be 3 with `offload_param`", self.stage, hint))
        if self.offload_optimizer is not None and self.offload_optimizer.device == "cpu" and self.stage == 0:
            hint = "Offloading the optimizer shards it first: use stage 1, 2 or 3."
            problems.append(Problem("stage", "be 1, 2 or 3 with `offload_optimizer`", 0, hint))
        refuse_if(problems)
        return self


class ActivationCheckpointingConfig(Section):
    partition_activations: bool = False
    number_checkpoints: int | None = Field(default=None, ge=1)
    contiguous_memory_optimization: bool = False
    synchronize_checkpoint_boundary: bool = False
    profile: bool = False
    cpu_checkpointing: bool = False


class AioConfig(Section):
    hints: ClassVar[dict[str, str]] = {"thread_count": "DeepSpeed calls it `aio.intra_op_parallelism` now."}

    block_size: Count = 1_048_576
    queue_depth: Count = 8
    intra_op_parallelism: Count = 1
    single_submit: bool = False
    overlap_events: bool = True
    use_gds: bool = False


class CheckpointWriterConfig(Section):
    type: str = "FAST"
    io_buffer_size: Count = 67_108_864
    io_buffer_double: bool = True
    show_statistics: bool = False
    data_parallel: str | None = None
    decoupled: bool = False
    io_multiplier: Count = 1


class ParallelWriteConfig(Section):
    pipeline_stage: bool = False


class CheckpointConfig(Section):
    tag_validation: str = "WARN"
    checkpoint_serialization: bool = True
    load_universal: bool = False
    use_node_local_storage: bool = False
    parallel_write: ParallelWriteConfig | None = None
    writer: CheckpointWriterConfig | None = None


class CometConfig(Section):
    enabled: bool = False
    samples_log_interval: int = Field(default=100, ge=1)
    project: str | None = None
    workspace: str | None = None
    api_key: str | None = None
    experiment_name: str | None = None
    experiment_key: str | None = None
    online: bool | None = None
    mode: Literal["get", "create", "get_or_create"] | None = None


class CommsLoggerConfig(Section):
    enabled: bool = False
    prof_all: bool = True
    prof_ops: tuple[str, ...] = Field(default=(), strict=False)
    verbose: bool = False
    debug: bool = False


class CompileConfig(Section):
    deepcompile: bool = False
    autoep_non_moe: bool = False
    free_activation: bool = False
    free_activation_threshold: Count = 10_485_760
    offload_activation: bool = False
    offload_activation_pin_memory: bool = True
    offload_opt_states: bool = False
    double_buffer: bool = True
    symmetric_memory: bool = False
    debug_log: bool = False
    offload_parameters: bool = False
    sync_before_reduce: bool = False
    sync_after_reduce: bool = False
    sync_before_allgather: bool = False
    sync_after_allgather: bool = False
    keep_int_input_tensors: bool = True
    keep_all_input_tensors: bool = False
    passes: tuple[str, ...] | None = Field(default=None, strict=False)


class CsvMonitorConfig(Section):
    enabled: bool = False
    output_path: PathText = ""
    job_name: str = "DeepSpeedJobName"


class TensorBoardConfig(CsvMonitorConfig):
    pass


class DataTypesConfig(Section):
    grad_accum_dtype: Literal["fp32", "fp16", "bf16"] | None = None
    param_dtype: Literal["fp32", "fp16", "bf16"] | None = None
    buffer_dtype: Literal["fp32", "fp16", "bf16"] | None = None
    keep_in_fp32_modules: Literal["auto"] | Annotated[tuple[str, ...], Field(strict=False)] = "auto"


class FlopsProfilerConfig(Section):
    enabled: bool = False
    recompute_fwd_factor: float = Field(default=0.0, ge=0)
    profile_step: int = Field(default=1, ge=1)
    module_depth: int = -1
    top_modules: int = Field(default=1, ge=1)
    detailed: bool = True
    output_file: PathText | None = None


class ThroughputTimerConfig(Section):
    enabled: bool = True
    synchronized: bool = True


class TimersConfig(Section):
    throughput: ThroughputTimerConfig | None = None


class WandbConfig(Section):
    enabled: bool = False
    group: str | None = None
    team: str | None = None
    project: str = "deepspeed"
