"""The options of training, and the configuration that they ask for."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2v_fast.cli.arguments import count_argument, path_argument
from d2v_fast.cli.run import is_first_process
from d2v_fast.errors import OptionError
from d2v_fast.files.paths import PathError, expand_path
from d2v_fast.packages import add_version_option

if TYPE_CHECKING:
    from d2v_fast.config import RunConfig

_EXAMPLES = """\
examples:
  python d2v_fast/train.py configs/digits.json
  deepspeed d2v_fast/train.py --ds_config configs/vision_base.json --set d2v.data.path=/data/images
  torchrun --nproc_per_node 8 d2v_fast/train.py --ds_config configs/vision_base.json --run-name base
  python d2v_fast/train.py --run digits-1 --resume
"""


def train_parser() -> argparse.ArgumentParser:
    """Return the parser of `d2v_fast/train.py`."""
    result = argparse.ArgumentParser(
        prog="d2v_fast/train.py",
        description="Pre-train a data2vec encoder from one JSON file.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_train_options(result)
    add_version_option(result)
    return result


def add_train_options(parser: argparse.ArgumentParser, *, file: bool = True) -> None:
    """Add the options of training, which `d2v_fast/train.py`, `d2v-fast train` and `d2v-fast finetune` share.

    Args:
        parser: receives them.
        file: whether the file may be named without an option.
    """
    about = "JSON file with DeepSpeed's keys and a d2v section, or the name of a preset (with --resume the default is "
    about += "the configuration of the run)"
    if file:
        parser.add_argument("file", type=path_argument, metavar="FILE", nargs="?", help=about)
    else:
        parser.set_defaults(file=None)
    also = "the same, for DeepSpeed's launcher" if file else about
    parser.add_argument("--ds_config", type=path_argument, metavar="FILE", help=also)
    add_overrides(parser)
    # torchrun takes every --run for the beginning of its own --run-path, before and after the script
    parser.add_argument(
        "--run",
        "--run-name",
        metavar="NAME",
        help="name of the run folder (default: the file's name and a number); under torchrun write --run-name",
    )
    parser.add_argument("--resume", action="store_true", help="continue the run NAME from its last checkpoint")
    parser.add_argument(
        "--supervise",
        metavar="N",
        nargs="?",
        type=count_argument,
        const=3,
        help="restart after a fault from the newest good checkpoint; give up after N restarts in a row without a new "
        "checkpoint (default: 3)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print parameters, memory and steps, then stop")
    parser.add_argument(
        "--profile", action="store_true", help="time the parts of a step; waits for the device between them"
    )
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add `--set KEY=VALUE`, which is collected in `overrides`."""
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        dest="overrides",
        help="override one key of the file, such as d2v.model.depth=6 or optimizer.params.lr=1e-3; repeatable",
    )


def read_config(options: argparse.Namespace, num_processes: int) -> RunConfig:
    """Return the validated configuration that the options ask for, with `run.name` and `run.profile` filled in.

    Args:
        options: as `train_parser` returns them.
        num_processes: of the run.
    Raises:
        ConfigError: the configuration is wrong, or there is no run to resume. It lists every problem.
        OptionError: FILE and --ds_config are both given.
    """
    from d2v_fast.checkpoints.saved_config import saved_config
    from d2v_fast.config import ConfigError, apply_overrides, load_config, parse_config
    from d2v_fast.config.schema import with_earlier_values

    file = _file(options)
    overrides = list(options.overrides)
    if options.run is not None:
        overrides.append(f"d2v.run.name={json.dumps(options.run)}")
    if options.profile:
        overrides.append("d2v.run.profile=true")
    if file is not None:

        def written(folder: Path) -> dict[str, Any] | None:
            is_run = options.resume and (folder / "config.json").is_file()
            return saved_config(folder, warn=False) if is_run else None

        config = load_config(file, overrides, num_processes, written)
    elif options.resume and options.run is not None:
        folder = runs_folder(overrides) / options.run
        if not os.path.lexists(folder / "config.json") and not (folder / "checkpoints").is_dir():
            raise ConfigError([_nothing_to_resume(folder)], "--resume")
        saved = with_earlier_values(saved_config(folder, warn=is_first_process()))
        config = parse_config(apply_overrides(saved, overrides), num_processes, str(folder / "config.json"))
    else:
        raise ConfigError(["`FILE` is required (or `--resume --run NAME` to continue a run)."], "options")
    if options.resume and config.d2v.run.name is None:
        raise ConfigError(["`--resume` needs the name of a run: add `--run NAME`."], "options")
    return config


def config_stem(options: argparse.Namespace) -> str:
    """Return the beginning of the name of a run that the user has not named."""
    file = _file(options)
    return "run" if file is None else file.stem


def _file(options: argparse.Namespace) -> Path | None:
    """Return FILE or --ds_config."""
    file: Path | None = options.file
    if file is not None and options.ds_config is not None:
        raise OptionError("`FILE` and `--ds_config` are two ways to name the same file: give one of them.")
    return options.ds_config if file is None else file


def _nothing_to_resume(folder: Path) -> str:
    """Return why a run cannot be resumed without its file."""
    problem = f"`--run {folder.name}` must name a run to resume, but there is no {folder / 'config.json'}."
    if folder.is_dir():
        return f"{problem} Nothing was saved there: start the run with its FILE, without `--resume`."
    root = folder.parent
    there = sorted(path.parent.name for path in root.glob("*/config.json"))
    return f"{problem} Runs in {root}: {', '.join(there)}." if there else f"{problem} There are no runs in {root}."


def runs_folder(overrides: Sequence[str]) -> Path:
    """Return `d2v.run.dir` of the overrides, which must be known before the run's own file can be read.

    Raises:
        ConfigError: it cannot be expanded.
    """
    from d2v_fast.config import ConfigError, apply_overrides
    from d2v_fast.config.file import section

    run = section(section(apply_overrides({}, overrides), "d2v"), "run")
    try:
        return Path(expand_path(str(run.get("dir", "runs"))))
    except PathError as error:
        raise ConfigError([f"`d2v.run.dir` must {error.must}."], "--set") from None
