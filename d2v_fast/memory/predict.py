"""Memory per process of a run, predicted from its configuration; `docs/memory.md` derives the formulas.

The tensors that stay from step to step are `parts`. What comes on top of them differs from moment to moment: while the
model is built, in the forward and backward pass, while gradients are exchanged, in the optimizer's step. The peak is
the largest of these moments. Everything follows from shapes: nothing is computed.

Letters: P trained elements, S of them averaged into the teacher, N processes, b bytes of an element of the compute
dtype. `shard` is the part of P that a process trains, DeepSpeed's padding included.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from d2v_fast.config import RunConfig
from d2v_fast.memory.step import Arrival, StepMemory, step_memory
from d2v_fast.models.student import MaskedBatch
from d2v_fast.objectives.data2vec import build_model

# of DeepSpeed's own all-reduce without ZeRO, in elements
_PLAIN_BUCKET = 500_000_000
# measured at most: the share of a step's small blocks that malloc keeps besides them; bytes for threads and kernels
KEPT_SHARE, LIBRARIES = 0.6, 40_000_000


class Part(NamedTuple):
    """Bytes that stay from step to step, on the device and in host memory (offload)."""

    name: str
    device: int
    host: int
    meaning: str


class Moment(NamedTuple):
    """Bytes on top of the parts at the worst point of something that a run does."""

    name: str
    device: int
    host: int
    meaning: str


class Prediction(NamedTuple):
    """Memory of the process that needs most. On a CPU all but `save` is the device's.

    Attributes:
        parts: what stays.
        activations: bytes that the backward pass finds saved, which come and go in every micro-step.
        moments: what comes on top.
        build: device bytes in all while model and engine are made.
        save: host bytes of the copy that a checkpoint is written from with `background_save`.
        kept: on a CPU, the most that is resident besides tensors: freed blocks, and what libraries allocate.
    """

    parts: tuple[Part, ...]
    activations: int
    moments: tuple[Moment, ...]
    build: int
    save: int
    kept: int = 0

    @property
    def device_state(self) -> int:
        """Device bytes whose size does not depend on the batch and that stay from step to step."""
        return sum(part.device for part in self.parts)

    @property
    def host_state(self) -> int:
        """Host bytes that stay from step to step; 0 on a CPU, where they are the device's."""
        return sum(part.host for part in self.parts)

    @property
    def device_peak(self) -> int:
        """Device bytes at the worst moment. On a CPU everything, without the copy of a checkpoint."""
        return max(self.build, self.device_state + max(moment.device for moment in self.moments))

    @property
    def resident_peak(self) -> int:
        """Device bytes at the worst moment, on a CPU with what is resident besides tensors."""
        return self.device_peak + self.kept

    @property
    def host_peak(self) -> int:
        """Host bytes at the worst moment, the copy of a checkpoint included; on a CPU that copy alone."""
        return self.host_state + max(moment.host for moment in self.moments) + self.save


class Shapes(NamedTuple):
    """Elements of the trained parameters, in the two groups of the optimizer.

    Attributes:
        groups: of each group, the elements of every parameter in order.
        averaged: of each group, the same for the parameters that the teacher averages.
    """

    groups: tuple[tuple[int, ...], ...]
    averaged: tuple[tuple[int, ...], ...]

    @property
    def trained(self) -> int:
        return sum(map(sum, self.groups))

    @property
    def teacher(self) -> int:
        return sum(map(sum, self.averaged))

    @property
    def largest(self) -> int:
        return max(max(group) for group in self.groups)


def shapes_of(config: RunConfig) -> Shapes:
    """The parameters of a configuration, without making them."""
    with torch.device("meta"):
        model = build_model(config.d2v)
    groups: tuple[list[int], list[int]] = ([], [])
    averaged: tuple[list[int], list[int]] = ([], [])
    for name, parameter in model.named_parameters():
        index = int(parameter.ndim <= 1)
        groups[index].append(parameter.numel())
        if name.startswith("student." + model.student.averaged_prefix()):
            averaged[index].append(parameter.numel())
    return Shapes(tuple(map(tuple, groups)), tuple(map(tuple, averaged)))


