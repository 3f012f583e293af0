"""Labeled recordings: what is trained on, held out and left out; batches with masks and targets; heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from d2v_fast.config import ConfigError, D2VConfig, parse_config
from d2v_fast.data.listing import describe_listing
from d2v_fast.data.makers import resolved
from d2v_fast.data.once import reading_once
from d2v_fast.data.order import MicroStep
from d2v_fast.errors import DataError
from d2v_fast.modalities.speech import labeled, source
from d2v_fast.modalities.speech.audio import AudioDataset
from d2v_fast.modalities.speech.labeled import recordings_held_out, recordings_to_train
from d2v_fast.modalities.speech.labeled_batches import held_out_recordings, labeled_recordings
from d2v_fast.modalities.speech.vocabulary import Vocabulary
from d2v_fast.objectives.build import build_objective
from tests.helpers.audio_files import tone, write_manifest
from tests.helpers.runs import TINY_CTC, tiny_raw

# 8 kHz and 160 samples per frame: 50 frames in a second
RATE = 8000
TEXTS = {"a/one": "one", "a/two": "two too", "b/three": "three", "b/four": "Four!"}


def section(objective: str = "ctc", **changes: Any) -> D2VConfig:
    """The `"d2v"` section of a tiny run, with its labels."""
    raw = tiny_raw(TINY_CTC, d2v__objective=objective, **changes)
    return resolved(parse_config(raw)).d2v


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four recordings of different lengths in two folders, with LibriSpeech's transcripts."""
    for number, name in enumerate(TEXTS):
        path = tmp_path / f"{name}.flac"
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, tone(0.5 + 0.1 * number, 300 + 100 * number, RATE), RATE)
    for part in "ab":
        lines = [f"{name[2:]} {text}\n" for name, text in TEXTS.items() if name[0] == part]
        (tmp_path / part / f"{part}.trans.txt").write_text("".join(lines))
    return tmp_path


def own(folder: Path, objective: str = "ctc", **changes: Any) -> D2VConfig:
    data = {"kind": "audio", "path": str(folder), "num_workers": 0, "min_seconds": 0.3, "max_seconds": 2.0}
    data |= {key.removeprefix("data__"): changes.pop(key) for key in list(changes) if key.startswith("data__")}
    return section(objective, d2v__data=data, **changes)


def test_parts_do_not_meet(folder: Path) -> None:
    config = own(folder, d2v__valid__fraction=0.25)
    train, held = recordings_to_train(config), recordings_held_out(config)
    assert sorted(train.labels + held.labels) == sorted(TEXTS.values())
    assert len(held.labels) == 1
    # the letters are those of the part to train on, and the transcript stays as it is
    assert set("".join(train.labels).replace(" ", "")) == set("".join(config.labels[2:]))
    by_class = own(folder, "classify", d2v__valid__fraction=0.25)
    assert by_class.labels == ("a", "b")
    assert sorted(recordings_held_out(by_class).labels) == ["a", "b"]


