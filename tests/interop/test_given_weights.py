"""Weights that cannot be used are described by every command before it writes a file."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from d2v_fast.checkpoints.store import MANIFEST
from d2v_fast.commands.console import main
from d2v_fast.config import load_config
from d2v_fast.interop.fairseq import save_fairseq
from d2v_fast.interop.huggingface import export_model
from d2v_fast.modalities.vision.beit import save_beit
from d2v_fast.objectives.build import build_model
from tests.helpers.image_datasets import picture
from tests.helpers.runs import TINY, TINY_SPEECH, TINY_TEXT, failure_status, leave_out_reports, run_forked, tiny_file

BASES = {"vision": TINY, "speech": TINY_SPEECH, "text": TINY_TEXT}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4f" * 32 + b"\nsize 372911\n"


def complaint(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    status, error = main([str(argument) for argument in arguments]), capsys.readouterr().err
    assert status == failure_status(error)
    assert error.count("error: ") == 1
    return error


def spoil(weights: dict[str, Any], value: float) -> str:
    """Put a value into one place of the last tensor of two dimensions; returns what is to be said of it."""
    name = [name for name, tensor in weights.items() if isinstance(tensor, torch.Tensor) and tensor.dim() == 2][-1]
    weights[name] = weights[name].clone()
    weights[name][0, 0] = value
    return f"1 of {weights[name].numel():,} values of `{name}`"


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("modality", BASES)
@pytest.mark.parametrize("form", ["folder", "file"])
def test_values_that_are_not_finite(
    modality: str, form: str, value: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tiny_file(tmp_path, BASES[modality])
    config = load_config(file).d2v
    model = build_model(config)
    if form == "folder":
        source = tmp_path / "folder"
        export_model(model.student, config, source)
        weights = load_file(source / "model.safetensors")
        said = spoil(weights, value)
        save_file(weights, source / "model.safetensors")
    else:
        source = tmp_path / "a.pt"
        save = save_beit if modality == "vision" else save_fairseq
        save(model.student, model.head, model.student, config, source)
        content = torch.load(source, weights_only=True)
        said = spoil(content["model"], value)
        torch.save(content, source)
    arguments = [[source, "--to", tmp_path / "runs" / "a", "--ds_config", file]]
    if form == "file":
        arguments.append([source, "--to", tmp_path / "out"])
    for one in arguments:
        told = complaint(capsys, "import", *one)
        assert "must hold finite weights" in told
        assert said in told
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "out").exists()
    if form == "folder":
        inputs = tmp_path / ("a.txt" if modality == "text" else "inputs")
        told = complaint(capsys, "embed", source, inputs, "--to", tmp_path / "a.npy")
        assert said in told


def test_of_an_average_and_a_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tiny_file(tmp_path, TINY_SPEECH)
    config = load_config(file).d2v
    model = build_model(config)
    save_fairseq(model.student, model.head, model.student, config, tmp_path / "a.pt")
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    for key in ("_ema", "final_proj.weight"):
        spoilt = {**content["model"], "_ema": dict(content["model"]["_ema"])}
        if key == "_ema":
            spoil(spoilt["_ema"], torch.nan)
        else:
            spoilt[key] = torch.full_like(spoilt[key], torch.nan)
        torch.save({**content, "model": spoilt}, tmp_path / "b.pt")
        told = complaint(capsys, "import", tmp_path / "b.pt", "--to", tmp_path / "r" / "a", "--ds_config", file)
        assert "must hold finite weights" in told
    assert not (tmp_path / "r").exists()


@pytest.fixture(scope="module")
def spoilt_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on images whose checkpoint holds a NaN, and is otherwise sound."""
    folder = tmp_path_factory.mktemp("spoilt")
    patch = pytest.MonkeyPatch()
    leave_out_reports(patch.setattr)
    file = tiny_file(folder, d2v__schedule={"steps": 1})
    status = run_forked("--ds_config", file, "--run", "a", output=folder / "output")
    patch.undo()
    assert status == [0], (folder / "output").read_text()
    [step] = (folder / "runs" / "a" / "checkpoints").iterdir()
    [shard] = step.glob("shard-*")
    weights = load_file(shard)
    weights["student/student.embedding.cls_token"][3] = torch.nan
    save_file(weights, shard, metadata={"format": "pt"})
    manifest = json.loads((step / MANIFEST).read_text())
    content = shard.read_bytes()
    manifest["files"][shard.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (step / MANIFEST).write_text(json.dumps(manifest))
    return folder / "runs" / "a"


@pytest.mark.parametrize("command", ["transformers", "beit", "onnx", "embed", "probe", "draw"])
def test_of_a_checkpoint(command: str, spoilt_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to = tmp_path / "out.npy"
    if command in ("probe", "draw"):
        arguments: list[object] = [command, spoilt_run, *(["--out", to] if command == "draw" else [])]
    elif command == "embed":
        picture().save(tmp_path / "a.png")
        arguments = ["embed", spoilt_run, tmp_path, "--to", to]
    else:
        arguments = ["export", spoilt_run, "--format", command, "--to", to]
    told = complaint(capsys, *arguments)
    assert "must hold finite weights" in told
    assert "values of `embedding.cls_token`" in told
    assert "1 of " in told
    assert not to.exists()


def folder_of(folder: Path) -> Path:
    file = tiny_file(folder)
    config = load_config(file).d2v
    export_model(build_model(config).student, config, folder / "folder")
    return folder / "folder"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "preprocessor_config.json"])
