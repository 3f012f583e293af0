"""Exponential moving average of a whole model in one call."""

from __future__ import annotations

import importlib
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from d2v_fast.ops import _library
from d2v_fast.ops._library import (
    FLOAT_DTYPES,
    check_tensors,
    define,
    define_in_cpp,
    has_triton,
    in_cpp,
    is_observed,
    tensor_list,
)
from d2v_fast.ops.memory_checks import check_memory, check_overlap

Tensors = Iterable[Tensor] | Mapping[str, Tensor]
"""Tensors by position or by name."""

_LAYOUTS_KEPT = 4


def ema_update_reference(
    teacher: Sequence[Tensor],
    student: Sequence[Tensor],
    decay: float,
    decay_tensor: Tensor | None,
    working: Sequence[Tensor],
) -> None:
    """Update ``teacher <- lerp(teacher, student, 1 - decay)`` in fp32, then ``working <- teacher``. Decay 1 does
    nothing."""
    if decay_tensor is None:
        if decay == 1.0:
            return
        weight = torch.tensor(1.0 - decay, dtype=torch.float32)
        frozen = torch.tensor(False)
    else:
        weight = (1.0 - decay_tensor.double()).float()
        frozen = decay_tensor == 1.0
    for i, (t, s) in enumerate(zip(teacher, student, strict=True)):
        updated = torch.lerp(t, s.to(torch.float32), weight.to(t.device))
        # decay 1 must not copy NaN from the student
        t.copy_(torch.where(frozen.to(t.device), t, updated))
        if working:
            working[i].copy_(torch.where(frozen.to(t.device), working[i], t.to(working[i].dtype)))


class _Lists(NamedTuple):
    """Tensors of an update, matched by position; `working` is empty without a working copy."""

    teacher: list[Tensor]
    student: list[Tensor]
    working: list[Tensor]

    def only(self, indices: Iterable[int]) -> _Lists:
        """Return the entries at these positions of every list."""
        indices = list(indices)
        return _Lists(*([group[i] for i in indices] for group in self if group), *([] for group in self if not group))


def _check_call(
    teacher: list[Tensor], student: list[Tensor], _decay: float, _decay_tensor: Tensor | None, working: list[Tensor]
) -> None:
    """Check arguments for the reference and for Triton."""
    lists = _Lists(teacher, student, working)
    if in_cpp("ema_check"):
        try:
            torch.ops.d2v.ema_check(*lists)
        except ValueError:
            _check(lists)
            raise
        return
    layout = tuple(tuple((x.data_ptr(), x.shape, x.stride(), x.dtype, x.device) for x in group) for group in lists)
    if layout not in _accepted:
        _check(lists)
        _accepted[layout] = None
        if len(_accepted) > _LAYOUTS_KEPT:
            _accepted.popitem(last=False)


# recent layouts that passed the checks, which depend on nothing else
_accepted: OrderedDict[tuple, None] = OrderedDict()

define(
    "ema_update_(Tensor(a!)[] teacher, Tensor[] student, float decay, Tensor? decay_tensor, Tensor(b!)[] working)"
    " -> ()",
    ema_update_reference,
    "ema.ema_update",
    _check_call,
)
define_in_cpp("ema_check(Tensor[] teacher, Tensor[] student, Tensor[] working) -> ()")
define_in_cpp("ema_prepare(Tensor[] teacher, Tensor[] student, Tensor[] working) -> int")
define_in_cpp("ema_is_current(int handle) -> bool")
define_in_cpp("ema_run(int handle, float decay, Tensor? decay_tensor) -> bool")
define_in_cpp("ema_release(int handle) -> ()")


@torch.library.register_fake("d2v::ema_update_")
def _fake(
    teacher: Sequence[Tensor],
    student: Sequence[Tensor],
    decay: float,
    decay_tensor: Tensor | None,
    working: Sequence[Tensor],
) -> None:
    _fake_check(teacher, student, working)


