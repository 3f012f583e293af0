"""Features as colors: the projection, what is read from a run folder, and the picture itself."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from PIL import Image

from d2v_fast.checkpoints.shard_files import Kept
from d2v_fast.checkpoints.store import Checkpoints
from d2v_fast.commands import draw
from d2v_fast.config import (
    BlockMaskConfig,
    RunSection,
    SpeechConfig,
    TargetConfig,
    VisionConfig,
    VisionDataConfig,
    VisionModelConfig,
    check_d2v,
)
from d2v_fast.distributed.shards import Shard
from d2v_fast.distributed.world import World
from d2v_fast.figures.sheet import Sheet, save_figure
from d2v_fast.objectives.data2vec import build_model
from tests.helpers.places import ROOT
from tests.helpers.runs import failure_status

CONFIG = VisionConfig(
    model=VisionModelConfig(image_size=8, patch_size=2, channels=1, width=24, depth=3, heads=2),
    mask=BlockMaskConfig(num_patches=9, min_patches=2),
    target=TargetConfig(top_k=2),
    data=VisionDataConfig(mean=(0.3,), std=(0.4,)),
    run=RunSection(seed=5),
)


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


def test_colors_are_the_principal_components() -> None:
    features = torch.randn(20, 9, 7) * torch.tensor([27.0, 9.0, 3.0, 0.1, 0.1, 0.1, 0.1])
    colors = draw.principal_colors(features)
    assert colors.shape == (20, 9, 3)
    assert colors.dtype == np.float32
    for channel in range(3):
        values = colors[..., channel].ravel()
        assert (values.min(), values.max()) == (0.0, 1.0)
        # a component is almost the coordinate with that much spread, up to sign, center and scale
        coordinate = features[..., channel].flatten().numpy()
        assert abs(np.corrcoef(values, coordinate)[0, 1]) > 0.9


def test_colors_do_not_depend_on_the_basis() -> None:
    features = torch.randn(4, 6, 9, dtype=torch.float64) * torch.linspace(5, 1, 9)
    rotation, _ = torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64))
    turned = features @ rotation * 3 + 7
    np.testing.assert_allclose(draw.principal_colors(turned), draw.principal_colors(features), atol=1e-5)


def test_colors_of_degenerate_features() -> None:
    np.testing.assert_array_equal(draw.principal_colors(torch.full((2, 4, 5), 3.7)), 0.5)
    assert draw.principal_colors(torch.randn(1, 2, 5)).shape == (1, 2, 3)
    assert draw.principal_colors(torch.randn(2, 4, 1)).shape == (2, 4, 3)
    two = torch.randn(2, 5)[torch.tensor([[0, 1, 1], [1, 0, 0]])]
    colors = draw.principal_colors(two)
    assert np.unique(colors.reshape(-1, 3).round(4), axis=0).shape == (2, 3)


def test_features_are_those_of_the_target() -> None:
    model = build_model(CONFIG).student
    pixels = torch.randn(2, 1, 8, 8)
    outputs = model.eval()(pixels, top_k=2).features
    expected = (F.layer_norm(outputs[0], (24,)) + F.layer_norm(outputs[1], (24,)))[:, 1:] / 2
    torch.testing.assert_close(draw.patch_features(model, pixels, top_k=2), expected)


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_newest_whole_checkpoint_is_read(name: str, run_folder: Path) -> None:
    weights = draw.newest_weights(run_folder, CONFIG, name)
    assert (weights.name, weights.step) == (name, 10)
    torch.manual_seed(2)
    expected = build_model(CONFIG).student.state_dict()
    assert all(torch.equal(expected[key], value) for key, value in weights.model.state_dict().items())


def test_draws_held_out_digits(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert draw.main([str(run_folder), "--count", "3"]) == 0
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
    assert draw.main([str(run_folder), "--data", str(photographs), "--weights", "teacher", "--out", str(out)]) == 0
    assert out.is_file()
    assert not (run_folder / "features.png").exists()


def photograph(path: Path, seed: int, size: tuple[int, int] = (30, 20)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def test_no_image_twice(tmp_path: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither in the place of an unreadable neighbor nor as a copy; fewer than asked for are said."""
    folder = tmp_path / "photographs"
    for index in range(4):
        photograph(folder / f"{index}.png", index)
    (folder / "1a.png").write_bytes(b"no image")
    (folder / "2a.png").write_bytes((folder / "2.png").read_bytes())
    found = draw._choose_images(CONFIG, folder, 6)
    assert found.names == ["0.png", "1.png", "2.png", "3.png"]
    assert len({image.numpy().tobytes() for image in found.pixels}) == 4
    # what a name stands under is that file
    for name, image in zip(found.names, found.pixels, strict=True):
        alone = draw.image_dataset(
            CONFIG.model_copy(update={"data": CONFIG.data.model_copy(update={"kind": "images", "path": str(folder)})})
        )
        index = [Path(alone.path(i)).name for i in range(len(alone))].index(name)  # type: ignore[union-attr]
        assert torch.equal(alone[index], image)
    assert draw.main([str(run_folder), "--data", str(folder), "--count", "6", "--out", str(tmp_path / "o.png")]) == 0
    assert "4 images are drawn" in capsys.readouterr().err


