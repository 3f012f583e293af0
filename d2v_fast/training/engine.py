"""Engines that run a training step: plain torch for one process; DeepSpeed for several processes, ZeRO and offload.

Both engines have the same interface. A step with a non-finite loss or gradient changes nothing in any process:

- A non-finite loss is multiplied by NaN before the backward pass. This makes every gradient of this process NaN, and
  the average over the processes as well.
- Torch's AdamW (in `PlainEngine`, and in DeepSpeed without ZeRO in fp32) receives a flag on the device that is 1 if
  the gradient norm is not finite, and then leaves parameters and moments unchanged. The host does not wait for the
  flag: `step` returns it, and the caller masks the teacher's update with it on the device.
- In all other cases DeepSpeed makes this check itself and reports the outcome to the host.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from d2v_fast.checkpoints.shard_files import Kept
from d2v_fast.config import BatchSplit, DeepSpeedConfig
from d2v_fast.data import Batch
from d2v_fast.distributed import deepspeed_internals, deepspeed_start
from d2v_fast.distributed.deepspeed_types import Engine as ZeroEngine
from d2v_fast.distributed.shards import Shard, find_shards
from d2v_fast.distributed.world import World
from d2v_fast.errors import RunError
from d2v_fast.objectives.base import Objective, Rate, StepOutput
from d2v_fast.packages import install_command
from d2v_fast.training.optimizers import (
    MOMENTS,
    NO_RATES,
    check_optimizer_available,
    make_optimizer,
    optimizer_step,
    parameter_groups,
    rate_of,
    restore_optimizer,
    set_lr,
)


class Engine(ABC):
    """A model with its optimizer.

    Attributes:
        model: The module without wrappers.
        compute_dtype: Dtype of the forward pass and of the teacher's working copy.
        grad_norm: 0-d, global norm of the last step's gradient before clipping.
        compiled, captured: Whether the blocks are compiled, and whether steps are captured; part of `signature`.
    """

    model: nn.Module
    compute_dtype: torch.dtype
    grad_norm: Tensor
    compiled = captured = False
    _frozen = False

    def begin_step(self, number: int) -> None:
        """Prepare for optimizer step `number`, counted from 1: the objective may freeze the encoder in it."""
        if isinstance(self.model, Objective):
            self.model.begin_step(number)
            self._frozen = self.model.frozen_at(number)

    @abstractmethod
    def forward(self, batch: Batch, teacher: nn.Module, moments: bool = True) -> StepOutput:
        """Run the model on one micro-batch in training mode, in the compute dtype.

        Args:
            batch: The micro-batch, on the model's device.
            teacher: The network that computes the targets, in eval mode.
            moments: Whether to compute `StepOutput.moments`.
        """

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Put the model into eval mode, in which `forward` returns predictions, without gradient."""
        trained: Any = self.model if self.deepspeed is None else self.deepspeed
        trained.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            trained.train()

    @abstractmethod
    def backward(self, loss_sum: Tensor, num_values: float) -> None:
        """Accumulate the gradient of one micro-batch.

        After all micro-batches the gradient is that of the mean loss: the sum of `loss_sum` over all micro-batches and
        processes, divided by `num_values`.

        Args:
            loss_sum: 0-d fp32, the loss summed over this micro-batch.
            num_values: Number of terms in the whole step, the same for all micro-batches and processes.
        """

    @abstractmethod
    def step(self, lr: float) -> Tensor:
        """Clip and apply the accumulated gradients with learning rate `lr`, then clear them.

        Returns:
            0-d bool on the model's device: whether the step was applied. Reading it from a GPU waits for the step.
        """

    def signature(self) -> dict[str, Any]:
        """Return settings that affect the last digits of results. They are compared when a run is resumed."""
        return {
            "optimizer": type(self.optimizer).__name__,
            "compiled_blocks": self.compiled,
            "captured_steps": self.captured,
        }

    @property
    @abstractmethod
    def optimizer(self) -> Any:
        """The optimizer that steps the fp32 parameters."""

    @property
    def deepspeed(self) -> ZeroEngine | None:
        """DeepSpeed's engine, which determines how parameters are sharded; None without DeepSpeed."""
        return None

    def shards(self) -> list[Shard]:
        """Return the parameter ranges that this process trains, as fp32 views of the live values."""
        return find_shards(self.model.named_parameters(), self.deepspeed)

    def kept(self) -> list[Kept]:
        """Return the tensors of the model and its optimizer that a checkpoint stores."""
        shards = self.shards()
        kept = [Kept("student", shard) for shard in shards]
        if self._step_count(shards) > 0:
            for moment in MOMENTS:
                for shard in shards:
                    value = self.optimizer.state[shard.stepped][moment]
                    kept.append(Kept(moment, shard._replace(master=shard.state(_local(value)))))
        return kept

    def state(self) -> dict[str, Any]:
        """Return the rest of the engine's state, in values that JSON can express."""
        return {"optimizer_step": self._step_count(self.shards())}

    def restore(self, read: Callable[[Kept], None], state: Mapping[str, Any]) -> None:
        """Restore model and optimizer from a saved state of any engine.

        Args:
            read: Fills the tensor of an entry of `kept` from the checkpoint.
            state: The saved result of `state`.
        """
        restore_optimizer(self.optimizer, _distinct(shard.stepped for shard in self.shards()), state["optimizer_step"])
        for kept in self.kept():
            read(kept)

    def _step_count(self, shards: list[Shard]) -> int:
        return optimizer_step(self.optimizer, _distinct(shard.stepped for shard in shards))


