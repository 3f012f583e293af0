"""Log-mel spectrograms: the baseline for speech features, and the waveform's image in figures."""

from __future__ import annotations

import math

import torch
from torch import Tensor

WINDOW_SECONDS, HOP_SECONDS, NUM_BANDS = 0.025, 0.01, 40
_FLOOR = 1e-6


def log_mel(waveform: Tensor, sample_rate: int) -> Tensor:
    """Return the log power in mel bands (O'Shaughnessy 1987), with Hann windows of 25 ms every 10 ms.

    The bands are triangular and equally wide in mel, from 0 Hz to half the sample rate.

    Args:
        waveform: fp32 `[N]`; padded with zeros to at least one window.
        sample_rate: Sample rate in Hz.

    Returns:
        fp32 `[frames, NUM_BANDS]`.
    """
    window = round(WINDOW_SECONDS * sample_rate)
    waveform = torch.nn.functional.pad(waveform, (0, max(0, window - len(waveform))))
    size = 1 << (window - 1).bit_length()
    spectrum = torch.stft(
        waveform,
        size,
        hop_length=round(HOP_SECONDS * sample_rate),
        win_length=window,
        window=torch.hann_window(window),
        center=len(waveform) < size,
        return_complex=True,
        pad_mode="constant",
    )
    power = spectrum.abs().square()
    return (power.T @ _filters(size, sample_rate) + _FLOOR).log()


def mel(hertz: float) -> float:
    """Convert a frequency in Hz to mel."""
    return 2595 * math.log10(1 + hertz / 700)


def _filters(size: int, sample_rate: int) -> Tensor:
    """Return the triangular filters, fp32 `[size // 2 + 1, NUM_BANDS]`."""
    edges = 700 * (10 ** (torch.linspace(0, mel(sample_rate / 2), NUM_BANDS + 2) / 2595) - 1)
    frequencies = torch.linspace(0, sample_rate / 2, size // 2 + 1)[:, None]
    rising = (frequencies - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequencies) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp(min=0)
