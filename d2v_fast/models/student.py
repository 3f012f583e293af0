"""What the objective asks of the encoder of a modality."""

from __future__ import annotations

import copy
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from d2v_fast.models.encoder import EncoderOutput


class MaskedBatch(Protocol):
    """What a step needs of a batch.

    Attributes:
        inputs, lengths, kept, masked_inputs, offsets, drop_keys: as of `data.Batch`.
        rows: int64 `[N]`, flat indices `b * P + p` of the masked places, without repeats, ascending.
    """

    @property
    def inputs(self) -> Tensor: ...
    @property
    def rows(self) -> Tensor: ...
    @property
    def lengths(self) -> Tensor | None: ...
    @property
    def kept(self) -> Tensor | None: ...
    @property
    def masked_inputs(self) -> Tensor | None: ...
    @property
    def offsets(self) -> Tensor | None: ...
    @property
    def drop_keys(self) -> npt.NDArray[np.uint64] | None: ...


class Student(nn.Module):
    """An encoder, divided into what is averaged into the teacher and what both share.

    Attributes:
        num_prefix_tokens: tokens in front of the places of a sample, such as a class token.
        averaged_name: the submodule of which the teacher is an average; empty: all of it. Called with what `embed`
            returns, and `top_k` and `output_rows` as keywords, it returns an `EncoderOutput`.
        entrance_name: the submodule that the gradient reaches last.
    """

    num_prefix_tokens = 0
    averaged_name = ""
    entrance_name = ""

    @property
    def averaged(self) -> nn.Module:
        """The module that `averaged_name` names."""
        return self.get_submodule(self.averaged_name)

    @classmethod
    def averaged_prefix(cls) -> str:
        """What the names of averaged parameters begin with."""
        return f"{cls.averaged_name}." if cls.averaged_name else ""

    def with_averaged(self, module: nn.Module) -> Student:
        """A view of this encoder with a teacher's module in the place of the averaged one: the teacher as a whole."""
        if isinstance(module, type(self)):
            return module
        whole = copy.copy(self)
        whole._modules = {**self._modules, self.averaged_name: module}
        return whole

    def embed(self, batch: MaskedBatch) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """What the averaged part takes: for the student, masked; and for the teacher, unmasked and without gradient."""
        raise NotImplementedError

    def num_places(self, embedded: tuple[Any, ...]) -> tuple[int, int]:
        """B and P of what `embed` returns."""
        raise NotImplementedError

    def token_rows(self, rows: Tensor, num_places: int) -> Tensor:
        """From rows of places `b * P + p` to rows of tokens: the prefix precedes the places of every sample."""
        return rows if self.num_prefix_tokens == 0 else rows + (rows // num_places + 1) * self.num_prefix_tokens

    def encode(self, embedded: tuple[Any, ...], output_rows: Tensor | None = None) -> Tensor:
        """The student's output, `[B, T, D]`, or `[M, D]` at `output_rows`, flat indices `b * P + p` of places."""
        output: EncoderOutput = self.averaged(*embedded, output_rows=output_rows)
        return output.last_hidden

    def finish(self, hidden: Tensor) -> Tensor:
        """What stands between the encoder's output, at whatever rows, and the head."""
        return hidden

    def features(self, inputs: Tensor, lengths: Tensor | None = None, top_k: int = 1) -> list[Tensor]:
        """What the last K blocks make of unmasked inputs, `[B, P, D]` each, first to last: what targets are made of."""
        raise NotImplementedError

    def make_head(self) -> nn.Module:
        """A new regression head."""
        raise NotImplementedError
