"""Features of a frozen encoder: its outputs at patches, frames or tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from d2v_fast.models.student import Student


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into eval mode, and restore the mode of each afterwards.

    A teacher shares modules with the student, whose modes differ.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@torch.no_grad()
def patch_features(model: Student, images: Tensor, top_k: int) -> Tensor:
    """Return the mean of the last K blocks' outputs, each layer-normalized, as in the training target.

    Args:
        model: An image encoder, in any mode, which is restored. It runs on the device of its parameters.
        images: `[B, C, H, W]`.
        top_k: Number of blocks.
    Returns:
        fp32 `[B, P, D]`.
    """
    parameter = next(model.parameters())
    with evaluating(model):
        features = model.features(images.to(parameter.device, parameter.dtype), top_k=top_k)
    patches_KBPD = torch.stack([feature.float() for feature in features])
    return F.layer_norm(patches_KBPD, patches_KBPD.shape[-1:]).mean(0)


@torch.no_grad()
def sequence_features(
    model: Student,
    sequences: Sequence[Tensor],
    *,
    num_places: Callable[[int], int],
    padding: float = 0.0,
    batch_size: int = 32,
) -> list[Tensor]:
    """Return the encoder's output at the frames or tokens of each sequence, in the order of the sequences.

    Args:
        model: An encoder of waveforms or tokens, in any mode, which is restored. It runs on the device of its
            parameters.
        sequences: Waveforms fp32 `[N]`, or tokens int64 `[T]`.
        num_places: From the length of a sequence to the number of its frames or tokens.
        padding: Value behind the end of a shorter sequence.
        batch_size: Sequences that are encoded together.
    Returns:
        fp32 `[P, D]` each, on the CPU.
    """
    parameter = next(model.parameters())
    # sequences of similar length are encoded together, so that little is padded
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    found: dict[int, Tensor] = {}
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = pad_sequence([sequences[index] for index in chosen], batch_first=True, padding_value=padding)
            batch = batch.to(parameter.device, parameter.dtype if batch.is_floating_point() else None)
            lengths = torch.tensor([num_places(len(sequences[index])) for index in chosen])
            is_padded = bool((lengths < lengths.max()).any())
            hidden = model(batch, lengths.to(parameter.device) if is_padded else None).last_hidden.float().cpu()
            found |= {index: hidden[place, : lengths[place]] for place, index in enumerate(chosen)}
    return [found[index] for index in range(len(sequences))]
