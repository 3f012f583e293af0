"""The memory of a run as tables: part, phase of a step, layout -> bytes.

docs/memory.md derives the formulas. The letters are those of `Sizes`. A formula returns `None` where the run has no
such part or phase.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from d2v_fast.memory.sizes import Layout, Sizes, exchange, fetching, gradients_leave, micro_step, reduction, working

Formula = Callable[[Sizes], int | None]
# where a part lives. "optimizer" and "parameters": on the device, or on the host with offload of these
Home = Literal["device", "host", "both", "optimizer", "parameters"]

# elements of the buckets of DeepSpeed's all-reduce without ZeRO
_PLAIN_BUCKET = 500_000_000


class Line(NamedTuple):
    """One line of a table: a part that stays from step to step, or a phase and the most that it needs on top."""

    name: str
    home: Home
    size: Formula
    meaning: str


_WHOLE_TEACHER = (
    Line("teacher", "device", lambda s: 4 * s.S, "4 S: the fp32 average, which runs itself in fp32"),
    Line("teacher's copy", "device", lambda s: s.low * s.S, "b S: what runs"),
)
_SHARDED_OPTIMIZER = (
    Line("fp32 parameters", "optimizer", lambda s: 4 * s.shard, "4 P / N, in fp32 runs too"),
    Line("optimizer", "optimizer", lambda s: 8 * s.shard, "8 P / N: two moments"),
)
_HOST_GRADIENTS = Line(
    "offload gradients",
    "host",
    lambda s: 4 * s.shard if s.offloads_optimizer else None,
    "4 P / N, for the optimizer on the host",
)


def _average(s: Sizes) -> int | None:
    """The fp32 average, unless the module that runs is the average."""
    moved = s.offloads_optimizer != (s.layout == "stage 3" and s.offloads_parameters)
    return 4 * s.averaged if not s.fp32 or (moved and not s.cpu) else None


_AVERAGE = Line("teacher's average", "optimizer", _average, "4 S / N, beside the fp32 parameters")


def _small_parameters(s: Sizes) -> int | None:
    threshold = s.zero.stage3_param_persistence_threshold
    return s.b * sum(n for group in s.shapes.groups for n in group if n <= threshold) if s.N > 1 else None


def _bucket(s: Sizes) -> int | None:
    return s.b * (min(s.bucket, s.P) if s.cpu else s.bucket) if s.zero.contiguous_gradients else None


_SHARDED_PARTS = (
    Line("parameters", "device", lambda s: s.b * sum(s.flats), "b P"),
    *_SHARDED_OPTIMIZER,
    Line("teacher", "device", lambda s: s.b * sum(s.flats), "b P: what runs, whole, laid out as the parameters"),
    _AVERAGE,
    _HOST_GRADIENTS,
    Line(
        "offload buffer",
        "host",
        lambda s: s.b * s.shard if s.offloads_optimizer else None,
        "b P / N: values on their way back",
    ),
    Line(
        "offload transfer",
        "both",
        lambda s: s.b * s.shapes.largest if s.offloads_optimizer else None,
        "b times the largest parameter, on either side",
    ),
)

PARTS: dict[Layout, tuple[Line, ...]] = {
    "plain": (
        Line("parameters", "device", lambda s: 4 * s.P, "4 P: fp32"),
        Line("optimizer", "device", lambda s: 8 * s.P, "8 P: two moments"),
        *_WHOLE_TEACHER,
        Line("gradients", "device", lambda s: 4 * s.P if s.captured else None, "4 P, in fixed places"),
        Line("graphs", "device", lambda s: working(s) if s.captured else None, "A: what a captured micro-step needs"),
    ),
    "stage 0": (
        Line("parameters", "device", lambda s: s.b * s.P, "b P"),
        Line("fp32 parameters", "device", lambda s: s.full * s.P, "4 P"),
        Line("optimizer", "device", lambda s: 8 * s.P, "8 P: two moments"),
        *_WHOLE_TEACHER,
    ),
    "stage 1": _SHARDED_PARTS,
    "stage 2": _SHARDED_PARTS,
    "stage 3": (
        Line("parameters", "parameters", lambda s: s.b * s.shard, "b P / N"),
        Line("small parameters", "device", _small_parameters, "b times those that are never sharded"),
        *_SHARDED_OPTIMIZER,
        Line("gradients", "optimizer", lambda s: s.b * s.shard, "b P / N"),
        Line("teacher", "parameters", lambda s: s.b * s.averaged, "b S / N: what runs"),
        _AVERAGE,
        _HOST_GRADIENTS,
        Line("gradient bucket", "device", _bucket, "b times `reduce_bucket_size`, at most b P by default"),
    ),
}


def _in_stage_2(s: Sizes) -> int:
    """Gradients enter buckets as they arrive."""
    before = s.b * s.touched if s.accumulates and not s.offloads_optimizer else 0
    return max(reduction(s, s.step.arrivals), s.step.forward, s.step.backward) + before


def _in_stage_3(s: Sizes) -> tuple[int, int]:
    # gloo reduces in a copy of its own
    copies = (2 if s.cpu else 1) if s.zero.reduce_scatter else 0
    return exchange(s, s.step.arrivals, buffers=0, copies=copies, gathered=s.gathered)


_ACTIVATIONS = "activations, and the gradients that have arrived"
_BUCKETS = "a bucket of gradients, a flat copy of it, and the gradients of this process"
_STEPS = (
    Line(
        "optimizer step",
        "optimizer",
        lambda s: (
            s.b * s.touched + max((s.b + s.full) * part for part in s.shards)
            if not s.offloads_optimizer
            else s.b * s.touched * s.accumulates
        ),
        "the gradients of this process, and a flat fp32 copy; with offload, gradients accumulated on the host",
    ),
    Line(
        "shards of the teacher",
        "device",
        lambda s: s.b * (s.flats[0] + s.shards[0]) if s.N > 1 and s.cpu else None,
        "b (P + P / N): gloo gathers into memory of its own",
    ),
)

PHASES: dict[Layout, tuple[Line, ...]] = {
    "plain": (Line("forward and backward", "device", lambda s: micro_step(s, 4 * s.P), _ACTIVATIONS),),
    "stage 0": (
        Line("forward and backward", "device", lambda s: micro_step(s, s.b * s.P), _ACTIVATIONS),
        Line(
            "gradient exchange",
            "device",
            lambda s: s.b * s.P + s.b * min(s.P, _PLAIN_BUCKET + s.shapes.largest),
            "b P gradients and a flat copy of at most 5e8 of them",
        ),
        Line(
            "optimizer step",
            "device",
            lambda s: None if s.fp32 else (s.b + 4) * s.P,
            "b P gradients and 4 P of them in fp32",
        ),
    ),
    "stage 1": (
        Line("forward and backward", "device", lambda s: micro_step(s, s.b * s.P), _ACTIVATIONS),
        Line("gradient exchange", "device", lambda s: reduction(s, gradients_leave(s)), _BUCKETS),
        *_STEPS,
    ),
    "stage 2": (Line("forward and backward", "device", _in_stage_2, f"activations, or {_BUCKETS}"), *_STEPS),
    "stage 3": (
        Line(
            "forward and backward",
            "device",
            lambda s: max(s.step.forward + s.b * s.gathered, fetching(s), _in_stage_3(s)[0]),
            "activations, and gathered parameters",
        ),
        Line(
            "gradient exchange",
            "device",
            lambda s: _in_stage_3(s)[1],
            "copies of a bucket of gradients, and the activations of that time",
        ),
        Line(
            "optimizer step",
            "device",
            lambda s: None if s.offloads_optimizer else (s.b + s.full) * min(s.shard, s.zero.sub_group_size),
            "a flat copy of the gradients in fp32",
        ),
    ),
}


def _whole(s: Sizes) -> int:
    """Every process builds the whole model in fp32 and copies the student."""
    return 4 * s.P + 4 * s.S


def _waiting_teacher(s: Sizes) -> int:
    """The fp32 copy of the student stays on the host until the engine exists; on a CPU that is the same memory."""
    return 4 * s.S if s.cpu else 0


def _build_stage_0(s: Sizes) -> int:
    # DeepSpeed allocates moments and gradients of both kinds at once, for a step of zeros
    return _whole(s) if s.fp32 else _waiting_teacher(s) + (2 * s.b + 16) * s.P


def _build_sharded(s: Sizes) -> int:
    # a flat copy beside the model; then the shards, and zeros for gradients
    flat, on_host = sum(s.flats), 8 * s.shard if s.offloads_optimizer and not s.cpu else 0
    in_sharding = s.b * flat + (8 + s.low) * s.shard - on_host
    return max(_whole(s) if s.cpu else 0, _waiting_teacher(s) + max(s.b * (s.P + flat), in_sharding))


def _build_stage_3(s: Sizes) -> int:
    # the whole model and the copy of the student; then shards, a flat copy of them, fp32 values, gradients
    on_host = s.offloads_optimizer and not s.cpu
    in_sharding = _waiting_teacher(s) + (2 * s.b + (0 if on_host else 8 + s.b)) * s.shard
    if s.cpu:
        return max(_whole(s), in_sharding)
    # DeepSpeed moves a module to the device, in the dtype that it computes in, before it divides it
    return max(s.b * s.P, in_sharding, s.b * s.S + (s.b + (0 if on_host else 4)) * s.shard)


BUILD: dict[Layout, Callable[[Sizes], int]] = {
    "plain": lambda s: _whole(s) + s.low * s.S,
    "stage 0": _build_stage_0,
    "stage 1": _build_sharded,
    "stage 2": _build_sharded,
    "stage 3": _build_stage_3,
}


def checkpoint(s: Sizes) -> int:
    """Return the bytes that this process writes into a checkpoint: fp32 values, two moments, average."""
    if s.layout in ("plain", "stage 0"):
        return 12 * s.P + 4 * s.S
    return 12 * s.shard + 4 * (s.averaged if s.layout == "stage 3" else min(s.shard, s.S))
