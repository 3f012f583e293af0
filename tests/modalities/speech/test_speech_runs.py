"""Test whole speech runs: resuming, several processes, the loader's batches, the probe and the dry run."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from d2v_fast.config import BatchSplit, SpeechConfig, parse_config
from d2v_fast.data import batch_maker
from d2v_fast.modalities.speech.log_mel import log_mel
from d2v_fast.training.run_state import RunState
from tests.helpers.loaders import make_loader
from tests.helpers.marks import needs_deepspeed
from tests.helpers.runs import TINY_SPEECH, figures, leave_out_reports, run_forked, run_here, tiny_file


def speech_file(folder: Path, **changes: Any) -> Path:
    return tiny_file(folder, TINY_SPEECH, **changes)


def make_config(**data: Any) -> SpeechConfig:
    raw = copy.deepcopy(TINY_SPEECH)
    raw["d2v"]["data"] |= data
    config = parse_config(raw).d2v
    assert isinstance(config, SpeechConfig)
    return config


@pytest.mark.parametrize(
    "num_processes", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=needs_deepspeed)]
)
def test_resume_is_bit_exact(num_processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_out_reports(monkeypatch.setattr)
    file, output = speech_file(tmp_path, d2v__schedule={"steps": 6, "kind": "constant"}), tmp_path / "output"
    arguments = ["--ds_config", file, "--run"]
    options: dict[str, Any] = {"output": output, "num_processes": num_processes}
    success = [0] * num_processes
    assert run_forked(*arguments, "whole", **options) == success, output.read_text()
    assert run_forked(*arguments, "r", "--set", "d2v.schedule.steps=3", **options) == success, output.read_text()
    assert run_forked(*arguments, "r", "--resume", **options) == success, output.read_text()
    assert figures(tmp_path, "r") == figures(tmp_path, "whole")


@needs_deepspeed
@pytest.mark.parametrize("positions", ["shared", pytest.param("averaged", marks=pytest.mark.slow)])
def test_stages_agree(positions: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer-drop skips the same utterances of unequal length, whichever process has them."""
    leave_out_reports(monkeypatch.setattr)
    changes = {"d2v__schedule": {"steps": 3}, "d2v__model__position_in_teacher": positions}
    changes |= {f"d2v__model__{name}": 0.0 for name in ("dropout", "attention_dropout")}
    losses = {}
    for stage, num_processes in ((0, 1), (1, 2), (3, 2)):
        name, output = f"stage-{stage}", tmp_path / f"output-{stage}"
        file = speech_file(tmp_path, **changes, zero_optimization__stage=stage)
        statuses = run_forked("--ds_config", file, "--run", name, output=output, num_processes=num_processes)
        assert statuses == [0] * num_processes, output.read_text()
        losses[stage] = [(step[2], step[7]) for step in figures(tmp_path, name)]
    for stage in (1, 3):
        np.testing.assert_allclose(losses[stage], losses[0], rtol=1e-4)