def make_engine(
    model: nn.Module,
    config: DeepSpeedConfig,
    world: World,
    *,
    decay_1d: bool,
    rates: Mapping[str, Rate] = NO_RATES,
) -> Engine:
    """Return the engine that the configuration and the number of processes require.

    Args:
        model: The module in fp32 on its device. Its `forward` has the arguments and the result of `Engine.forward`.
        config: The configuration file without its `"d2v"` section.
        world: The processes of the run.
        decay_1d: Whether 1-D parameters (biases, norms) have weight decay.
        rates: The parameters, by name, whose learning rate differs from that of a step.
    """
    if not config.needs_deepspeed(world.size):
        return PlainEngine(model, config, world, decay_1d=decay_1d, rates=rates)
    return DeepSpeedEngine(model, config, world, decay_1d=decay_1d, rates=rates)


def check_engine_available(config: DeepSpeedConfig, num_processes: int) -> None:
    """Check that the optimizer is available and, if it is needed, a supported version of DeepSpeed.

    Raises:
        RunError: One of them is missing or not supported.
    """
    if config.needs_deepspeed(num_processes):
        if importlib.util.find_spec("deepspeed") is None:
            raise RunError(
                "Several processes, ZeRO and offload need DeepSpeed, which is not installed: "
                f"`{install_command('deepspeed')}`. One process without `zero_optimization` does not need it."
            )
        deepspeed_start.check_version()
    if config.optimizer.type != "AdamW":
        check_optimizer_available(config.optimizer)


def import_engine(config: DeepSpeedConfig, world: World) -> None:
    """Import an engine's packages before the run's memory is measured.

    Raises:
        RunError: DeepSpeed cannot be imported.
    """
    importlib.import_module("torch._dynamo")
    if config.needs_deepspeed(world.size):
        try:
            deepspeed_start.load(world.device)
        except RunError:
            raise
        except Exception as error:
            # incompatible packages can raise any exception on import
            raise RunError(f"deepspeed cannot be imported: {type(error).__name__}: {error}") from error
        if config.zero_optimization.stage > 0:
            deepspeed_start.load_zero()


