"""The interface between an objective and the encoder of a modality."""

from __future__ import annotations

import copy
from typing import Protocol

import torch
from torch import Tensor, nn

from d2v_fast.models.encoder import Drops, Encoder, EncoderOutput


class MaskedBatch(Protocol):
    """The fields of a batch that a training step reads.

    Attributes:
        inputs, lengths, unpadded, masked_inputs, offsets, drop_keys, visible, visible_lengths, noise_keys,
            channel_rows: as in `data.Batch`.
        rows: int64 `[N]`, flat indices `b * P + p` of the masked places, ascending, without repeats.
        num_rows: 0-d int64, how many of `rows` count. The others are padding: any valid places. `None` means all.
    """

    @property
    def inputs(self) -> Tensor: ...
    @property
    def rows(self) -> Tensor: ...
    @property
    def num_rows(self) -> Tensor | None: ...
    @property
    def lengths(self) -> Tensor | None: ...
    @property
    def unpadded(self) -> Tensor | None: ...
    @property
    def masked_inputs(self) -> Tensor | None: ...
    @property
    def offsets(self) -> Tensor | None: ...
    @property
    def drop_keys(self) -> Drops: ...
    @property
    def visible(self) -> Tensor | None: ...
    @property
    def visible_lengths(self) -> Tensor | None: ...
    @property
    def noise_keys(self) -> Tensor | None: ...
    @property
    def channel_rows(self) -> Tensor | None: ...


class Embedded(Protocol):
    """Input of the averaged part of an encoder: a dataclass of each modality."""

    @property
    def num_samples(self) -> int:
        """B."""
        ...

    @property
    def num_places(self) -> int:
        """P, places per sample, padding included."""
        ...

    def run(self, averaged: nn.Module, top_k: int = 0, output_rows: Tensor | None = None) -> EncoderOutput:
        """Encode with the student's averaged part or with the teacher.

        Args:
            averaged: a module of the class of `Student.averaged`.
            top_k: K, how many of the last blocks' features to return.
            output_rows: int64 `[M]`, flat indices `b * P + p` of the only places that the last block computes.
                `None` computes all.
        """
        ...


def masked_places(rows: Tensor, num_rows: Tensor, num_places: int) -> Tensor:
    """Return bool `[num_places]`, True at the first `num_rows` of `rows`, without a shape that depends on values.

    Args:
        rows: int64 `[N]`, indices of places.
        num_rows: 0-d int64.
        num_places: places of all samples.
    """
    counts = torch.arange(len(rows), device=rows.device) < num_rows
    # padding marks one more place, which is cut off
    places = torch.where(counts, rows, num_places)
    masked = torch.zeros(num_places + 1, dtype=torch.bool, device=rows.device)
    return masked.index_fill_(0, places, True)[:num_places]


class Student(nn.Module):
    """An encoder: a part that the teacher averages, and a part that student and teacher share.

    Attributes:
        num_prefix_tokens: tokens before the places of a sample, such as a class token.
        averaged_name: the submodule that the teacher averages. The empty string stands for the whole encoder.
        entrance_name: the submodule that the gradient reaches last.
        upper_names: beginnings of the names of parameters that belong above the blocks, such as those of a last norm.
    """

    num_prefix_tokens = 0
    averaged_name = ""
    entrance_name = ""
    upper_names: tuple[str, ...] = ()

    @property
    def averaged(self) -> nn.Module:
        """Return the module that `averaged_name` names."""
        return self.get_submodule(self.averaged_name)

    @classmethod
    def averaged_prefix(cls) -> str:
        """Return the prefix of the names of averaged parameters."""
        return f"{cls.averaged_name}." if cls.averaged_name else ""

    def with_averaged(self, module: nn.Module) -> Student:
        """Return the whole teacher: a view of this encoder with the teacher's module in place of the averaged one."""
        if isinstance(module, type(self)):
            return module
        whole = copy.copy(self)
        whole._modules = {**self._modules, self.averaged_name: module}
        return whole

    def embed(self, batch: MaskedBatch) -> tuple[Embedded, Embedded]:
        """Compute the shared part: the student's masked input, and the teacher's unmasked input without gradient."""
        raise NotImplementedError

    def token_rows(self, rows: Tensor, num_places: int) -> Tensor:
        """Convert flat indices of places, `b * P + p`, to flat indices of tokens, which count each sample's prefix."""
        return rows if self.num_prefix_tokens == 0 else rows + (rows // num_places + 1) * self.num_prefix_tokens

    def finish(self, hidden: Tensor) -> Tensor:
        """Apply the layers between the averaged part's output, `[..., D]`, and the head."""
        return hidden

    def encode(self, batch: MaskedBatch) -> Tensor:
        """Return the encoder's output for a head, `[B, T, D]` with the prefix, before `finish`.

        Args:
            batch: samples without masks, unless the modality masks them to fine-tune.
        """
        raise NotImplementedError

    def hold_entrance(self) -> tuple[str, ...]:
        """Stop the gradient of the parts that fine-tuning leaves as they are; return the beginnings of their names."""
        return ()

    @property
    def num_layers(self) -> int:
        """The layer of a head: the number of blocks, and one below them for what embeds the input."""
        return 1 + sum(len(part.blocks) for part in self.modules() if isinstance(part, Encoder))

    def layer_of(self, name: str) -> int:
        """Return the layer of a parameter: 0 of what embeds the input, 1 of the first block, `num_layers` above all."""
        for prefix, part in self.named_modules():
            begin = f"{prefix}.blocks." if prefix else "blocks."
            if isinstance(part, Encoder) and name.startswith(begin):
                return 1 + int(name.removeprefix(begin).partition(".")[0])
        return self.num_layers if name.startswith(self.upper_names) else 0

    def features(self, inputs: Tensor, lengths: Tensor | None = None, top_k: int = 1) -> list[Tensor]:
        """Return the features of the last K blocks on unmasked inputs, `[B, P, D]` each, first block to last."""
        raise NotImplementedError

    def imitate_autocast(self, dtype: torch.dtype) -> None:
        """Compute in `dtype` what autocast would, on a device that has no autocast, such as `meta`.

        An encoder that asks autocast for its dtype overrides it.
        """

    def make_head(self) -> nn.Module:
        """Create a new regression head."""
        raise NotImplementedError