def test_pointers_in_a_folder(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of(tmp_path)
    (folder / name).write_bytes(POINTER)
    picture().save(tmp_path / "a.png")
    told = complaint(capsys, "embed", folder, tmp_path, "--to", tmp_path / "a.npy")
    assert "run `git lfs pull`" in told
    assert name in told


@pytest.mark.parametrize("name", ["a.pt", "a.pth", "model.safetensors", "a.bin"])
def test_pointers_instead_of_a_checkpoint(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / name).write_bytes(POINTER)
    told = complaint(capsys, "import", tmp_path / name, "--to", tmp_path / "out")
    assert f"{name}` is a git-lfs pointer in place of the file: run `git lfs pull`" in told


def test_a_pointer_in_the_place_of_a_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.tsv").write_bytes(POINTER)
    file = tiny_file(tmp_path, TINY_SPEECH)
    data = [f"d2v.data.{key}" for key in (f"path={tmp_path}/a.tsv", 'kind="audio"')]
    assert "run `git lfs pull`" in complaint(capsys, "check", file, *(w for d in data for w in ("--set", d)))


@pytest.mark.parametrize("name", ["tokenizer.json", "merges.txt"])
def test_pointers_of_a_tokenizer(name: str, tmp_path: Path) -> None:
    from d2v_fast.modalities.text.tokenizer import load_tokenizer

    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(ValueError, match="run `git lfs pull`"):
        load_tokenizer(tmp_path)


def test_pointers_among_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One image of two was not fetched; a text about git-lfs is a text."""
    folder = folder_of(tmp_path)
    images = tmp_path / "images"
    images.mkdir()
    picture().save(images / "a.png")
    (images / "b.jpg").write_bytes(POINTER.replace(b"v1\n", b"v1\next-0-foo sha256:" + b"00" * 32 + b"\n"))
    assert main(["embed", str(folder), str(images), "--to", str(tmp_path / "a.npy")]) == 0
    assert "b.jpg: a git-lfs pointer in place of the file: run `git lfs pull`" in capsys.readouterr().err

    from d2v_fast.files.reading import is_pointer

    assert is_pointer(POINTER)
    assert not is_pointer(b"A pointer begins with " + POINTER)
    assert not is_pointer(POINTER + b"and more of the text\n")
    assert not is_pointer(POINTER[:40])


def run_folder(folder: Path) -> Path:
    """A run without weights: what it is called is all that counts."""
    run = folder / "runs" / "x"
    (run / "checkpoints" / "step-7").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"train_batch_size": 8, "d2v": {}}))
    return run


def with_export(folder: Path) -> Path:
    run = run_folder(folder)
    (run / "export").mkdir()
    (run / "export" / "config.json").write_text("{}")
    return run


def deepspeed_folder(folder: Path, names: list[str]) -> Path:
    for name in names:
        (folder / "ds" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "ds" / name).write_bytes(b"")
    return folder / "ds"


def only(folder: Path, *names: str) -> Path:
    inner = folder / "m"
    shutil.copytree(folder_of(folder), inner)
    for path in inner.iterdir():
        if path.name not in names:
            path.unlink()
    return inner


def written(path: Path, content: bytes = b"{}") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


WRONG: dict[str, tuple[Callable[[Path], Path], str]] = {
    "run": (run_folder, r"`\S*d2v-fast export {run}` makes a Transformers folder of it, `{run}/export`"),
    "run with its export": (with_export, "is the folder of a run: name `{run}/export`, which holds its weights"),
    "checkpoint": (
        lambda f: run_folder(f) / "checkpoints" / "step-7",
        r"`\S*d2v-fast export {run} --step 7 --to FOLDER`",
    ),
    "checkpoints": (lambda f: run_folder(f) / "checkpoints", r"belongs to the run `{run}`: `\S*d2v-fast export {run}`"),
    "DeepSpeed's": (
        lambda f: deepspeed_folder(f, ["latest", "global_step10/mp_rank_00_model_states.pt"]),
        "holds checkpoints of DeepSpeed. .*`zero_to_fp32.py`",
    ),
    "DeepSpeed's step": (
        lambda f: deepspeed_folder(f, ["zero_pp_rank_0_mp_rank_00_model_states.pt"]),
        "is a checkpoint of DeepSpeed",
    ),
    "tokenizer": (
        lambda f: written(f / "t" / "tokenizer.json").parent,
        "holds a tokenizer .tokenizer.json. and no model. Name the folder of the model, and this one",
    ),
    "file of a tokenizer": (lambda f: written(f / "t" / "tokenizer.json"), "is the file of a tokenizer and no model"),
    "weights": (lambda f: folder_of(f) / "model.safetensors", "is a file of a folder: name the folder, `.*folder`"),
    "configuration": (lambda f: folder_of(f) / "config.json", "is a file of a folder: name the folder, `.*folder`"),
    "weights alone": (lambda f: only(f, "model.safetensors"), "holds weights without their `config.json`"),
    "configuration alone": (lambda f: only(f, "config.json"), "must hold `model.safetensors`, but does not"),
    "pickle": (
        lambda f: written(folder_of(f) / "pytorch_model.bin"),
        "is a pickle beside a `config.json`. Save the model again with Transformers",
    ),
    "folder of models": (lambda f: folder_of(f).parent, "holds no model itself, but folders .* of them: folder"),
    "empty": (lambda f: written(f / "e" / "x").parent, "config.json"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_model_is_explained(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, expected = WRONG[kind]
    source = make(tmp_path)
    file = tiny_file(tmp_path / "e" if (tmp_path / "e").is_dir() else tmp_path)
    pattern = expected.replace("{run}", str(tmp_path / "runs" / "x"))
    commands: list[list[object]] = [["import", source, "--to", tmp_path / "out", "--ds_config", file]]
    if not kind.startswith("run"):
        commands.append(["embed", source, tmp_path, "--to", tmp_path / "a.npy"])
    if kind not in ("configuration alone", "empty"):
        commands.append(["import", source, "--to", tmp_path / "out"])
    for command in commands:
        told = complaint(capsys, *command)
        assert re.search(pattern, told), told
    assert not (tmp_path / "out").exists()


def test_commands_on_runs_explain_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of(tmp_path)
    for command in ("probe", "export", "draw"):
        assert "but is a Transformers folder already" in complaint(capsys, command, folder)
        told = complaint(capsys, command, run_folder(tmp_path / command) / "checkpoints" / "step-7")
        assert f"is a checkpoint of the run `{tmp_path / command}/runs/x`" in told


def test_an_import_that_fails_leaves_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from d2v_fast.checkpoints import store

    def full(path: Path, tensors: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "write_shards", full)
    run = tmp_path / "runs" / "a"
    told = complaint(capsys, "import", folder_of(tmp_path), "--to", run, "--ds_config", tiny_file(tmp_path))
    assert "No space left" in told
    assert not run.exists()
