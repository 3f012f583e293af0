"""Whole runs with captured steps, without a GPU: what is captured of every objective, and what is refused in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from d2v_fast.config import RunConfig
from d2v_fast.training import prepare
from tests.helpers.dry_capture import DryCapture
from tests.helpers.finetuning import TINY_CLASSIFY, logged
from tests.helpers.runs import TINY_2_SPEECH, TINY_2_TEXT, TINY_CTC, run_here, tiny_file

pytestmark = pytest.mark.usefixtures("quick_runs")

REFUSED = "some steps run without a CUDA graph (`d2v.run.cuda_graph`): "


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> DryCapture:
    """Let runs capture their steps; the capture refuses to read values on the host."""
    capture = DryCapture()
    monkeypatch.setattr(prepare, "CudaCapture", lambda device: capture)
    monkeypatch.setattr(RunConfig, "reason_not_to_capture", lambda config, size, device: None)
    return capture


def train(
    folder: Path, base: dict[str, Any], capsys: pytest.CaptureFixture[str], name: str = "r", **changes: Any
) -> list[str]:
    """Run 7 steps and return what was refused."""
    schedule = {"steps": 7, "warmup_steps": 1, "kind": "constant"}
    file = tiny_file(folder, base, d2v__schedule=schedule, d2v__run__save_every=100, **changes)
    assert run_here("--ds_config", file, "--run", name) == 0
    said = capsys.readouterr().out
    assert "nan" not in said
    return [line.removeprefix(REFUSED) for line in said.splitlines() if "cuda_graph" in line]


def classify_texts(folder: Path, objective: str) -> dict[str, Any]:
    """Return a configuration that classifies, or scores, short texts of one length."""
    pytest.importorskip("tokenizers")
    from tests.helpers.text_files import small_tokenizer

    (folder / "tokenizer").mkdir()
    small_tokenizer().save(folder / "tokenizer")
    metric = "accuracy" if objective == "classify" else "mse"
    rows = [f"some words {number % 10}\t{number % 2}" for number in range(60)]
    (folder / "train.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")
    return {
        **TINY_2_TEXT,
        "d2v": {
            **{key: TINY_2_TEXT["d2v"][key] for key in ("schedule", "run", "modality")},
            "objective": objective,
            "encoder": "data2vec",
            "model": {"vocab_size": 360, "max_positions": 32, "width": 16, "depth": 2, "heads": 2, "padding_id": 1},
            "data": {
                "path": str(folder / "train.tsv"),
                "tokenizer": str(folder / "tokenizer"),
                "num_workers": 0,
                "block_size": 32,
            },
            "valid": {"fraction": 0.2, "every_epochs": 0, "every_steps": 7, "metric": metric},
        },
    }


@pytest.mark.parametrize("base", [TINY_2_SPEECH, TINY_2_TEXT], ids=["speech 2.0", "text 2.0"])
def test_version_2(
    base: dict[str, Any], capture: DryCapture, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Samples of equal lengths are captured; padded ones have another number of masked places in every batch."""
    data = {**base["d2v"]["data"], "lengths": "crop"} if base is TINY_2_SPEECH else base["d2v"]["data"]
    # on a CPU, attention with ALiBi reads the seed of its dropout on the host
    refused = train(tmp_path, base, capsys, d2v__data=data, d2v__model__attention_dropout=0.0, train_batch_size=4)
    assert refused == []
    assert capture.records >= 2


def test_classify_images(capture: DryCapture, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Mixed samples, layer-wise rates and an average: all in the graphs, once the encoder is no longer frozen."""
    changes = {"d2v__data__mixup": 0.5, "d2v__run__kept_samples": "drawn", "d2v__valid__every_steps": 7}
    finetune = {"layer_decay": 0.8, "average_decay": 0.9, "freeze_encoder_steps": 1}
    refused = train(tmp_path, TINY_CLASSIFY, capsys, d2v__finetune=finetune, **changes)
    assert refused == ["the encoder is frozen in the first steps (`d2v.finetune.freeze_encoder_steps`)"]
    assert capture.records >= 2
    captured = figures_of(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunConfig, "reason_not_to_capture", lambda config, size, device: "it is false")
        assert train(tmp_path, TINY_CLASSIFY, capsys, "plain", d2v__finetune=finetune, **changes) == []
    assert captured == pytest.approx(figures_of(tmp_path, "plain"), rel=2e-3)


@pytest.mark.parametrize("objective", ["classify", "regress"])
def test_text(objective: str, capture: DryCapture, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = classify_texts(tmp_path, objective)
    refused = train(tmp_path, base, capsys, d2v__model__dropout=0.1)
    assert refused == []
    assert capture.records >= 2


def test_ctc_falls_back_and_says_so_once(
    capture: DryCapture, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """PyTorch's loss copies lengths to the host. The update is captured all the same."""
    refused = train(tmp_path, TINY_CTC, capsys, d2v__valid={"every_epochs": 0, "every_steps": 7, "batch_size": 60})
    assert refused == ["transcripts have another number of letters in every batch"]
    assert capture.records == 1
    assert capture.replays >= 3


def figures_of(folder: Path, name: str = "r") -> list[float]:
    return [value for entry in logged(folder, name) for value in entry.values() if isinstance(value, float)]