class PlainEngine(Engine):
    """Train in one process with fp32 parameters; bf16 is autocast, so that the optimizer steps fp32 values."""

    def __init__(
        self,
        model: nn.Module,
        config: DeepSpeedConfig,
        world: World,
        *,
        decay_1d: bool,
        rates: Mapping[str, Rate] = NO_RATES,
    ) -> None:
        self.model = model
        self.compute_dtype = compute_dtype(config, world.device)
        self.grad_norm = torch.zeros((), device=world.device)
        self._device_type = world.device.type
        self._accumulation = config.batch_split(world.size).accumulation
        self._clipping = config.gradient_clipping
        self._optimizer = _make_optimizer(model, config, decay_1d, rates)
        model.train()

    def forward(self, batch: Batch, teacher: nn.Module, moments: bool = True) -> StepOutput:
        enabled = self.compute_dtype != torch.float32
        with torch.autocast(self._device_type, self.compute_dtype, enabled=enabled):
            output: StepOutput = self.model(batch, teacher, moments)
        return output

    def backward(self, loss_sum: Tensor, num_values: float) -> None:
        self.accumulate(loss_sum, self.loss_scale(num_values))

    def loss_scale(self, num_values: float) -> float:
        """Return the factor of a loss that `accumulate` expects; see `backward`."""
        return self._accumulation / num_values

    def accumulate(self, loss_sum: Tensor, scale: float | Tensor) -> None:
        """Run `backward` with a factor that may be a tensor, 0-d fp32 on the device."""
        # scale and divide as DeepSpeed does, so that both engines round alike
        (_nan_unless_finite(loss_sum * scale) / self._accumulation).backward()

    def step(self, lr: float) -> Tensor:
        set_lr(self._optimizer, lr, self._frozen)
        self._fill_gradients()
        self.grad_norm, applied = self.apply()
        self._optimizer.zero_grad()
        return applied

    def apply(self) -> tuple[Tensor, Tensor]:
        """Clip and apply the gradients with the present learning rate, without a sync.

        Returns:
            The norm of the gradient before clipping, and whether the step is applied, both 0-d.
        """
        norm, applied = _clip(self.model, self._optimizer, self._clipping)
        self._optimizer.step()
        return norm, applied

    def hold_still(self) -> Callable[[float], None]:
        """Give gradients and learning rates fixed places in memory, as a captured step needs them.

        Returns:
            Sets the learning rate of a step, instead of passing one to `step`. The gradients must be set to zero in
            place.
        """
        groups = self._optimizer.param_groups
        for group in groups:
            group["capturable"], group["lr"] = True, torch.zeros((), device=self.grad_norm.device)
        self._fill_gradients()

        def write(lr: float) -> None:
            for group in groups:
                group["lr"].fill_(rate_of(group, lr, self._frozen))

        return write

    def _fill_gradients(self) -> None:
        for parameter in self.model.parameters():
            if parameter.grad is None:
                # a skipped block: update its moments and apply weight decay, as with several processes
                parameter.grad = torch.zeros_like(parameter)

    def signature(self) -> dict[str, Any]:
        return {"engine": "plain torch", "processes": 1, "zero_stage": 0, **super().signature()}

    @property
    def optimizer(self) -> Any:
        return self._optimizer


class DeepSpeedEngine(Engine):
    """Train with DeepSpeed, in several processes or with ZeRO or offload."""

    def __init__(
        self,
        model: nn.Module,
        config: DeepSpeedConfig,
        world: World,
        *,
        decay_1d: bool,
        rates: Mapping[str, Rate] = NO_RATES,
    ) -> None:
        deepspeed_start.load(world.device)
        split = config.batch_split(world.size)
        self.model = model
        self.compute_dtype = compute_dtype(config, world.device)
        self.grad_norm = torch.zeros((), device=world.device)
        self._device = world.device
        self._world_size, self._stage = world.size, config.zero_optimization.stage
        self._micro_steps, self._accumulation = 0, split.accumulation
        # without ZeRO and loss scaling, DeepSpeed does not check for non-finite gradients
        self._checks_here = self._stage == 0 and self.compute_dtype == torch.float32
        self._clipping = config.gradient_clipping
        settings = _deepspeed_settings(config, split, self.compute_dtype, sum(p.numel() for p in model.parameters()))
        if self._checks_here:
            settings["gradient_clipping"] = 0.0
        # build the optimizer here: DeepSpeed's optimizer names are ambiguous
        del settings["optimizer"]
        optimizer = _make_optimizer(model, config, decay_1d, rates)
        try:
            with warnings.catch_warnings(), deepspeed_internals.without_compiling(world.device):
                warnings.simplefilter("ignore")
                self._engine = deepspeed_start.initialize(model, settings, optimizer)
        except (ValueError, AssertionError) as error:
            raise RunError(f"DeepSpeed cannot run this configuration here: {error}") from error
        except Exception as error:
            # these packages raise without an account or a network
            package = type(error).__module__.partition(".")[0]
            if package not in ("wandb", "comet_ml"):
                raise
            raise RunError(
                f"{package} cannot report this run: {error} Fix that, or set its `enabled` to false."
            ) from error
        if self.compute_dtype == torch.float16:
            # the guard ends such a run, with a report
            deepspeed_internals.tolerate_smallest_scale(self._engine)
        self._engine.train()

    def forward(self, batch: Batch, teacher: nn.Module, moments: bool = True) -> StepOutput:
        output: StepOutput = self._engine(batch, teacher, moments)
        return output

    def backward(self, loss_sum: Tensor, num_values: float) -> None:
        # DeepSpeed divides by the number of micro-steps, and averages over the processes
        loss = loss_sum * (self._accumulation * self._world_size / num_values)
        self._engine.backward(_nan_unless_finite(loss))
        self._micro_steps += 1
        if self._micro_steps < self._accumulation:
            # DeepSpeed counts micro-steps in its `step`, which changes nothing before the last one
            self._engine.step()

    def step(self, lr: float) -> Tensor:
        self._micro_steps = 0
        set_lr(self.optimizer, lr, self._frozen)
        if self._checks_here:
            self.grad_norm, applied = _clip(self.model, self.optimizer, self._clipping)
            self._engine.step()
            return applied
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        self.grad_norm = torch.as_tensor(float("nan") if norm is None else norm, dtype=torch.float32)
        return torch.full((), self._engine.was_step_applied(), device=self._device)

    def signature(self) -> dict[str, Any]:
        return {
            "engine": "DeepSpeed",
            "processes": self._world_size,
            "zero_stage": self._stage,
            **super().signature(),
        }

    @property
    def optimizer(self) -> Any:
        return deepspeed_internals.stepping_optimizer(self._engine)

    @property
    def deepspeed(self) -> ZeroEngine:
        return self._engine

    def state(self) -> dict[str, Any]:
        # other dtypes have no loss scale
        is_scaled = self.compute_dtype == torch.float16
        scale = deepspeed_internals.loss_scale_state(self._engine) if is_scaled else {}
        return {**super().state(), "loss_scale": scale}

    def restore(self, read: Callable[[Kept], None], state: Mapping[str, Any]) -> None:
        super().restore(read, state)
        if self.compute_dtype == torch.float16:
            deepspeed_internals.restore_loss_scale(self._engine, state.get("loss_scale", {}))
        deepspeed_internals.write_low_precision(self._engine)


