"""The training data of a configuration, by modality."""

from __future__ import annotations

from typing import Literal

from d2v_fast.config import D2VConfig, RunConfig, SpeechConfig, TextConfig, VisionConfig
from d2v_fast.data.bad_files import judge_listing
from d2v_fast.data.batch import DataError
from d2v_fast.data.makers import BatchMaker, ImageBatches, SpeechBatches, TextBatches
from d2v_fast.modalities.vision.digits import DigitsDataset
from d2v_fast.modalities.vision.images import ImagesDataset

__all__ = ["batch_maker", "image_dataset", "resolved"]


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
    from d2v_fast.modalities.text.tasks import with_vocabulary

    return config.model_copy(update={"d2v": with_vocabulary(config.d2v)})


def batch_maker(config: D2VConfig) -> BatchMaker:
    """What makes the training batches of a run.

    Raises:
        DataError: if there is nothing to read, too much of it is unreadable, or the model does not fit it.
    """
    maker = _batch_maker(config)
    judge_listing(config.data, maker)
    return maker


def _batch_maker(config: D2VConfig) -> BatchMaker:
    if isinstance(config, VisionConfig):
        return ImageBatches(image_dataset(config), config)
    if isinstance(config, TextConfig):
        from d2v_fast.modalities.text.tasks import TextDataset

        return TextBatches(TextDataset(config.data, config.model, patience_s=config.run.timeout_s), config)
    assert isinstance(config, SpeechConfig)
    from d2v_fast.modalities.speech.audio import AudioDataset
    from d2v_fast.modalities.speech.samples import SpeechSamples

    kind = SpeechSamples if config.data.kind == "speech" else AudioDataset
    return SpeechBatches(kind(config.data, config.model), config)
