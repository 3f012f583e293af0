"""Find the modality of a checkpoint of the published code, and report one that has none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from d2v_fast.config import check_d2v
from d2v_fast.interop.fairseq import read_fairseq, save_fairseq
from d2v_fast.interop.published import read_published
from d2v_fast.modalities.speech.config import SpeechModelConfig
from d2v_fast.modalities.text.config import TextModelConfig
from d2v_fast.modalities.vision.beit import save_beit
from d2v_fast.modalities.vision.config import VisionModelConfig
from d2v_fast.objectives.build import build_model
from tests.helpers.runs import TINY, TINY_SPEECH, TINY_TEXT


@pytest.mark.parametrize(
    ("base", "kind"),
    [(TINY, VisionModelConfig), (TINY_SPEECH, SpeechModelConfig), (TINY_TEXT, TextModelConfig)],
    ids=["vision", "speech", "text"],
)
def test_names_decide_the_modality(base: dict[str, Any], kind: type, tmp_path: Path) -> None:
    config, problems = check_d2v(base["d2v"])
    assert config is not None, problems
    if kind is TextModelConfig:
        model = config.model.model_copy(update={"vocab_size": 300, "padding_id": 1})
        config = config.model_copy(update={"model": model})
    built = build_model(config)
    save = save_beit if kind is VisionModelConfig else save_fairseq
    save(built.student, built.head, built.student, config, tmp_path / "a.pt")
    assert type(read_published(tmp_path / "a.pt").config) is kind
    if kind is VisionModelConfig:
        with pytest.raises(
            ValueError, match=r"data2vec encoder of vision \(fairseq\) or speech .* holds an image model"
        ):
            read_fairseq(tmp_path / "a.pt")
        with pytest.raises(ValueError, match=r"`d2v.modality` must be speech or text for fairseq, but is vision"):
            save_fairseq(built.student, built.head, built.student, config, tmp_path / "b.pt")
    else:
        assert type(read_fairseq(tmp_path / "a.pt").config) is kind


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["modality_encoders.SMELL.x"], r"but holds a model of data2vec 2\.0: `modality_encoders\.SMELL\.x`"),
        (["bert.x", "b\n", "c", "d"], r"but holds no name of one: `bert\.x`, `b\\n`, `c`\."),
        ([], "but holds no name of one: it is empty"),
    ],
)
def test_another_model_is_named(names: list[str], said: str, tmp_path: Path) -> None:
    torch.save({"model": dict.fromkeys(names, torch.zeros(2))}, tmp_path / "a.pt")
    fairseq = " or ".join(rf"{name} \(fairseq\)" for name in ("vision", "speech", "text"))
    owners = rf"vision \(the published vision code\) or {fairseq}"
    with pytest.raises(ValueError, match=rf"must hold a data2vec encoder of {owners}, {said}"):
        read_published(tmp_path / "a.pt")
