"""Operations raise the version of tensors that they overwrite, so autograd refuses graphs with old values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from d2v_fast.ops import ema_update_
from tests.helpers.common import run_python
from tests.ops.writers import WRITERS

CASES = [pytest.param(write, id=f"{op}, {what}") for op, ways in WRITERS.items() for what, write in ways.items()]


def names_of(mutable: bool) -> set[str]:
    schemas = [schema for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("d2v::")]
    return {schema.name.removeprefix("d2v::") for schema in schemas if schema.is_mutable == mutable}


def test_every_operation_that_writes_is_tried():
    assert "topk_target" in names_of(mutable=False)
    assert names_of(mutable=True) == set(WRITERS)


@pytest.mark.parametrize("write", CASES)
def test_autograd_refuses_the_old_graph(device, write):
    leaf = torch.randn(4, 3, device=device, requires_grad=True)
    saved = leaf.exp()
    version = saved._version
    write(saved.detach())
    assert saved._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()
    assert leaf.grad is None


@pytest.mark.parametrize("write", CASES)
def test_a_later_graph_is_right(device, write):
    leaf = torch.randn(4, 3, device=device, requires_grad=True)
    value = leaf.detach().clone()
    write(value)
    (value * leaf).sum().backward()
    assert torch.equal(leaf.grad, value)


@pytest.mark.parametrize("write", CASES)
def test_inference_tensors(device, write):
    """Inference tensors have no version; others keep theirs, also in inference mode."""
    with torch.inference_mode():
        x = torch.randn(4, 3, device=device)
        write(x)
    plain = torch.randn(4, 3, device=device)
    before = plain.clone()
    with torch.inference_mode():
        write(plain)
    assert plain._version > 0
    assert not torch.equal(plain, before)
    write(x)


def test_inference_tensors_beside_others(device):
    with torch.inference_mode():
        x = torch.zeros(3, device=device)
    plain = torch.zeros(3, device=device)
    ema_update_([x, plain], [torch.ones(3, device=device)] * 2, 0.5)
    assert x.tolist() == plain.tolist() == [0.5] * 3
    assert plain._version == 1


def test_what_is_read_keeps_its_version(device):
    teacher, student = torch.zeros(3, device=device), torch.ones(3, device=device)
    ema_update_([teacher], [student], 0.5)
    assert student._version == 0
    ema_update_([teacher], [student], 1.0)
    assert teacher._version == 1


def test_update_between_forward_and_backward(device):
    """A student may itself be a teacher, as in a chain of averages."""
    model = torch.nn.Linear(3, 3, device=device)
    x = torch.randn(4, 3, device=device, requires_grad=True)
    y = model(x)
    ema_update_(list(model.parameters()), [torch.randn_like(p) for p in model.parameters()], 0.9)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    model(x).sum().backward()


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled(device, backend):
    def update(teacher: list[Tensor], student: list[Tensor], working: list[Tensor]) -> None:
        ema_update_(teacher, student, 0.5, working=working)

    compiled = torch.compile(update, backend=backend, fullgraph=True)
    for _ in range(2):
        leaf = torch.randn(4, 3, device=device, requires_grad=True)
        for position in range(2):
            saved = leaf.exp()
            written = [torch.randn(4, 3, device=device), torch.randn(4, 3, device=device)]
            written[position] = saved.detach()
            compiled(written[:1], [torch.randn(4, 3, device=device)], written[1:])
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                saved.sum().backward()


WITHOUT_KERNELS = """
import warnings
import torch

def refuse(path):
    raise OSError("not here")

torch.ops.load_library = refuse
with warnings.catch_warnings(action="ignore"):
    from d2v_fast.ops import backends
    from tests.ops.writers import WRITERS
    for ways in WRITERS.values():
        for what, write in ways.items():
            x = torch.randn(4, 3)
            write(x)
            assert x._version > 0, what
print(backends()["cpu"])
"""


def test_reference():
    """Without the C++ kernels, the reference raises the versions as well."""
    assert run_python(WITHOUT_KERNELS).strip() == "reference"
