"""Test figures of speech encoders: frame similarity, axes, and the choice of recordings."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from d2v_fast.config import SpeechConfig, check_d2v
from d2v_fast.modalities.speech.pictures import Recording, choose_recordings, self_similarity, speech_figure
from d2v_fast.objectives.build import build_model
from tests.helpers.masked_models import masked_config
from tests.helpers.runs import TINY_SPEECH


def test_self_similarity() -> None:
    """Alternating frames are similar within a kind and opposite between kinds, whatever offset they share."""
    kinds = torch.tensor([1.0, -1.0]).repeat(4)[:, None] * torch.randn(1, 6) + 100 * torch.randn(1, 6)
    expected = torch.tensor([1.0, -1.0]).repeat(4)
    np.testing.assert_allclose(self_similarity(kinds), torch.outer(expected, expected), atol=1e-3)


def test_recordings_have_axes_and_none_is_shown_twice(tmp_path: Path) -> None:
    """Skip a silent recording; distinguish files that differ only in their extension."""
    raw = copy.deepcopy(TINY_SPEECH["d2v"])
    raw["data"] |= {"kind": "audio", "path": str(tmp_path)}
    config, problems = check_d2v(raw)
    assert isinstance(config, SpeechConfig), problems
    rate = config.model.sample_rate
    noise = np.random.default_rng(0).normal(0, 0.1, (4, rate))
    soundfile.write(tmp_path / "a.wav", noise[0], rate)
    soundfile.write(tmp_path / "a.flac", noise[1], rate)
    soundfile.write(tmp_path / "b.wav", np.zeros(rate), rate)
    soundfile.write(tmp_path / "c.wav", noise[2], rate)
    (tmp_path / "d.wav").write_bytes((tmp_path / "c.wav").read_bytes())
    recordings = choose_recordings(config, None, 5)
    assert [recording.name for recording in recordings] == ["a.flac", "a.wav", "c.wav"]
    models = {"untrained": build_model(config).student}
    figure = speech_figure(models, recordings, config, "title")
    spectrum, square = figure.axes[:2]
    assert spectrum.get_ylabel() == "kHz"
    assert [text.get_text() for text in spectrum.get_yticklabels()] == ["0", "0.5", "1", "2", "4"]
    # half the rate is at the top of the bands; on the mel scale, 1 kHz is above a quarter of 4 kHz
    heights = spectrum.get_yticks()
    assert heights[-1] == pytest.approx(40)
    assert heights[2] == pytest.approx(40 * 999.99 / 2146.06, rel=1e-3)
    assert (square.get_xlabel(), square.get_ylabel()) == ("s", "s")
    assert square.get_xlim()[1] == pytest.approx(1.0, abs=0.03)
    assert spectrum.get_xlim() == pytest.approx(square.get_xlim())


def test_bars_of_several_masks_lie_above_each_other() -> None:
    config = masked_config("speech", mask={"num_masks": 4})
    rate = config.model.sample_rate
    recordings = [Recording(name, torch.randn(rate // 8)) for name in ("a", "b")]
    figure = speech_figure({"a model": build_model(config).student}, recordings, config, "title")
    assert figure.texts[0].get_text() == "log-mel,\n3 of 4 masks\nmarked"
    frames = config.model.num_frames(rate // 8)
    for axis in figure.axes[::2]:
        bottoms = Counter(round(bar.get_y(), 6) for bar in axis.patches)
        # every mask hides as many frames
        assert len(bottoms) == 3
        assert set(bottoms.values()) == {int(frames * 0.5)}
