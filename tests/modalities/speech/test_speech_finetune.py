"""Runs that fine-tune speech encoders: from a source to transcripts, resumed, in several processes, and handed over."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
import torch

from d2v_fast.commands.console import main as d2v_fast
from d2v_fast.commands.predict import predict
from d2v_fast.config import parse_config
from d2v_fast.interop.export import export_run
from d2v_fast.modalities.speech import recognition
from d2v_fast.modalities.speech.huggingface_head import head_of_folder
from d2v_fast.modalities.speech.samples import FOLDER
from d2v_fast.modalities.speech.vocabulary import Vocabulary
from tests.helpers.finetuning import check_killed_run, check_two_processes, saved, validations
from tests.helpers.marks import needs_deepspeed
from tests.helpers.runs import TINY_2_SPEECH, TINY_CTC, TINY_SPEECH, run_here, tiny_file

pytestmark = pytest.mark.usefixtures("quick_runs")

STEPS = {"steps": 4, "kind": "constant"}
VALID = {"every_epochs": 0, "every_steps": 2, "batch_size": 60}


def ctc(folder: Path, **changes: Any) -> Path:
    return tiny_file(folder, TINY_CTC, **{"d2v__schedule": STEPS, "d2v__valid": VALID, **changes})


def pretrained(folder: Path, base: dict[str, Any]) -> str:
    file = tiny_file(folder, base, d2v__schedule={"steps": 1, "kind": "constant"})
    assert run_here("--ds_config", file, "--run", "pre") == 0
    return str(folder / "runs" / "pre")


@pytest.mark.parametrize(
    ("base", "objective"),
    [
        (TINY_SPEECH, "ctc"),
        # they repeat the first one with another encoder or head
        pytest.param(TINY_2_SPEECH, "classify", marks=pytest.mark.slow),
        pytest.param(TINY_2_SPEECH, "ctc", marks=pytest.mark.slow),
        pytest.param(TINY_SPEECH, "classify", marks=pytest.mark.slow),
    ],
)
def test_from_a_run_to_transformers_and_back(
    base: dict[str, Any],
    objective: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    transformers = pytest.importorskip("transformers")
    source = pretrained(tmp_path, base)
    changes = {"d2v__objective": objective, "d2v__model": {"dropout": 0.0}, "d2v__finetune": {"source": source}}
    file = ctc(tmp_path, **changes, d2v__schedule={"steps": 2, "kind": "constant"})
    assert run_here("--ds_config", file, "--run", "r") == 0
    before, after = saved(tmp_path, "pre", 1), saved(tmp_path, "r", 2)
    held = [name for name in before if name.startswith("student/student.front_end.convolutions.")]
    assert held
    assert all(torch.equal(before[name], after[name]) for name in held)
    other = "student/student.front_end.projection.weight"
    assert not torch.equal(before[other], after[other])
    entry = validations(tmp_path, "r")[-1]
    assert entry["samples"] == 120
    assert {"wer", "cer"} <= entry.keys() if objective == "ctc" else 0 <= entry["accuracy"] <= 1

    folder = tmp_path / "export"
    export_run(tmp_path / "runs" / "r", to=folder)
    head = head_of_folder(folder)
    assert head is not None
    config = json.loads((tmp_path / "runs" / "r" / "config.json").read_text())
    assert list(head.labels) == config["d2v"]["labels"]
    # it goes on training, head included
    changes["d2v__finetune"] = {"source": str(folder)}
    assert run_here("--ds_config", ctc(tmp_path, **changes), "--run", "on", "--set", "optimizer.params.lr=1e-30") == 0
    on = saved(tmp_path, "on", 4)
    for name, value in after.items():
        if name.startswith("student/"):
            torch.testing.assert_close(on[name], value, rtol=0, atol=0, msg=name)
    trust = {"trust_remote_code": True} if base is TINY_2_SPEECH else {}
    kind = transformers.AutoModelForCTC if objective == "ctc" else transformers.AutoModelForAudioClassification
    model, told = kind.from_pretrained(folder, output_loading_info=True, **trust)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert type(model).__name__ == json.loads((folder / "config.json").read_text())["architectures"][0]
    # a pipeline gives the answer of `predict`
    section = parse_config(config).d2v
    path = FOLDER / "en-gb+m6" / "yellow.flac"
    predict(tmp_path / "runs" / "r", path, tmp_path / "p.jsonl")
    (answer,) = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert answer["path"] == "yellow.flac"
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
    if objective == "ctc":
        parts = {"tokenizer": transformers.AutoTokenizer.from_pretrained(folder), "feature_extractor": extractor}
        ask = transformers.pipeline("automatic-speech-recognition", model=model.eval(), **parts)
    else:
        ask = transformers.pipeline("audio-classification", model=model.eval(), feature_extractor=extractor)
    waveform, rate = soundfile.read(path, dtype="float32")
    waveform = soxr.resample(waveform, rate, section.model.sample_rate)
    told = ask({"raw": waveform, "sampling_rate": section.model.sample_rate})
    if objective == "ctc":
        assert told["text"] == answer["transcript"]
        check_language_model(tmp_path / "runs" / "r", monkeypatch, capsys)
    else:
        assert told[0]["label"] == answer["label"]
        assert told[0]["score"] == pytest.approx(answer["probability"], rel=1e-2)


ARPA = """\\data\\
ngram 1=5
ngram 2=1

