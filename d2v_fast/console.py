"""The `d2v-fast` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 1 failed, 2 wrong options."""
    options = _parser().parse_args(arguments)
    # the slow imports, only now: --help has answered by here
    from d2v_fast.export import export_run
    from d2v_fast.world import RunError

    try:
        print(export_run(options.run_folder, to=options.to, weights=options.weights, step=options.step))
    except (ValueError, OSError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="d2v-fast", description="Work with what a pre-training run has left.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    export = commands.add_parser(
        "export",
        help="write a Transformers folder from a checkpoint",
        description="Write a full-precision Transformers folder from a checkpoint, sharded or not. Needs no GPU.",
        epilog="example: d2v-fast export runs/mine --weights teacher --to exported",
    )
    export.add_argument("run_folder", type=Path, help="runs/NAME")
    export.add_argument("--weights", choices=("student", "teacher"), default="student", help="whose (default: student)")
    export.add_argument("--to", type=Path, default=None, metavar="FOLDER", help="default: runs/NAME/export")
    export.add_argument("--step", type=int, default=None, metavar="N", help="of the checkpoint (default: the newest)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
