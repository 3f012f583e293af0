"""The vision modality: images cut into patches, one encoder row per patch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from d2v_fast.modalities import Modality
from d2v_fast.modalities.vision.config import ImagesConfig, VisionConfig
from d2v_fast.modalities.vision.config2 import MaskedVisionConfig
from d2v_fast.modalities.vision.config_finetune import VisionClassifyConfig

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure

    from d2v_fast.data import Batch, BatchMaker
    from d2v_fast.evaluation.inputs import Encoder, Source
    from d2v_fast.evaluation.probing import Probing
    from d2v_fast.interop.formats import HuggingFace, Published
    from d2v_fast.interop.onnx import Graph
    from d2v_fast.modalities.vision.encoder import VisionModel
    from d2v_fast.modalities.vision.encoder2 import MaskedVisionModel
    from d2v_fast.models.student import Student
    from d2v_fast.objectives.finetune import Finetuning

__all__ = ["CLASSIFY", "DATA2VEC2", "MODALITY"]


def _encoder() -> type[VisionModel]:
    from d2v_fast.modalities.vision.encoder import VisionModel

    return VisionModel


def _batches(config: VisionConfig) -> BatchMaker:
    from d2v_fast.modalities.vision.batches import ImageBatches, image_dataset

    return ImageBatches(image_dataset(config), config)


def _largest_batch(config: VisionConfig, num_samples: int) -> Batch:
    from d2v_fast.modalities.vision.batches import largest_batch

    return largest_batch(config, num_samples)


def _huggingface() -> HuggingFace:
    from d2v_fast.modalities.vision.huggingface import FORMAT

    return FORMAT


def _published() -> Published:
    from d2v_fast.modalities.vision.beit import FORMAT

    return FORMAT


def _onnx(model: Student, config: ImagesConfig) -> Graph:
    from d2v_fast.modalities.vision.onnx import vision_graph

    return vision_graph(model, config)


def _open_inputs(encoder: Encoder, inputs: Path, tokenizer: Path | None) -> Source:
    from d2v_fast.modalities.vision.embed import open_images

    return open_images(encoder, inputs)


def _probing() -> Probing:
    from d2v_fast.modalities.vision.probe import PROBING

    return PROBING


def _draw(models: dict[str, Student], config: Any, data: Path | None, count: int, title: str) -> Figure:
    from d2v_fast.modalities.vision.pictures import choose_images, vision_figure

    return vision_figure(models, choose_images(config, data, count), config, title)


def _masked_encoder() -> type[MaskedVisionModel]:
    from d2v_fast.modalities.vision.encoder2 import MaskedVisionModel

    return MaskedVisionModel


def _masked_batches(config: MaskedVisionConfig) -> BatchMaker:
    from d2v_fast.modalities.vision.batches import image_dataset
    from d2v_fast.modalities.vision.batches2 import MaskedImageBatches

    return MaskedImageBatches(image_dataset(config), config)


def _largest_masked_batch(config: MaskedVisionConfig, num_samples: int) -> Batch:
    from d2v_fast.modalities.vision.batches2 import largest_batch

    return largest_batch(config, num_samples)


def _huggingface2() -> HuggingFace:
    from d2v_fast.modalities.vision.huggingface2 import FORMAT

    return FORMAT


def _published2() -> Published:
    from d2v_fast.modalities.vision.fairseq2 import FORMAT

    return FORMAT


def _labeled_batches(config: VisionClassifyConfig) -> BatchMaker:
    from d2v_fast.modalities.vision.labeled import labeled_images

    return labeled_images(config)


def _largest_labeled_batch(config: VisionClassifyConfig, num_samples: int) -> Batch:
    from d2v_fast.modalities.vision.labeled import largest_batch

    return largest_batch(config, num_samples)


def _resolved(config: VisionClassifyConfig) -> VisionClassifyConfig:
    from d2v_fast.modalities.vision.labeled import resolved

    return resolved(config)


def _finetuning() -> Finetuning:
    from d2v_fast.modalities.vision.head import ImageHead
    from d2v_fast.modalities.vision.labeled import batch_of, held_out_images
    from d2v_fast.objectives.finetune import Finetuning

    return Finetuning(ImageHead, held_out_images, batch_of)


def _filled(raw: dict[str, Any]) -> dict[str, Any]:
    from d2v_fast.interop.sources import fill

    return fill(raw)


def _huggingface_classify() -> HuggingFace:
    from d2v_fast.modalities.vision.huggingface_classify import FORMAT

    return FORMAT


CLASSIFY = Modality(
    name="vision",
    objective="classify",
    place="patch",
    config=VisionClassifyConfig,
    encoder=_encoder,
    batches=_labeled_batches,
    largest_batch=_largest_labeled_batch,
    resolved=_resolved,
    open_inputs=_open_inputs,
    huggingface=_huggingface_classify,
    filled=_filled,
    finetuning=_finetuning,
)

DATA2VEC2 = Modality(
    name="vision",
    objective="data2vec2",
    place="patch",
    config=MaskedVisionConfig,
    encoder=_masked_encoder,
    batches=_masked_batches,
    largest_batch=_largest_masked_batch,
    open_inputs=_open_inputs,
    probing=_probing,
    huggingface=_huggingface2,
    published=_published2,
    onnx=_onnx,
    draw=_draw,
)

MODALITY = Modality(
    name="vision",
    place="patch",
    config=VisionConfig,
    encoder=_encoder,
    batches=_batches,
    largest_batch=_largest_batch,
    huggingface=_huggingface,
    published=_published,
    onnx=_onnx,
    open_inputs=_open_inputs,
    probing=_probing,
    draw=_draw,
    others=(DATA2VEC2, CLASSIFY),
)