@torch.library.register_fake("d2v::ema_check")
def _fake_check(teacher: Sequence[Tensor], student: Sequence[Tensor], working: Sequence[Tensor]) -> None:
    _check_alike(_Lists(list(teacher), list(student), list(working)))


def ema_update_(
    teacher: Tensors,
    student: Tensors,
    decay: float | Tensor,
    *,
    working: Tensors | None = None,
) -> None:
    """Update the teacher in place: ``teacher <- decay * teacher + (1 - decay) * student``.

    The EMA of data2vec (arXiv 2202.03555, section 3.2, "teacher parameterization") for a list of tensors: one kernel
    launch on a GPU, one parallel loop on a CPU. Arithmetic is fp32 in the form of ``torch.lerp``. The update raises
    the version counters of the tensors that it writes, so that autograd refuses a backward pass through replaced
    values. It has no derivative, as under ``torch.no_grad()``. For a fixed set of tensors, `EmaUpdate` is faster.

    Args:
        teacher: Tensors of any shape in fp32: bf16 would lose nearly every update at decay 0.9999. A list, tuple or
            iterator such as ``module.parameters()``, or a dict such as ``module.state_dict()``. Integer and bool
            tensors (counters of batches) are copied from the student instead of averaged, unless decay is 1.
        student: Tensors of the same number, shapes and device; fp32, bf16 or fp16. Read only. A dict with the same
            names if ``teacher`` is a dict: dicts are matched by name, lists by position.
        decay: In [0, 1]; 1 changes nothing, 0 copies. A float, or a 0-d fp64 or fp32 tensor on the same device, which
            a CUDA graph can capture; the value of a tensor on a GPU is not checked. Under `torch.compile` a float may
            change without recompilation.
        working: Optional tensors of the same shapes, fp32, bf16 or fp16, that receive the updated teacher in the same
            pass (the copy that runs the teacher's forward pass). A dict if ``teacher`` is a dict.

    Raises:
        ValueError: Lists differ in length, dicts in names, or tensors in shape or device; a dtype is not listed above;
            the decay is outside [0, 1]; a tensor is sparse, distributed or a batch of ``torch.vmap``; the teacher
            shares memory with the student or the working copy; or several elements of the teacher or working copy
            share memory (an expanded tensor). Entries of a dict that share all of their memory on every side (tied
            weights) are allowed and updated once.
        TypeError: An argument is a module or a single tensor, or a list contains an element that is not a tensor.

    Examples:
        >>> teacher, student = [torch.zeros(3)], [torch.ones(3)]
        >>> ema_update_(teacher, student, 0.75)
        >>> teacher[0]
        tensor([0.2500, 0.2500, 0.2500])
    """
    lists = _paired(teacher, student, working)
    value, decay_tensor = _read_decay(decay, lists)
    if torch.compiler.is_compiling():
        _update_in_graph(*_sorted_out(lists), decay)
        return
    try:
        _update(lists, value, decay_tensor)
        return
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        refused = error
    # check every element only in this rare case: wrong lists, or lists with integers
    floats, integers = _sorted_out(lists)
    if not integers.teacher:
        raise refused
    _update(floats, value, decay_tensor)
    _copy_integers(integers, value, decay_tensor)