def compute_dtype(config: DeepSpeedConfig, device: torch.device) -> torch.dtype:
    """Return the dtype of the forward pass.

    `bf16.enabled` "auto" selects bf16 on a GPU with native support, unless fp16 is enabled.
    """
    wanted = config.bf16.enabled
    if wanted == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        wanted = has_bf16 and not config.fp16.enabled
    if wanted:
        return torch.bfloat16
    return torch.float16 if config.fp16.enabled else torch.float32


def _make_optimizer(
    model: nn.Module, config: DeepSpeedConfig, decay_1d: bool, rates: Mapping[str, Rate]
) -> torch.optim.Optimizer:
    groups = parameter_groups(model, config.optimizer.params.weight_decay, decay_1d, rates)
    return make_optimizer(config.optimizer, groups)


def _nan_unless_finite(loss: Tensor) -> Tensor:
    # a factor on the device avoids a sync; without it, an infinite loss could have finite gradients
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)


def _clip(model: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float) -> tuple[Tensor, Tensor]:
    """Clip the gradients, and set AdamW's flag that skips a step with a non-finite norm, without a sync.

    Returns:
        The norm before clipping and whether the step is applied, both 0-d.
    """
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(p.grad for p in parameters if p.grad is not None)
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    applied = torch.isfinite(norm)
    optimizer.found_inf = (~applied).float()  # type: ignore[attr-defined]
    return norm, applied


def _deepspeed_settings(
    config: DeepSpeedConfig, split: BatchSplit, dtype: torch.dtype, num_parameters: int
) -> dict[str, Any]:
    """Return the file's DeepSpeed keys with all defaults and "auto" values resolved."""
    settings = config.for_deepspeed(split.world_size)
    settings |= {
        "train_batch_size": split.global_batch,
        "train_micro_batch_size_per_gpu": split.micro_batch,
        "gradient_accumulation_steps": split.accumulation,
        "zero_allow_untested_optimizer": config.zero_allow_untested_optimizer,
        "zero_force_ds_cpu_optimizer": config.zero_force_ds_cpu_optimizer,
        "bf16": {**settings.get("bf16", {}), "enabled": dtype == torch.bfloat16},
    }
    settings.setdefault("steps_per_print", 10**9)
    zero = settings.setdefault("zero_optimization", {})
    for bucket in ("reduce_bucket_size", "allgather_bucket_size"):
        # DeepSpeed's default is a buffer of 2 GB, but no bucket needs to exceed the model; it must be even
        even = num_parameters + num_parameters % 2
        zero.setdefault(bucket, min(getattr(config.zero_optimization, bucket), even))
    return settings


def _distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())


def _local(value: Any) -> Tensor:
    local: Tensor = value.to_local() if hasattr(value, "to_local") else value
    return local
