"""The text modality: token ids, one row per token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from d2v_fast.modalities import Modality
from d2v_fast.modalities.text.config import DocumentsConfig, TextConfig
from d2v_fast.modalities.text.config2 import MaskedTextConfig
from d2v_fast.modalities.text.config_finetune import TextClassifyConfig, TextFinetuneConfig, TextRegressConfig

if TYPE_CHECKING:
    from pathlib import Path

    from d2v_fast.data import Batch, BatchMaker
    from d2v_fast.evaluation.inputs import Encoder, Source
    from d2v_fast.evaluation.probing import Probing
    from d2v_fast.interop.formats import HuggingFace, Published
    from d2v_fast.interop.onnx import Graph
    from d2v_fast.modalities.text.encoder import TextModel
    from d2v_fast.modalities.text.encoder2 import MaskedTextModel
    from d2v_fast.modalities.text.tasks import TextDataset
    from d2v_fast.modalities.text.tokenizer import Tokenizer
    from d2v_fast.objectives.finetune import Finetuning

__all__ = ["CLASSIFY", "DATA2VEC2", "MODALITY", "REGRESS"]

DocumentsT = TypeVar("DocumentsT", bound=DocumentsConfig)
FinetuneT = TypeVar("FinetuneT", bound=TextFinetuneConfig)


def _encoder() -> type[TextModel]:
    from d2v_fast.modalities.text.encoder import TextModel

    return TextModel


def _batches(config: TextConfig) -> BatchMaker:
    from d2v_fast.modalities.text.batches import TextBatches
    from d2v_fast.modalities.text.tasks import TextDataset

    return TextBatches(TextDataset(config.data, config.model, patience_s=config.run.timeout_s), config)


def _largest_batch(config: TextConfig, num_samples: int) -> Batch:
    from d2v_fast.modalities.text.batches import largest_batch

    return largest_batch(config, num_samples)


def _resolved(config: DocumentsT) -> DocumentsT:
    from d2v_fast.modalities.text.tasks import with_vocabulary

    return with_vocabulary(config)


def _huggingface() -> HuggingFace:
    from d2v_fast.modalities.text.huggingface import FORMAT

    return FORMAT


def _published() -> Published:
    from d2v_fast.modalities.text.fairseq import FORMAT

    return FORMAT


def _onnx(model: TextModel | MaskedTextModel, config: DocumentsConfig) -> Graph:
    from d2v_fast.modalities.text.onnx import text_graph

    return text_graph(model, config)


def _open_inputs(encoder: Encoder, inputs: Path, tokenizer: Path | None) -> Source:
    from d2v_fast.modalities.text.embed import open_lines

    return open_lines(encoder, inputs, tokenizer)


def _probing() -> Probing:
    from d2v_fast.modalities.text.probe import PROBING

    return PROBING


def _tokenizer(
    config: DocumentsConfig | TextFinetuneConfig | None, path: Path | None, digest: str | None, where: str
) -> Tokenizer:
    from d2v_fast.modalities.text.tasks import run_tokenizer
    from d2v_fast.modalities.text.tokenizer import load_tokenizer

    if config is not None:
        return run_tokenizer(config, path, digest, where)
    assert path is not None
    return load_tokenizer(path)


def _tokenize(config: DocumentsConfig) -> TextDataset:
    from d2v_fast.modalities.text.tasks import tokenize

    return tokenize(config)


def _masked_encoder() -> type[MaskedTextModel]:
    from d2v_fast.modalities.text.encoder2 import MaskedTextModel

    return MaskedTextModel


def _masked_batches(config: MaskedTextConfig) -> BatchMaker:
    from d2v_fast.modalities.text.batches2 import MaskedTextBatches
    from d2v_fast.modalities.text.tasks import TextDataset

    return MaskedTextBatches(TextDataset(config.data, config.model, patience_s=config.run.timeout_s), config)


def _largest_masked_batch(config: MaskedTextConfig, num_samples: int) -> Batch:
    from d2v_fast.modalities.text.batches2 import largest_batch

    return largest_batch(config, num_samples)


def _huggingface2() -> HuggingFace:
    from d2v_fast.modalities.text.huggingface2 import FORMAT

    return FORMAT


def _published2() -> Published:
    from d2v_fast.modalities.text.fairseq2 import FORMAT

    return FORMAT


def _labeled_batches(config: TextFinetuneConfig) -> BatchMaker:
    from d2v_fast.modalities.text.labeled import labeled_batches

    return labeled_batches(config)


def _largest_labeled_batch(config: TextFinetuneConfig, num_samples: int) -> Batch:
    from d2v_fast.modalities.text.labeled import largest_batch

    return largest_batch(config, num_samples)


def _labeled_resolved(config: FinetuneT) -> FinetuneT:
    from d2v_fast.modalities.text.labeled import resolved

    return resolved(config)


def _finetuning() -> Finetuning:
    from d2v_fast.modalities.text.head import TextHead
    from d2v_fast.modalities.text.labeled import batch_of, held_out_batches
    from d2v_fast.objectives.finetune import Finetuning

    return Finetuning(TextHead, held_out_batches, batch_of)


def _filled(raw: dict[str, Any]) -> dict[str, Any]:
    from d2v_fast.modalities.text.source import fill_text

    return fill_text(raw)


def _open_rows(encoder: Encoder, inputs: Path, tokenizer: Path | None) -> Source:
    from d2v_fast.modalities.text.rows import open_rows

    return open_rows(encoder, inputs, tokenizer)


def _huggingface_head() -> HuggingFace:
    from d2v_fast.modalities.text.huggingface_head import FORMAT

    return FORMAT


def _finetuned(objective: str, config: type[TextFinetuneConfig]) -> Modality[Any]:
    return Modality(
        name="text",
        objective=objective,
        place="token",
        config=config,
        encoder=_encoder,
        batches=_labeled_batches,
        largest_batch=_largest_labeled_batch,
        resolved=_labeled_resolved,
        huggingface=_huggingface_head,
        open_inputs=_open_rows,
        tokenizer=_tokenizer,
        filled=_filled,
        finetuning=_finetuning,
    )


CLASSIFY = _finetuned("classify", TextClassifyConfig)
REGRESS = _finetuned("regress", TextRegressConfig)

DATA2VEC2 = Modality(
    name="text",
    objective="data2vec2",
    place="token",
    config=MaskedTextConfig,
    encoder=_masked_encoder,
    batches=_masked_batches,
    largest_batch=_largest_masked_batch,
    resolved=_resolved,
    open_inputs=_open_inputs,
    probing=_probing,
    tokenizer=_tokenizer,
    tokenize=_tokenize,
    huggingface=_huggingface2,
    published=_published2,
    onnx=_onnx,
)

MODALITY = Modality(
    name="text",
    place="token",
    config=TextConfig,
    encoder=_encoder,
    batches=_batches,
    largest_batch=_largest_batch,
    resolved=_resolved,
    huggingface=_huggingface,
    published=_published,
    onnx=_onnx,
    open_inputs=_open_inputs,
    probing=_probing,
    tokenizer=_tokenizer,
    tokenize=_tokenize,
    others=(DATA2VEC2, CLASSIFY, REGRESS),
)
