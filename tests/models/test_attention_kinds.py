"""Encoders with each `attention`: fused kernels and xformers give what PyTorch's attention gives.

Without a GPU, the fused operation runs its reference, and xformers is replaced by a module that checks the calls as the
package does (0.0.35) and computes plain products.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from d2v_fast.config import VisionConfig, load_config
from d2v_fast.distributed.world import World
from d2v_fast.errors import RunError
from d2v_fast.models import pre_norm, xformers_attention
from d2v_fast.models.post_norm import AlibiPlaces
from d2v_fast.models.visible import Alibi
from d2v_fast.ops import attention as operation
from d2v_fast.training import preflight
from tests.helpers import speech_models, text_models, vision_models
from tests.helpers.masked_models import masked_config, random_masked_batch, random_masked_pair
from tests.helpers.runs import TINY_SPEECH, tiny_file


class FakeXformers:
    """`xformers.ops` as the encoders use it.

    Attributes:
        calls: lengths of the segments, or "bias", and the dropout of every call.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[Any, float]] = []
        masks = SimpleNamespace(BlockDiagonalMask=SimpleNamespace(from_seqlens=self.from_seqlens))
        self.fmha = SimpleNamespace(attn_bias=masks)
        self.made = 0

    def from_seqlens(self, sizes: list[int], *, device: torch.device) -> list[int]:
        assert all(type(size) is int for size in sizes)
        assert device == torch.device("cpu")
        self.made += 1
        return sizes

    def memory_efficient_attention(self, q: Tensor, k: Tensor, v: Tensor, *, attn_bias: Any, p: float) -> Tensor:
        B, T, H, D = q.shape
        assert k.shape == v.shape == q.shape
        assert q.dtype == k.dtype == v.dtype
        if isinstance(attn_bias, list):
            assert B == 1
            assert sum(attn_bias) == T
            blocks = torch.block_diag(*(torch.ones(size, size) for size in attn_bias)).bool()
            bias = torch.zeros(T, T).masked_fill(~blocks, -torch.inf)
        else:
            # it accepts no broadcast shape, and rows that are aligned to 16 bytes only
            assert attn_bias.shape == (B, H, T, T)
            assert attn_bias.dtype == q.dtype
            assert attn_bias.stride(-1) == 1
            assert all(stride % (16 // q.itemsize) == 0 for stride in attn_bias.stride()[:-1])
            bias = attn_bias
        self.calls.append((attn_bias if isinstance(attn_bias, list) else "bias", p))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return ((q @ k.mT * D**-0.5 + bias).softmax(-1) @ v).transpose(1, 2)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeXformers:
    module = FakeXformers()
    monkeypatch.setattr(xformers_attention, "load", lambda: module)
    monkeypatch.setattr(xformers_attention, "is_usable", lambda x: True)
    return module


@pytest.fixture
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let encoders and the operation take the way of a GPU, with the reference in place of Triton."""
    for module in (operation, pre_norm):
        monkeypatch.setattr(module, "has_kernels", lambda x: True)
    # "stock" makes the bias, as on a GPU
    monkeypatch.setattr(Alibi, "needs_no_bias", lambda self, x, by_kernels: by_kernels)


def step_of(model: nn.Module, teacher: nn.Module, batch: Any) -> dict[str, Tensor]:
    """Return loss and gradients of a step that draws as every other one does."""
    torch.manual_seed(5)
    model.zero_grad()
    loss = model(batch, teacher).loss_sum
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


def assert_same_step(
    model: nn.Module, other: nn.Module, teacher: nn.Module, other_teacher: nn.Module, batch: Any
) -> None:
    other.load_state_dict(model.state_dict())
    other_teacher.load_state_dict(teacher.state_dict())
    want, got = step_of(model, teacher, batch), step_of(other, other_teacher, batch)
    assert want.keys() == got.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5 * value.abs().max().item(), msg=name)


def vision_pairs(attention: str, **changes: Any) -> tuple[Any, ...]:
    base = vision_models.CONFIG
    configs = [
        VisionConfig(**{**base.model_dump(), "model": {**base.model.model_dump(), **changes, "attention": kind}})
        for kind in ("stock", attention)
    ]
    (model, teacher), (other, other_teacher) = (vision_models.random_pair(config) for config in configs)
    return model, other, teacher, other_teacher


@pytest.mark.parametrize("bias", ["shared", "per_block"])
@pytest.mark.usefixtures("_kernels")
def test_fused_attention_of_images(bias: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []
    fused = pre_norm.attention_with_bias

    def counted(*arguments: Tensor, dropout: float) -> Tensor:
        calls.append(dropout)
        return fused(*arguments, dropout=dropout)

    monkeypatch.setattr(pre_norm, "attention_with_bias", counted)
    assert_same_step(*vision_pairs("fused", position_bias=bias, drop_path=0.3), vision_models.random_images())
    # of student and teacher
    assert calls == [0.0] * 8
    model, other, teacher, _ = vision_pairs("fused", attention_dropout=0.5)
    calls.clear()
    step_of(other, teacher, vision_models.random_images())
    assert calls[-4:] == [0.5] * 4
    assert len(model.student.encoder.blocks) == 4


def test_xformers_of_images(fake: FakeXformers) -> None:
    assert_same_step(*vision_pairs("xformers"), vision_models.random_images())
    assert fake.calls == [("bias", 0.0)] * 8
    _, other, teacher, _ = vision_pairs("xformers", attention_dropout=0.5)
    step_of(other, teacher, vision_models.random_images())
    assert fake.calls[-4:] == [("bias", 0.5)] * 4


def test_xformers_of_speech(fake: FakeXformers) -> None:
    """Padded utterances are packed, with one mask for all blocks of a pass."""
    configs = [speech_models.make_config(attention=kind) for kind in ("padded", "xformers")]
    (model, teacher), (other, other_teacher) = (speech_models.make_pair(config) for config in configs)
    sizes = [431, 278]
    frames = [configs[0].model.num_frames(size) for size in sizes]
    assert_same_step(model, other, teacher, other_teacher, speech_models.make_batch(configs[0], sizes))
    assert fake.calls == [(frames, 0.0)] * 6
    assert fake.made == 2
    config = speech_models.make_config(attention="xformers", attention_dropout=0.5, layer_drop=0.5)
    dropping, teacher = speech_models.make_pair(config)
    step_of(dropping, teacher, speech_models.make_batch(config, sizes))
    assert fake.calls[-1] == (frames, 0.5)


def test_xformers_of_text(fake: FakeXformers) -> None:
    """Documents attend within themselves."""
    configs = [text_models.make_config(attention=kind) for kind in ("padded", "xformers")]
    (model, teacher), (other, other_teacher) = (text_models.make_pair(config) for config in configs)
    documents = [[4, 7], [2, 5]]
    assert_same_step(model, other, teacher, other_teacher, text_models.make_batch([11, 7], documents))
    assert fake.calls == [([4, 7, 2, 5], 0.0)] * 6


@pytest.mark.parametrize("changes", [{}, {"layer_drop": 0.5}], ids=["all blocks", "layer drop"])
@pytest.mark.usefixtures("_kernels")
def test_fused_attention_of_speech_2(changes: dict[str, Any]) -> None:
    """ALiBi from the places of visible frames, padded or not, with the gradient of its scale."""
    configs = [masked_config("speech", model={**changes, "attention": kind}) for kind in ("stock", "fused")]
    (model, teacher), (other, other_teacher) = (random_masked_pair(config) for config in configs)
    for sizes in ([12, 7, 12, 7], [9, 9]):
        batch = random_masked_batch(configs[0], sizes)
        assert_same_step(model, other, teacher, other_teacher, batch)
        scale = other.student.context.alibi.scale
        assert scale.grad is not None
        assert scale.grad.abs().max() > 0


def test_places_of_some_samples() -> None:
    places = AlibiPlaces(torch.ones(2), torch.arange(6).view(3, 2), None)
    some = places.index_select(0, torch.tensor([2, 0]))
    assert some.places is not None
    assert some.places.tolist() == [[4, 5], [0, 1]]
    assert some.lengths is None


def test_an_encoder_without_xformers_attends_as_pytorch() -> None:
    """A checkpoint of a run with xformers is read on any machine."""
    config = speech_models.make_config(attention="xformers")
    packed = speech_models.make_config(attention="packed")
    (model, teacher), (other, other_teacher) = (speech_models.make_pair(each) for each in (packed, config))
    assert_same_step(model, other, teacher, other_teacher, speech_models.make_batch(config, [431, 278]))


def test_what_cannot_run_is_refused(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def check(file: Any, device: str = "cpu", **changes: Any) -> None:
        world = World("cpu")
        monkeypatch.setattr(world, "device", torch.device(device))
        preflight.check_attention(load_config(file), world, torch.bfloat16, said.append)

    check(tiny_file(tmp_path))
    assert said == []
    check(tiny_file(tmp_path, d2v__model__attention="fused"))
    assert said == ['no effect of `d2v.model.attention`: "fused" is for GPUs, and a CPU uses the attention of PyTorch']
    vision = tiny_file(tmp_path, d2v__model__attention="xformers")
    with pytest.raises(
        RunError, match=r'must be "stock" or "fused" here, but is "xformers": xformers has attention for'
    ):
        check(vision)
    speech = tiny_file(tmp_path, TINY_SPEECH, d2v__model__attention="xformers")
    with pytest.raises(RunError, match=r'`d2v.model.attention` must be "padded" or "packed" here, .* is on a cpu\.'):
        check(speech)

    def broken() -> None:
        raise ImportError("undefined symbol")

    monkeypatch.setattr(xformers_attention, "load", broken)
    with pytest.raises(RunError, match=r"xformers cannot be imported \(ImportError: undefined symbol\)\."):
        check(vision, "cuda")
    monkeypatch.setattr(xformers_attention, "load", FakeXformers)

    def unsupported(*arguments: object) -> None:
        raise NotImplementedError("No operator found\n  for this")

    monkeypatch.setattr(xformers_attention, "_try", unsupported)
    with pytest.raises(RunError, match=r"its attention in torch.bfloat16 \(NotImplementedError: No operator found for"):
        check(vision, "cuda")


def test_the_trial_passes_where_the_package_works(fake: FakeXformers) -> None:
    xformers_attention._try(torch.device("cpu"), torch.float32)
    assert fake.calls == [([6, 10], 0.1), ("bias", 0.1)]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["vision", "speech", "text"])
def test_xformers_itself(device: torch.device, kind: str) -> None:
    """The package gives what PyTorch's attention gives, in bf16, on a GPU."""
    problem = xformers_attention.problem(device, torch.bfloat16)
    if problem is not None:
        pytest.skip(problem)
    q, k, v = torch.randn(3, 2, 4, 40, 32, device=device, dtype=torch.bfloat16).unbind()
    if kind == "vision":
        bias = torch.randn(1, 4, 40, 40, device=device, dtype=torch.bfloat16, requires_grad=True)
        got = xformers_attention.attend_with_bias(q, k, v, bias, 0.0)
        want = operation.attention_with_bias_reference(*(x.double() for x in (q, k, v, bias)), None, None, None, 0.0)[0]
        grads = (torch.autograd.grad(y.double().sin().sum(), bias)[0] for y in (got, want))
        torch.testing.assert_close(*(x.double() for x in grads), rtol=5e-2, atol=5e-2)
    else:
        sizes = [13, 27] if kind == "speech" else [1, 39]
        offsets = torch.tensor([0, sizes[0], 40], dtype=torch.int32, device=device)
        got = xformers_attention.attend_packed(q[:1], k[:1], v[:1], xformers_attention.block_diagonal(offsets), 0.0)
        blocks = torch.block_diag(*(torch.ones(size, size) for size in sizes)).bool().to(device)
        bias = torch.zeros(1, 4, 40, 40, device=device).masked_fill(~blocks, -torch.inf)
        wide = (x[:1].double() for x in (q, k, v))
        want = operation.attention_with_bias_reference(*wide, bias, None, None, None, 0.0)[0]
    torch.testing.assert_close(got.double(), want.double(), rtol=2e-2, atol=2e-2)