def predict(
    config: RunConfig, num_processes: int, dtype: torch.dtype, device_type: str, like: MaskedBatch | None = None
) -> Prediction:
    """Memory of a run.

    Args:
        config: the run.
        num_processes: N.
        dtype: of the forward pass, see `engine.compute_dtype`.
        device_type: "cpu" or "cuda".
        like: a micro-batch of the wanted size; None for the largest that the run can have.
    """
    split = config.deepspeed.batch_split(num_processes)
    by_deepspeed = config.deepspeed.needs_deepspeed(num_processes)
    step = step_memory(
        config.d2v,
        split.micro_batch,
        dtype,
        autocast=not by_deepspeed and dtype != torch.float32,
        device_type=device_type,
        like=like,
    )
    return predict_from(config, num_processes, dtype, device_type, shapes_of(config), step)


def predict_from(
    config: RunConfig, num_processes: int, dtype: torch.dtype, device_type: str, shapes: Shapes, step: StepMemory
) -> Prediction:
    """`predict` for known sizes of parameters and of a micro-step."""
    kinds = (_Stage0, _Stage1, _Stage2, _Stage3)
    by_deepspeed = config.deepspeed.needs_deepspeed(num_processes)
    kind = kinds[config.deepspeed.zero_optimization.stage] if by_deepspeed else _Plain
    engine = kind(config, num_processes, dtype, device_type, shapes, step)
    parts, moments = list(engine.parts()), list(engine.moments())
    copies = config.d2v.run.background_save or device_type != "cpu"
    if device_type == "cpu":
        parts = [part._replace(device=part.device + part.host, host=0) for part in parts]
        moments = [moment._replace(device=moment.device + moment.host, host=0) for moment in moments]
    return Prediction(
        tuple(part for part in parts if part.device or part.host),
        step.batch + step.saved,
        tuple(moments),
        engine.build(),
        engine.saved() if copies else 0,
        int(KEPT_SHARE * step.small) + LIBRARIES if device_type == "cpu" else 0,
    )


class _Plain:
    """One process and plain torch: fp32 parameters, gradients and moments; bf16 is autocast."""

    def __init__(
        self,
        config: RunConfig,
        processes: int,
        dtype: torch.dtype,
        device_type: str,
        shapes: Shapes,
        step: StepMemory,
    ) -> None:
        self.zero = config.deepspeed.zero_optimization
        self.processes, self.shapes, self.step = processes, shapes, step
        self.trained, self.averaged = shapes.trained, shapes.teacher
        self.low, self.is_fp32 = dtype.itemsize, dtype == torch.float32
        self.on_cpu = device_type == "cpu"
        self.accumulates = config.deepspeed.batch_split(processes).accumulation > 1

    def parts(self) -> Iterator[Part]:
        yield Part("parameters", 4 * self.trained, 0, "4 P: fp32")
        yield Part("optimizer", 8 * self.trained, 0, "8 P: two moments")
        yield from self._whole_teacher()

    def moments(self) -> Iterator[Moment]:
        yield self._micro_step(4 * self.trained)

    def build(self) -> int:
        """Model and teacher, and what else is alive while they are made."""
        return self._whole_copies() + (0 if self.is_fp32 else self.low * self.averaged)

    def saved(self) -> int:
        """The copy of what this process writes into a checkpoint: fp32 values, two moments, average."""
        return 12 * self.trained + 4 * self.averaged

    def _whole_copies(self) -> int:
        # every process builds the whole model in fp32, and copies the student
        return 4 * self.trained + 4 * self.averaged

    def _whole_teacher(self) -> Iterator[Part]:
        yield Part("teacher", 4 * self.averaged, 0, "4 S: the fp32 average, which runs itself in fp32")
        if not self.is_fp32:
            yield Part("teacher's copy", self.low * self.averaged, 0, "b S: what runs")

    def _micro_step(self, kept: int) -> Moment:
        """Where gradients of `kept` bytes stay in the parameters until they are used."""
        step = self.step
        if self.accumulates:
            most = max(step.forward, step.backward) + kept
        else:
            most = max(step.forward, step.with_gradients, kept)
        return Moment("forward and backward", most, 0, "activations, and the gradients that are there by then")


