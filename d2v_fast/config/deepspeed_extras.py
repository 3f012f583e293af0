"""The sections that DeepSpeed alone reads (monitors, profilers, timers), and those without effect on a run.

`tests/config/test_deepspeed_keys.py` compares the keys with those of the installed DeepSpeed.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from d2v_fast.config.deepspeed_sections import Count
from d2v_fast.config.errors import PathText, Section


class ActivationCheckpointingConfig(Section):
    """No effect: `d2v.model.gradient_checkpointing` is the key for it.

    Attributes:
        partition_activations: Shard saved activations.
        number_checkpoints: Number of checkpoints.
        contiguous_memory_optimization: Save activations in one buffer.
        synchronize_checkpoint_boundary: Wait for the device at each checkpoint.
        profile: Measure each checkpoint.
        cpu_checkpointing: Save activations on the host.
    """

    partition_activations: bool = False
    number_checkpoints: int | None = Field(default=None, ge=1)
    contiguous_memory_optimization: bool = False
    synchronize_checkpoint_boundary: bool = False
    profile: bool = False
    cpu_checkpointing: bool = False


class AioConfig(Section):
    """No effect: it is for offload to NVMe, which is not supported.

    Attributes:
        block_size: Bytes of a request.
        queue_depth: Requests in flight.
        intra_op_parallelism: Threads of a request.
        single_submit: Submit requests one by one.
        overlap_events: Overlap submission and completion.
        use_gds: Use GPUDirect Storage.
    """

    hints: ClassVar[dict[str, str]] = {"thread_count": "DeepSpeed calls it `aio.intra_op_parallelism` now."}

    block_size: Count = 1_048_576
    queue_depth: Count = 8
    intra_op_parallelism: Count = 1
    single_submit: bool = False
    overlap_events: bool = True
    use_gds: bool = False


class CheckpointWriterConfig(Section):
    """No effect: checkpoints are d2v_fast's own.

    Attributes:
        type: Kind of the writer.
        io_buffer_size: Bytes of its buffer.
        io_buffer_double: Use two buffers.
        show_statistics: Log its speed.
        data_parallel: Processes that write.
        decoupled: Write in the background.
        io_multiplier: Writers per process.
    """

    type: str = "FAST"
    io_buffer_size: Count = 67_108_864
    io_buffer_double: bool = True
    show_statistics: bool = False
    data_parallel: str | None = None
    decoupled: bool = False
    io_multiplier: Count = 1


class ParallelWriteConfig(Section):
    """No effect: checkpoints are d2v_fast's own.

    Attributes:
        pipeline_stage: Write the stages of a pipeline in parallel.
    """

    pipeline_stage: bool = False


class CheckpointConfig(Section):
    """No effect: checkpoints are d2v_fast's own.

    Attributes:
        tag_validation: Compare the tag between processes.
        checkpoint_serialization: Serialize as DeepSpeed does.
        load_universal: Load a universal checkpoint.
        use_node_local_storage: Write to each node's own disk.
        parallel_write: Parallel writing.
        writer: The writer.
    """

    tag_validation: str = "WARN"
    checkpoint_serialization: bool = True
    load_universal: bool = False
    use_node_local_storage: bool = False
    parallel_write: ParallelWriteConfig | None = None
    writer: CheckpointWriterConfig | None = None


class CometConfig(Section):
    """DeepSpeed's monitor for Comet; it needs the package comet_ml.

    Attributes:
        enabled: Switch the monitor on.
        samples_log_interval: Samples between two reports.
        project: Project.
        workspace: Workspace.
        api_key: Key of the account.
        experiment_name: Name of the experiment.
        experiment_key: Key of an experiment to continue.
        online: Send at once.
        mode: Continue an experiment or create one.
    """

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
    """DeepSpeed's log of collectives.

    Attributes:
        enabled: Log collectives.
        prof_all: Log all of them.
        prof_ops: Names of those to log.
        verbose: Log each call.
        debug: Log who called it.
    """

    enabled: bool = False
    prof_all: bool = True
    prof_ops: tuple[str, ...] = Field(default=(), strict=False)
    verbose: bool = False
    debug: bool = False


class CompileConfig(Section):
    """No effect: `d2v.run.compile` compiles the model.

    Attributes:
        deepcompile: DeepCompile.
        autoep_non_moe: Automatic expert parallelism.
        free_activation: Free activations early.
        free_activation_threshold: Smallest activation, in bytes, that is freed.
        offload_activation: Offload activations.
        offload_activation_pin_memory: Into page-locked memory.
        offload_opt_states: Offload optimizer states.
        double_buffer: Use two buffers.
        symmetric_memory: Use symmetric memory.
        debug_log: Log the passes.
        offload_parameters: Offload parameters.
        sync_before_reduce: Wait before a reduction.
        sync_after_reduce: Wait after it.
        sync_before_allgather: Wait before a gathering.
        sync_after_allgather: Wait after it.
        keep_int_input_tensors: Keep integer inputs.
        keep_all_input_tensors: Keep all inputs.
        passes: Names of the passes.
    """

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
    """DeepSpeed's monitor that writes files.

    Attributes:
        enabled: Switch the monitor on.
        output_path: Folder of the files.
        job_name: Folder below it.
    """

    enabled: bool = False
    output_path: PathText = ""
    job_name: str = "DeepSpeedJobName"


class TensorBoardConfig(CsvMonitorConfig):
    """DeepSpeed's monitor for TensorBoard, beside the event files of the run folder."""


class DataTypesConfig(Section):
    """Dtypes.

    Attributes:
        grad_accum_dtype: Dtype in which gradients are accumulated.
        param_dtype: Dtype of parameters.
        buffer_dtype: Dtype of buffers.
        keep_in_fp32_modules: Modules that stay in fp32.
    """

    grad_accum_dtype: Literal["fp32", "fp16", "bf16"] | None = None
    param_dtype: Literal["fp32", "fp16", "bf16"] | None = None
    buffer_dtype: Literal["fp32", "fp16", "bf16"] | None = None
    keep_in_fp32_modules: Literal["auto"] | Annotated[tuple[str, ...], Field(strict=False)] = "auto"


class FlopsProfilerConfig(Section):
    """DeepSpeed's count of operations.

    Attributes:
        enabled: Profile one step.
        recompute_fwd_factor: Share of the forward pass that is recomputed.
        profile_step: The step.
        module_depth: Depth of the listed modules; -1 lists all.
        top_modules: Modules listed per depth.
        detailed: List each module.
        output_file: File for the report; null prints it.
    """

    enabled: bool = False
    recompute_fwd_factor: float = Field(default=0.0, ge=0)
    profile_step: int = Field(default=1, ge=1)
    module_depth: int = -1
    top_modules: int = Field(default=1, ge=1)
    detailed: bool = True
    output_file: PathText | None = None


class ThroughputTimerConfig(Section):
    """Timer of samples per second.

    Attributes:
        enabled: Measure.
        synchronized: Wait for the device.
    """

    enabled: bool = True
    synchronized: bool = True


class TimersConfig(Section):
    """DeepSpeed's timers.

    Attributes:
        throughput: Timer of samples per second.
    """

    throughput: ThroughputTimerConfig | None = None


class WandbConfig(Section):
    """DeepSpeed's monitor for Weights & Biases; it needs the package wandb.

    Attributes:
        enabled: Switch the monitor on.
        group: Group.
        team: Team.
        project: Project.
    """

    enabled: bool = False
    group: str | None = None
    team: str | None = None
    project: str = "deepspeed"