class EmaUpdate:
    """Run `ema_update_` on a fixed set of tensors, which are checked and tabulated once.

    A call costs a fraction of the host time of `ema_update_`. The object keeps the tensors alive. If the memory, shape
    or dtype of one has changed (``.data = ``, ``set_``, ``resize_``, ``module.to``), a call first checks and tabulates
    them again.

    Args:
        teacher: See `ema_update_`. An iterator or dict is read once, here.
        student: See `ema_update_`, read like ``teacher``.
        working: See `ema_update_`, read like ``teacher``.

    Raises:
        ValueError, TypeError: See `ema_update_`. A call raises them if the tensors have become invalid.

    Examples:
        >>> teacher, student = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        >>> update = EmaUpdate(teacher.parameters(), student.parameters())
        >>> update(0.0)
        >>> torch.equal(teacher.weight, student.weight)
        True
    """

    def __init__(self, teacher: Tensors, student: Tensors, *, working: Tensors | None = None) -> None:
        self._lists, self._integers = _sorted_out(_paired(teacher, student, working))
        self._prepared: _Prepared | None = None
        self._is_direct = True
        self._prepare()

    def __call__(self, decay: float | Tensor) -> None:
        """Update once.

        Args:
            decay: See `ema_update_`.
        """
        value, decay_tensor = _read_decay(decay, self._lists)
        if torch.compiler.is_compiling():
            _update_in_graph(self._lists, self._integers, decay)
            return
        if value == 1.0 and decay_tensor is None:
            return
        if is_observed() or not self._run_prepared(value, decay_tensor):
            _update(self._lists, value, decay_tensor)
        _copy_integers(self._integers, value, decay_tensor)

    def __getstate__(self) -> dict[str, Any]:
        # a copy has its own tensors and prepares them at its first call
        return {"_lists": self._lists, "_integers": self._integers, "_prepared": None, "_is_direct": True}

    def _prepare(self) -> None:
        self._prepared = None
        _check(self._lists)
        self._is_direct = in_cpp("ema_prepare") and _is_direct(self._lists)
        if self._is_direct and not is_observed():
            self._prepared = _Prepared(self._lists)

    def _run_prepared(self, value: float, decay_tensor: Tensor | None) -> bool:
        """Update; return False without an update if the tensors need the general operation."""
        while self._is_direct:
            if self._prepared is not None and self._prepared.run(value, decay_tensor):
                _raise_versions(self._lists)
                return True
            self._prepare()
        return False


class _Prepared:
    """A prepared update in C++ (and Triton) of tensors that are contiguous, on one device, and of no subclass."""

    def __init__(self, lists: _Lists) -> None:
        self._handle = torch.ops.d2v.ema_prepare.default(*lists)
        weakref.finalize(self, torch.ops.d2v.ema_release.default, self._handle).atexit = False
        self._device = lists.teacher[0].device
        self._launches: Any = None
        if self._device.type == "cuda":
            self._triton = importlib.import_module("d2v_fast.kernels.ema")
            with torch.cuda.device(self._device):
                self._launches = self._triton.prepare(*lists)

    def run(self, value: float, decay_tensor: Tensor | None) -> bool:
        """Update; return False without an update if a tensor has moved."""
        if self._launches is None:
            done: bool = torch.ops.d2v.ema_run.default(self._handle, value, decay_tensor)
            return done
        if not torch.ops.d2v.ema_is_current.default(self._handle):
            return False
        with torch.cuda.device(self._device):
            self._triton.launch(self._launches, value, decay_tensor)
        return True


def _is_direct(lists: _Lists) -> bool:
    """Return whether `_Prepared` supports these tensors."""
    if not lists.teacher:
        return False
    device = lists.teacher[0].device
    if device.type != "cpu" and not (device.type == "cuda" and has_triton()):
        return False
    every = [x for group in lists for x in group]
    plain = (Tensor, torch.nn.Parameter)
    # C++ would copy a negative view and miss later changes
    return all(type(x) in plain and x.device == device and x.is_contiguous() and not x.is_neg() for x in every)


def _update(lists: _Lists, value: float, decay_tensor: Tensor | None) -> None:
    """Run the operation, which checks its arguments."""
    arguments = lists.teacher, lists.student, value, decay_tensor, lists.working
    if _library.HAS_CPP and not in_cpp("ema_check"):
        # kernels built from older sources check less
        _check_call(*arguments)
    if not lists.teacher or (value == 1.0 and decay_tensor is None):
        _check_call(*arguments)
        return
    # the guard replaces the operation's own kernel below autograd, which would convert the lists once more
    with torch._C._AutoDispatchBelowADInplaceOrView():
        torch.ops.d2v.ema_update_.default(*arguments)
    _raise_versions(lists)


