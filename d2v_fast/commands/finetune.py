"""`d2v-fast finetune`: train an encoder with a head on labeled samples.

It is `train` with a configuration of fine-tuning, into which SOURCE and the options about it are written.
"""

from __future__ import annotations

import argparse
import sys

from d2v_fast.cli.train_options import runs_folder
from d2v_fast.command_lines import path_override, path_words
from d2v_fast.errors import OptionError
from d2v_fast.train import train_command


def finetune(options: argparse.Namespace) -> int:
    """Fine-tune, and return the exit status; see `train_command`.

    Args:
        options: of the command.
    Raises:
        UserError, OSError: with a message for the user.
    """
    if options.sweep:
        return _sweep(options)
    if options.seeds is not None:
        raise OptionError("`--seeds` is for `--sweep`; one run has the seed `--set d2v.run.seed=N`.")
    options.overrides = _overrides(options)
    return train_command(options, _train_words(options))


def _overrides(options: argparse.Namespace) -> list[str]:
    """Return the overrides of a run: what the options say of SOURCE, and those that were given."""
    found: list[str] = []
    if options.source is not None:
        _, override = path_override("d2v.finetune.source", options.source)
        found.append(override)
    elif options.weights is not None or options.step is not None:
        raise OptionError("`--weights` and `--step` choose weights of SOURCE, which is not given.")
    if options.weights is not None:
        found.append(f"d2v.finetune.weights={options.weights}")
    if options.step is not None:
        found.append(f"d2v.finetune.step={options.step}")
    return [*found, *options.overrides]


def _sweep(options: argparse.Namespace) -> int:
    """Fine-tune once for each value and seed, in processes of their own.

    The configurations of all new runs are read first: what the last run of a sweep would refuse costs no other run.
    """
    from d2v_fast.commands.sweep import Sweep, parse_axis, refuse_own_keys
    from d2v_fast.config import load_config

    if options.ds_config is None:
        raise OptionError("`--sweep` needs the configuration of its runs: add `--ds_config FILE`.")
    if options.dry_run:
        raise OptionError(
            "`--dry-run` is for one run: leave `--sweep` out. A sweep checks all its runs before the first."
        )
    axes = [parse_axis(text) for text in options.sweep]
    refuse_own_keys(axes, options.overrides)
    name = options.run or f"{options.ds_config.stem}-sweep"
    folder = runs_folder(options.overrides) / name
    command = [sys.executable, "-m", "d2v_fast", "finetune"]
    sweep = Sweep(options.words, axes, options.seeds or 1, folder, command)
    overrides = _overrides(options)
    # seeds do not matter, and a run that has begun need not read its source again
    new = {cell.values: cell for cell in sweep.cells if not (folder / cell.name).exists()}
    for cell in new.values():
        load_config(options.ds_config, [*overrides, *sweep.settings(cell)])
    return sweep.run()


def _train_words(options: argparse.Namespace) -> list[str]:
    """Return the words with which `d2v_fast/train.py` does the same, for child processes."""
    words = [] if options.ds_config is None else ["--ds_config", path_words(options.ds_config)]
    for override in options.overrides:
        words += ["--set", override]
    if options.run is not None:
        words.append(f"--run-name={options.run}")
    if options.supervise is not None:
        words += ["--supervise", str(options.supervise)]
    flags = {"--resume": options.resume, "--dry-run": options.dry_run, "--profile": options.profile}
    return words + [flag for flag, is_set in flags.items() if is_set]
