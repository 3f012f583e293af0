"""The text encoder and one step of data2vec: values, gradients, padding and separate documents."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from d2v_fast.config import SpeechModelConfig, TextConfig, TextModelConfig
from d2v_fast.data import Batch
from d2v_fast.objectives.build import build_model
from tests.helpers.masked_models import masked_config
from tests.helpers.speech_reference import blocks, gelu, sub
from tests.helpers.text_models import MASK, make_batch, make_config, make_pair
from tests.helpers.vision_reference import layer_norm


@pytest.mark.parametrize("pad", [0, 1, 7])
def test_padding_alone_stays_zero(pad: int) -> None:
    """For any padding id: the rows of all other tokens are initialized and trained."""
    model = build_model(make_config(padding_id=pad))
    rows = model.student.embedding.token.weight
    assert (rows.detach() == 0).all(1).nonzero().flatten().tolist() == [pad]
    tokens = torch.arange(16)[None]
    hidden = model.student(tokens).last_hidden
    hidden.square().sum().backward()
    assert rows.grad is not None
    assert (rows.grad[:16] == 0).all(1).nonzero().flatten().tolist() == [pad]


@pytest.mark.parametrize("objective", ["data2vec", "data2vec2"])
def test_token_std_sets_the_deviation_of_tokens_alone(objective: str) -> None:
    """The positions keep theirs, which is also the default of the tokens."""
    torch.manual_seed(0)
    for change, std in ({}, 0.02), ({"token_std": 0.5}, 0.5):
        sizes = {"vocab_size": 2000, "max_positions": 500, **change}
        is_second = objective == "data2vec2"
        config = masked_config("text", model=sizes) if is_second else make_config(**sizes)
        embedding = build_model(config).student.embedding
        assert embedding.token.weight.std().item() == pytest.approx(std, rel=0.05)
        assert embedding.position.std().item() == pytest.approx(0.02, rel=0.05)
        assert not embedding.token.weight[embedding.token.padding_idx].any()


def reference_step(
    weights: dict[str, Tensor], teacher: dict[str, Tensor], config: TextConfig, batch: Batch, pieces: list[range]
) -> Tensor:
    """Return the summed loss; `pieces` are ranges of flat positions that attend to each other."""
    T = batch.inputs.shape[1]
    student = sub(weights, "student")
    masked_rows = set(batch.rows.tolist())
    sizes = {name: getattr(config.model, name) for name in ("width", "heads", "depth", "norm_eps")}
    shape = SpeechModelConfig(**sizes, position_groups=1)

    def embed(tokens: Tensor, piece: range) -> Tensor:
        flat = tokens.flatten()[piece.start : piece.stop]
        places = torch.arange(piece.start, piece.stop) % T + 2
        x = student["embedding.token.weight"][flat] + student["embedding.position"][places]
        return layer_norm(x, 1e-5, student["embedding.norm.weight"], student["embedding.norm.bias"])

    def run(w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, list[Tensor]]:
        # the blocks of speech, without the norm in front of them
        return blocks(w, shape, x, normed=True)

    total = torch.zeros((), dtype=torch.float64)
    for piece in pieces:
        chosen = torch.tensor([i for i, position in enumerate(piece) if position in masked_rows], dtype=torch.int64)
        output, _ = run(sub(student, "context"), embed(batch.masked_inputs, piece))
        hidden = gelu(output[chosen] @ weights["head.0.weight"].T + weights["head.0.bias"])
        prediction = hidden @ weights["head.2.weight"].T + weights["head.2.bias"]
        with torch.no_grad():
            _, features = run(teacher, embed(batch.inputs, piece))
            target = sum(layer_norm(f, 1e-5) for f in features[-config.target.top_k :]) / config.target.top_k
        distance = (prediction - target[chosen]).abs()
        beta = config.loss.beta
        total = total + torch.where(distance < beta, distance.square() / (2 * beta), distance - beta / 2).sum()
    return total


CASES = {
    "equal": ([11, 11], None, [range(11), range(11, 22)]),
    "padded": ([11, 7], None, [range(11), range(11, 18)]),
    "documents": ([11, 11], [[4, 7], [11]], [range(4), range(4, 11), range(11, 22)]),
    "padded documents": ([11, 7], [[4, 7], [2, 5]], [range(4), range(4, 11), range(11, 13), range(13, 18)]),
}


@pytest.mark.parametrize("attention", ["padded", "packed"])
@pytest.mark.parametrize("case", CASES)
def test_step_matches_fp64_formulas(case: str, attention: str) -> None:
    lengths, documents, pieces = CASES[case]
    config = make_config(attention=attention)
    model, teacher = make_pair(config)
    batch = make_batch(lengths, documents)
    weights = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    of_teacher = {name: p.detach().double() for name, p in teacher.named_parameters()}
    expected_loss = reference_step(weights, of_teacher, config, batch, pieces)
    expected = torch.autograd.grad(expected_loss, list(weights.values()))
    output = model(batch, teacher)
    output.loss_sum.backward()
    torch.testing.assert_close(output.loss_sum.double(), expected_loss, rtol=2e-5, atol=0)
    for (name, parameter), grad in zip(model.named_parameters(), expected, strict=True):
        assert parameter.grad is not None, name
        error = (parameter.grad.double() - grad).abs().max() / grad.abs().max()
        assert error < 1e-4, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize(
    ("sizes", "count"),
    [({}, 126_415_872), ({"width": 1024, "depth": 24, "heads": 16}, 358_506_496)],
    ids=["base", "large"],
)
def test_parameter_counts(sizes: dict[str, int], count: int) -> None:
    """The count of Base is published; that of Large follows from the same recipe by hand."""
    with torch.device("meta"):
        model = build_model(TextConfig(model=TextModelConfig(**sizes)))
    D = sizes.get("width", 768)
    by_hand = (50_265 + 514 + 2) * D + sizes.get("depth", 12) * (12 * D * D + 13 * D) + 4 * D * D + 3 * D
    assert sum(parameter.numel() for parameter in model.parameters()) == by_hand == count


def test_teacher_reads_the_whole_text() -> None:
    """Masking other tokens changes the student's input only, and the teacher's input has no dropout."""
    config = make_config()
    model, _ = make_pair(config)
    batch = make_batch([11, 11])
    other = Batch(batch.inputs, batch.rows, batch.sample_ids, masked_inputs=torch.full_like(batch.inputs, MASK))
    one, two = (model.embed(each) for each in (batch, other))
    assert torch.equal(one[1].tokens, two[1].tokens)
    assert not torch.equal(one[0].tokens, two[0].tokens)
    model.student.embedding.dropout = 0.5
    again = model.embed(batch)
    assert torch.equal(again[1].tokens, one[1].tokens)
    assert not torch.equal(again[0].tokens, one[0].tokens)


def test_padding_token_is_not_trained() -> None:
    config = make_config()
    model, teacher = make_pair(config)
    model(make_batch([11, 7]), teacher).loss_sum.backward()
    gradient = model.student.embedding.token.weight.grad
    assert not gradient[1].any()
    assert gradient[MASK].any()


def test_too_many_tokens() -> None:
    model, _ = make_pair(make_config())
    with pytest.raises(ValueError, match=r"`tokens` must be \[B, T\] with T <= 16, but T is 17 instead"):
        model.student(torch.zeros(1, 17, dtype=torch.int64))
