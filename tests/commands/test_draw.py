"""`d2v-fast draw`: reading a run folder, and the picture."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from d2v_fast.checkpoints.shard_files import Kept
from d2v_fast.checkpoints.store import Checkpoints
from d2v_fast.commands import draw
from d2v_fast.commands.console import main
from d2v_fast.distributed.shards import Shard
from d2v_fast.distributed.world import World
from d2v_fast.figures.sheet import Sheet, Spacing
from d2v_fast.objectives.build import build_model
from tests.helpers.places import ROOT
from tests.helpers.runs import failure_status
from tests.helpers.written_runs import vision_config

CONFIG = vision_config(width=24, depth=3)


def save_weights(folder: Path, step: int, kinds: dict[str, dict[str, torch.Tensor]]) -> None:
    """A checkpoint with no more than pictures need."""
    kept = [
        Kept(kind, Shard(name, value.shape, 0, value.reshape(-1).clone(), value, 0, replicated=True))
        for kind, state in kinds.items()
        for name, value in state.items()
    ]
    Checkpoints(folder, keep=9, world=World("cpu")).save(step, {}, kept)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run with two whole checkpoints, one that was being written, and one that was found damaged."""
    folder = tmp_path / "digits-1"
    checkpoints = folder / "checkpoints"
    for seed, step in enumerate((9, 10, 11, 12), 1):
        torch.manual_seed(seed)
        model = build_model(CONFIG)
        save_weights(checkpoints, step, {"student": model.state_dict(), "teacher": model.student.state_dict()})
    (checkpoints / "step-11").rename(checkpoints / "step-11.tmp-77")
    (checkpoints / "step-12").rename(checkpoints / "step-12.damaged")
    (folder / "config.json").write_text(json.dumps({"train_batch_size": 64, "d2v": CONFIG.model_dump(mode="json")}))
    return folder


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_newest_whole_checkpoint_is_read(name: str, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = {}

    def figure(models: dict[str, torch.nn.Module], *arguments: object) -> Figure:
        drawn.update(models)
        return Figure()

    monkeypatch.setattr(draw, "modality_of", lambda config: SimpleNamespace(draw=figure))
    draw.draw(run_folder, weights=name)
    torch.manual_seed(2)
    expected = build_model(CONFIG).student.state_dict()
    found = drawn[f"{name},\nstep 10"].state_dict()
    assert all(torch.equal(expected[key], value) for key, value in found.items())


def test_draws_held_out_digits(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["draw", str(run_folder), "--count", "3"]) == 0
    path = run_folder / "features.png"
    assert capsys.readouterr().out.strip() == str(path)
    with Image.open(path) as picture:
        assert picture.width > 3 * 100
        assert picture.height > 4 * 100
        assert len(picture.convert("RGB").getcolors(maxcolors=1 << 20) or []) > 50


def test_draws_a_folder_of_images(run_folder: Path, tmp_path: Path) -> None:
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    rng = np.random.default_rng(0)
    for index in range(2):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(photographs / f"{index}.png")
    out = tmp_path / "out.png"
    assert main(["draw", str(run_folder), "--data", str(photographs), "--weights", "teacher", "--out", str(out)]) == 0
    assert out.is_file()
    assert not (run_folder / "features.png").exists()


@pytest.mark.parametrize(("count", "blocks"), [(1, 1), (8, 1), (9, 2), (24, 3)])
def test_rows_wrap_at_eight(count: int, blocks: int) -> None:
    sheet = Sheet(count, ["a", "b"], Spacing(cell=1.0, below=0.3), title="t", caption="c")
    corners = [axes[0].get_position().p0 for axes in map(sheet.axes, range(count))]
    assert len({round(y, 6) for _, y in corners}) == blocks
    assert len({round(x, 6) for x, _ in corners}) == min(count, 8)
    width = sheet.figure.get_figwidth()
    # nothing overlaps and all is on the sheet
    places = [axis.get_position() for index in range(count) for axis in sheet.axes(index)]
    assert all(0 <= p.x0 < p.x1 <= 1 and 0 <= p.y0 < p.y1 <= 1 for p in places)
    assert all(not a.overlaps(b) for i, a in enumerate(places) for b in places[:i])
    assert width < 12


def test_drawing_twice_gives_the_same_picture(run_folder: Path, tmp_path: Path) -> None:
    first, second = (draw.draw(run_folder, count=2, out=tmp_path / f"{index}.png") for index in range(2))
    assert first.read_bytes() == second.read_bytes()


def test_mistakes_are_named(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def complaint(*arguments: object) -> str:
        status, captured = main(["draw", *map(str, arguments)]), capsys.readouterr()
        assert status == failure_status(captured.err)
        assert not captured.out
        return captured.err

    assert "must be the folder of a run, but holds no config.json" in complaint(tmp_path)
    assert "`--count` must be in [1, 24], but is 0 instead" in complaint(run_folder, "--count", 0)
    nowhere = tmp_path / "nowhere"
    assert f"`--data` must be a folder, but '{nowhere}' does not exist" in complaint(run_folder, "--data", nowhere)

    newest = run_folder / "checkpoints" / "step-13"
    state = build_model(CONFIG).state_dict()
    del state["student.norm.weight"]
    save_weights(newest.parent, 13, {"student": state})
    assert "does not fit the run's config.json: norm.weight is missing or misshapen" in complaint(run_folder)
    assert "is missing or misshapen" in complaint(run_folder, "--weights", "teacher")
    shard = newest / "shard-00000.safetensors"
    content = shard.read_bytes()
    for damaged in (content[:1000], b"", b"\xff" * 8 + b"{}"):
        shard.write_bytes(damaged)
        assert "step-13 is damaged (shard-00000.safetensors has " in complaint(run_folder)

    for checkpoint in (run_folder / "checkpoints").iterdir():
        checkpoint.rename(checkpoint.with_name(checkpoint.name + ".tmp-1"))
    assert "must hold a checkpoint, but has none yet" in complaint(run_folder)

    for content, reason in (
        ('{"d2v": ' + "[" * 100_000 + "}", "nested too deeply"),
        ('{"d2v": []}', "`d2v` must be a section"),
    ):
        (run_folder / "config.json").write_text(content)
        assert reason in complaint(run_folder)
    (run_folder / "config.json").write_text('{"d2v": {"model": {"widht": 3}}}')
    assert "d2v.model.widht" in complaint(run_folder)


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_recordings_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a run on the sample set, and of a folder of one's own; more masked frames than none are marked."""
    from tests.helpers.runs import TINY_SPEECH, leave_out_reports, run_here, tiny_file

    leave_out_reports(monkeypatch.setattr)
    file = tiny_file(tmp_path, TINY_SPEECH, d2v__schedule={"steps": 1}, d2v__model__layer_drop=0.0)
    assert run_here("--ds_config", file, "--run", "r") == 0
    folder = tmp_path / "runs" / "r"
    path = draw.draw(folder, count=2, weights="teacher")
    assert path == folder / "features.png"
    image = pixels_of(path)
    # both colors of the similarities, and the marks of the mask
    assert ((image[..., 0] > 150) & (image[..., 2] < 100)).sum() > 100
    assert ((image[..., 2] > 150) & (image[..., 0] < 100)).sum() > 100
    samples = ROOT / "d2v_fast" / "modalities" / "speech" / "speech_samples" / "en-us+f2"
    other = draw.draw(folder, data=samples, count=3, out=tmp_path / "other.png")
    assert pixels_of(other).shape[1] > image.shape[1]
