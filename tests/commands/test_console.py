"""The `d2v-fast` command on small real inputs, with messages for mistakes and help without heavy imports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from d2v_fast.cli.run import explain
from d2v_fast.commands import bench, check, console
from d2v_fast.commands.console import main
from d2v_fast.config import VisionConfig, check_d2v, presets
from d2v_fast.config.finetune import FinetuneConfig
from d2v_fast.modalities import build_student, modality_names
from tests.helpers.command_line import complaint
from tests.helpers.places import ROOT
from tests.helpers.runs import TINY, TINY_SPEECH, leave_out_reports, tiny_file
from tests.helpers.text_files import sentences, small_tokenizer
from tests.helpers.written_runs import write_run

COMMANDS = tuple(console._WORK)


def tiny_text(folder: Path, **changes: object) -> Path:
    """A tiny configuration of text, with its text and its tokenizer."""
    (folder / "text").mkdir(exist_ok=True)
    (folder / "text" / "a.txt").write_text("\n\n".join(sentences(120)))
    (folder / "tokenizer").mkdir(exist_ok=True)
    small_tokenizer().save(folder / "tokenizer")
    base = {
        **TINY,
        "d2v": {
            **{key: TINY["d2v"][key] for key in ("teacher", "schedule", "run")},
            "modality": "text",
            "model": {"vocab_size": 360, "max_positions": 64, "width": 16, "depth": 2, "heads": 2},
            "target": {"top_k": 2},
            "data": {
                "kind": "text",
                "path": str(folder / "text"),
                "documents": "paragraph",
                "tokenizer": str(folder / "tokenizer"),
                "tokens_path": str(folder / "tokens"),
                "block_size": 64,
                "num_workers": 0,
            },
        },
    }
    return tiny_file(folder, base, train_batch_size=4, **changes)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"] if command else ["--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "example" in said
    assert f"d2v-fast {command}".strip() in said
    if command in ("check", "presets"):
        assert all(name in said for name in modality_names())


def test_help_imports_no_torch() -> None:
    code = f"""
