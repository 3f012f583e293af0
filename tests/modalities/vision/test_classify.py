"""Classifiers of images: folders of classes, their errors, mixed images, and the answers of exported folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from d2v_fast.commands.console import main as d2v_fast
from d2v_fast.config import RunConfig, load_config
from d2v_fast.data import DataError, batch_maker, resolved
from d2v_fast.data.order import MicroStep
from d2v_fast.modalities.vision import labeled
from d2v_fast.modalities.vision.config import ImageModelSection, VisionDataConfig
from d2v_fast.modalities.vision.huggingface_classify import head_of_folder
from d2v_fast.modalities.vision.images import ImagesDataset
from d2v_fast.modalities.vision.labeled import held_out_images
from d2v_fast.training.prepare import make_plan
from tests.helpers.finetuning import TINY_CLASSIFY, saved
from tests.helpers.runs import run_here, tiny_file

pytestmark = pytest.mark.usefixtures("quick_runs")

SIDE = 8


def write_images(folder: Path, classes: dict[str, int], seed: int = 0) -> Path:
    """Write images of a side of 8 pixels: a folder for each class, with so many images."""
    rng = np.random.default_rng(seed)
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(folder / name / f"{number}.png")
    return folder


def images(folder: Path, path: Path, **changes: Any) -> Path:
    data = {"kind": "images", "path": str(path), "num_workers": 0, "mean": [0.5], "std": [0.25]}
    model = {**TINY_CLASSIFY["d2v"]["model"], "channels": 3}
    changes = {"train_batch_size": 4, "d2v__schedule": {"steps": 2, "kind": "constant"}, "d2v__model": model, **changes}
    return tiny_file(folder, TINY_CLASSIFY, **{"d2v__data": {**data, **changes.pop("data", {})}, **changes})


def test_folders_of_classes(tmp_path: Path) -> None:
    path = write_images(tmp_path / "train", {"b": 10, "a": 5, "c d": 20})
    (path / "loose.png").write_bytes((path / "a" / "0.png").read_bytes())
    config = resolved(load_config(images(tmp_path, path, d2v__valid__fraction=0.2))).d2v
    assert config.labels == ("a", "b", "c d")
    train, held_out = batch_maker(config), held_out_images(config)
    assert (train.num_samples, held_out.num_samples) == (28, 7)
    assert [held_out.targets.count(number) for number in range(3)] == [1, 2, 4]
    ids = np.arange(28)
    classes = train.make(MicroStep(0, ids, ids), 0).batch.targets
    assert torch.bincount(classes).tolist() == [4, 8, 16]
    few = config.model_copy(update={"data": config.data.model_copy(update={"labels_per_class": 3})})
    assert batch_maker(few).num_samples == 9
    assert held_out_images(few).num_samples == 7


def open_both(config: RunConfig) -> None:
    """Open training and held-out images as a run does."""
    config = resolved(config)
    batch_maker(config.d2v)
    held_out_images(config.d2v)


def test_errors(tmp_path: Path) -> None:
    path = write_images(tmp_path / "train", {"a": 4, "b": 4})
    other = write_images(tmp_path / "valid", {"a": 2, "z": 2})
    empty = tmp_path / "empty"
    (empty / "a").mkdir(parents=True)

    def refused(message: str, **changes: Any) -> None:
        config = load_config(images(tmp_path, path, **changes))
        with pytest.raises(DataError, match=message):
            open_both(config)

    refused(
        r'`d2v\.valid\.path` must hold samples of the classes .*"a", "b".* some of "z"', d2v__valid__path=str(other)
    )
    refused(r"`d2v\.valid\.path` .*", d2v__valid__path=str(empty))
    refused(r'`d2v\.data\.path` must hold samples of every class .* none of "z"', d2v__labels=["a", "b", "z"])
    refused(r'`d2v\.data\.path` must hold samples of the classes .* some of "b"', d2v__labels=["a", "z"])
    one = write_images(tmp_path / "one", {"a": 4})
    refused("at least 2 sub-folders", data={"path": str(one)})


def test_a_plan_lists_a_folder_once_and_reads_what_is_held_out(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_images(tmp_path / "train", {"a": 4, "b": 4})
    listed: list[str | None] = []

    def listing(data: VisionDataConfig, model: ImageModelSection) -> ImagesDataset:
        listed.append(data.path)
        return ImagesDataset(data, model)

    monkeypatch.setattr(labeled, "ImagesDataset", listing)
    plan = make_plan(load_config(images(tmp_path, path)))
    assert listed == [str(path)]
    assert plan.held_out is not None
    assert (plan.maker.num_samples, plan.held_out.num_samples) == (6, 2)
    # a class without a held-out sample is said, and an unknown one refused before anything is built
    other = write_images(tmp_path / "valid", {"a": 2})
    file = images(tmp_path, path, d2v__valid__path=str(other))
    assert run_here("--ds_config", file, "--dry-run") == 0
    assert "held out        2 images" in capsys.readouterr().out
    assert '`d2v.valid.path` has no held-out sample of "b": no answer of this kind is scored' in caplog.messages
    write_images(other, {"z": 2})
    assert run_here("--ds_config", file, "--dry-run") == 1
    assert 'but has some of "z"' in capsys.readouterr().err


@pytest.mark.parametrize("ways", [{"mixup": 0.8}, {"cutmix": 1.0, "erase_prob": 0.5}, {"mixup": 0.8, "cutmix": 1.0}])
def test_mixed_images_do_not_depend_on_the_split(ways: dict[str, float], tmp_path: Path) -> None:
    path = write_images(tmp_path / "train", {"a": 6, "b": 7})
    config = resolved(load_config(images(tmp_path, path, data=ways, d2v__valid__path=str(path)))).d2v
    maker, ids = batch_maker(config), np.array([12, 3, 4, 0, 7, 1, 9, 2, 5])
    whole = maker.make(MicroStep(1, ids, ids), 3).batch
    parts = [maker.make(MicroStep(1, ids[part], ids), 3).batch for part in (slice(0, 4), slice(4, 7), slice(7, 9))]
    assert torch.equal(whole.inputs, torch.cat([part.inputs for part in parts]))
    assert torch.equal(whole.targets, torch.cat([part.targets for part in parts]))
    torch.testing.assert_close(whole.targets.sum(1), torch.ones(9))
    # the last one has no partner
    assert whole.targets[-1].max() == 1
    assert ((whole.targets > 0).sum(1) == 2).any()


@pytest.mark.parametrize(("version", "pooling"), [(1, "mean"), (1, "token"), (2, "mean"), (2, "token")])
def test_pipeline_gives_the_answers_of_predict(
    version: int, pooling: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    path = write_images(tmp_path / "train", {"a": 6, "b": 6, "c": 6})
    changes: dict[str, Any] = {"d2v__head": {"pooling": pooling}}
    if version == 2:
        changes |= {"d2v__encoder": "data2vec2", "d2v__model": MODEL2}
    file = images(tmp_path, path, **changes)
    assert run_here("--ds_config", file, "--run", "r") == 0, capsys.readouterr().err
    run, answers = tmp_path / "runs" / "r", tmp_path / "answers.jsonl"
    assert d2v_fast(["predict", str(run), str(path), "--to", str(answers), "--device", "cpu"]) == 0
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert len(rows) == 18
    assert d2v_fast(["predict", str(run), str(path), "--to", str(tmp_path / "b.csv"), "--lm", "lm.arpa"]) == 2
    assert '`--lm` must be left out for a run of modality "vision" and objective "classify"' in capsys.readouterr().err
    export = tmp_path / "export"
    assert d2v_fast(["export", str(run), "--to", str(export)]) == 0
    options = {"trust_remote_code": True} if version == 2 else {}
    classify = transformers.pipeline("image-classification", model=str(export), device="cpu", **options)
    for row in rows[::5]:
        found = classify(Image.open(path / row["path"]))
        assert [one["label"] for one in found] == [one["label"] for one in row["top"]]
        theirs = [one["score"] for one in found]
        assert theirs == pytest.approx([one["probability"] for one in row["top"]], abs=1e-5)
    head = head_of_folder(export)
    assert head is not None
    assert head.keys == {"pooling": pooling}
    # the folder goes on training, with its head
    more = images(tmp_path, path, **{**changes, "d2v__finetune": {"source": str(export)}})
    small = ["--set", "optimizer.params.lr=1e-30", "--set", "d2v.schedule.steps=1"]
    assert run_here("--ds_config", more, "--run", "more", *small) == 0, capsys.readouterr().err
    before, after = saved(tmp_path, "r", 2), saved(tmp_path, "more", 1)
    heads = [name for name in after if name.startswith("student/head.")]
    assert len(heads) == 4
    for name in heads:
        assert torch.equal(after[name], before[name.replace("student/", "teacher/")]), name


def test_features_of_a_classifier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are those of the best step and of the average, if there is one."""
    path = write_images(tmp_path / "train", {"a": 4, "b": 4})
    # all validations are equal, so the first step is the best one
    file = images(tmp_path, path, d2v__valid={"every_steps": 1, "every_epochs": 0, "metric": "top5"})
    for name, changes in (("r", []), ("plain", ["--set", "d2v.finetune.average_decay=null"])):
        assert run_here("--ds_config", file, "--run", name, *changes) == 0, capsys.readouterr().err

    def told(run: str, *options: str) -> str:
        capsys.readouterr()
        to = ["--to", str(tmp_path / "e.npy"), "--overwrite", "--device", "cpu"]
        status = d2v_fast(["embed", str(tmp_path / "runs" / run), str(path), *to, *options])
        said = capsys.readouterr()
        return f"{status} {said.out}{said.err}"

    assert f"by the teacher of {tmp_path}/runs/r, step 1" in told("r")
    assert f"by the student of {tmp_path}/runs/r, step 2" in told("r", "--weights", "student", "--step", "2")
    assert f"by the student of {tmp_path}/runs/plain, step 1" in told("plain")
    refused = told("plain", "--weights", "teacher")
    assert refused.startswith("2 ")
    assert "`--weights teacher` needs an average" in refused


MODEL2 = {
    "image_size": 8,
    "patch_size": 2,
    "channels": 3,
    "width": 16,
    "context_depth": 1,
    "depth": 2,
    "heads": 2,
    "decoder": {"width": 8, "depth": 1, "kernel": 3, "groups": 2},
}