\\1-grams:
-1.0\t<unk>
-99\t<s>\t0
-1.0\t</s>
-0.8\tyellow\t0
-0.5\tgreen\t0

\\2-grams:
-0.3\tyellow green

\\end\\
"""


class StandIn:
    """In the place of flashlight-text's modules: records the calls, and finds the second word of the lexicon."""

    def __init__(self) -> None:
        self.SmearingMode = self.CriterionType = SimpleNamespace(MAX="max", CTC="ctc")
        self.calls: dict[str, Any] = {}
        self.spelled: list[list[int]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> StandIn:
            self.calls[name] = options or arguments
            return self

        return call

    def insert(self, letters: list[int], number: int, score: float) -> None:
        assert number == len(self.spelled)
        self.spelled.append(letters)

    def score(self, state: Any, number: int) -> tuple[Any, float]:
        return state, -1.0

    def decode(self, address: int, frames: int, classes: int) -> list[Any]:
        assert frames > 0
        self.calls["classes"] = classes
        return [SimpleNamespace(words=[1, -1])]


def check_language_model(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Predict with a language model: what is refused, and what reaches the search."""
    to, lm, words = run / "p.jsonl", run / "lm.arpa", run / "words.txt"
    lm.write_text(ARPA)
    words.write_text("blue\nred\n")
    ask = ["predict", str(run), str(FOLDER / "en-gb+m6" / "yellow.flac"), "--to", str(to), "--overwrite"]

    def transcript(*options: str) -> str:
        assert d2v_fast([*ask, *options]) == 0, capsys.readouterr().err
        (line,) = to.read_text().splitlines()
        return str(json.loads(line)["transcript"])

    capsys.readouterr()
    assert d2v_fast([*ask, "--word-score", "-1"]) == 2
    assert "`--word-score` needs `--lm FILE`" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        d2v_fast([*ask, "--lm", str(lm), "--lm-weight", "nan"])
    assert "must be a finite number, but is nan instead" in capsys.readouterr().err
    if find_spec("flashlight") is None:
        assert d2v_fast([*ask, "--lm", str(lm)]) == 1
        assert "`pip install 'd2v_fast[lm]'` installs it" in capsys.readouterr().err
    else:
        assert set(transcript("--lm", str(lm)).split()) <= {"yellow", "green"}
    fake = StandIn()
    monkeypatch.setattr(recognition, "_flashlight", lambda: (fake, fake, fake))
    assert transcript("--lm", str(lm)) == "green"
    settings = {"beam_size": 50, "lm_weight": 2.0, "word_score": -1.0, "beam_size_token": fake.calls["classes"]}
    assert settings.items() <= fake.calls["LexiconDecoderOptions"].items()
    vocabulary = Vocabulary(tuple(json.loads((run / "config.json").read_text())["d2v"]["labels"]))
    assert fake.spelled == [vocabulary.encode("yellow"), vocabulary.encode("green")]
    assert fake.calls["KenLM"][0] == str(lm)
    options = ["--lexicon", str(words), "--lm-weight", "0.5", "--word-score", "-2", "--beam-size", "7"]
    fake.spelled.clear()
    assert transcript("--lm", str(lm), *options) == "red"
    changed = {"beam_size": 7, "lm_weight": 0.5, "word_score": -2.0}
    assert changed.items() <= fake.calls["LexiconDecoderOptions"].items()


@pytest.mark.slow
def test_killed_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    file = ctc(tmp_path, d2v__finetune__freeze_encoder_steps=2, d2v__schedule={"steps": 7, "kind": "constant"})
    check_killed_run(tmp_path, file)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_two_processes_equal_one(stage: int, tmp_path: Path) -> None:
    """Also with convolutions that are held, a frozen encoder at first, and accumulation."""
    changes = {
        "d2v__model": {"dropout": 0.0, "attention_dropout": 0.0, "layer_drop": 0.3},
        "d2v__finetune": {"source": pretrained(tmp_path, TINY_SPEECH), "freeze_encoder_steps": 1},
        "zero_optimization__stage": stage,
        "gradient_accumulation_steps": 2,
    }
    file = ctc(tmp_path, **changes)
    check_two_processes(tmp_path, file)
    for mine, other in zip(validations(tmp_path, "one"), validations(tmp_path, "two"), strict=True):
        assert mine == pytest.approx(other, rel=1e-3)


def test_sources_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = ctc(tmp_path, d2v__model={}, d2v__finetune={"source": str(tmp_path / "gone")})
    assert run_here("--ds_config", file, "--run", "r") == 2
    assert "`d2v.finetune.source` must be a run, a Transformers folder or a checkpoint" in capsys.readouterr().err
    np.testing.assert_equal(list((tmp_path / "runs").glob("*")) if (tmp_path / "runs").exists() else [], [])
