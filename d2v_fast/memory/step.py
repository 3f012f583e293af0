"""Count the memory of a forward and a backward pass besides parameters, without computing anything.

Teacher and student run on PyTorch's `meta` device, whose tensors have shapes and no values. Every storage counts from
the operation that allocates it until it is freed: outputs, tensors that autograd saves, temporary tensors of the
backward pass, gradients. Memory that an operation allocates internally is not counted.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from d2v_fast.config import D2VConfig
from d2v_fast.data import Batch
from d2v_fast.modalities import modality_of
from d2v_fast.models.encoder import Encoder
from d2v_fast.models.pre_norm import attention_with_bias_gradient
from d2v_fast.models.visible import Alibi
from d2v_fast.objectives.build import build_objective
from d2v_fast.ops.attention import kernels_on_meta

# glibc allocates blocks of up to this many bytes from its heap, and retains them when they are freed
HEAP_BLOCK = 32 << 20


class Arrival(NamedTuple):
    """The completed gradient of a parameter.

    Attributes:
        elements: elements of the parameter.
        most: most bytes since the previous arrival, including this gradient but no earlier one.
        rest: bytes that remain without it.
    """

    elements: int
    most: int
    rest: int


class StepMemory(NamedTuple):
    """Bytes of one micro-step of one process besides parameters and their gradients, unless said otherwise.

    Attributes:
        batch: inputs and rows of the masked places.
        saved: bytes that the forward pass saves for the backward pass, without the batch.
        forward: most bytes while teacher and student run.
        backward: most bytes during the backward pass, with the gradient in progress but no completed one.
        with_gradients: most bytes during the backward pass, with the completed gradients.
        arrivals: gradients of the parameters, in the order in which the backward pass completes them.
        small: most bytes in blocks of at most `HEAP_BLOCK` bytes, with the completed gradients.
    """

    batch: int
    saved: int
    forward: int
    backward: int
    with_gradients: int
    arrivals: tuple[Arrival, ...]
    small: int = 0


def step_memory(
    config: D2VConfig,
    micro_batch: int,
    dtype: torch.dtype,
    *,
    autocast: bool = False,
    device_type: str = "cpu",
    like: Batch | None = None,
    captured: bool = False,
) -> StepMemory:
    """Count the memory of a micro-step.

    Args:
        config: the model, its mask and its target. No sample is assumed to skip a block: this is the worst case.
        micro_batch: samples.
        dtype: dtype of the forward pass.
        autocast: whether the student's parameters are fp32 and cast in the forward pass. Otherwise they are of
            `dtype`.
        device_type: "cpu" or "cuda", which use different attention kernels.
        like: a batch of the size to assume, without padding. `None` assumes the largest that a run can have.
        captured: whether the step is captured, so that its batch has fixed shapes.
    """
    with torch.device("meta"):
        model = build_objective(_without_skipping(config))
        teacher: nn.Module = nn.Module()
        if model.teacher_config is not None:
            teacher = build_objective(config).averaged.eval().requires_grad_(False).to(dtype)
        if not autocast:
            model.to(dtype)
        batch = modality_of(config).largest_batch(config, micro_batch) if like is None else _empty_like(like)
        if captured and model.shape_varies(batch) is None:
            batch = model.with_fixed_shapes(batch, fixed_counts=True)
    if autocast:
        model.student.imitate_autocast(dtype)
    as_on = _AsOn(device_type, dtype if autocast else None)
    for part in (*model.modules(), *teacher.modules()):
        if isinstance(part, Alibi):
            part.device_type = device_type
        if isinstance(part, Encoder):
            part.checkpoint_contexts = lambda: (nullcontext(), _recomputing(as_on))
    live = _LiveBytes([*model.parameters(), *model.buffers(), *teacher.parameters(), *teacher.buffers()])
    with torch.device("meta"), kernels_on_meta(device_type), live, as_on:
        live.add((batch.inputs, batch.rows, batch.targets))
        in_batch = live.bytes
        loss = model(batch, teacher).loss_sum
        saved, forward = live.bytes, live.peak
        as_on.end_forward()
        gradients = _Gradients(model.parameters(), live)
        live.peak = live.bytes
        loss.backward()
    arrivals = tuple(gradients.arrivals)
    return StepMemory(in_batch, saved - in_batch, forward, live.peak, gradients.peak, arrivals, live.small_peak)


@contextmanager
def _recomputing(as_on: TorchFunctionMode) -> Iterator[None]:
    """Re-enter the modes of the forward pass, which are off in the backward pass."""
    with torch.device("meta"), as_on:
        yield


def _without_skipping(config: D2VConfig) -> D2VConfig:
    """Return the configuration with which no sample skips a block or a branch: a step then needs the most memory."""
    return config.model_copy(update={"model": config.model.without_skipping()})


def _empty_like(batch: Batch) -> Batch:
    """Return a batch of the same shapes, on torch's current device, without padding."""

    def integers(like: Tensor | None) -> Tensor | None:
        return None if like is None else torch.empty(like.shape, dtype=torch.int64)

    return Batch(
        torch.empty(batch.inputs.shape, dtype=batch.inputs.dtype),
        torch.empty(batch.rows.shape, dtype=torch.int64),
        torch.empty(len(batch.inputs), dtype=torch.int64),
        masked_inputs=integers(batch.masked_inputs),
        visible=integers(batch.visible),
        noise_keys=integers(batch.noise_keys),
        targets=None if batch.targets is None else torch.empty(batch.targets.shape, dtype=batch.targets.dtype),
        target_lengths=integers(batch.target_lengths),
    )


