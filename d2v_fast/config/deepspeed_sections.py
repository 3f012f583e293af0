"""The sections of DeepSpeed's part of the configuration file, key by key.

`tests/config/test_deepspeed_keys.py` compares the keys with those of the installed DeepSpeed. A key that is not here is
refused, with the nearest one, or with the sentence that `hints` of its section holds.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator
from typing_extensions import Self

from d2v_fast.config.errors import PathText, Problem, Section, refuse_if


def _integral(value: Any) -> Any:
    # DeepSpeed files write element counts as 5e8, which JSON reads as a float
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _auto_or_bool(value: Any) -> Any:
    if isinstance(value, bool) or value == "auto":
        return value
    raise ValueError('be true, false or "auto"')


Count = Annotated[int, BeforeValidator(_integral), Field(ge=0)]
AutoBool = Annotated[Any, BeforeValidator(_auto_or_bool)]


class AdamWParams(Section):
    """Adam with decoupled weight decay. `d2v.decay_1d` says whether 1-D parameters have it as well."""

    hints: ClassVar[dict[str, str]] = {
        "max_grad_norm": "Write it as `gradient_clipping`.",
        "torch_adam": "`optimizer.type` says whose Adam it is.",
        "adam_w_mode": "Weight decay is always decoupled.",
        "adamw_mode": "Weight decay is always decoupled.",
        "bias_correction": "The moments are always corrected.",
        "amsgrad": "AMSGrad is not supported.",
        "fused": 'It is: "AdamW" is torch\'s fused one.',
    }

    lr: float = Field(gt=0, le=1e6)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.999), strict=False
    )
    eps: float = Field(default=1e-8, gt=0, le=1)
    weight_decay: float = Field(default=0.0, ge=0, le=1e6)


class OptimizerConfig(Section):
    """`AdamW` is torch's fused one, `FusedAdam` DeepSpeed's for GPUs, `CPUAdam` DeepSpeed's for an optimizer that is
    offloaded to the host, `ApexFusedAdam` that of NVIDIA's apex. DeepSpeed compiles its own at their first use."""

    hints: ClassVar[dict[str, str]] = {"legacy_fusion": '`type` "ApexFusedAdam" is the optimizer of NVIDIA\'s apex.'}

    type: Literal["AdamW", "FusedAdam", "CPUAdam", "ApexFusedAdam"] = "AdamW"
    params: AdamWParams

    @field_validator("type", mode="before")
    @classmethod
    def _name_adamw(cls, value: Any) -> Any:
        # DeepSpeed reads this name without regard to case, and means decoupled decay by "Adam" as well
        if isinstance(value, str) and value != "AdamW" and value.lower() in ("adam", "adamw"):
            hint = 'The decay is decoupled, as in DeepSpeed\'s "Adam" unless `adam_w_mode` is false.'
            refuse_if([Problem("", 'be "AdamW"', value, hint)])
        return value


class Bf16Config(Section):
    """`enabled` "auto" means: on a GPU that computes in bf16, and nowhere else."""

    enabled: AutoBool = False
    immediate_grad_update: bool = False
    check_grad_overflow: bool = True
    bf16_master_weights_and_grads: bool = False
    bf16_optimizer_states: bool = False


class Fp16Config(Section):
    """Loss-scaled half precision, DeepSpeed's own: `loss_scale` 0 is dynamic."""

    hints: ClassVar[dict[str, str]] = dict.fromkeys(
        ("opt_level", "fp16_opt_level"), "It is of NVIDIA's apex, which is not used: leave it out."
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
    """ZeRO: which of optimizer state (1), gradients (2) and parameters (3) are sharded over the ranks."""

    hints: ClassVar[dict[str, str]] = {
        # names that DeepSpeed has given up, or takes beside those of this class
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
        # what DeepSpeed would take, and a run here does not
        "compute_grad_norm": "The norm of the gradient is always computed: it decides whether a step is applied.",
        "elastic_checkpoint": "A checkpoint of d2v_fast can be resumed with any number of processes and any stage.",
        "leaf_module": "The encoders have no modules that must be gathered as a whole.",
        "pipeline_loading_checkpoint": "Checkpoints are d2v_fast's own.",
        "save_muon_momentum_buffer_in_memory": "The Muon optimizer is not supported.",
        "zenflow": "ZenFlow applies gradients late, and the teacher follows what is applied.",
        # what DeepSpeed has removed
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
        """True where anything is asked to live outside the accelerator."""
        sections = (self.offload_optimizer, self.offload_param)
        return any(section is not None and section.device != "none" for section in sections)

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = []
        if self.legacy_stage1:
            problems.append(Problem("legacy_stage1", "be false", True, "DeepSpeed has removed its old stage 1."))
        if self.offload_optimizer is not None and self.offload_optimizer.ratio < 1 and self.stage != 3:
            hint = "A part of the optimizer can only be offloaded in stage 3."
            problems.append(Problem("offload_optimizer.ratio", "be 1", self.offload_optimizer.ratio, hint))
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