def _raise_versions(lists: _Lists) -> None:
    torch.autograd.graph.increment_version(lists.teacher)
    if lists.working:
        torch.autograd.graph.increment_version(lists.working)


def _update_in_graph(floats: _Lists, integers: _Lists, decay: float | Tensor) -> None:
    """Update under `torch.compile`."""
    written = [*floats.teacher, *integers.teacher]
    if not written:
        return
    if not isinstance(decay, Tensor):
        # a float argument is a constant of the graph, and a new value would recompile; a product is not constant
        decay = torch.ones((), dtype=torch.float64, device=written[0].device) * decay
    with torch.no_grad():
        if floats.teacher:
            torch.ops.d2v.ema_update_(floats.teacher, floats.student, 1.0, decay, floats.working)
        _copy_integers(integers, 1.0, decay)


@torch.no_grad()
def _copy_integers(lists: _Lists, value: float, decay_tensor: Tensor | None) -> None:
    if decay_tensor is None and value == 1.0:
        return
    for i, (mine, other) in enumerate(zip(lists.teacher, lists.student, strict=True)):
        new = other if decay_tensor is None else torch.where(decay_tensor == 1.0, mine, other)
        mine.copy_(new)
        if lists.working:
            working = lists.working[i]
            working.copy_(new if decay_tensor is None else torch.where(decay_tensor == 1.0, working, new))


def _read_decay(decay: float | Tensor, lists: _Lists) -> tuple[float, Tensor | None]:
    """Return the decay as a float, or 1 and a tensor."""
    if isinstance(decay, Tensor):
        if decay.ndim != 0 or decay.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                "`decay` must be a float or a 0-d fp32 or fp64 tensor, "
                f"but is a {decay.dtype} tensor of shape {tuple(decay.shape)} instead."
            )
        first = lists.teacher[0] if lists.teacher else None
        if isinstance(first, Tensor) and decay.device != first.device:
            raise ValueError(f"`decay` must be on {first.device}, but is on {decay.device} instead.")
        if decay.device.type != "cpu" or type(decay) is not Tensor or is_observed() or torch.compiler.is_compiling():
            return 1.0, decay
        # no device to wait for: check it like a float
        decay = decay.item()
    if not torch.compiler.is_compiling():
        try:
            decay = float(decay)
        except (TypeError, ValueError):
            raise TypeError(f"`decay` must be a float or a 0-d tensor, but is {decay!r} instead.") from None
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"`decay` must be in [0, 1], but is {decay} instead.")
    return decay, None


def _paired(teacher: Tensors, student: Tensors, working: Tensors | None) -> _Lists:
    """Match the tensors of all sides, dicts by name."""
    sides = {"teacher": teacher, "student": student} | ({} if working is None else {"working": working})
    named = {name: _as_dict(side) for name, side in sides.items()}
    if not any(isinstance(side, dict) for side in named.values()):
        lists = [tensor_list(name, side) for name, side in sides.items()]
        if len(lists) > 2 and lists[0] and not lists[2]:
            # below, an empty list means no working copy
            raise ValueError(f"`working` must have as many tensors as `teacher` ({len(lists[0])}), but has 0 instead.")
        return _Lists(lists[0], lists[1], lists[2] if len(lists) > 2 else [])
    by_name: dict[str, dict[str, Tensor]] = {}
    for name, side in named.items():
        if side is None:
            others = ", ".join(f"`{other}`" for other, its in named.items() if its is not None)
            raise TypeError(
                f"`{name}` must be a dict, as {others} is, to be matched by name, but is "
                f"{type(sides[name]).__name__} instead: pass dicts for all, or lists for all."
            )
        by_name[name] = side
    mine = by_name["teacher"]
    for name, other in by_name.items():
        differing = sorted(map(str, mine.keys() ^ other.keys()))
        if differing:
            raise ValueError(
                f"`{name}` must have the names of `teacher`, but {len(differing)} are in one of the two only: "
                f"{', '.join(differing[:5])}."
            )
        check_tensors(name, other.values())
    lists = [[other[key] for key in mine] for other in by_name.values()]
    return _untied(_Lists(lists[0], lists[1], lists[2] if len(lists) > 2 else []))


