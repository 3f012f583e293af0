"""What a speech encoder hears: log-mel spectrograms, their masks, and which moments it takes for alike."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from d2v_fast.config import SpeechConfig
from d2v_fast.data.audio import AudioDataset
from d2v_fast.data.listing import counted, print_listing
from d2v_fast.data.speech import SpeechSamples
from d2v_fast.log_mel import HOP_SECONDS, log_mel
from d2v_fast.masking import span_mask_rows
from d2v_fast.modalities import Student
from d2v_fast.speech_probe import frame_features

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MASK_COLOUR = "#c43b3b"
# of a recording: beyond, nothing can be made out in a picture
MAX_SECONDS = 4.0


def choose_recordings(config: SpeechConfig, folder: Path | None, count: int) -> dict[str, Tensor]:
    """Waveforms `[N]`, of zero mean and unit variance, by name: spread evenly over the held-out sample recordings, or
    over those of the run, or of `folder`.

    Raises:
        DataError: there is none that can be read.
    """
    if folder is not None:
        data = config.data.model_copy(update={"kind": "audio", "path": str(folder)})
        dataset = AudioDataset(data, config.model)
    elif config.data.kind == "speech":
        dataset = SpeechSamples(config.data, config.model, "test")
    else:
        dataset = AudioDataset(config.data, config.model)
    print_listing(dataset.listing, counted(len(dataset), "recording"), sys.stderr)
    most = int(MAX_SECONDS * config.model.sample_rate)
    ids = np.unique(np.linspace(0, len(dataset) - 1, count, dtype=np.int64)).tolist()
    return {str(Path(dataset.path(i)).relative_to(dataset.root).with_suffix("")): dataset.whole(i)[:most] for i in ids}


def draw_speech(
    models: dict[str, Student], recordings: dict[str, Tensor], config: SpeechConfig, title: str, out: Path
) -> None:
    """One column per recording. Rows: the log-mel spectrogram with the masked frames of a first epoch, then for each
    model which frames have similar features.

    Args:
        models: encoders by the name of their row.
        recordings: of `choose_recordings`.
    """
    waveforms = list(recordings.values())
    frames = np.array([config.model.num_frames(len(waveform)) for waveform in waveforms], dtype=np.int64)
    mask = config.mask
    rows = span_mask_rows(
        config.run.seed,
        0,
        np.arange(len(frames)),
        int(frames.max()),
        mask.prob,
        mask.length,
        min_masks=mask.min_masks,
        equal_counts=False,
        lengths=frames,
    )
    masked = np.zeros((len(frames), int(frames.max())), dtype=np.bool_)
    masked.flat[rows] = True
    similarities = {
        name: [self_similarity(features) for features in frame_features(model, waveforms, config)]
        for name, model in models.items()
    }
    spectra = [log_mel(waveform, config.model.sample_rate).numpy() for waveform in waveforms]
    figure = _figure(list(recordings), spectra, masked, frames, similarities, title, config)
    figure.savefig(out, dpi=150, bbox_inches="tight", pad_inches=0.1)


def self_similarity(features: Tensor) -> NDArray[np.float32]:
    """Cosine of every pair of frames `[T, T]`, their mean over time taken out: what all frames share tells nothing."""
    centred = torch.nn.functional.normalize(features - features.mean(0), dim=-1)
    return (centred @ centred.T).numpy()


def _figure(
    names: list[str],
    spectra: list[NDArray[np.float32]],
    masked: NDArray[np.bool_],
    frames: NDArray[np.int64],
    similarities: dict[str, list[NDArray[np.float32]]],
    title: str,
    config: SpeechConfig,
) -> Figure:
    from matplotlib.figure import Figure

    hop = config.model.hop / config.model.sample_rate
    # inches
    cell, label, header = 1.7, 1.15, 0.75
    width, height = label + cell * len(names), header + cell * (1 + len(similarities))
    figure = Figure(figsize=(width, height), facecolor="white")
    axes = figure.subplots(1 + len(similarities), len(names), squeeze=False)
    figure.subplots_adjust(left=label / width, right=1, bottom=0.06, top=1 - header / height, wspace=0.12, hspace=0.12)
    for column, (name, spectrum) in enumerate(zip(names, spectra, strict=True)):
        axis = axes[0, column]
        seconds = len(spectrum) * HOP_SECONDS
        axis.imshow(spectrum.T, origin="lower", aspect="auto", cmap="Greys", extent=(0, seconds, 0, spectrum.shape[1]))
        # a bar above the spectrogram, so that it can still be read
        top = spectrum.shape[1]
        for frame in np.flatnonzero(masked[column, : frames[column]]):
            axis.axvspan(frame * hop, (frame + 1) * hop, ymin=0.93, color=MASK_COLOUR, linewidth=0)
        axis.set(xlim=(0, frames[column] * hop), ylim=(0, top * 1.1), xticks=[], yticks=[])
        axis.set_title(name.replace("/", "\n"), fontsize=7)
        for row, of_model in enumerate(similarities.values(), start=1):
            axis = axes[row, column]
            axis.imshow(of_model[column], cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
    for axis, name in zip(axes[:, 0], ("log-mel,\nmasked frames\nmarked", *similarities), strict=True):
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9, labelpad=6)
    figure.text(0, 1, title, fontsize=11, fontweight="bold", va="top")
    caption = "squares: cosine between the features of every two moments, red alike, blue opposite"
    figure.text(0, 1 - 0.22 / height, caption, fontsize=8, color="0.4", va="top")
    return figure
