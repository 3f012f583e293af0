"""What a frozen encoder makes of inputs: the outputs at patches, frames or tokens."""

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
    """Put every module into eval mode, and afterwards each back into the mode that it had.

    A teacher shares modules with the student that trains: their modes differ.
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
    """`[B, P, D]`, fp32: the mean of the last K blocks' outputs, each layer-normalized, as in the target of training.

    The model may be training elsewhere: its mode is restored, and it is run where its parameters are.
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
    """The encoder's output at the places of each sequence, in their order.

    The model may be training elsewhere: its mode is restored, and it is run where its parameters are.

    Args:
        model: An encoder of waveforms or tokens.
        sequences: Waveforms fp32 `[N]`, or tokens int64 `[T]`.
        num_places: From the length of a sequence to the number of its frames or tokens.
        padding: What stands behind the end of a shorter sequence.
        batch_size: Sequences that are encoded together.
    Returns:
        fp32 `[P, D]` each, on the CPU.
    """
    parameter = next(model.parameters())
    # those of like length together, so that little is padded
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
