"""Labeled images: those that a classifier is trained on, and those that are held out."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from d2v_fast.data.batch import Batch, ImageDataset, MicroBatch
from d2v_fast.data.few import LabeledSubset, classes_of, few, held_out, held_out_classes, require_trained
from d2v_fast.data.labels import class_of, refuse_parts
from d2v_fast.data.makers import drop_keys
from d2v_fast.data.once import read_once
from d2v_fast.data.order import MicroStep
from d2v_fast.errors import DataError
from d2v_fast.modalities.vision.batches import Images
from d2v_fast.modalities.vision.config import ImageModelSection, VisionDataConfig
from d2v_fast.modalities.vision.config_finetune import VisionClassifyConfig
from d2v_fast.modalities.vision.digits import DigitsDataset, digit_classes
from d2v_fast.modalities.vision.images import ImagesDataset
from d2v_fast.modalities.vision.mixing import Mixing

__all__ = [
    "HeldOutImages",
    "LabeledImages",
    "batch_of",
    "held_out_images",
    "labeled_images",
    "largest_batch",
    "resolved",
]

PATH, VALID = "`d2v.data.path`", "`d2v.valid.path`"


class _Chosen(NamedTuple):
    """Images of a data set and their classes.

    Attributes:
        dataset: the data set.
        positions: int64 `[S]`, positions in it.
        names: of the classes, one per image.
    """

    dataset: ImageDataset
    positions: npt.NDArray[np.int64]
    names: list[str]


class LabeledImages(Images):
    """Make batches of augmented images with their classes; see `BatchMaker`."""

    def __init__(self, chosen: _Chosen, config: VisionClassifyConfig) -> None:
        super().__init__(chosen.dataset)
        labels = config.labels or ()
        classes = classes_of(chosen.names, labels, PATH)
        kept = few(classes, config.data.labels_per_class, config.data.labels_seed)
        self._positions, self._classes = chosen.positions[kept], classes[kept]
        require_trained(self._classes, labels, PATH)
        self.num_samples = len(kept)
        self.source = LabeledSubset(chosen.dataset, self._positions, self._classes.tolist())
        self._mixing = Mixing(config.data, len(labels))

    def make(self, micro: MicroStep, seed: int) -> MicroBatch:
        """See `BatchMaker`. A step has as many rows as samples."""
        ids = micro.sample_ids
        partners = self._mixing.partners(micro)
        # each image is read once, also if it is blended into another one of this micro-step
        read = np.unique(np.concatenate((ids, partners)))
        drawn = self._dataset.drawn(self._positions[read], seed, micro.epoch)
        pixels, scale = drawn.values, drawn.scale
        targets: Tensor = torch.from_numpy(self._classes[ids])
        if self._mixing.changes:
            pixels, scale = (pixels if scale is None else scale.applied(pixels)), None
            pixels, targets = self._mixing.apply(pixels, read, partners, self._classes, micro, seed)
        elif len(read) != len(ids) or (read != ids).any():
            pixels = pixels[np.searchsorted(read, ids)]
        batch = Batch(
            pixels,
            torch.empty(0, dtype=torch.int64),
            torch.from_numpy(ids),
            bad=drawn.bad,
            drop_keys=drop_keys(micro, seed),
            scale=scale,
            targets=targets,
        )
        return MicroBatch(batch, len(micro.step_sample_ids))

    def warm_up(self) -> None:
        """See `BatchMaker`."""


class HeldOutImages(Images):
    """Make batches of held-out images as they are, with their classes; see `HeldOut`."""

    def __init__(self, chosen: _Chosen, config: VisionClassifyConfig) -> None:
        super().__init__(chosen.dataset)
        where = PATH if config.valid.path is None else VALID
        if not chosen.names:
            raise DataError(
                f"{where} must leave at least one image to validate on, but leaves none: name a folder of them as "
                f"{VALID}, or raise `d2v.valid.fraction`."
            )
        self._classes = held_out_classes(chosen.names, config.labels or (), where)
        self._positions, self.num_samples = chosen.positions, len(chosen.positions)
        self.targets: list[int] = self._classes.tolist()
        self.source = LabeledSubset(chosen.dataset, self._positions, self.targets)

    def make(self, micro: MicroStep, seed: int) -> MicroBatch:
        """See `BatchMaker`."""
        pixels = self._dataset.plain(self._positions[micro.sample_ids])
        targets = torch.from_numpy(self._classes[micro.sample_ids])
        rows, ids = torch.empty(0, dtype=torch.int64), torch.from_numpy(micro.sample_ids)
        return MicroBatch(Batch(pixels, rows, ids, targets=targets), len(micro.step_sample_ids))

    def warm_up(self) -> None:
        """See `BatchMaker`."""


def labeled_images(config: VisionClassifyConfig) -> LabeledImages:
    """Return the maker of the training batches.

    Raises:
        DataError: there are no readable images, or no image of a class.
    """
    return LabeledImages(_training(config), config)


def held_out_images(config: VisionClassifyConfig) -> HeldOutImages:
    """Return the maker of the held-out batches.

    Raises:
        DataError: there are none, or one is of a class that is not trained on.
    """
    if config.data.kind == "digits":
        return HeldOutImages(_digits(config, "test"), config)
    if config.valid.path is None:
        found = _folder(config, str(config.data.path), PATH)
        return HeldOutImages(_part(found, _is_held_out(found, config)), config)
    return HeldOutImages(_folder(config, config.valid.path, VALID), config)


def resolved(config: VisionClassifyConfig) -> VisionClassifyConfig:
    """Return the section with the classes of the data, if it names none.

    Raises:
        DataError: the data have fewer than two classes.
    """
    if config.labels is not None:
        return config
    names = sorted(set(_training(config).names))
    if len(names) < 2:
        raise DataError(
            f"{PATH} must hold at least 2 sub-folders with images, one for each class, but holds {len(names)}."
        )
    return config.model_copy(update={"labels": tuple(names)})


def largest_batch(config: VisionClassifyConfig, num_samples: int) -> Batch:
    """Return a batch with the shapes of a run's largest one, uninitialized, on torch's current device."""
    model = config.model
    pixels = torch.empty(num_samples, model.channels, model.image_size, model.image_size)
    ids = torch.empty(num_samples, dtype=torch.int64)
    targets = torch.empty(num_samples, len(config.labels or ())) if config.data.mixup or config.data.cutmix else ids
    return Batch(pixels, torch.empty(0, dtype=torch.int64), ids, targets=targets)


def batch_of(config: VisionClassifyConfig, parts: list[Tensor]) -> Batch:
    """Return a batch of images without classes."""
    return Batch(torch.stack(parts), torch.empty(0, dtype=torch.int64), torch.arange(len(parts)))


def _training(config: VisionClassifyConfig) -> _Chosen:
    if config.data.kind == "digits":
        return _digits(config, "train")
    found = _folder(config, str(config.data.path), PATH)
    return found if config.valid.path is not None else _part(found, ~_is_held_out(found, config))


def _digits(config: VisionClassifyConfig, split: Literal["train", "test"]) -> _Chosen:
    dataset = DigitsDataset(config.data, config.model, split)
    classes = digit_classes(config.data, split)
    return _Chosen(dataset, np.arange(len(classes), dtype=np.int64), list(map(str, classes.tolist())))


def _folder(config: VisionClassifyConfig, path: str, where: str) -> _Chosen:
    """Return the images of a folder whose sub-folders are classes."""
    return _read(config.data.model_copy(update={"path": path}), config.model, path, where)


@read_once
def _read(data: VisionDataConfig, model: ImageModelSection, path: str, where: str) -> _Chosen:
    try:
        dataset = ImagesDataset(data, model)
    except DataError as error:
        raise DataError(str(error).replace(PATH, where)) from None
    names = [class_of(dataset.name(position)) for position in range(len(dataset))]
    refuse_parts(path, set(names) - {""}, where)
    positions = np.array([position for position, name in enumerate(names) if name], dtype=np.int64)
    return _Chosen(dataset, positions, [name for name in names if name])


def _is_held_out(found: _Chosen, config: VisionClassifyConfig) -> npt.NDArray[np.bool_]:
    _, numbers = np.unique(np.array(found.names, dtype=np.str_), return_inverse=True)
    return held_out(numbers.astype(np.int64), config.valid.fraction, config.valid.seed)


def _part(found: _Chosen, chosen: npt.NDArray[np.bool_]) -> _Chosen:
    names = [name for name, is_chosen in zip(found.names, chosen.tolist(), strict=True) if is_chosen]
    return _Chosen(found.dataset, found.positions[chosen], names)
