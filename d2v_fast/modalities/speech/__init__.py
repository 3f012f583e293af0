"""Speech: waveforms, one row per frame."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from d2v_fast.modalities import Modality
from d2v_fast.modalities.speech.config import RecordingsConfig, SpeechConfig
from d2v_fast.modalities.speech.config2 import MaskedSpeechConfig

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure

    from d2v_fast.data import Batch, BatchMaker
    from d2v_fast.evaluation.inputs import Encoder, Source
    from d2v_fast.evaluation.probing import Probing
    from d2v_fast.interop.formats import HuggingFace, Published
    from d2v_fast.interop.onnx import Graph
    from d2v_fast.modalities.speech.encoder import SpeechModel
    from d2v_fast.modalities.speech.encoder2 import MaskedSpeechModel
    from d2v_fast.models.student import Student

__all__ = ["DATA2VEC2", "MODALITY"]


def _encoder() -> type[SpeechModel]:
    from d2v_fast.modalities.speech.encoder import SpeechModel

    return SpeechModel


def _batches(config: SpeechConfig) -> BatchMaker:
    from d2v_fast.modalities.speech.batches import SpeechBatches, speech_dataset

    return SpeechBatches(speech_dataset(config), config)


def _largest_batch(config: SpeechConfig, num_samples: int) -> Batch:
    from d2v_fast.modalities.speech.batches import largest_batch

    return largest_batch(config, num_samples)


def _huggingface() -> HuggingFace:
    from d2v_fast.modalities.speech.huggingface import FORMAT

    return FORMAT


def _published() -> Published:
    from d2v_fast.modalities.speech.fairseq import FORMAT

    return FORMAT


def _onnx(model: SpeechModel | MaskedSpeechModel, config: RecordingsConfig) -> Graph:
    from d2v_fast.modalities.speech.onnx import speech_graph

    return speech_graph(model, config)


def _open_inputs(encoder: Encoder, inputs: Path, tokenizer: Path | None) -> Source:
    from d2v_fast.modalities.speech.embed import open_recordings

    return open_recordings(encoder, inputs)


def _probing() -> Probing:
    from d2v_fast.modalities.speech.probe import PROBING

    return PROBING


def _draw(models: dict[str, Student], config: Any, data: Path | None, count: int, title: str) -> Figure:
    from d2v_fast.modalities.speech.pictures import choose_recordings, speech_figure

    return speech_figure(models, choose_recordings(config, data, count), config, title)


def _masked_encoder() -> type[MaskedSpeechModel]:
    from d2v_fast.modalities.speech.encoder2 import MaskedSpeechModel

    return MaskedSpeechModel


def _masked_batches(config: MaskedSpeechConfig) -> BatchMaker:
    from d2v_fast.modalities.speech.batches import speech_dataset
    from d2v_fast.modalities.speech.batches2 import MaskedSpeechBatches

    return MaskedSpeechBatches(speech_dataset(config), config)


def _largest_masked_batch(config: MaskedSpeechConfig, num_samples: int) -> Batch:
    from d2v_fast.modalities.speech.batches2 import largest_batch

    return largest_batch(config, num_samples)


def _huggingface2() -> HuggingFace:
    from d2v_fast.modalities.speech.huggingface2 import FORMAT

    return FORMAT


def _published2() -> Published:
    from d2v_fast.modalities.speech.fairseq2 import FORMAT

    return FORMAT


DATA2VEC2 = Modality(
    name="speech",
    objective="data2vec2",
    place="frame",
    config=MaskedSpeechConfig,
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
    name="speech",
    place="frame",
    config=SpeechConfig,
    encoder=_encoder,
    batches=_batches,
    largest_batch=_largest_batch,
    huggingface=_huggingface,
    published=_published,
    onnx=_onnx,
    open_inputs=_open_inputs,
    probing=_probing,
    draw=_draw,
    others=(DATA2VEC2,),
)
