"""The command line of training. Nothing but the standard library is imported before it has been read."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from d2v_fast.commands.number_arguments import count_argument
from d2v_fast.files.paths import PathError, expand_path, path_argument
from d2v_fast.packages import add_version_option

if TYPE_CHECKING:
    from d2v_fast.config import RunConfig

DESCRIPTION = "Pre-train a data2vec encoder from one JSON file."
_EXAMPLES = """\
examples:
  python d2v_fast/train.py configs/digits.json
  deepspeed d2v_fast/train.py --ds_config configs/vision_base.json --set d2v.data.path=/data/images
  torchrun --nproc_per_node 8 d2v_fast/train.py --ds_config configs/vision_base.json --run-name base
  python d2v_fast/train.py --run digits-1 --resume
"""


def parser() -> argparse.ArgumentParser:
    """The options of `d2v_fast/train.py`."""
    result = argparse.ArgumentParser(
        prog="d2v_fast/train.py",
        description=DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_options(result)
    return result


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of training to a parser; `d2v-fast train` has them, too."""
    parser.add_argument(
        "file",
        type=path_argument,
        metavar="FILE",
        nargs="?",
        help="the run: DeepSpeed's keys and a d2v section, or the name of a preset (with --resume: the run's own)",
    )
    parser.add_argument(
        "--ds_config", type=path_argument, metavar="FILE", help="the same, as DeepSpeed's launcher knows it"
    )
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        dest="overrides",
        help="override one key of the file, such as d2v.model.depth=6 or optimizer.params.lr=1e-3; repeatable",
    )
    # torchrun takes every --run for the beginning of its own --run-path, before and after the script
    parser.add_argument(
        "--run",
        "--run-name",
        metavar="NAME",
        help="name of the run folder (default: the file's name and a number); under torchrun write --run-name",
    )
    parser.add_argument("--resume", action="store_true", help="continue the run of that name where it was saved last")
    parser.add_argument(
        "--supervise",
        metavar="N",
        nargs="?",
        type=count_argument,
        const=3,
        help="restart after a fault, from the newest good checkpoint; N (3) restarts in a row without a new one end it",
    )
    parser.add_argument("--dry-run", action="store_true", help="print parameters, memory and steps, then stop")
    parser.add_argument(
        "--profile", action="store_true", help="measure the parts of a step (waits for the device between them)"
    )
    add_version_option(parser)
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)


def read_config(options: argparse.Namespace, num_processes: int) -> RunConfig:
    """The configuration that the options ask for, checked; `run.name` and `run.profile` are filled in.

    Raises:
        ConfigError: with every problem at once.
    """
    from d2v_fast.checkpoints.saved_config import saved_config
    from d2v_fast.config import ConfigError, apply_overrides, load_config, parse_config
    from d2v_fast.config.schema import with_earlier_values

    overrides = list(options.overrides)
    if options.run is not None:
        overrides.append(f"d2v.run.name={json.dumps(options.run)}")
    if options.profile:
        overrides.append("d2v.run.profile=true")
    if options.ds_config is not None:
        config = load_config(options.ds_config, overrides, num_processes)
    elif options.resume and options.run is not None:
        folder = _runs_folder(overrides) / options.run
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
    """What an unnamed run is called after."""
    return options.ds_config.stem if options.ds_config else "run"


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; argparse prints and exits where it is wrong."""
    reader = parser()
    options = reader.parse_args(arguments)
    if options.file is not None:
        if options.ds_config is not None:
            reader.error("FILE and --ds_config name the same thing: give one of them")
        options.ds_config = options.file
    return options


def is_first_process() -> bool:
    """True in the one process that prints, also before the processes are connected."""
    return os.environ.get("RANK", "0") == "0"


def _nothing_to_resume(folder: Path) -> str:
    """Say why a run cannot be resumed without its file."""
    problem = f"`--run {folder.name}` must name a run to resume, but there is no {folder / 'config.json'}."
    if folder.is_dir():
        return f"{problem} Nothing was saved there: start the run with its FILE, without `--resume`."
    root = folder.parent
    there = sorted(path.parent.name for path in root.glob("*/config.json"))
    return f"{problem} Runs in {root}: {', '.join(there)}." if there else f"{problem} There are no runs in {root}."


def _runs_folder(overrides: Sequence[str]) -> Path:
    """`d2v.run.dir` of the overrides: it must be known before the run's own file can be read."""
    from d2v_fast.config import ConfigError, apply_overrides

    run = apply_overrides({}, overrides).get("d2v", {}).get("run", {})
    try:
        return Path(expand_path(str(run.get("dir", "runs"))))
    except PathError as error:
        raise ConfigError([f"`d2v.run.dir` must {error.must}."], "--set") from None
