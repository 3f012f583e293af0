"""What a speech encoder hears: log-mel spectrograms, their masks, and which moments it takes for alike."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from d2v_fast.config import SpeechConfig
from d2v_fast.data.listing import counted, print_listing
from d2v_fast.errors import DataError
from d2v_fast.evaluation.features import sequence_features
from d2v_fast.figures.sheet import PER_ROW, Sheet, Spacing, choose_samples, label_of, say_if_fewer
from d2v_fast.masking import span_mask_rows
from d2v_fast.modalities.speech.audio import AudioDataset
from d2v_fast.modalities.speech.log_mel import HOP_SECONDS, log_mel, mel
from d2v_fast.modalities.speech.samples import SpeechSamples
from d2v_fast.models.student import Student

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MASK_COLOR = "#c43b3b"
# of a recording: beyond, nothing can be made out in a picture
MAX_SECONDS = 4.0


class Recording(NamedTuple):
    """A recording to draw: its path below the data set's folder, and its waveform `[N]`, of zero mean and unit
    variance."""

    name: str
    waveform: Tensor


def choose_recordings(config: SpeechConfig, folder: Path | None, count: int) -> list[Recording]:
    """Recordings spread evenly over the held-out sample recordings, or over those of the run, or of `folder`; no two of
    them alike.

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
    seen: set[bytes] = set()

    def read(sample_id: int) -> Recording:
        waveform = dataset.whole(sample_id)[:most]
        content = waveform.numpy().tobytes()
        if content in seen:
            raise DataError("shown already")
        seen.add(content)
        return Recording(str(Path(dataset.path(sample_id)).relative_to(dataset.root)), waveform)

    found = list(choose_samples(len(dataset), count, read).values())
    say_if_fewer(len(found), count, "recordings")
    return found


def speech_figure(models: dict[str, Student], recordings: list[Recording], config: SpeechConfig, title: str) -> Figure:
    """One column per recording. Rows: the log-mel spectrogram with the masked frames of a first epoch, then for each
    model which frames have similar features.

    Args:
        models: encoders by the name of their row.
        recordings: of `choose_recordings`.
        title: stands above.
    """
    waveforms = [recording.waveform for recording in recordings]
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
    features = {
        name: sequence_features(model, waveforms, num_places=config.model.num_frames) for name, model in models.items()
    }
    sheet = Sheet(
        len(recordings),
        ("log-mel,\nmasked frames\nmarked", *models),
        Spacing(cell=1.6, above=0.35, below=0.3, gap=0.28, beside=0.45),
        title=title,
        caption="squares: cosine between the features of every two moments, red alike, blue opposite; of a longer "
        f"recording the first {MAX_SECONDS:g} s",
    )
    hop = config.model.hop / config.model.sample_rate
    for index, recording in enumerate(recordings):
        spectrum, *squares = sheet.axes(index)
        is_first = index % PER_ROW == 0
        _draw_spectrum(spectrum, recording.waveform, masked[index, : frames[index]], config, is_first)
        spectrum.set_title(label_of(recording.name), fontsize=6, pad=3, parse_math=False)
        seconds = frames[index] * hop
        for axis, of_model in zip(squares, features.values(), strict=True):
            similarity = self_similarity(of_model[index])
            # the first moment at the top left, as in a matrix
            place = (0, seconds, seconds, 0)
            axis.imshow(similarity, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest", extent=place)
            axis.tick_params(labelsize=6, length=2, pad=1)
            axis.locator_params(nbins=4)
            if is_first:
                axis.set_ylabel("s", fontsize=6, labelpad=1)
        squares[-1].set_xlabel("s", fontsize=6, labelpad=1)
    return sheet.figure


def _draw_spectrum(
    axis: Axes, waveform: Tensor, masked: NDArray[np.bool_], config: SpeechConfig, is_first: bool
) -> None:
    """The log-mel spectrogram over seconds and kHz, and above it a bar over each masked frame of `masked` `[T]`."""
    rate, hop = config.model.sample_rate, config.model.hop / config.model.sample_rate
    spectrum = log_mel(waveform, rate).numpy()
    seconds, bands = len(spectrum) * HOP_SECONDS, spectrum.shape[1]
    axis.imshow(spectrum.T, origin="lower", aspect="auto", cmap="Greys", extent=(0, seconds, 0, bands))
    for frame in np.flatnonzero(masked):
        axis.axvspan(frame * hop, (frame + 1) * hop, ymin=0.93, color=MASK_COLOR, linewidth=0)
    # bands are equally wide in mel
    kilohertz = [value for value in (0, 0.5, 1, 2, 4, 8, 16, 32, 64) if value <= rate / 2000]
    axis.set(xlim=(0, len(masked) * hop), ylim=(0, bands * 1.1))
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
    """Cosine of every pair of frames `[T, T]`, their mean over time taken out: what all frames share tells nothing."""
    centered = torch.nn.functional.normalize(features - features.mean(0), dim=-1)
    return (centered @ centered.T).numpy()