@needs_deepspeed
@pytest.mark.parametrize("stage", [0, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (2, 3))])
def test_layer_drop_in_several_processes(stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not hang if all utterances of one process skip a block and some of the other do not."""
    leave_out_reports(monkeypatch.setattr)
    output = tmp_path / "output"
    file = speech_file(tmp_path, zero_optimization__stage=stage, d2v__model__layer_drop=0.9, d2v__schedule__steps=6)
    assert run_forked("--ds_config", file, "--run", "r", output=output, num_processes=2) == [0, 0], output.read_text()
    assert len(figures(tmp_path, "r")) == 6


@pytest.mark.parametrize("lengths", ["pad", "crop"])
@pytest.mark.parametrize("equal_counts", [False, True])
def test_any_split_gives_the_same_samples(lengths: str, equal_counts: bool) -> None:
    config = make_config(lengths=lengths)
    config = config.model_copy(update={"mask": config.mask.model_copy(update={"equal_counts": equal_counts})})
    maker = batch_maker(config)

    def steps(micro_batch: int, accumulation: int, world_size: int) -> list[dict[int, tuple[Any, ...]]]:
        split = BatchSplit.of(micro_batch, accumulation, world_size)
        ranks = [make_loader(maker, config, split, rank=rank, num_steps=5) for rank in range(world_size)]
        found = []
        for parts in zip(*ranks, strict=True):
            seen: dict[int, tuple[Any, ...]] = {}
            num_rows = 0
            for batch in (batch for part in parts for batch in part.micro_batches):
                num_frames = config.model.num_frames(batch.inputs.shape[1])
                frames = torch.full((len(batch.inputs),), num_frames) if batch.lengths is None else batch.lengths
                num_rows += len(batch.rows)
                for b, sample in enumerate(batch.sample_ids.tolist()):
                    rows = batch.rows[batch.rows // num_frames == b] % num_frames
                    assert 1 <= len(rows) < frames[b]
                    assert rows.max() < frames[b]
                    used = batch.inputs[b, : config.model.num_samples(int(frames[b]))]
                    seen[sample] = (int(frames[b]), tuple(rows.tolist()), used.numpy().tobytes())
            assert {part.num_rows for part in parts} == {num_rows}
            found.append(seen)
        return found

    whole = steps(24, 1, 1)
    assert all(len(step) <= 24 for step in whole)
    if lengths == "crop":
        for step in whole:
            [num_frames] = {frames for frames, _, _ in step.values()}
            assert num_frames % 8 == 0 or num_frames < 8
    if equal_counts:
        assert all(len({len(rows) for _, rows, _ in step.values()}) == 1 for step in whole)
    assert steps(4, 3, 2) == whole
    assert steps(12, 1, 2) == whole


def test_every_recording_once_per_epoch() -> None:
    config = make_config()
    loader = make_loader(batch_maker(config), config, BatchSplit.of(24), num_steps=200)
    seen: list[int] = []
    for number, step in enumerate(loader, start=1):
        [batch] = step.micro_batches
        seen += batch.sample_ids.tolist()
        assert loader.order.samples_after(number) == len(seen)
        if number == loader.order.steps_per_epoch:
            break
    assert sorted(seen) == list(range(300))


def test_probe_and_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = speech_file(tmp_path, d2v__schedule={"steps": 2})
    assert run_here("--ds_config", file, "--dry-run") == 0
    text = capsys.readouterr().out
    assert "300 recordings" in text
    assert "memory" in text
    assert run_here("--ds_config", file, "--run", "r") == 0
    found = json.loads((tmp_path / "runs" / "r" / "probe.json").read_text())[-1]
    for question in ("word", "voice"):
        assert list(found[question]) == ["untrained", "student", "teacher", "log-mel average"]
        assert all(0 <= scores["linear"] <= 100 for scores in found[question].values())
    # any description of a sound classifies words and voices far better than chance
    assert found["voice"]["log-mel average"]["linear"] > 60
    assert found["word"]["log-mel average"]["linear"] > 10
    out = capsys.readouterr().out
    assert "accuracy in % on words, new voices" in out
    assert "accuracy in % on voices, new words" in out


def test_log_mel_of_a_tone() -> None:
    """A tone is in the band given by the mel scale, at any sample rate."""
    for rate in (8_000, 16_000):
        for frequency in (200.0, 1000.0, 3000.0):
            tone = torch.sin(2 * torch.pi * frequency * torch.arange(rate) / rate)
            bands = log_mel(tone, rate)
            assert bands.shape[1] == 40
            assert abs(len(bands) - 98) <= 3
            highest = 2595 * np.log10(1 + rate / 2 / 700)
            expected = 2595 * np.log10(1 + frequency / 700) / highest * 41 - 1
            assert abs(int(bands.mean(0).argmax()) - expected) <= 1


def test_teacher_is_whole_for_the_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole teacher combines its own part with the student's convolutions."""
    leave_out_reports(monkeypatch.setattr)
    kept: list[Any] = []
    original = RunState.save

    def save(self: RunState, *arguments: Any, **options: Any) -> None:
        kept.append(self.whole_encoders())
        original(self, *arguments, **options)

    monkeypatch.setattr(RunState, "save", save)
    assert run_here("--ds_config", speech_file(tmp_path, d2v__schedule={"steps": 3}), "--run", "r") == 0
    student, teacher = kept[-1]
    assert teacher.front_end is student.front_end
    assert teacher.context is not student.context
    waveform = torch.randn(1, 4000)
    assert not torch.equal(teacher.eval()(waveform).last_hidden, student.eval()(waveform).last_hidden)
