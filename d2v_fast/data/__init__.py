"""Data: which samples there are, how they are read and changed at random, and in which order they are seen."""

from __future__ import annotations

from typing import Literal

from d2v_fast.config import BatchSplit, D2VConfig, RunConfig, SpeechConfig, TextConfig, VisionConfig
from d2v_fast.data.bad_files import judge_listing
from d2v_fast.data.batch import Batch, DataError, ImageDataset
from d2v_fast.data.digits import DigitsDataset, ProbeData, digits_for_probe
from d2v_fast.data.images import ImagesDataset
from d2v_fast.data.loader import StepLoader, worker_died
from d2v_fast.data.makers import BatchMaker, ImageBatches, SpeechBatches, TextBatches
from d2v_fast.data.order import StepOrder
from d2v_fast.data.samples import Samples

__all__ = [
    "Batch",
    "BatchMaker",
    "DataError",
    "DigitsDataset",
    "ImageDataset",
    "ImagesDataset",
    "ProbeData",
    "Samples",
    "StepLoader",
    "batch_maker",
    "digits_for_probe",
    "image_dataset",
    "resolved",
    "steps_per_epoch",
    "worker_died",
]


def image_dataset(config: VisionConfig, split: Literal["train", "test"] = "train") -> DigitsDataset | ImagesDataset:
    """The images that `data.kind` names, of the size that the model reads.

    Args:
        split: "test" is the held-out part of the digits; a folder of images has none.
    Raises:
        DataError: if there is nothing to read, or the model does not fit it.
    """
    if config.data.kind == "digits":
        return DigitsDataset(config.data, config.model, split)
    if split != "train":
        raise DataError(f'`split` must be "train" for a folder of images, but is "{split}" instead.')
    return ImagesDataset(config.data, config.model)


def resolved(config: RunConfig) -> RunConfig:
    """The configuration with everything that follows from the data, such as a vocabulary's size, filled in.

    Raises:
        DataError: what it follows from cannot be read.
    """
    if not isinstance(config.d2v, TextConfig):
        return config
    from d2v_fast.data.text import with_vocabulary

    return config.model_copy(update={"d2v": with_vocabulary(config.d2v)})


def batch_maker(config: D2VConfig) -> BatchMaker:
    """What makes the training batches of a run.

    Raises:
        DataError: if there is nothing to read, too much of it is unreadable, or the model does not fit it.
    """
    maker = _batch_maker(config)
    judge_listing(config.data, maker)
    return maker


def steps_per_epoch(maker: BatchMaker, split: BatchSplit) -> int:
    """Optimizer steps of one pass over the data.

    Raises:
        DataError: the data set is smaller than a step.
    """
    order = StepOrder(
        maker.num_samples,
        micro_batch=split.micro_batch,
        accumulation=split.accumulation,
        world_size=split.world_size,
        rank=0,
        seed=0,
        start_step=0,
        num_steps=None,
        lengths=maker.lengths,
        max_step_length=maker.max_step_length,
    )
    return order.steps_per_epoch


def _batch_maker(config: D2VConfig) -> BatchMaker:
    if isinstance(config, VisionConfig):
        return ImageBatches(image_dataset(config), config)
    if isinstance(config, TextConfig):
        from d2v_fast.data.text import TextDataset

        return TextBatches(TextDataset(config.data, config.model, patience_s=config.run.timeout_s), config)
    assert isinstance(config, SpeechConfig)
    from d2v_fast.data.audio import AudioDataset
    from d2v_fast.data.speech import SpeechSamples

    kind = SpeechSamples if config.data.kind == "speech" else AudioDataset
    return SpeechBatches(kind(config.data, config.model), config)
