"""Run one recorded step with this library: its importer, its model, its teacher, its exporter."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2v_fast import ops
from d2v_fast.config import D2VConfig, TeacherConfig, check_d2v
from d2v_fast.data import Batch
from d2v_fast.interop.formats import Pretrained, Published
from d2v_fast.interop.published import open_published
from d2v_fast.modalities import modality_of_model
from d2v_fast.objectives.build import build_model
from d2v_fast.objectives.data2vec2 import Data2Vec2
from d2v_fast.teacher import Teacher
from tests.golden2.cases import Case, CaseError
from tests.golden2.compare import Step


def run(case: Case, dtype: torch.dtype) -> Step:
    """Compute the step of a case.

    Args:
        case: The recorded step.
        dtype: fp32, or fp64, in which the operations run their definitions, and the teacher, which averages in fp32,
            is not updated.
    Raises:
        CaseError: The case has values that this library does not support; the message names them.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            form, found, config = _read(case, Path(folder))
        except ValueError as error:
            raise CaseError(f"{case.name}: {error}") from None
        model = build_model(config)
        assert isinstance(model, Data2Vec2)
        assert found.head is not None
        assert found.teacher is not None
        model.student.load_state_dict(found.student.state_dict())
        model.head.load_state_dict(found.head)
        model.to(dtype)
        return _step(case, model, found, form, config)


def _read(case: Case, folder: Path) -> tuple[Published, Pretrained, D2VConfig]:
    """Read the case as a checkpoint, and make the configuration of its step."""
    path = folder / f"{case.name}.pt"
    torch.save(case.checkpoint, path)
    form, found = open_published(path)
    assert form.step is not None
    sections = form.step(case.checkpoint, path)
    modality = modality_of_model(found.config)
    raw = {"modality": modality.name, "objective": modality.objective, "model": found.config.model_dump(), **sections}
    if case.kind == "TEXT":
        # no document of the case is shorter
        raw["data"] = {**raw.get("data", {}), "min_tokens": case.tensors["input"].shape[1]}
    config, problems = check_d2v(raw)
    if config is None:
        raise ValueError("; ".join(problems))
    return form, found, config


def _step(case: Case, model: Data2Vec2, found: Pretrained, form: Published, config: D2VConfig) -> Step:
    dtype = next(model.parameters()).dtype
    seen: dict[str, Any] = {}
    encoder = model.student.context.encoder
    model.train()
    hooks = [
        encoder.register_forward_hook(lambda _, __, output: seen.update(encoded=output[0])),
        encoder.blocks[config.model.context_depth].register_forward_pre_hook(
            lambda _, args: seen.update(context=args[0])
        ),
        model.head.register_forward_hook(lambda _, __, output: seen.update(prediction=output)),
    ]
    # the product's average is always fp32
    teacher = _teacher(case, model, found) if dtype == torch.float32 else None
    module = found.teacher.averaged.to(dtype).eval() if teacher is None else teacher.module
    features = model.teacher_features
    model.teacher_features = lambda *args: seen.setdefault("features", features(*args))
    noise = case.tensors["decoder_noise"].flatten(0, 1).to(dtype)
    # the recorded noise has its deviation already
    model.draw_noise = lambda keys, rows, num_places, width: noise.index_select(0, rows) / model.head.noise_std
    output = model(_batch(case, dtype), module)
    divisor = config.loss.divisor(config.model.width)
    total = output.loss_sum / divisor
    mean = total / output.num_rows
    mean.backward()
    for hook in hooks:
        hook.remove()
    class_loss = torch.zeros(()) if output.class_loss is None else output.class_loss / divisor
    losses = {f"{case.kind}_regression": total - class_loss, "cls": class_loss, "total": total, "mean": mean}
    target = ops.topk_target(
        seen["features"],
        layer_norm=config.target.layer_norm,
        final_norm=config.target.final_norm,
        eps=config.target.eps,
    )
    average = None
    if teacher is not None:
        teacher.update(1)
        whole = model.student.with_averaged(teacher.module)
        average = _saved(form, model.student, model.head, whole, config)["_ema"]
    return Step(
        losses={name: value.detach().reshape(1) for name, value in losses.items()},
        prediction=seen["prediction"].detach(),
        target=target.detach(),
        encoder_output=_reordered(case, seen["encoded"].detach()),
        context_input=_reordered(case, seen["context"].detach()),
        gradients={n: g for n, g in _gradients(form, model, config).items() if n not in case.frozen},
        average=average,
    )


def _teacher(case: Case, model: Data2Vec2, found: Pretrained) -> Teacher:
    """Return the recorded average, as a run that begins with the checkpoint has it."""
    teacher = Teacher(model.student.averaged, TeacherConfig(decay_start=case.decay, decay_end=case.decay))
    whole, prefix = found.teacher.state_dict(), model.student.averaged_prefix()
    for shard in teacher.shards:
        shard.master.copy_(whole[prefix + shard.name].view(-1))
    teacher.refresh(0)
    return teacher


def _batch(case: Case, dtype: torch.dtype) -> Batch:
    inputs, is_masked = case.tensors["input"], case.tensors["mask"].bool()
    num_rows = len(is_masked)
    flat = torch.arange(is_masked.numel()).view_as(is_masked)
    return Batch(
        sample_ids=torch.arange(len(inputs)),
        inputs=inputs.to(dtype) if inputs.is_floating_point() else inputs,
        rows=flat[is_masked],
        visible=flat[~is_masked].view(num_rows, -1),
        noise_keys=torch.zeros(num_rows, dtype=torch.int64),
        drop_keys=np.zeros(num_rows, dtype=np.uint64),
    )


def _reordered(case: Case, encoded: Tensor) -> Tensor:
    """Return `[B * M, (1 +) V, D]` with the places, which ascend here, in the order of `ids_keep`."""
    keep = case.tensors["ids_keep"]
    num_first = encoded.shape[1] - keep.shape[1]
    # where each kept place is among the ascending ones
    order = keep.argsort(1).argsort(1)[:, :, None].expand(-1, -1, encoded.shape[2])
    return torch.cat([encoded[:, :num_first], encoded[:, num_first:].gather(1, order)], dim=1)


def _gradients(form: Published, model: Data2Vec2, config: D2VConfig) -> dict[str, Tensor]:
    """Return the gradients under the reference's names, by the exporter that gives weights these names."""
    student, head = (
        {name: torch.full_like(value, torch.nan) for name, value in module.state_dict().items()}
        | {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        for module in (model.student, model.head)
    )
    named = _saved(form, student, head, None, config)
    return {name: value for name, value in named.items() if not value.isnan().all()}


def _saved(form: Published, student: Any, head: Any, teacher: Any, config: D2VConfig) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step.pt"
        form.write(student, head, teacher, config, path)
        return torch.load(path, weights_only=True)["model"]
