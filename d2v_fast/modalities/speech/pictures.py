"""Figures of speech encoders: log-mel spectrograms with masks, and the similarity of frames."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from d2v_fast.config import MaskedSpeechConfig, SpeechConfig
from d2v_fast.data.listing import counted, print_listing
from d2v_fast.errors import DataError
from d2v_fast.evaluation.features import sequence_features
from d2v_fast.figures.sheet import MAX_MASKS, PER_ROW, Sheet, Spacing, choose_samples, label_of, say_if_fewer
from d2v_fast.masking import several_sequence_masks, span_mask_rows
from d2v_fast.modalities.speech.audio import AudioDataset
from d2v_fast.modalities.speech.config import RecordingsConfig
from d2v_fast.modalities.speech.log_mel import HOP_SECONDS, log_mel, mel
from d2v_fast.modalities.speech.samples import SpeechSamples
from d2v_fast.models.student import Student

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MASK_COLOR = "#c43b3b"
# longer recordings would be illegible
MAX_SECONDS = 4.0


class Recording(NamedTuple):
    """A recording to draw: its path below the data set's folder, and its normalized waveform fp32 `[N]`."""

    name: str
    waveform: Tensor


def choose_recordings(config: RecordingsConfig, folder: Path | None, count: int) -> list[Recording]:
    """Choose distinct recordings, spread evenly over `folder`, the held-out sample recordings or the run's data.

    Raises:
        DataError: No recording is readable.
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
    seen: set[bytes] = set()

    def read(sample_id: int) -> Recording:
        waveform = dataset.whole(sample_id)[:most]
        content = waveform.numpy().tobytes()
        if content in seen:
            raise DataError("a duplicate")
        seen.add(content)
        return Recording(str(Path(dataset.path(sample_id)).relative_to(dataset.root)), waveform)

    found = list(choose_samples(len(dataset), count, read).values())
    say_if_fewer(len(found), count, "recordings")
    return found


def speech_figure(
    models: dict[str, Student],
    recordings: list[Recording],
    config: SpeechConfig | MaskedSpeechConfig,
    title: str,
) -> Figure:
    """Draw one column per recording: its log-mel spectrogram with masked frames, and each model's frame similarity.

    Args:
        models: Encoders by the name of their row.
        recordings: Result of `choose_recordings`.
        config: The run's configuration. The masks are those of its first epoch.
        title: Title of the figure.
    """
    waveforms = [recording.waveform for recording in recordings]
    frames = np.array([config.model.num_frames(len(waveform)) for waveform in waveforms], dtype=np.int64)
    masked, marks = _draw_masks(config, frames)
    features = {
        name: sequence_features(model, waveforms, num_places=config.model.num_frames) for name, model in models.items()
    }
    sheet = Sheet(
        len(recordings),
        (f"log-mel,\n{marks}\nmarked", *models),
        Spacing(cell=1.6, above=0.35, below=0.3, gap=0.28, beside=0.45),
        title=title,
        caption=f"squares: cosine of each pair of frames, red similar, blue opposite; at most {MAX_SECONDS:g} s",
    )
    hop = config.model.hop / config.model.sample_rate
    for index, recording in enumerate(recordings):
        spectrum, *squares = sheet.axes(index)
        is_first = index % PER_ROW == 0
        _draw_spectrum(spectrum, recording.waveform, masked[index, :, : frames[index]], config, is_first)
        spectrum.set_title(label_of(recording.name), fontsize=6, pad=3, parse_math=False)
        seconds = frames[index] * hop
        for axis, of_model in zip(squares, features.values(), strict=True):
            similarity = self_similarity(of_model[index])
            # time runs from the top left, as in a matrix
            place = (0, seconds, seconds, 0)
            axis.imshow(similarity, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest", extent=place)
            axis.tick_params(labelsize=6, length=2, pad=1)
            axis.locator_params(nbins=4)
            if is_first:
                axis.set_ylabel("s", fontsize=6, labelpad=1)
        squares[-1].set_xlabel("s", fontsize=6, labelpad=1)
    return sheet.figure


def _draw_masks(config: SpeechConfig | MaskedSpeechConfig, frames: NDArray[np.int64]) -> tuple[NDArray[np.bool_], str]:
    """Return masks of recordings with so many frames, bool `[B, M, T]`, and what they mark in words."""
    ids = np.arange(len(frames))
    if isinstance(config, MaskedSpeechConfig):
        several = config.mask
        rows = several_sequence_masks(
            *(config.run.seed, 0, ids, frames, several.prob, several.length, several.prob_adjust),
            num_masks=several.num_masks,
            inverse=several.inverse,
        ).rows
        num, shown = several.num_masks, min(several.num_masks, MAX_MASKS)
        marks = f"{shown} of {num} masks"
    else:
        mask = config.mask
        rows = span_mask_rows(
            *(config.run.seed, 0, ids, int(frames.max()), mask.prob, mask.length),
            min_masks=mask.min_masks,
            equal_counts=False,
            lengths=frames,
        )
        num, shown, marks = 1, 1, "masked frames"
    masked = np.zeros((len(frames), num, int(frames.max())), dtype=np.bool_)
    masked.flat[rows] = True
    return masked[:, :shown], marks


def _draw_spectrum(
    axis: Axes, waveform: Tensor, masked: NDArray[np.bool_], config: RecordingsConfig, is_first: bool
) -> None:
    """Draw the log-mel spectrogram over seconds and kHz, and above it a bar at each masked frame of `masked` `[M, T]`.

    Bars of several masks lie above each other.
    """
    rate, hop = config.model.sample_rate, config.model.hop / config.model.sample_rate
    spectrum = log_mel(waveform, rate).numpy()
    seconds, bands = len(spectrum) * HOP_SECONDS, spectrum.shape[1]
    axis.imshow(spectrum.T, origin="lower", aspect="auto", cmap="Greys", extent=(0, seconds, 0, bands))
    # the part of the axis above the spectrum
    height = 0.07 / len(masked)
    for number, frame in np.argwhere(masked):
        top = 1 - number * height
        bottom = top - height if len(masked) == 1 else top - 0.8 * height
        axis.axvspan(frame * hop, (frame + 1) * hop, ymin=bottom, ymax=top, color=MASK_COLOR, linewidth=0)
    # bands are equally wide in mel
    kilohertz = [value for value in (0, 0.5, 1, 2, 4, 8, 16, 32, 64) if value <= rate / 2000]
    axis.set(xlim=(0, masked.shape[1] * hop), ylim=(0, bands * 1.1))
    axis.set_yticks(
        [bands * mel(1000 * value) / mel(rate / 2) for value in kilohertz], [f"{value:g}" for value in kilohertz]
    )
    axis.locator_params(axis="x", nbins=4)
    axis.tick_params(labelsize=6, length=2, pad=1)
    if is_first:
        axis.set_ylabel("kHz", fontsize=6, labelpad=1)
    else:
        axis.tick_params(labelleft=False)


def self_similarity(features: Tensor) -> NDArray[np.float32]:
    """Return the cosine similarity of each pair of frames, fp32 `[T, T]`, after subtracting the mean over time."""
    centered = torch.nn.functional.normalize(features - features.mean(0), dim=-1)
    return (centered @ centered.T).numpy()
