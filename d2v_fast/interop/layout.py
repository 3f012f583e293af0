"""Names and shapes of an encoder's tensors in another library; one error lists everything that does not fit."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from d2v_fast.files.reading import printable
from d2v_fast.models.weights import MAX_SHOWN, require_finite

_log = logging.getLogger(__name__)


class Misfit(ValueError):
    """Tensors are missing, unknown or misshapen.

    Attributes:
        problems: One phrase for each.
    """

    def __init__(self, what: str, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        shown = list(self.problems[:MAX_SHOWN])
        if len(self.problems) > MAX_SHOWN:
            shown.append(f"and {len(self.problems) - MAX_SHOWN} more")
        super().__init__(f"{what}:\n  " + "\n  ".join(shown))


def log_unused(names: Iterable[str], source: str) -> None:
    """Log the parts of a file without which an encoder is read, such as the head of a classifier.

    Fine-tuning reads a head by itself.

    Args:
        names: Of the unused tensors. If there are none, nothing is logged.
        source: Where they come from, such as "`x.pt`".
    """
    parts = Counter(name.partition(".")[0] for name in names)
    if parts:
        shown = ", ".join(f"{name} ({count} tensors)" if count > 1 else name for name, count in sorted(parts.items()))
        _log.warning("%s: the encoder is read without the parts beside it: %s", printable(source), printable(shown))


def within(tensors: Mapping[str, Tensor], prefix: str, source: str) -> dict[str, Tensor]:
    """Return the tensors of the encoder inside a larger model, by their names in the encoder; log the others.

    Args:
        tensors: Of a model. If no name begins with `prefix`, the model is the encoder itself.
        prefix: In front of the encoder's names.
        source: Where they come from, such as "`x.pt`".
    """
    if not any(name.startswith(prefix) for name in tensors):
        return dict(tensors)
    log_unused([name for name in tensors if not name.startswith(prefix)], source)
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


@dataclass(frozen=True)
class Layout:
    """Names and shapes of another library's tensors ("theirs").

    Attributes:
        names: Our name to theirs. Our tensor is the concatenation of theirs along the first dimension.
        shapes: Their shape by their name, if only the shape differs: same numbers, same order.
        swapped: Their names of tensors `[a, b, c]` that are `[a, c, b]` here.
    """

    names: Mapping[str, tuple[str, ...]]
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    swapped: frozenset[str] = frozenset()

    def theirs(self, name: str, value: Tensor) -> dict[str, Tensor]:
        """Convert one of our tensors to theirs: fp32, in host memory, without shared storage."""
        their_names = self.names[name]
        value = value.detach().to("cpu", torch.float32)
        parts = {}
        for their_name, part in zip(their_names, value.chunk(len(their_names)), strict=True):
            part = part.transpose(1, 2) if their_name in self.swapped else part
            part = part.reshape(self.shapes.get(their_name, part.shape))
            parts[their_name] = part.contiguous() if len(their_names) == 1 else part.clone()
        return parts

    def all_theirs(self, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield their names and tensors of a whole state; our tensors are read one at a time."""
        for name in self.names:
            yield from self.theirs(name, state[name]).items()

    def require_finite(self, theirs: Mapping[str, Tensor], source: str) -> None:
        """Refuse NaN and infinite values in those of their tensors that have a place here."""
        names = (name for names in self.names.values() for name in names if name in theirs)
        require_finite(((name, theirs[name]) for name in names), source)

    def ours(
        self,
        theirs: Mapping[str, Tensor],
        shapes: Mapping[str, Sequence[int]],
        what: str,
        ignored: Callable[[str], bool] = lambda name: False,
    ) -> dict[str, Tensor]:
        """Convert their tensors to our state, fp32.

        Args:
            theirs: By their name.
            shapes: Ours, by our name.
            what: The beginning of the error, such as "`x` does not fit".
            ignored: Return whether one of their tensors may be ignored.
        Raises:
            Misfit: Lists every missing, unknown and misshapen tensor.
        """
        state, problems = {}, []
        for name, their_names in self.names.items():
            parts = []
            for their_name in their_names:
                if their_name not in theirs:
                    problems.append(f"`{their_name}` is missing")
                    continue
                part = theirs[their_name]
                shape = self._their_shape(their_name, list(shapes[name]), len(their_names))
                if list(part.shape) != shape:
                    problems.append(f"`{their_name}` must be {shape}, but is {list(part.shape)} instead")
                    continue
                part = part.to(torch.float32)
                parts.append(part.transpose(1, 2) if their_name in self.swapped else part)
            if len(parts) == len(their_names):
                joined = parts[0] if len(parts) == 1 else torch.cat(parts)
                state[name] = joined.reshape(list(shapes[name])).contiguous()
        known = {their_name for their_names in self.names.values() for their_name in their_names}
        problems += [
            f"`{printable(name)}` has no place in this encoder"
            for name in theirs
            if name not in known and not ignored(name)
        ]
        if problems:
            raise Misfit(what, problems)
        return state

    def _their_shape(self, their_name: str, shape: list[int], num_parts: int) -> list[int]:
        shape[0] //= num_parts
        if their_name in self.swapped:
            shape[1], shape[2] = shape[2], shape[1]
        return list(self.shapes.get(their_name, shape))