class _Stage0(_Plain):
    """DeepSpeed without ZeRO: an all-reduce of a flat copy of the gradients; in 16 bits fp32 values are kept apart."""

    def parts(self) -> Iterator[Part]:
        yield Part("parameters", self.low * self.trained, 0, "b P")
        if not self.is_fp32:
            yield Part("fp32 parameters", 4 * self.trained, 0, "4 P")
        yield Part("optimizer", 8 * self.trained, 0, "8 P: two moments")
        yield from self._whole_teacher()

    def moments(self) -> Iterator[Moment]:
        gradients = self.low * self.trained
        yield self._micro_step(gradients)
        flat = self.low * min(self.trained, _PLAIN_BUCKET + self.shapes.largest)
        yield Moment("gradient exchange", gradients + flat, 0, "b P gradients and a flat copy of at most 5e8 of them")
        if not self.is_fp32:
            yield Moment("optimizer step", gradients + 4 * self.trained, 0, "b P gradients and 4 P of them in fp32")

    def build(self) -> int:
        if self.is_fp32:
            return self._whole_copies()
        # DeepSpeed makes moments and gradients of both kinds at once, for a step of zeros
        return self._waiting_teacher() + (2 * self.low + 16) * self.trained

    def _waiting_teacher(self) -> int:
        """The copy of the student in fp32, on the host until the engine is made; that is the same memory on a CPU."""
        return 4 * self.averaged if self.on_cpu else 0


class _ZeRO(_Stage0):
    """What the stages with shards share. DeepSpeed reduces gradients in buckets."""

    @property
    def offloads_optimizer(self) -> bool:
        section = self.zero.offload_optimizer
        return section is not None and section.device == "cpu"

    @property
    def bucket(self) -> int:
        """Elements of a bucket of gradients. `engine.py` makes it no larger than the model, unless it is given."""
        given = "reduce_bucket_size" in self.zero.model_fields_set
        return self.zero.reduce_bucket_size if given else min(self.zero.reduce_bucket_size, self.trained)

    def _optimizer(self, name: str, size: int, meaning: str) -> Part:
        return Part(name, 0, size, meaning) if self.offloads_optimizer else Part(name, size, 0, meaning)

    def _exchange(
        self, arrivals: Sequence[Arrival], *, buffers: int, copies: int, owned: int = 0, gathered: int = 0
    ) -> tuple[int, int]:
        """Largest bytes while the gradients arrive, and while a full bucket of them is reduced.

        Args:
            arrivals: of the backward pass, in order.
            buffers: flat buffers of a bucket that are allocated at the first arrival; a CPU gives a page of them memory
                when it is first written.
            copies: of a bucket, while it is reduced.
            owned: bytes kept of the gradients, from the first reduction on.
            gathered: elements of parameters that are whole until their gradients have come.
        """
        while_arriving, while_reducing, filled, written, kept = 0, 0, 0, 0, 0
        size = self.bucket if buffers else 0

        def reduce(rest: int) -> None:
            nonlocal while_reducing, filled, kept
            base = rest + self.low * (buffer() + gathered)
            while_reducing = max(while_reducing, base + kept + self.low * copies * filled, base + owned)
            filled, kept = 0, owned

        def buffer() -> int:
            return buffers * (min(written, size) if self.on_cpu else size)

        rest = 0
        for arrival in arrivals:
            if filled and filled + arrival.elements > self.bucket:
                reduce(arrival.most)
            filled += arrival.elements
            written = max(written, filled)
            while_arriving = max(while_arriving, arrival.most + self.low * (buffer() + gathered) + kept)
            gathered, rest = max(0, gathered - arrival.elements), arrival.rest
        reduce(rest)
        return while_arriving, while_reducing


