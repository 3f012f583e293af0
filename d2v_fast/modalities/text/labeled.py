"""Batches of labeled texts: those that a head is trained on, and those that are held out."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from d2v_fast.data.batch import Batch, MicroBatch
from d2v_fast.data.few import LabeledSubset, classes_of, few, held_out, held_out_classes, require_trained
from d2v_fast.data.labels import MAX_CLASSES
from d2v_fast.data.makers import drop_keys
from d2v_fast.data.order import MicroStep
from d2v_fast.data.samples import SampleSource
from d2v_fast.errors import DataError
from d2v_fast.modalities.text.config_finetune import TextClassifyConfig, TextFinetuneConfig, TextRegressConfig
from d2v_fast.modalities.text.labeled_tokens import LabeledTokens, labeled_tokens
from d2v_fast.modalities.text.tasks import with_vocabulary

__all__ = ["HeldOutTexts", "TextRows", "batch_of", "held_out_batches", "labeled_batches", "largest_batch", "resolved"]

PATH, VALID = "`d2v.data.path`", "`d2v.valid.path`"

ConfigT = TypeVar("ConfigT", bound=TextFinetuneConfig)


class _Chosen(NamedTuple):
    """Texts of a data set.

    Attributes:
        texts: The data set.
        positions: int64 `[S]`, positions in it.
    """

    texts: LabeledTokens
    positions: npt.NDArray[np.int64]

    @property
    def labels(self) -> list[Any]:
        """Class or score of each of them."""
        return [self.texts.labels[position] for position in self.positions.tolist()]


class TextRows:
    """Make batches of texts with their classes or scores; see `BatchMaker`.

    Args:
        chosen: The texts.
        targets: int64 `[S]`, their classes, or fp32 `[S]`, their scores.
        config: The run's section.
    """

    max_step_length: int | None = None

    def __init__(self, chosen: _Chosen, targets: npt.NDArray[Any], config: TextFinetuneConfig) -> None:
        self.what = "text" if config.data.pair_field is None else "pair"
        self._texts, self._positions, self._targets = chosen.texts, chosen.positions, targets
        self._unpads = _unpads(config)
        self.num_samples = len(chosen.positions)
        self.lengths: npt.NDArray[np.int64] | None = chosen.texts.lengths[chosen.positions]
        self.sample_bytes = 8 * int(self.lengths.max(initial=0))
        self.listing = chosen.texts.listing
        self.vocabulary: str | None = chosen.texts.tokenizer.digest
        self.source: SampleSource = LabeledSubset(chosen.texts, chosen.positions, targets.tolist())

    def make(self, micro: MicroStep, seed: int) -> MicroBatch:
        """See `BatchMaker`. A step has as many rows as samples."""
        ids = micro.sample_ids
        places = self._positions[ids]
        batch = _batch(self._texts.read(places), self._texts.lengths[places], self._unpads, torch.from_numpy(ids))
        targets = torch.from_numpy(self._targets[ids])
        made = Batch(**{**vars(batch), "targets": targets, "drop_keys": drop_keys(micro, seed)})
        return MicroBatch(made, len(micro.step_sample_ids))

    def warm_up(self) -> None:
        """See `BatchMaker`."""


class HeldOutTexts(TextRows):
    """Make batches of held-out texts; see `HeldOut`."""

    def __init__(self, chosen: _Chosen, targets: npt.NDArray[Any], config: TextFinetuneConfig) -> None:
        super().__init__(chosen, targets, config)
        self.targets: list[Any] = targets.tolist()


def labeled_batches(config: TextFinetuneConfig) -> TextRows:
    """Return the maker of the training batches.

    Raises:
        DataError: There are no readable texts, or none of a class.
    """
    chosen = _training(config)
    if isinstance(config, TextClassifyConfig):
        labels = config.labels or ()
        classes = classes_of(chosen.labels, labels, PATH)
        kept = few(classes, config.data.labels_per_class, config.data.labels_seed)
        require_trained(classes[kept], labels, PATH)
        return TextRows(_Chosen(chosen.texts, chosen.positions[kept]), classes[kept], config)
    return TextRows(chosen, np.array(chosen.labels, dtype=np.float32), config)


def held_out_batches(config: TextFinetuneConfig) -> HeldOutTexts:
    """Return the maker of the held-out batches.

    Raises:
        DataError: There are none, or one is of a class that is not trained on.
    """
    where = PATH if config.valid.path is None else VALID
    chosen = _held_out(config)
    if len(chosen.positions) == 0:
        raise DataError(
            f"{where} must leave at least one text to validate on, but leaves none: name a file of them as {VALID}, or "
            "raise `d2v.valid.fraction`."
        )
    if isinstance(config, TextClassifyConfig):
        return HeldOutTexts(chosen, held_out_classes(chosen.labels, config.labels or (), where), config)
    return HeldOutTexts(chosen, np.array(chosen.labels, dtype=np.float32), config)


def resolved(config: ConfigT) -> ConfigT:
    """Return the section with the tokenizer's vocabulary and the classes of the data, where it names none.

    Raises:
        DataError: The data have fewer than two classes, or the tokenizer does not fit.
    """
    config = with_vocabulary(config)
    if config.labels is not None or not isinstance(config, TextClassifyConfig):
        return config
    names = sorted(set(_training(config).labels))
    if len(names) < 2:
        raise DataError(
            f"{PATH} must hold at least 2 classes in `d2v.data.label_field` ('{config.data.label_field}'), but holds "
            f'{len(names)}. Numbers are predicted with `d2v.objective` "regress".'
        )
    if len(names) > MAX_CLASSES:
        raise DataError(
            f"{PATH} must hold at most {MAX_CLASSES:,} classes, but holds {len(names):,}, such as {names[0]!r}. "
            'Numbers are predicted with `d2v.objective` "regress".'
        )
    return config.model_copy(update={"labels": tuple(names)})


def largest_batch(config: TextFinetuneConfig, num_samples: int) -> Batch:
    """Return a batch with the shapes of a run's largest one, uninitialized, on torch's current device."""
    tokens = torch.empty(num_samples, config.data.block_size, dtype=torch.int64)
    ids = torch.empty(num_samples, dtype=torch.int64)
    targets = torch.empty(num_samples) if isinstance(config, TextRegressConfig) else ids
    return Batch(tokens, torch.empty(0, dtype=torch.int64), ids, targets=targets)


def batch_of(config: TextFinetuneConfig, parts: list[Tensor]) -> Batch:
    """Return a batch of token sequences without labels.

    Args:
        config: The run's section.
        parts: int64 `[T]` each, with special tokens.
    """
    padding = config.model.padding_row
    lengths = np.array([len(part) for part in parts], dtype=np.int64)
    tokens = pad_sequence(parts, batch_first=True, padding_value=padding)
    return _batch(tokens.numpy(), lengths, _unpads(config), torch.arange(len(parts)))


def _unpads(config: TextFinetuneConfig) -> bool:
    """Return whether attention skips padding; an encoder of data2vec 2.0 has no such choice."""
    return getattr(config.model, "attention", "padded") in ("packed", "xformers")


def _batch(tokens: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], unpads: bool, ids: Tensor) -> Batch:
    width = tokens.shape[1]
    padded = bool((lengths < width).any())
    places = torch.from_numpy(np.flatnonzero(np.arange(width) < lengths[:, None])) if padded and unpads else None
    return Batch(
        torch.from_numpy(tokens),
        torch.empty(0, dtype=torch.int64),
        ids,
        lengths=torch.from_numpy(lengths) if padded else None,
        unpadded=places,
    )


def _training(config: TextFinetuneConfig) -> _Chosen:
    texts = _read(config, config.data.path, PATH, is_train=True)
    if config.data.kind == "docs" or config.valid.path is not None:
        return _Chosen(texts, np.arange(len(texts), dtype=np.int64))
    return _Chosen(texts, np.flatnonzero(~_share(texts, config)))


def _held_out(config: TextFinetuneConfig) -> _Chosen:
    if config.data.kind == "docs" or config.valid.path is not None:
        texts = _read(config, config.valid.path, VALID, is_train=False)
        return _Chosen(texts, np.arange(len(texts), dtype=np.int64))
    texts = _read(config, config.data.path, PATH, is_train=True)
    return _Chosen(texts, np.flatnonzero(_share(texts, config)))


def _read(config: TextFinetuneConfig, path: str | None, key: str, *, is_train: bool) -> LabeledTokens:
    scores = isinstance(config, TextRegressConfig)
    return labeled_tokens(config.data, config.model, path, is_train=is_train, key=key, scores=scores)


def _share(texts: LabeledTokens, config: TextFinetuneConfig) -> npt.NDArray[np.bool_]:
    """Return which texts are held out: the same share of every class."""
    if isinstance(config, TextRegressConfig):
        numbers = np.zeros(len(texts), dtype=np.int64)
    else:
        numbers = np.unique(np.array(texts.labels, dtype=np.str_), return_inverse=True)[1].astype(np.int64)
    return held_out(numbers, config.valid.fraction, config.valid.seed)
