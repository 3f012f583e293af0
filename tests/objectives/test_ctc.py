"""The loss of CTC against the sum over all alignments."""

from __future__ import annotations

import itertools

import pytest
import torch

from d2v_fast.objectives.ctc import ctc_loss


def brute_force(logits: torch.Tensor, target: list[int], blank: int) -> torch.Tensor:
    """Minus the logarithm of the summed probability of every path of classes that collapses to `target`."""
    probs = logits.softmax(-1)
    total = torch.zeros((), dtype=torch.float64)
    for path in itertools.product(range(logits.shape[1]), repeat=len(logits)):
        merged = [label for label, _ in itertools.groupby(path) if label != blank]
        if merged == target:
            total = total + probs[range(len(path)), path].prod()
    return -total.log()


@pytest.mark.parametrize("blank", [0, 2])
def test_equals_sum_over_alignments(blank: int) -> None:
    one, other = [label for label in range(4) if label != blank][:2]
    # the second needs a blank between its two equal labels, the third is empty
    wanted = [[one, other], [one, one], [], [other]]
    lengths = torch.tensor([4, 3, 4, 1])
    logits = torch.randn(4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(blank))
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    targets = torch.tensor([label for target in wanted for label in target])
    sizes = torch.tensor([len(target) for target in wanted])
    loss = ctc_loss(ours, targets, sizes, lengths, blank=blank).sum()
    expected = sum(brute_force(theirs[i, : lengths[i]], wanted[i], blank) for i in range(4))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)
    single = ctc_loss(logits.to(torch.bfloat16), targets, sizes, lengths, blank=blank)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.sum().double(), expected.detach(), rtol=0.02, atol=0.0)


def test_meta_tensors_have_its_shapes() -> None:
    """Predicting memory runs the loss without values."""
    logits = torch.empty(2, 9, 4, device="meta", requires_grad=True)
    targets = torch.empty(6, dtype=torch.int64, device="meta")
    loss = ctc_loss(logits, targets, targets[:2])
    loss.sum().backward()
    assert loss.shape == (2,)
    assert logits.grad.shape == logits.shape


def test_too_long_a_transcript_adds_nothing() -> None:
    logits = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    # two equal labels and one more need four frames
    loss = ctc_loss(logits, torch.tensor([1, 1, 2, 3]), torch.tensor([3, 1]))
    loss.sum().backward()
    alone = ctc_loss(logits[1:], torch.tensor([3]), torch.tensor([1]))
    assert loss.tolist() == [0.0, alone.item()]
    assert not logits.grad[0].any()
    assert logits.grad[1].any()