class _Stage1(_ZeRO):
    """Optimizer sharded. DeepSpeed keeps the parameters in one flat tensor per optimizer group, equal slices of which
    are the shards; the teacher's memory is laid out alike."""

    def parts(self) -> Iterator[Part]:
        shard, flat = sum(self._shards()), sum(self._flat())
        yield Part("parameters", self.low * flat, 0, "b P")
        yield self._optimizer("fp32 parameters", 4 * shard, "4 P / N, in fp32 runs too")
        yield self._optimizer("optimizer", 8 * shard, "8 P / N: two moments")
        yield Part("teacher", self.low * flat, 0, "b P: what runs, whole, laid out as the parameters")
        if not self.is_fp32 or (self.offloads_optimizer and not self.on_cpu):
            average = sum(
                min(part, sum(group)) for part, group in zip(self._shards(), self.shapes.averaged, strict=True)
            )
            yield self._optimizer("teacher's average", 4 * average, "4 S / N, beside the fp32 parameters")
        if self.offloads_optimizer:
            yield Part("offload gradients", 0, 4 * shard, "4 P / N, for the optimizer on the host")
            yield Part("offload buffer", 0, self.low * shard, "b P / N: values on their way back")
            largest = self.low * self.shapes.largest
            yield Part("offload transfer", largest, largest, "b times the largest parameter, on either side")

    def moments(self) -> Iterator[Moment]:
        shard, owned = self._shards(), self.low * self._owned()
        whole = self.low * self.trained
        yield self._micro_step(whole)
        # gradients leave the parameters when they enter a bucket
        left, arrivals = self.trained, []
        for group in self.shapes.groups:
            for elements in group:
                arrivals.append(Arrival(elements, self.low * left, self.low * (left - elements)))
                left -= elements
        kept = 0 if self.offloads_optimizer else owned
        yield self._reduction(arrivals, kept)
        yield from self._step(shard, owned)
        yield from self._gathering()

    def build(self) -> int:
        # a flat copy beside the model; then the shards, and zeros for gradients
        flat, shard = sum(self._flat()), sum(self._shards())
        in_flattening = self.low * (self.trained + flat)
        in_sharding = self.low * flat + 4 * shard + (0 if self.is_fp32 else self.low * shard) + 4 * shard
        on_host = 8 * shard if self.offloads_optimizer and not self.on_cpu else 0
        whole = self._whole_copies() if self.on_cpu else 0
        return max(whole, self._waiting_teacher() + max(in_flattening, in_sharding - on_host))

    def saved(self) -> int:
        return 12 * sum(self._shards()) + 4 * min(sum(self._shards()), self.averaged)

    def _flat(self) -> list[int]:
        """Elements of the groups' flat tensors: a multiple of 2 N."""
        unit = 2 * self.processes
        return [-(-sum(group) // unit) * unit for group in self.shapes.groups]

    def _shards(self) -> list[int]:
        return [flat // self.processes for flat in self._flat()]

    def _owned(self) -> int:
        """Elements of the parameters that overlap with a process's shards, of the process with most: their gradients
        are kept whole."""
        owned = [0] * self.processes
        for group, shard in zip(self.shapes.groups, self._shards(), strict=True):
            begin = 0
            for elements in group:
                for process in range(begin // shard, (begin + elements - 1) // shard + 1):
                    owned[process] += elements
                begin += elements
        return max(owned)

    def _reduction(self, arrivals: Sequence[Arrival], owned: int) -> Moment:
        contiguous = self.zero.contiguous_gradients or self.offloads_optimizer
        buffers = (2 if self.zero.overlap_comm else 1) if contiguous else 0
        # one process has one slice of a bucket, which is no copy
        copies = 1 if self.processes > 1 and self.zero.reduce_scatter else 0
        most = max(self._exchange(arrivals, buffers=buffers, copies=copies, owned=owned))
        return Moment("gradient exchange", most, 0, "a bucket of gradients, a flat copy of it, and what is kept")

    def _step(self, shard: Sequence[int], owned: int) -> Iterator[Moment]:
        if self.offloads_optimizer:
            host = owned if self.accumulates else 0
            yield Moment("optimizer step", 0, host, "gradients that were added up on the host")
            return
        flat = max((self.low + (0 if self.is_fp32 else 4)) * part for part in shard)
        yield Moment("optimizer step", owned + flat, 0, "the gradients kept, and a flat copy of them in fp32")

    def _gathering(self) -> Iterator[Moment]:
        if self.processes > 1 and self.on_cpu:
            most = self.low * (self._flat()[0] + self._shards()[0])
            yield Moment("shards of the teacher", most, 0, "b (P + P / N): gloo gathers into memory of its own")


class _Stage2(_Stage1):
    """Gradients sharded as well: they enter buckets as they come."""

    def moments(self) -> Iterator[Moment]:
        owned = self.low * self._owned()
        kept = 0 if self.offloads_optimizer else owned
        before = kept if self.accumulates else 0
        moment = self._reduction(self.step.arrivals, kept)
        most = max(moment.device, self.step.forward, self.step.backward) + before
        yield moment._replace(name="forward and backward", device=most)
        yield from self._step(self._shards(), owned)
        yield from self._gathering()


class _Stage3(_ZeRO):
    """Parameters sharded, one by one; a forward or backward pass gathers those that it needs."""

    @property
    def offloads_parameters(self) -> bool:
        section = self.zero.offload_param
        return section is not None and section.device == "cpu"

    def parts(self) -> Iterator[Part]:
        shard, average = self._shard(self.shapes.groups), self._shard(self.shapes.averaged)
        yield self._parameters("parameters", shard, "b P / N")
        threshold = self.zero.stage3_param_persistence_threshold
        persistent = sum(n for group in self.shapes.groups for n in group if n <= threshold)
        if self.processes > 1:
            yield Part("small parameters", self.low * persistent, 0, "b times those that are never sharded")
        yield self._optimizer("fp32 parameters", 4 * shard, "4 P / N, in fp32 runs too")
        yield self._optimizer("optimizer", 8 * shard, "8 P / N: two moments")
        yield self._optimizer("gradients", self.low * shard, "b P / N")
        yield self._parameters("teacher", average, "b S / N: what runs")
        if not self.is_fp32 or (self.offloads_optimizer != self.offloads_parameters and not self.on_cpu):
            yield self._optimizer("teacher's average", 4 * average, "4 S / N, beside the fp32 parameters")
        if self.offloads_optimizer:
            yield Part("offload gradients", 0, 4 * shard, "4 P / N, for the optimizer on the host")
        if self.zero.contiguous_gradients:
            bucket = min(self.bucket, self.trained) if self.on_cpu else self.bucket
            yield Part("gradient bucket", self.low * bucket, 0, "b times `reduce_bucket_size`, at most b P by default")

    def moments(self) -> Iterator[Moment]:
        step, gathered = self.step, 0
        if self.processes > 1 or self.offloads_parameters:
            # what is used again soon enough, on the way back, stays
            reuse = min(self.zero.stage3_max_reuse_distance // 2, self.zero.stage3_max_live_parameters)
            gathered = min(self.trained, reuse + self.zero.stage3_prefetch_bucket_size)
        # gloo reduces in a copy of its own
        copies = (2 if self.on_cpu else 1) if self.zero.reduce_scatter else 0
        arriving, reducing = self._exchange(step.arrivals, buffers=0, copies=copies, gathered=gathered)
        forward = max(step.forward + self.low * gathered, self._fetching(gathered))
        yield Moment("forward and backward", max(forward, arriving), 0, "activations, and parameters that are gathered")
        yield Moment("gradient exchange", reducing, 0, "copies of a bucket of gradients, and activations at that time")
        if not self.offloads_optimizer:
            part = min(self._shard(self.shapes.groups), self.zero.sub_group_size)
            flat = (self.low + (0 if self.is_fp32 else 4)) * part
            yield Moment("optimizer step", flat, 0, "a flat copy of the gradients in fp32")

    def _fetching(self, gathered: int) -> int:
        """Largest bytes of the forward pass while parameters are fetched: together they arrive in one flat tensor, and
        each is copied out of it."""
        if not gathered:
            return 0
        # gloo gathers into memory of its own, from a copy
        copies = 2 + 1 / self.processes if self.on_cpu else 1
        most, there = 0.0, 0
        while there < self.trained:
            fetched = min(max(self.zero.stage3_prefetch_bucket_size, self.shapes.largest), self.trained - there)
            # activations pile up as parameters are used
            saved = self.step.saved * there / self.trained
            kept = max(0, min(there, gathered - fetched))
            most = max(most, saved + self.low * (kept + (1 + copies) * fetched))
            there += fetched
        return int(most)

    def build(self) -> int:
        # the whole model and the copy of the student; then shards, a flat copy of them, fp32 values, gradients
        shard = self._shard(self.shapes.groups)
        on_host = self.offloads_optimizer and not self.on_cpu
        in_sharding = self._waiting_teacher() + (2 * self.low + (0 if on_host else 8 + self.low)) * shard
        if self.on_cpu:
            return max(self._whole_copies(), in_sharding)
        # DeepSpeed takes a module to the device, in the dtype that it computes in, before it divides it
        teacher = self.low * self.averaged + (self.low + (0 if on_host else 4)) * shard
        return max(self.low * self.trained, in_sharding, teacher)

    def saved(self) -> int:
        return 12 * self._shard(self.shapes.groups) + 4 * self._shard(self.shapes.averaged)

    def _shard(self, groups: Sequence[Sequence[int]]) -> int:
        """Elements of a process: each parameter is padded to a multiple of N."""
        return sum(-(-elements // self.processes) for group in groups for elements in group)

    def _parameters(self, name: str, elements: int, meaning: str) -> Part:
        size = self.low * elements
        return Part(name, 0, size, meaning) if self.offloads_parameters else Part(name, size, 0, meaning)