import contextlib, io, sys
from d2v_fast.commands.console import main
for words in [["--help"], *([name, "--help"] for name in {COMMANDS!r})]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        main(words)
print(sorted({{"torch", "numpy", "pydantic"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    "arguments",
    [[], ["tarin"], ["check"], ["embed", "x", "y"], ["probe", "x", "--stpe", "3"], ["export", "x", "--format", "y"]],
)
def test_wrong_options_are_told_by_the_parser(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: d2v-fast" in capsys.readouterr().err


def test_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    leave_out_reports(monkeypatch.setattr)
    file = tiny_file(tmp_path)
    assert main(["train", str(file), "--set", "d2v.schedule.steps=3", "--run", "r"]) == 0
    assert (tmp_path / "runs/r/result.json").is_file()
    assert main(["train", str(file), "--set", "d2v.model.detph=3"]) == 2
    assert "depth" in capsys.readouterr().err
    assert "give one of them" in complaint(capsys, "train", file, "--ds_config", file, status=2)


@pytest.mark.parametrize("modality", ["vision", "speech", "text"])
def test_check(
    modality: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = {
        "vision": lambda: tiny_file(tmp_path),
        "speech": lambda: tiny_file(tmp_path, TINY_SPEECH),
        "text": lambda: tiny_text(tmp_path),
    }[modality]()
    monkeypatch.setattr(check, "ENOUGH_SECONDS", 0.1)
    before = set(tmp_path.rglob("*"))
    assert main(["check", str(file), "--set", "d2v.schedule.steps=1000"]) == 0
    said = capsys.readouterr().out
    for part in ("parameters", "memory", "batch", "% padding", "peak memory", "micro-step", "step", "whole run"):
        assert f"\n{part}" in said or part in said, part
    assert "for 1,000 steps" in said
    if modality == "vision":
        assert "24 images, 16 patches each: 0.0 % padding, 5" in said
    # the tokens of text, and nothing else
    written = {path for path in set(tmp_path.rglob("*")) - before if tmp_path / "tokens" not in path.parents}
    assert written <= {tmp_path / "tokens"}


def test_check_of_several_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("deepspeed")
    monkeypatch.setattr(check, "ENOUGH_SECONDS", 0.1)
    file = tiny_file(tmp_path, zero_optimization__stage=2)
    assert main(["check", str(file), "--processes", "3"]) == 0
    said = capsys.readouterr().out
    assert "8 per micro-step x 1 micro-steps x 3 processes" in said
    assert "without the exchange between processes" in said


def test_check_tells_problems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tiny_file(tmp_path)
    assert "`d2v.model.detph`" in complaint(capsys, "check", file, "--set", "d2v.model.detph=3", status=2)
    assert "must be a readable JSON file" in complaint(capsys, "check", tmp_path / "none.json", status=2)
    missing = ["--set", "d2v.data.kind=images", "--set", f"d2v.data.path={tmp_path / 'none'}"]
    assert "does not exist" in complaint(capsys, "check", file, *missing)
    assert "must hold at least one optimizer step" in complaint(
        capsys, "check", file, "--set", "train_batch_size=100000"
    )
    monkeypatch.setattr(check, "available_memory", lambda: 1000)
    assert "a step cannot be tried here" in complaint(capsys, "check", file)
    monkeypatch.undo()
    monkeypatch.setattr(check, "ENOUGH_SECONDS", 0.1)
    monkeypatch.setattr(check, "build_objective", infinite_model)
    assert main(["check", str(file)]) == 1
    assert "problem: the loss must be finite, but is nan" in capsys.readouterr().out


def infinite_model(config: VisionConfig) -> torch.nn.Module:
    from d2v_fast.objectives.build import build_model

    model = build_model(config)
    with torch.no_grad():
        model.head.bias.fill_(float("nan"))
    return model


def test_probe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, _ = check_d2v(TINY["d2v"])
    assert config is not None
    write_run(tmp_path / "r", config, 2)
    assert main(["probe", str(tmp_path / "r"), "--step", "7"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{tmp_path / 'r'}, step 7:\n")
    assert [line.split()[0] for line in said.splitlines()[2:]] == ["untrained", "student", "teacher", "raw"]
    assert "`--step` must be of a checkpoint in" in complaint(capsys, "probe", tmp_path / "r", "--step", 3)
    assert "holds no config.json" in complaint(capsys, "probe", tmp_path)
    unlabeled = config.model_copy(update={"data": config.data.model_copy(update={"kind": "images", "path": "x"})})
    write_run(tmp_path / "u", unlabeled, 1)
    assert "there are no labels to probe the run on: " in complaint(capsys, "probe", tmp_path / "u")


def test_tokenize(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tiny_text(tmp_path)
    new = tmp_path / "new"
    train = ["tokenize", tmp_path / "text", "--train", "--vocab-size", 300, "--to", new]
    assert main([*map(str, train), "--set", "d2v.data.documents=line"]) == 0
    assert f"{new} (300 tokens)" in capsys.readouterr().out
    assert (new / "tokenizer.json").is_file()
    assert main(["tokenize", str(file), "--set", f"d2v.data.tokenizer={new}"]) == 0
    said = capsys.readouterr().out
    assert "of 120 documents" in said
    (folder,) = [path for path in (tmp_path / "tokens").iterdir() if path.is_dir()]
    assert f"cache: {folder}" in said
    # a run takes what is there
    changed = (folder / "manifest.json").stat().st_mtime_ns
    assert main(["tokenize", str(file), "--set", f"d2v.data.tokenizer={new}"]) == 0
    assert (folder / "manifest.json").stat().st_mtime_ns == changed
    capsys.readouterr()

    assert "must not exist" in complaint(capsys, *train)
    assert "`--train` needs `--vocab-size N` and `--to FOLDER`" in complaint(capsys, "tokenize", "x", "--train")
    assert "are for `--train`" in complaint(capsys, "tokenize", file, "--to", "x")
    small = complaint(capsys, *train[:4], 20, "--to", tmp_path / "small")
    assert "`--vocab-size` must be >= 261, but is 20 instead" in small
    assert "does not exist" in complaint(capsys, "tokenize", tmp_path / "none", *train[2:-1], tmp_path / "small")
    wrong = ["--set", "d2v.model.depth=3", "--set", "d2v.data.feild=x"]
    said = complaint(capsys, *train[:-1], tmp_path / "small", *wrong, status=2)
    assert "`model` has no effect" in said
    assert "field" in said
    vision = tiny_file(tmp_path)
    assert '`d2v.modality` must be "text", but is "vision"' in complaint(capsys, "tokenize", vision, status=2)


def test_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        ValueError, match="in the source tree of d2v_fast, and this installation has none: unpack or clone"
    ):
        bench.run_benchmarks(root=tmp_path)
    called: list[list[str]] = []
    statuses = [0, 0, 0, 0, 0, 0, 1, 1, 5]

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        called.append([Path(part).name for part in command[1:]])
        return subprocess.CompletedProcess(command, statuses.pop(0))

    monkeypatch.setattr(bench.subprocess, "run", run)
    assert main(["bench"]) == 0
    assert "every benchmark, about a quarter of an hour on two idle cores; to run some: " in capsys.readouterr().out
    assert main(["bench", "--only", "ema"]) == 0
    assert not capsys.readouterr().out
    assert main(["bench", "--check"]) == 1
    assert "about ten minutes" in capsys.readouterr().out
    assert main(["bench"]) == 1
    assert "must match the name of a benchmark" in complaint(capsys, "bench", "--only", "nothing")
    assert "leave out `--only`" in complaint(capsys, "bench", "--check", "--only", "ema")
    assert called[1] == ["report.py", "bench.json"]
    assert called[2][-3:] == ["-k", "ema", "--collect-only"]
    assert called[3][-4:] == ["-k", "ema", "--benchmark-json", "bench.json"]
    assert called[4] == ["report.py", "bench.json", "--out", "bench"]
    assert called[6] == ["report.py", "bench-check.json", "--check"]
    assert not statuses


def test_presets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    configs = ROOT / "configs"
    assert [line.split()[0] for line in lines[1:-1]] == sorted(path.stem for path in configs.glob("*.json"))
    assert main(["presets", "digits"]) == 0
    assert json.loads(capsys.readouterr().out)["d2v"]["modality"] == "vision"
    to = tmp_path / "mine.json"
    assert main(["presets", "text_base", "--to", str(to)]) == 0
    needed = f"d2v-fast train {to} --set d2v.data.path=... --set d2v.data.tokenizer=..."
    assert needed in capsys.readouterr().out
    assert to.read_bytes() == (configs / "text_base.json").read_bytes()
    assert "must be a new file" in complaint(capsys, "presets", "digits", "--to", to)
    assert main(["presets", "finetune_speech_large", "--to", str(tmp_path / "tune.json")]) == 0
    needed = f"d2v-fast finetune SOURCE --ds_config {tmp_path / 'tune.json'} --set d2v.data.path=..."
    assert needed in capsys.readouterr().out
    for line in lines[1:-1]:
        assert line.count("of SOURCE") == (2 if line.startswith("finetune_") else 0)
    assert "The nearest is digits." in complaint(capsys, "presets", "digtis")
    assert "needs the name of a configuration" in complaint(capsys, "presets", "--to", to)


def test_presets_say_how_large_they_are() -> None:
    assert sorted(presets._ABOUT) == presets.preset_names()
    for name, (parameters, _) in presets._ABOUT.items():
        if isinstance(presets.read_preset(name), FinetuneConfig):
            # the sizes in the file, if any, are replaced by those of the source
            assert parameters == presets.OF_SOURCE, name
            continue
        with torch.device("meta"):
            count = sum(p.numel() for p in build_student(presets.read_preset(name)).parameters())
        shown = f"{count / 1e6:.3g} M" if count >= 1e6 else f"{count / 1e3:.3g} k"
        assert parameters == shown, name


def test_faults_are_told_apart(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def raising(error: BaseException) -> None:
        def work(options: object) -> int:
            raise error

        monkeypatch.setitem(console._WORK, "doctor", work)

    raising(ModuleNotFoundError("No module named 'numba'", name="numba.core"))
    said = complaint(capsys, "doctor")
    assert "numba cannot be imported: No module named 'numba'. `pip install 'd2v_fast[train]'`" in said
    raising(torch.OutOfMemoryError("too much"))
    assert complaint(capsys, "doctor") == "error: too much\n"
    assert explain(torch.OutOfMemoryError("a"), "train").startswith("a\nLower `train_micro_batch_size_per_gpu`")
    raising(KeyboardInterrupt())
    assert main(["doctor"]) == 130
    # a fault of the library itself is not hidden
    for error in (RuntimeError("odd"), KeyError("odd")):
        raising(error)
        with pytest.raises(type(error)):
            main(["doctor"])