@pytest.mark.parametrize("objective", ["ctc", "classify"])
def test_recordings_are_listed_once(objective: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed: list[object] = []

    def listing(*sections: Any) -> AudioDataset:
        listed.append(sections[0])
        return AudioDataset(*sections)

    monkeypatch.setattr(labeled, "AudioDataset", listing)
    with reading_once():
        config = own(folder, objective, d2v__valid__fraction=0.25)
        assert labeled_recordings(config).num_samples + held_out_recordings(config).num_samples == 4
    assert len(listed) == 1


def test_manifest_with_letters_and_dictionary(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = [f"{name}.flac" for name in reversed(TEXTS)]
    counts = [soundfile.info(folder / name).frames for name in names]
    manifest = write_manifest(folder / "train.tsv", folder, names, counts)
    letters = [" ".join(f"{text} ".replace(" ", "|")) for text in reversed(TEXTS.values())]
    (folder / "train.ltr").write_text("\n".join(letters) + "\n")
    (folder / "dict.ltr.txt").write_text("".join(f"{letter} 1\n" for letter in "|enothrwf"))
    config = own(folder, data__path=str(manifest), data__letter_case="lower", d2v__valid__path=str(manifest))
    assert config.labels == ("<pad>", "<s>", "</s>", "<unk>", *"|enothrwf")
    chosen = recordings_to_train(config)
    assert dict(zip(chosen.dataset.names(), chosen.labels, strict=True)) == {
        "a/one.flac": "one",
        "a/two.flac": "two too",
        "b/four.flac": "four!",
        "b/three.flac": "three",
    }
    said = describe_listing(chosen.dataset.listing, "")
    left_out = "left out: 2 characters of transcripts outside the vocabulary ('u' 1, '!' 1)"
    assert left_out in said
    recordings_held_out(config)
    assert f"held-out recordings: {left_out}" in caplog.messages


def test_letters_of_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "fill", dict)
    raw = tiny_raw(TINY_CTC, d2v__finetune={"source": str(tmp_path)})["d2v"]
    (tmp_path / "vocab.json").write_text('{"<pad>": 1, "|": 0, "x": 2}')
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text('{"architectures": ["Data2VecAudioForCTC"]}')
    assert source.fill_speech(raw)["labels"] == ["|", "<pad>", "x"]
    # names in the file have precedence
    named = [{**raw, "labels": ["<pad>", "|", "y"]}, {**raw, "data": {**raw["data"], "vocabulary": "z"}}]
    assert [source.fill_speech(one) for one in named] == named
    classify = {**raw, "objective": "classify"}
    assert source.fill_speech(classify) == classify
    (tmp_path / "config.json").write_text('{"architectures": ["Data2VecAudioModel"]}')
    assert source.fill_speech(raw) == raw
    # a run has them in its configuration
    (tmp_path / "checkpoints").mkdir()
    run = section()
    monkeypatch.setattr(source, "read_run_config", lambda folder: run)
    assert source.fill_speech(raw)["labels"] == list(run.labels)
    run = section("classify")
    assert source.fill_speech(raw) == raw


def test_what_is_left_out(folder: Path) -> None:
    soundfile.write(folder / "a" / "long.flac", tone(2.5, rate=RATE), RATE)
    soundfile.write(folder / "a" / "none.flac", tone(0.5, rate=RATE), RATE)
    rows = [
        *((name, text) for name, text in TEXTS.items()),
        ("a/long", "long"),
        ("a/one", "one"),
        ("b/three", "three"),
        ("gone", "x"),
    ]
    rows = [(name, {"a/two": " ", "b/three": "e" * 19}.get(name, text)) for name, text in rows]
    table = folder / "table.tsv"
    table.write_text("path\ttext\n" + "".join(f"{name}\t{text}\n" for name, text in rows))
    chosen = recordings_to_train(own(folder, data__labels_path=str(table), d2v__valid__path=str(folder)))
    # 0.7 s are 35 frames: 19 equal letters, 18 blanks between them and a boundary need 38
    assert sorted(chosen.labels) == ["Four!", "one"]
    said = describe_listing(chosen.dataset.listing, "")
    for line in (
        "left out: 1 recording without a transcript",
        "left out: 1 recording with an empty transcript",
        "left out: 1 recording longer than `d2v.data.max_seconds` (2 s)",
        "left out: 1 recording with more letters than CTC can write in their frames",
        "not used: 1 row of 'table.tsv' without a recording",
    ):
        assert line in said, said


def test_bad_data(folder: Path) -> None:
    config = own(folder)
    with pytest.raises(DataError, match=r"`d2v.valid.path` must be a folder, but '.*gone' does not exist"):
        recordings_held_out(own(folder, d2v__valid__path=str(folder / "gone")))
    (folder / "empty.ltr").write_text("")
    with pytest.raises(DataError, match=r"`d2v.data.path` must be fairseq's manifest \(.tsv\) for the transcripts"):
        own(folder, data__labels_path=str(folder / "empty.ltr"))
    few = config.model_copy(update={"labels": ("<pad>", "|", "z")})
    with pytest.raises(DataError, match=r"(?s)every one is left out:.*transcript has no letter of the vocabulary"):
        recordings_to_train(few)
    with pytest.raises(DataError, match=r"`d2v.data.path` must leave at least one recording to validate on"):
        recordings_held_out(few)
    for path in (folder / "a").iterdir():
        path.rename(folder / path.name)
    with pytest.raises(DataError, match=r"must hold recordings of at least 2 classes, but holds 1"):
        own(folder, "classify")
    by_class = own(folder, "classify", d2v__labels=["a", "b"])
    with pytest.raises(DataError, match=r'must hold samples of every class in `d2v.labels`, but has none of "a"'):
        recordings_to_train(by_class)
    with pytest.raises(DataError, match=r'but has some of "b"'):
        recordings_held_out(own(folder, "classify", d2v__labels=["a", "c"], d2v__valid__path=str(folder)))
    with pytest.raises(ConfigError, match=r'`d2v.valid.metric` must be "wer" or "cer" or "loss", but is "accuracy"'):
        own(folder, d2v__valid__metric="accuracy")


def test_batches(folder: Path) -> None:
    config = own(folder, d2v__valid__path=str(folder), d2v__mask={"prob": 0.6, "length": 3, "channel_length": 4})
    maker = labeled_recordings(config)
    ids = np.array([2, 0, 3])
    batch = maker.make(MicroStep(4, ids, ids), 5).batch
    vocabulary = Vocabulary(config.labels)
    assert batch.lengths.tolist() == [40, 25, 35]
    spelled = [vocabulary.encode(text) for text in ("Four!", "one", "three")]
    assert batch.targets.tolist() == [letter for one in spelled for letter in one]
    assert batch.target_lengths.tolist() == list(map(len, spelled))
    # masks of frames and channels are those of (seed, epoch, sample), whatever else is in the batch
    alone = maker.make(MicroStep(4, ids[1:2], ids), 5).batch
    frames, width = int(batch.lengths.max()), config.model.width
    of_sample = batch.rows[(batch.rows >= frames) & (batch.rows < 2 * frames)] - frames
    assert of_sample.tolist() == alone.rows.tolist()
    channels = batch.channel_rows[(batch.channel_rows >= width) & (batch.channel_rows < 2 * width)] - width
    assert channels.tolist() == alone.channel_rows.tolist()
    assert len(alone.rows) > 0
    other = maker.make(MicroStep(5, ids[1:2], ids), 5).batch
    assert other.rows.tolist() != alone.rows.tolist()
    held = held_out_recordings(config)
    assert held.targets == ["Four!", "three", "two too", "one"]
    assert held.make(MicroStep(0, ids, ids), 0).batch.channel_rows is None


def test_held_out_recordings_must_be_readable(folder: Path) -> None:
    held = held_out_recordings(own(folder, d2v__valid__path=str(folder)))
    content = (folder / "b" / "three.flac").read_bytes()
    (folder / "b" / "three.flac").write_bytes(content[:200] + bytes(len(content) - 200))
    with pytest.raises(DataError, match=r"held-out recordings must be readable. Repair or remove .*three.flac"):
        held.make(MicroStep(0, np.arange(4), np.arange(4)), 0)


@pytest.mark.parametrize("objective", ["ctc", "classify"])
@pytest.mark.parametrize("encoder", ["data2vec", "data2vec2"])
def test_padding_changes_nothing(objective: str, encoder: str) -> None:
    """A recording has the same prediction and loss alone and beside longer ones."""
    changes = {} if encoder == "data2vec" else {"d2v__model__decoder": {"width": 8, "depth": 1, "groups": 2}}
    config = section(objective, d2v__encoder=encoder, **changes)
    torch.manual_seed(0)
    model = build_objective(config).eval()
    held = held_out_recordings(config)
    ids = np.array([0, 60, 119])
    together = held.make(MicroStep(0, ids, ids), 0).batch
    alone = held.make(MicroStep(0, ids[2:], ids[2:]), 0).batch
    assert together.lengths is not None
    with torch.no_grad():
        both, one = model(together, None, False), model(alone, None, False)
    torch.testing.assert_close(both.losses[2:], one.losses, rtol=1e-4, atol=1e-4)
    answers = model.answers(both, together)[2], model.answers(one, alone)[0]
    assert answers[0].get("transcript") == answers[1].get("transcript")
    assert answers[0].get("classes") == answers[1].get("classes")


def test_masks_and_held_convolutions() -> None:
    config = section(d2v__finetune__source="given", d2v__mask={"prob": 0.5, "length": 4, "channel_length": 4})
    torch.manual_seed(0)
    model = build_objective(config)
    ids = np.arange(4)
    batch = labeled_recordings(config).make(MicroStep(0, ids, ids), 0).batch
    frames = model.student.front_end.masked(batch)
    D = config.model.width
    masked = torch.zeros(frames[..., 0].numel(), dtype=torch.bool)
    masked[batch.rows] = True
    dropped = torch.zeros(len(frames), D, dtype=torch.bool)
    dropped.view(-1)[batch.channel_rows] = True
    expected = model.student.front_end(batch.inputs).flatten(0, 1)
    expected[masked] = model.student.front_end.mask_token
    expected = expected.view_as(frames).masked_fill(dropped[:, None], 0.0)
    torch.testing.assert_close(frames, expected)
    assert dropped.any()
    model(batch, None, True).loss_sum.backward()
    without = {name for name, value in model.named_parameters() if value.grad is None}
    held = {name for name, rate in model.rates().items() if rate.scale == 0.0}
    assert without == held
    assert {name.split(".convolutions.")[0] for name in held} == {"student.front_end"}