def _as_dict(side: object) -> dict[str, Tensor] | None:
    return dict(side.items()) if isinstance(side, (Mapping, torch.nn.ParameterDict)) else None


def _untied(lists: _Lists) -> _Lists:
    """Keep one of each group of entries with the same memory on every side: tied weights in a state_dict."""
    if torch.compiler.is_compiling():
        return lists
    try:
        if len({x.data_ptr() for x in lists.teacher}) == len(lists.teacher):
            return lists
    except RuntimeError:
        _check_memory(lists)
        raise
    kept: dict[tuple, int] = {}
    for i, row in enumerate(zip(*(group for group in lists if group), strict=True)):
        place = tuple((x.data_ptr(), x.shape, x.stride(), x.dtype, x.device) for x in row)
        kept.setdefault(place if row[0].numel() and not row[0].is_meta else (i,), i)
    return lists.only(kept.values())


def _sorted_out(lists: _Lists) -> tuple[_Lists, _Lists]:
    """Split into tensors to average and tensors to copy, both checked."""
    for name, group in zip(_Lists._fields, lists, strict=True):
        check_tensors(name, group)
    _check_lengths(lists)
    integers = [i for i, x in enumerate(lists.teacher) if not x.is_floating_point() and not x.is_complex()]
    if not integers:
        _check(lists)
        return lists, _Lists([], [], [])
    for i in integers:
        for name, group in zip(_Lists._fields, lists, strict=True):
            if group and (group[i].dtype, group[i].shape) != (lists.teacher[i].dtype, lists.teacher[i].shape):
                raise ValueError(
                    f"`{name}[{i}]` must be {lists.teacher[i].dtype} of shape {tuple(lists.teacher[i].shape)} as "
                    f"`teacher[{i}]` is, since integers are copied, but is {group[i].dtype} of shape "
                    f"{tuple(group[i].shape)} instead."
                )
    floats = lists.only(set(range(len(lists.teacher))) - set(integers))
    _check(floats)
    return floats, lists.only(integers)


def _check(lists: _Lists) -> None:
    _check_memory(lists)
    _check_alike(lists)
    # under torch.compile and with fake tensors there are no addresses to compare
    if not torch.compiler.is_compiling() and not is_observed():
        check_overlap(*lists)


def _check_memory(lists: _Lists) -> None:
    for name, group in zip(_Lists._fields, lists, strict=True):
        check_memory(name, group)


def _check_lengths(lists: _Lists) -> None:
    num = len(lists.teacher)
    for name, others in (("student", lists.student), ("working", lists.working or lists.teacher)):
        if len(others) != num:
            raise ValueError(f"`{name}` must have as many tensors as `teacher` ({num}), but has {len(others)} instead.")


def _check_alike(lists: _Lists) -> None:
    _check_lengths(lists)
    teacher = lists.teacher
    for name, others in (("student", lists.student), ("working", lists.working)):
        # the compiler of torch 2.11 knows no `bool` of a list
        for i, (t, other) in enumerate(zip(teacher, others, strict=len(others) > 0)):
            if other.shape != t.shape:
                raise ValueError(
                    f"`{name}[{i}]` must have the shape of `teacher[{i}]`, {tuple(t.shape)}, "
                    f"but has {tuple(other.shape)} instead."
                )
            if other.dtype not in FLOAT_DTYPES:
                raise ValueError(f"`{name}[{i}]` must be fp32, bf16 or fp16, but is {other.dtype} instead.")
            if other.device != t.device:
                raise ValueError(
                    f"`{name}[{i}]` must be on {t.device} as `teacher[{i}]` is, but is on {other.device} instead."
                )
    for i, t in enumerate(teacher):
        if t.dtype != torch.float32:
            raise ValueError(
                f"`teacher[{i}]` must be fp32 (lower precision loses most updates), but is {t.dtype} instead."
            )
