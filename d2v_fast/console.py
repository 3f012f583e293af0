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
    from d2v_fast.world import RunError

    try:
        print(_import(options) if options.command == "import" else _export(options))
    except (ValueError, OSError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _export(options: argparse.Namespace) -> str:
    from d2v_fast.export import export_run

    return export_run(
        options.run_folder,
        to=options.to,
        weights=options.weights,
        step=options.step,
        form=options.format,
        tokenizer=options.tokenizer,
    )


def _import(options: argparse.Namespace) -> str:
    from d2v_fast.start import import_folder, start_run

    if options.ds_config is None:
        return import_folder(
            options.source, options.to, weights=options.weights, heads=options.heads, tokenizer=options.tokenizer
        )
    if options.tokenizer is not None:
        raise ValueError("`--tokenizer` is for a Transformers folder: a run names its own as `d2v.data.tokenizer`.")
    return start_run(options.source, options.to, options.ds_config, overrides=options.overrides, heads=options.heads)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="d2v-fast", description="Carry weights into pre-training runs and out of them."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    export = commands.add_parser(
        "export",
        help="write a checkpoint's weights for Transformers or fairseq",
        description="Write full-precision weights from a checkpoint, sharded or not. Needs no GPU.",
        epilog="example: d2v-fast export runs/mine --weights teacher --to exported",
        allow_abbrev=False,
    )
    export.add_argument("run_folder", type=Path, help="runs/NAME")
    export.add_argument("--weights", choices=("student", "teacher"), default="student", help="whose (default: student)")
    export.add_argument("--to", type=Path, default=None, metavar="PATH", help="default: runs/NAME/export, or export.pt")
    export.add_argument("--step", type=int, default=None, metavar="N", help="of the checkpoint (default: the newest)")
    export.add_argument(
        "--format",
        choices=("transformers", "fairseq"),
        default="transformers",
        help="a folder for Transformers (default), or of speech and text a .pt for fairseq, with student, head and "
        "teacher",
    )
    export.add_argument(
        "--tokenizer",
        type=Path,
        default=None,
        metavar="PATH",
        help="of a text run, for Transformers (default: what its config.json names)",
    )
    bring = commands.add_parser(
        "import",
        help="make a Transformers folder, or a run that begins with them, of other libraries' weights",
        description="Read a fairseq data2vec checkpoint (.pt, of speech or text) or a Transformers folder. Without "
        "--ds_config the checkpoint becomes a Transformers folder. With it, --to becomes the folder of a run that "
        "begins with these weights: d2v_fast/train.py --run NAME --resume trains it.",
        epilog="example: d2v-fast import audio_base_ls.pt --to exported",
        allow_abbrev=False,
    )
    bring.add_argument("source", type=Path, help="a .pt file, or a folder with config.json and model.safetensors")
    bring.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="the folder to write")
    bring.add_argument(
        "--weights",
        choices=("student", "teacher"),
        default="student",
        help="whose, of a .pt, for a Transformers folder; a run takes both (default: student)",
    )
    bring.add_argument(
        "--heads",
        type=int,
        default=None,
        metavar="N",
        help="of attention, where a .pt does not tell (default: width / 64)",
    )
    bring.add_argument(
        "--tokenizer", type=Path, default=None, metavar="PATH", help="of text, to put into a Transformers folder"
    )
    bring.add_argument("--ds_config", type=Path, default=None, metavar="FILE", help="of the run that is to begin")
    bring.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        dest="overrides",
        help="override one key of that file",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
