"""Test the bundled sample set: its contents, size, split by voices, and presence in the installed package."""

from __future__ import annotations

import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from d2v_fast.errors import DataError
from d2v_fast.modalities.speech import audio as audio_module
from d2v_fast.modalities.speech.config import SpeechDataConfig, SpeechModelConfig
from d2v_fast.modalities.speech.samples import FOLDER, HELD_OUT_VOICES, SpeechSamples, speech_for_probe

sf = pytest.importorskip("soundfile")

DATA = SpeechDataConfig(min_seconds=0.3, max_seconds=1.0)
MODEL = SpeechModelConfig()


def as_config(data: object = DATA, model: object = MODEL) -> object:
    return SimpleNamespace(data=data, model=model)


def test_index_says_what_is_there() -> None:
    lines = (FOLDER / "index.tsv").read_text(encoding="utf-8").splitlines()
    assert lines[0].split("\t") == ["path", "word", "voice", "speed", "samples"]
    rows = [line.split("\t") for line in lines[1:]]
    files = {path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.flac")}
    assert {row[0] for row in rows} == files
    assert len(rows) == len(files) == 420
    assert {(row[1], row[2]) for row in rows} == {
        (word, voice) for _, word, _, _, _ in rows for _, _, voice, _, _ in rows
    }
    for path, _, _, _, samples in rows:
        info = sf.info(FOLDER / path)
        assert (info.samplerate, info.channels, info.subtype) == (16_000, 1, "PCM_16")
        assert info.frames == int(samples)
        assert 0.3 < info.duration < 0.8
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 4_000_000


def test_splits_by_voice(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    read_header = audio_module.read_header
    monkeypatch.setattr(audio_module, "read_header", lambda *given: opened.append(given[0]) or read_header(*given))
    train, test = SpeechSamples(DATA, MODEL), SpeechSamples(DATA, MODEL, "test")
    # the index is trusted after a check of a few headers
    assert len(opened) == 2 * audio_module.NUM_CHECKED
    assert (len(train), len(test)) == (300, 120)
    for dataset, held_out in ((train, False), (test, True)):
        voices = {dataset.path(i).split("/")[-2] for i in range(len(dataset))}
        assert len(voices) == (4 if held_out else 10)
        assert {voice in HELD_OUT_VOICES for voice in voices} == {held_out}
    waves, bad = train.read(np.arange(300), train.lengths, 0, 0)
    assert bad == ()
    assert waves.shape == (300, train.lengths.max())


def test_other_rate() -> None:
    dataset = SpeechSamples(DATA, SpeechModelConfig(sample_rate=8000))
    expected = [length // 2 for length in SpeechSamples(DATA, MODEL).lengths.tolist()]
    assert dataset.lengths.tolist() == expected


def test_published_limits_leave_none() -> None:
    with pytest.raises(DataError, match=r"`d2v\.data\.min_seconds` must leave some recordings, but all 300"):
        SpeechSamples(SpeechDataConfig(), MODEL)


def test_probe_data() -> None:
    probe = speech_for_probe(as_config())  # type: ignore[arg-type]
    assert len(probe.waveforms) == len(probe.words) == len(probe.voices) == 420
    assert (len(probe.word_names), len(probe.voice_names)) == (30, 14)
    assert probe.words.dtype == probe.voices.dtype == probe.word_train_indices.dtype == torch.int64
    for wave in probe.waveforms:
        assert wave.dtype == torch.float32
        assert abs(wave.mean()) < 1e-4
        # the loudest sample is at a tenth of full scale, so the epsilon of the norm matters
        assert 0.85 < wave.var(correction=0) < 1.01
    new_voices = [probe.voice_names.index(voice) for voice in HELD_OUT_VOICES]
    assert probe.voices[probe.word_test_indices].unique().tolist() == sorted(new_voices)
    assert set(new_voices).isdisjoint(probe.voices[probe.word_train_indices].tolist())
    together = torch.cat([probe.word_train_indices, probe.word_test_indices])
    assert together.sort().values.equal(torch.arange(420))
    # each class is in both parts, each value of the other label in one part only
    assert probe.words[probe.word_train_indices].unique().tolist() == list(range(30))
    assert probe.words[probe.word_test_indices].unique().tolist() == list(range(30))
    train, test = probe.voice_train_indices, probe.voice_test_indices
    assert torch.cat([train, test]).sort().values.equal(probe.word_train_indices)
    assert (len(train), len(test)) == (230, 70)
    assert probe.voices[train].unique().equal(probe.voices[test].unique())
    assert set(probe.words[train].tolist()).isdisjoint(probe.words[test].tolist())


def test_probe_data_is_of_the_recordings_of_the_splits() -> None:
    probe = speech_for_probe(as_config())  # type: ignore[arg-type]
    train = SpeechSamples(DATA, MODEL)
    waves = {wave.numpy().tobytes() for wave in probe.waveforms}
    assert len(waves) == 420
    assert all(train.whole(i).numpy().tobytes() in waves for i in range(0, 300, 37))
    with pytest.raises(DataError, match="must be a speech model"):
        speech_for_probe(as_config(model=object()))  # type: ignore[arg-type]


def espeak_version() -> str:
    if shutil.which("espeak-ng") is None:
        return "none"
    return subprocess.run(["espeak-ng", "--version"], capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
@pytest.mark.skipif(": 1.51 " not in espeak_version(), reason="requires eSpeak NG 1.51, which made them")
def test_made_again_they_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests import make_speech_samples

    assert tuple(list(make_speech_samples.VOICES)[-4:]) == HELD_OUT_VOICES
    monkeypatch.setattr(sys, "argv", ["make_speech_samples", "--check"])
    assert make_speech_samples.main() == 0
