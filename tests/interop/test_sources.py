"""Which head and which weights fine-tuning begins with: those of its source, or a new head and why."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from d2v_fast.config import ConfigError, RunConfig, check_d2v, load_config
from d2v_fast.config.finetune import FinetuneConfig
from d2v_fast.interop.heads import SavedHead
from d2v_fast.interop.sources import Found
from d2v_fast.modalities import modality_of
from d2v_fast.objectives.build import build_model, build_objective
from d2v_fast.objectives.finetune import Finetune
from tests.helpers.finetuning import TINY_CLASSIFY
from tests.helpers.masked_models import masked_config
from tests.helpers.runs import TINY, TINY_CTC, TINY_SPEECH, TINY_TEXT

LABELS = ("a", "b", "c")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, None),
        ({"keys": {}}, None),
        ({"keys": {"pooling": "token"}}, 'its `d2v.head.pooling` is "token", and that of the run "mean"'),
        ({"labels": ("a", "c", "b")}, "its classes have another order"),
        ({"labels": ("a", "b")}, 'it distinguishes 2 classes ("a", "b"), and the run 3 classes ("a", "b", "c")'),
        ({"labels": None}, "it distinguishes no classes"),
        ({"tensors": {"weight": torch.zeros(3, 4)}}, "its tensors have other names or shapes"),
    ],
    ids=str,
)
def test_the_head_of_a_source(
    changes: dict[str, object], why: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config, _ = check_d2v({**TINY_CLASSIFY["d2v"], "labels": list(LABELS)})
    assert isinstance(config, FinetuneConfig)
    model = build_objective(config)
    assert isinstance(model, Finetune)
    tensors = {name: torch.rand_like(value) for name, value in model.head.state_dict().items()}
    before = {name: value.clone() for name, value in model.head.state_dict().items()}
    head = replace(SavedHead(tensors, LABELS, {"pooling": "mean"}), **changes)  # type: ignore[arg-type]
    Found("there", config.model, model.student.state_dict(), head).copy_to(model.student, model.head, config)
    expected = tensors if why is None else before
    assert all(torch.equal(value, expected[name]) for name, value in model.head.state_dict().items())
    told = "\n".join(caplog.messages)
    assert ("the head is that of there" in told) == (why is None)
    assert (f"the head is a new one, not that of there: {why}" in told) == (why is not None)


PUBLISHED = {"vision": TINY, "speech": TINY_SPEECH, "text": TINY_TEXT}
LABELED: dict[str, dict[str, Any]] = {
    "vision": {**TINY_CLASSIFY["d2v"], "labels": ["a", "b"]},
    "speech": {**TINY_CTC["d2v"], "labels": ["<pad>", "|", "a"]},
    "text": {
        "modality": "text",
        "objective": "classify",
        "labels": ["a", "b"],
        "schedule": {"steps": 2},
        "data": {"kind": "docs", "block_size": 16},
    },
}


def tuning_file(folder: Path, modality: str, source: Path) -> Path:
    section = {key: value for key, value in LABELED[modality].items() if key != "model"}
    section["finetune"] = {"source": str(source)}
    (folder / "tune.json").write_text(json.dumps({**TINY, "d2v": section}))
    return folder / "tune.json"


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("modality", PUBLISHED)
def test_files_of_the_published_code_are_sources(modality: str, version: int, tmp_path: Path) -> None:
    """Fine-tuning begins with the encoder of a pre-trained `.pt`, equal in every bit."""
    config = masked_config(modality) if version == 2 else check_d2v(PUBLISHED[modality]["d2v"])[0]
    assert config is not None
    torch.manual_seed(1)
    model, published = build_model(config), modality_of(config).published
    assert published is not None
    source = tmp_path / "a.pt"
    published().write(model.student, model.head, model.student, config, source)
    tuned = load_config(tuning_file(tmp_path, modality, source)).d2v
    assert isinstance(tuned, FinetuneConfig)
    begun = build_objective(tuned)
    begun.begin()
    given = model.student.state_dict()
    found = begun.student.state_dict()
    assert set(found) <= set(given)
    assert [name for name, value in found.items() if not torch.equal(value, given[name])] == []

    content = torch.load(source, weights_only=True)
    name = next(name for name in content["model"] if "blocks.1" in name or "layers.1." in name)
    del content["model"][name]
    torch.save(content, source)
    with pytest.raises((ConfigError, ValueError), match=name.rpartition("layers.1.")[2].rpartition("blocks.1.")[2]):
        build_objective(load_config(tuning_file(tmp_path, modality, source)).d2v).begin()


def test_a_source_without_weights_is_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(TINY))
    with pytest.raises(ConfigError, match="must hold a checkpoint, but has none yet"):
        load_config(tuning_file(tmp_path, "vision", tmp_path / "run"))
    (tmp_path / "other").mkdir()
    with pytest.raises(ConfigError, match=r"but `.*other` is a folder without `config.json`"):
        load_config(tuning_file(tmp_path, "vision", tmp_path / "other"))


def test_a_file_for_both_versions(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A source has precedence in sizes; a key of the other version is reported, and an unknown one refused."""
    config = masked_config("vision")
    model, published = build_model(config), modality_of(config).published
    assert published is not None
    published().write(model.student, model.head, None, config, tmp_path / "a.pt")

    def load(**keys: Any) -> RunConfig:
        file = tuning_file(tmp_path, "vision", tmp_path / "a.pt")
        raw = json.loads(file.read_text())
        file.write_text(json.dumps({**raw, "d2v": {**raw["d2v"], "model": keys}}))
        return load_config(file, written=lambda folder: written)

    written: dict[str, Any] | None = None
    keys = {"width": 999, "depth": 7, "drop_path": 0.1, "attention_dropout": 0.25}
    first = load(**keys)
    assert caplog.messages == [
        'no effect of `d2v.model.drop_path`: the encoder that the run begins with is of "data2vec2" and has no such key'
    ]
    assert first.d2v.model == config.model.model_copy(update={"attention_dropout": 0.25})
    # as well when the run is resumed with its file
    written = first.to_dict()
    assert load(**keys) == first
    with pytest.raises(ConfigError, match=r"`d2v\.model\.attention_dropuot` \(value 0\.25\) is not a known key"):
        load(attention_dropuot=0.25)
    written = None
    with pytest.raises(ConfigError, match=r"`d2v\.model\.attention_dropuot` \(value 0\.25\) is not a known key"):
        load(attention_dropuot=0.25)