class _LiveBytes(TorchDispatchMode):
    """Count the bytes of all live storages.

    Attributes:
        bytes: live bytes.
        peak: the most live bytes so far; may be reset.
        small_peak: the most bytes so far in blocks of at most `HEAP_BLOCK` bytes, including held ones.
        watcher: called whenever `bytes` has grown.
    """

    def __init__(self, ignored: Iterable[Tensor]) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.small_peak = self._small = 0
        self._held: set[int] = set()
        self.watcher: Callable[[], None] = lambda: None
        # by address of the storage; the entry is removed when the storage is freed
        self._known: dict[int, tuple[int, object]] = {x.untyped_storage()._cdata: (0, None) for x in ignored}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.add(result)
        return result

    def add(self, tensors: object) -> None:
        for tensor in tree_leaves(tensors):
            if not isinstance(tensor, Tensor) or tensor.device.type != "meta":
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._known:
                continue
            size = storage.nbytes()
            self._known[key] = (size, weakref.ref(storage, partial(self._free, key)))
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
            if size <= HEAP_BLOCK:
                self._small += size
                self.small_peak = max(self.small_peak, self._small)
            self.watcher()

    def hold(self, tensor: Tensor) -> None:
        """Keep counting the storage of `tensor` in `small_peak` after it is freed, as a run keeps it."""
        self._held.add(tensor.untyped_storage()._cdata)

    def _free(self, key: int, _: object) -> None:
        size, _ = self._known.pop(key)
        self.bytes -= size
        if key in self._held:
            self._held.remove(key)
        elif size <= HEAP_BLOCK:
            self._small -= size


class _Gradients:
    """Remove completed gradients of parameters from `live`, and count them separately.

    Attributes:
        arrivals: the completed gradients in order.
        peak: most bytes of completed gradients and all other live storages together.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], live: _LiveBytes) -> None:
        self.arrivals: list[Arrival] = []
        self.peak = 0
        self._live, self._bytes = live, 0
        self._most = live.bytes
        live.watcher = self._watch
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._take)

    def _watch(self) -> None:
        self.peak = max(self.peak, self._live.bytes + self._bytes)
        self._most = max(self._most, self._live.bytes)

    def _take(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self._bytes += parameter.grad.untyped_storage().nbytes()
        self._live.hold(parameter.grad)
        parameter.grad = None
        self.arrivals.append(Arrival(parameter.numel(), self._most, self._live.bytes))
        self._most = self._live.bytes


class _AsOn(TorchFunctionMode):
    """Imitate on `meta` the attention of another device, and autocast, which `meta` lacks.

    Attributes:
        caches: whether cast parameters are cached, as autocast does until the forward pass ends.
    """

    def __init__(self, device_type: str, autocast_to: torch.dtype | None) -> None:
        super().__init__()
        self._device_type, self._dtype = device_type, autocast_to
        self._cast: dict[int, Tensor] = {}
        self.caches = True

    def end_forward(self) -> None:
        self._cast.clear()
        self.caches = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if self._dtype is not None and func in (F.linear, F.conv1d, F.conv2d, torch.matmul):
            args = tuple(self._lower(x) if isinstance(x, Tensor) else x for x in args)
            kwargs = {key: self._lower(x) if isinstance(x, Tensor) else x for key, x in kwargs.items()}
        return func(*args, **kwargs)

    def _lower(self, x: Tensor) -> Tensor:
        if not isinstance(x, nn.Parameter) or not x.requires_grad or not self.caches:
            return x.to(self._dtype)
        if id(x) not in self._cast:
            self._cast[id(x)] = x.to(self._dtype)
        return self._cast[id(x)]

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0
    ) -> Tensor:
        bias = q.new_empty(1, 1, 1, 1) if attn_mask is None else attn_mask.to(q.dtype)
        if not torch.is_grad_enabled() or not q.requires_grad:
            # a tiled kernel writes its result only, in the layout `[B, T, H, D / H]`
            return torch.empty_like(q.transpose(1, 2)).transpose(1, 2)
        if self._device_type == "cpu" and (bias.requires_grad or dropout_p > 0):
            return attention_with_bias_gradient(q, k, v, bias, dropout_p)
        return _TiledAttention.apply(q, k, v, bias)


class _TiledAttention(torch.autograd.Function):
    """Memory-efficient attention with a bias: the tensors it saves, and a gradient of the bias per sample."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        out = torch.empty_like(q.transpose(1, 2)).transpose(1, 2)
        logsumexp = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
        ctx.save_for_backward(q, k, v, bias, out, logsumexp)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, *_ = ctx.saved_tensors
        of_bias = None
        if bias.requires_grad:
            of_bias = bias.new_empty(len(q), *bias.shape[1:])
            of_bias = of_bias if len(bias) == len(q) else of_bias.sum(0, keepdim=True)
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), of_bias
