"""Every path that a user can write, in a file or on the command line, is expanded by one function."""

from __future__ import annotations

import argparse
import json
import pwd
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from d2v_fast.cli.arguments import path_argument
from d2v_fast.cli.parser import tool_parser
from d2v_fast.cli.train_options import train_parser
from d2v_fast.commands import console
from d2v_fast.config import ConfigError, DeepSpeedConfig, load_config
from d2v_fast.config.errors import PathText
from d2v_fast.files.paths import PathError, expand_path
from d2v_fast.modalities import all_modalities
from d2v_fast.modalities.text.tokenizer import load_tokenizer
from tests.helpers.runs import TINY, leave_out_reports, tiny_file

# keys that hold text which is no path; whoever adds a key of text says here or by its type which it is
NO_PATHS = {
    *("modality", "name", "field", "label_field", "type"),
    # of DeepSpeed's monitors and checkpoints
    *("group", "team", "project", "job_name", "workspace", "api_key", "experiment_name", "experiment_key"),
    *("tag_validation", "data_parallel"),
}
# options whose value is text which is no path
NO_PATH_OPTIONS = {"overrides", "run", "only", "name", "field", "label_field", "local_rank", "sweep"}


def annotations(kind: Any) -> Iterator[Any]:
    """The alternatives of a union, with `Annotated` as it is written."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        for argument in typing.get_args(kind):
            yield from annotations(argument)
    else:
        yield kind


def text_fields(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, bool]]:
    """Dotted names of the fields that take any text, each with whether it is a path."""
    for name, kind in typing.get_type_hints(model, include_extras=True).items():
        if name not in model.model_fields:
            continue
        for one in annotations(kind):
            if isinstance(one, type) and issubclass(one, BaseModel):
                yield from text_fields(one, f"{prefix}{name}.")
            elif one == PathText:
                yield f"{prefix}{name}", True
            elif one is str:
                yield f"{prefix}{name}", False


def all_text_fields() -> dict[str, bool]:
    found = dict(text_fields(DeepSpeedConfig, ""))
    for modality in all_modalities():
        section = modality.config
        found |= dict(text_fields(section, "d2v."))
    return found


def test_every_key_of_text_is_a_path_or_known_to_be_none() -> None:
    found = all_text_fields()
    assert {key for key, is_path in found.items() if is_path} >= {
        *("d2v.run.dir", "d2v.data.path", "d2v.data.tokenizer", "d2v.data.tokens_path"),
        *("zero_optimization.offload_optimizer.nvme_path", "zero_optimization.offload_param.nvme_path"),
        *("tensorboard.output_path", "csv_monitor.output_path", "flops_profiler.output_file"),
    }
    others = {key.rpartition(".")[2] for key, is_path in found.items() if not is_path}
    assert others <= NO_PATHS, f"{others - NO_PATHS}: PathText, or no path?"


def options_of(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for one in action.choices.values():
                yield from options_of(one)
        else:
            yield action


def test_every_option_of_text_is_a_path_or_known_to_be_none() -> None:
    paths = set()
    for parser in (tool_parser(), train_parser()):
        for action in options_of(parser):
            if action.type is path_argument:
                paths.add(action.dest)
            elif action.nargs != 0 and action.choices is None and action.type in (None, str):
                assert action.dest in NO_PATH_OPTIONS, f"{action.dest}: path_argument, or no path?"
            else:
                assert action.type is not Path, f"{action.dest}: path_argument instead of Path"
    assert paths >= {"file", "ds_config", "to", "inputs", "model", "run_folder", "source", "tokenizer", "data", "out"}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.delenv("D2V_UNSET", raising=False)
    monkeypatch.chdir(tmp_path)
    return folder


def test_what_is_expanded(home: Path, tmp_path: Path) -> None:
    assert expand_path("~") == str(home)
    assert expand_path("~/runs") == f"{home}/runs"
    user = pwd.getpwuid(0)
    assert expand_path(f"~{user.pw_name}/runs") == f"{user.pw_dir}/runs"
    assert expand_path("$SCRATCH/a") == expand_path("${SCRATCH}/a") == f"{tmp_path}/scratch/a"
    assert expand_path("~/$SCRATCH") == f"{home}/{tmp_path}/scratch"
    # what is no beginning is left alone
    for text in ("", "runs", "./~", "a/~/b", "a~", "/a b/c", "cost$", "a$ b"):
        assert expand_path(text) == text
    with pytest.raises(PathError, match=r"of a user of this machine, or with `\./~nobody-here` for a folder"):
        expand_path("~nobody-here/runs")
    with pytest.raises(PathError, match="environment variables that are set, which `D2V_UNSET` is not"):
        expand_path("/data/$D2V_UNSET")
    (tmp_path / "a$D2V_UNSET").mkdir()
    assert expand_path("a$D2V_UNSET") == "a$D2V_UNSET"


@pytest.mark.parametrize("key", [key for key, is_path in all_text_fields().items() if is_path and "d2v." in key])
def test_keys(key: str, home: Path, tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    raw = {**TINY, "d2v": {"modality": "text", "data": {"kind": "text", "path": "/text", "tokenizer": "/tokenizer"}}}
    raw["d2v"]["schedule"] = {"steps": 4, "warmup_steps": 1}
    file.write_text(json.dumps(raw))
    section, name = key.split(".")[1:]
    for text, expanded in (("~/x", f"{home}/x"), ("$SCRATCH", f"{tmp_path}/scratch"), ("x", "x")):
        config = load_config(file, [f"{key}={text}"])
        assert getattr(getattr(config.d2v, section), name) == expanded
        assert config.to_dict()["d2v"][section][name] == expanded
    with pytest.raises(ConfigError, match=f"`{key}` must begin with the home folder of a user of this machine"):
        load_config(file, [f"{key}=~nobody-here/x"])
    with pytest.raises(ConfigError, match=f"`{key}` must name environment variables that are set"):
        load_config(file, [f"{key}=$D2V_UNSET/x"])


def test_a_run_in_the_home_folder(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_out_reports(monkeypatch.setattr)
    file = tiny_file(home, d2v__schedule__steps=1, d2v__schedule__warmup_steps=0, d2v__run__dir="~/my runs")
    assert console.main(["train", "~/tiny.json", "--run", "r"]) == 0
    assert (home / "my runs" / "r" / "result.json").is_file()
    assert not (tmp_path / "~").exists()
    assert console.main(["train", "--run", "r", "--resume", "--set", "d2v.run.dir=~/my runs"]) == 0
    assert console.main(["train", "--run", "r", "--resume", "--set", "d2v.run.dir=~nobody-here"]) == 2
    assert file.is_file()


def test_options(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert console.main(["presets", "digits", "--to", "~/mine.json"]) == 0
    assert (home / "mine.json").is_file()
    with pytest.raises(SystemExit) as ended:
        console.main(["embed", "~nobody-here/run", "x", "--to", "y.npy"])
    assert ended.value.code == 2
    assert "argument MODEL: a path must begin with the home folder" in capsys.readouterr().err
    with pytest.raises(ValueError, match=f"{home}/none"):
        load_tokenizer("~/none")
