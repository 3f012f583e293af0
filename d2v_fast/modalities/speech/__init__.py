"""Speech: waveforms, one row per frame."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from d2v_fast.modalities import Modality
from d2v_fast.modalities.speech.config import RecordingsConfig, SpeechConfig
from d2v_fast.modalities.speech.config2 import MaskedSpeechConfig
from d2v_fast.modalities.speech.config_finetune import SpeechClassifyConfig, SpeechCtcConfig, SpeechFinetuneConfig

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
    from d2v_fast.objectives.finetune import Finetuning

__all__ = ["CLASSIFY", "CTC", "DATA2VEC2", "MODALITY"]


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


def _labeled_batches(config: Any) -> BatchMaker:
    from d2v_fast.modalities.speech.labeled_batches import labeled_recordings

    return labeled_recordings(config)


def _largest_labeled_batch(config: SpeechFinetuneConfig, num_samples: int) -> Batch:
    from d2v_fast.modalities.speech.labeled_batches import largest_batch

    return largest_batch(config, num_samples)


def _resolved(config: Any) -> Any:
    from d2v_fast.modalities.speech.labeled import resolved

    return resolved(config)


def _huggingface_head() -> HuggingFace:
    from d2v_fast.modalities.speech.huggingface_head import FORMAT

    return FORMAT


def _filled(raw: dict[str, Any]) -> dict[str, Any]:
    from d2v_fast.modalities.speech.source import fill_speech

    return fill_speech(raw)


def _finetuning() -> Finetuning:
    from d2v_fast.modalities.speech.heads import make_head
    from d2v_fast.modalities.speech.labeled_batches import batch_of, held_out_recordings
    from d2v_fast.modalities.speech.recognition import recognizing, searching
    from d2v_fast.objectives.finetune import Finetuning

    return Finetuning(make_head, held_out_recordings, batch_of, recognizing, searching)


def _finetuned(objective: str, config: type[SpeechFinetuneConfig]) -> Modality[Any]:
    return Modality(
        name="speech",
        objective=objective,
        place="frame",
        config=config,
        encoder=_encoder,
        batches=_labeled_batches,
        largest_batch=_largest_labeled_batch,
        resolved=_resolved,
        open_inputs=_open_inputs,
        filled=_filled,
        finetuning=_finetuning,
        huggingface=_huggingface_head,
    )


CTC = _finetuned("ctc", SpeechCtcConfig)
CLASSIFY = _finetuned("classify", SpeechClassifyConfig)

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
    others=(DATA2VEC2, CTC, CLASSIFY),
)
