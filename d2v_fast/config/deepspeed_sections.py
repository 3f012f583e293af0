"""The sections of DeepSpeed's part of the configuration file that decide a run: optimizer, precision, ZeRO.

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
    """Adam with decoupled weight decay.

    Attributes:
        lr: Peak learning rate; `d2v.schedule` scales it.
        betas: Decay rates of the first and the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay; `d2v.decay_1d` extends it to 1-D parameters.
    """

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
    """Whose AdamW runs.

    Attributes:
        type: `AdamW` is torch's fused one, `FusedAdam` DeepSpeed's for GPUs, `CPUAdam` DeepSpeed's for an offloaded
            optimizer, `ApexFusedAdam` that of NVIDIA's apex. DeepSpeed compiles its own at their first use.
        params: Its parameters.
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
    """Training in bf16.

    Attributes:
        enabled: "auto" enables it on a GPU that computes in bf16, and nowhere else.
        immediate_grad_update: Add gradients to their fp32 copy as soon as they are computed.
        check_grad_overflow: Leave out steps with non-finite gradients; it must be true.
        bf16_master_weights_and_grads: Keep the optimizer's weights and gradients in bf16.
        bf16_optimizer_states: Keep the optimizer's moments in bf16.
    """

    enabled: AutoBool = False
    immediate_grad_update: bool = False
    check_grad_overflow: bool = True
    bf16_master_weights_and_grads: bool = False
    bf16_optimizer_states: bool = False


class Fp16Config(Section):
    """Training in fp16 with a scaled loss, which needs DeepSpeed.

    Attributes:
        enabled: Train in fp16.
        auto_cast: Cast inputs to fp16.
        loss_scale: Factor on the loss; 0 adapts it.
        initial_scale_power: The first factor is 2 to this power.
        loss_scale_window: Steps without overflow before the factor doubles.
        hysteresis: Overflows before the factor halves.
        consecutive_hysteresis: Restore the hysteresis after a step without overflow.
        min_loss_scale: Smallest factor.
        fp16_master_weights_and_grads: Keep the optimizer's weights and gradients in fp16.
    """

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
    """Offload of the optimizer, in stages 1 to 3.

    Attributes:
        device: "cpu" keeps the optimizer on the host; "nvme" is refused.
        nvme_path: No effect: it is for offload to NVMe, which is not supported.
        buffer_count: No effect: it is for offload to NVMe, which is not supported.
        pin_memory: Use page-locked host memory.
        pipeline_read: No effect: it is for offload to NVMe, which is not supported.
        pipeline_write: No effect: it is for offload to NVMe, which is not supported.
        fast_init: No effect: it is for offload to NVMe, which is not supported.
        ratio: Share of the parameters that is offloaded, in stage 3.
        super_offload: Use DeepSpeed's SuperOffload, in stage 3.
        cpuadam_cores_perc: Share of the cores for SuperOffload's optimizer.
    """

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
    """Offload of the parameters, in stage 3.

    Attributes:
        device: "cpu" keeps the parameters on the host; "nvme" is refused.
        nvme_path: No effect: it is for offload to NVMe, which is not supported.
        buffer_count: No effect: it is for offload to NVMe, which is not supported.
        buffer_size: No effect: it is for offload to NVMe, which is not supported.
        max_in_cpu: No effect: it is for offload to NVMe, which is not supported.
        pin_memory: Use page-locked host memory.
    """

    device: Literal["none", "cpu", "nvme"] = "none"
    nvme_path: PathText | None = None
    buffer_count: Count = 5
    buffer_size: Count = 100_000_000
    max_in_cpu: Count = 1_000_000_000
    pin_memory: bool = True


class ZeroConfig(Section):
    """ZeRO: what is sharded over the processes.

    Attributes:
        stage: 0 nothing, 1 optimizer, 2 also gradients, 3 also parameters.
        offload_optimizer: Offload of the optimizer to the host.
        offload_param: Offload of the parameters to the host.
        contiguous_gradients: Copy gradients into one buffer as they are computed.
        reduce_scatter: Reduce gradients to their owner instead of to all processes.
        reduce_bucket_size: Elements that are reduced at once.
        use_multi_rank_bucket_allreduce: Reduce buckets of several owners at once, in stages 1 and 2.
        allgather_partitions: No effect: DeepSpeed does not read it.
        allgather_bucket_size: Elements that are gathered at once, in stages 1 and 2.
        overlap_comm: Reduce gradients during the backward pass; null takes DeepSpeed's default for the stage.
        load_from_fp32_weights: No effect: checkpoints are d2v_fast's own.
        sub_group_size: Elements that stage 3 steps at once.
        ignore_unused_parameters: Accept parameters without a gradient, in stages 1 and 2.
        legacy_stage1: Must be false: DeepSpeed has removed its old stage 1.
        round_robin_gradients: Distribute gradients over the owners in turn, in stages 1 and 2.
        parameter_alignment: Align parameters in memory, in stages 1 and 2.
        zero_hpz_partition_size: Processes of a secondary partition (ZeRO++); the teacher must have 1.
        zero_quantized_weights: Gather weights in 8 bits (ZeRO++), in stage 3.
        zero_quantized_nontrainable_weights: Gather frozen weights in 8 bits, in stage 3.
        zero_quantized_gradients: Reduce gradients in 4 bits (ZeRO++), in stage 3.
        memory_efficient_linear: Use DeepSpeed's linear map that saves fewer activations, in stage 3.
        override_module_apply: Gather parameters when a module's `apply` runs, in stage 3.
        log_trace_cache_warnings: Log when the order of modules changes, in stage 3.
        enable_sanity_checks: Check the sharding at every step, in stage 3.
        stage3_prefetch_bucket_size: Elements that are gathered ahead of their use.
        stage3_param_persistence_threshold: Parameters of at most so many elements stay whole on every process.
        stage3_model_persistence_threshold: Most elements that stay whole because they are small.
        stage3_max_live_parameters: Most elements that are gathered at a time.
        stage3_max_reuse_distance: Parameters that are used again within so many elements stay gathered.
        stage3_gather_16bit_weights_on_model_save: No effect: checkpoints are d2v_fast's own.
        stage3_module_granularity_threshold: Gather modules with fewer elements per layer as a whole.
        stage3_use_all_reduce_for_fetch_params: Gather parameters by an all-reduce.
        stage3_allgather_sequential: Gather parameters one after the other.
    """

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