@pytest.mark.parametrize(("count", "blocks"), [(1, 1), (8, 1), (9, 2), (24, 3)])
def test_rows_wrap_at_eight(count: int, blocks: int) -> None:
    sheet = Sheet(count, ["a", "b"], cell=1.0, below=0.3, title="t", caption="c")
    corners = [axes[0].get_position().p0 for axes in map(sheet.axes, range(count))]
    assert len({round(y, 6) for _, y in corners}) == blocks
    assert len({round(x, 6) for x, _ in corners}) == min(count, 8)
    width = sheet.figure.get_figwidth()
    # nothing overlaps and all is on the sheet
    places = [axis.get_position() for index in range(count) for axis in sheet.axes(index)]
    assert all(0 <= p.x0 < p.x1 <= 1 and 0 <= p.y0 < p.y1 <= 1 for p in places)
    assert all(not a.overlaps(b) for i, a in enumerate(places) for b in places[:i])
    assert width < 12


def test_names_stand_under_the_images(tmp_path: Path) -> None:
    folder = tmp_path / "photographs"
    for seed, name in enumerate(("one.png", "deep/er/$a$ and $b.png", "deep/er/" + 60 * "x" + "7.png")):
        photograph(folder / name, seed)
    found = draw._choose_images(CONFIG, folder, 3)
    masks = draw._draw_masks(CONFIG, found.ids)
    figure = draw._figure(draw._displayable(found.pixels, CONFIG), masks, {}, found.names, "t")
    labels = [axis.get_xlabel() for axis in figure.axes if axis.get_xlabel()]
    assert labels[0] == "er\n$a$ and $b.png"
    assert labels[2] == "one.png"
    assert labels[1].startswith("er\nxxx")
    assert labels[1].endswith("x7.png")
    assert max(map(len, labels[1].splitlines())) <= 20
    save_figure(figure, tmp_path / "out.png")


def test_drawing_twice_gives_the_same_picture(run_folder: Path, tmp_path: Path) -> None:
    first, second = (draw.draw(run_folder, count=2, out=tmp_path / f"{index}.png") for index in range(2))
    assert first.read_bytes() == second.read_bytes()


def test_mistakes_are_named(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def complaint(*arguments: object) -> str:
        status, captured = draw.main([str(argument) for argument in arguments]), capsys.readouterr()
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


def test_self_similarity() -> None:
    """Two kinds of frames that take turns: alike within a kind, opposite between them, whatever they share."""
    from d2v_fast.modalities.speech.pictures import self_similarity

    kinds = torch.tensor([1.0, -1.0]).repeat(4)[:, None] * torch.randn(1, 6) + 100 * torch.randn(1, 6)
    expected = torch.tensor([1.0, -1.0]).repeat(4)
    np.testing.assert_allclose(self_similarity(kinds), torch.outer(expected, expected), atol=1e-3)


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


def test_recordings_have_axes_and_none_is_shown_twice(tmp_path: Path) -> None:
    """Also where one is silent, and another of the same name has another ending."""
    from d2v_fast.modalities.speech.pictures import choose_recordings, speech_figure
    from tests.helpers.runs import TINY_SPEECH

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
    # half the rate is at the top of the bands, and mel makes 1 kHz stand above the middle of 0 to 4 kHz's fourth
    heights = spectrum.get_yticks()
    assert heights[-1] == pytest.approx(40)
    assert heights[2] == pytest.approx(40 * 999.99 / 2146.06, rel=1e-3)
    assert (square.get_xlabel(), square.get_ylabel()) == ("s", "s")
    assert square.get_xlim()[1] == pytest.approx(1.0, abs=0.03)
    assert spectrum.get_xlim() == pytest.approx(square.get_xlim())
