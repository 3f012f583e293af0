"""The `d2v-fast` command: its options, and nothing of its work. What a command needs is imported once it is known which
one it is, so that every `--help` answers at once."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext

from d2v_fast.commands.cli import add_options
from d2v_fast.commands.error_words import in_words
from d2v_fast.commands.number_arguments import count_argument, seconds_argument
from d2v_fast.files.paths import path_argument
from d2v_fast.packages import add_version_option
from d2v_fast.processes.idle import IdleWatch
from d2v_fast.processes.signals import EndOnSignal

# a wrong configuration is a wrong option of these; to the others it is a damaged run folder
_TAKE_CONFIG = ("check", "import", "tokenize")
# these end when they have waited for so long for a disk or for nothing; the others wait for programs with time-outs
_WATCHED = ("check", "probe", "embed", "export", "import", "tokenize", "draw")
_IDLE_S = 600.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    It is 0 when done, 1 when failed, 2 for wrong options or a wrong configuration, and 128 and its number after a
    signal, such as 130 for Ctrl-C.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = None
    try:
        with EndOnSignal():
            parser = _parser()
            if "_ARGCOMPLETE" in os.environ:
                import argcomplete

                argcomplete.autocomplete(parser)
            options = parser.parse_args(arguments)
            command = options.command
            if command == "train":
                from d2v_fast.train import main as train

                return train(arguments[1:])
            with IdleWatch(_IDLE_S) if command in _WATCHED else nullcontext():
                return _WORK[command](options)
    except KeyboardInterrupt as error:
        print(f"{error}; what was half written is removed" if str(error) else "interrupted", file=sys.stderr)
        return getattr(error, "status", 130)
    except Exception as error:
        words = in_words(error)
        if words is None:
            raise
        print(f"error: {words}", file=sys.stderr)
        kind = type(error).__name__
        return 2 if kind == "OptionError" or (kind == "ConfigError" and command in _TAKE_CONFIG) else 1


def _check(options: argparse.Namespace) -> int:
    from d2v_fast.commands.check import check

    return 0 if check(options.file, options.overrides, num_processes=options.processes) else 1


def _probe(options: argparse.Namespace) -> int:
    from d2v_fast.evaluation.saved import probe_checkpoint

    print(
        probe_checkpoint(
            options.run_folder,
            step=options.step,
            data=options.data,
            field=options.field,
            label_field=options.label_field,
            max_samples=options.max_samples,
        )
    )
    return 0


def _embed(options: argparse.Namespace) -> int:
    from d2v_fast.commands.embed import embed

    print(
        embed(
            options.model,
            options.inputs,
            options.to,
            frames=options.frames,
            weights=options.weights,
            step=options.step,
            tokenizer=options.tokenizer,
            batch_size=options.batch_size,
            device=options.device,
            overwrite=options.overwrite,
        )
    )
    return 0


def _export(options: argparse.Namespace) -> int:
    from d2v_fast.checkpoints.saved_weights import export_run

    print(
        export_run(
            options.run_folder,
            to=options.to,
            weights=options.weights,
            step=options.step,
            form=options.format,
            tokenizer=options.tokenizer,
            overwrite=options.overwrite,
        )
    )
    return 0


def _import(options: argparse.Namespace) -> int:
    from d2v_fast.training.begin import import_folder, start_run

    if options.ds_config is None:
        own = {"weights": options.weights, "heads": options.heads, "tokenizer": options.tokenizer}
        own["overwrite"] = options.overwrite
        print(import_folder(options.source, options.to, **own, overrides=options.overrides))
        return 0
    from d2v_fast.config.errors import OptionError

    if options.overwrite:
        raise OptionError("`--overwrite` is for a Transformers folder: the folder of a run is never replaced.")
    if options.tokenizer is not None:
        raise OptionError("`--tokenizer` is for a Transformers folder: a run names its own as `d2v.data.tokenizer`.")
    more = {"overrides": options.overrides, "heads": options.heads}
    print(start_run(options.source, options.to, options.ds_config, **more))
    return 0


def _tokenize(options: argparse.Namespace) -> int:
    from d2v_fast.commands.tokenize import new_tokenizer, tokenize

    if options.train:
        print(new_tokenizer(options.source, options.vocab_size, options.to, options.overrides))
    elif options.to is not None or options.vocab_size is not None:
        from d2v_fast.config.errors import OptionError

        raise OptionError("`--to` and `--vocab-size` are for `--train`: a data set is tokenized into its cache folder.")
    else:
        print(tokenize(options.source, options.overrides))
    return 0


def _draw(options: argparse.Namespace) -> int:
    from d2v_fast.commands.draw import draw

    own = {"data": options.data, "count": options.count, "weights": options.weights}
    print(draw(options.run_folder, **own, out=options.out, overwrite=options.overwrite))
    return 0


def _bench(options: argparse.Namespace) -> int:
    from d2v_fast.commands.bench import run_benchmarks

    return run_benchmarks(check=options.check, only=options.only, device=options.device)


def _presets(options: argparse.Namespace) -> int:
    from d2v_fast.config.presets import list_presets, preset_text, write_preset

    if options.to is not None:
        print(write_preset(options.name, options.to, options.overwrite))
    elif options.name is not None:
        sys.stdout.write(preset_text(options.name))
    else:
        print(list_presets())
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from d2v_fast.commands.doctor import examine

    return examine(timeout_s=options.timeout)


_WORK: dict[str, Callable[[argparse.Namespace], int]] = {
    "check": _check,
    "probe": _probe,
    "embed": _embed,
    "export": _export,
    "import": _import,
    "tokenize": _tokenize,
    "draw": _draw,
    "bench": _bench,
    "presets": _presets,
    "doctor": _doctor,
}


def _parser() -> argparse.ArgumentParser:
    """The options of all commands."""
    parser = argparse.ArgumentParser(
        prog="d2v-fast",
        description="Pre-train data2vec, look at what was learned, and carry weights in and out.",
        epilog="example: d2v-fast presets; d2v-fast COMMAND --help shows one for each command",
        allow_abbrev=False,
    )
    add_version_option(parser)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, what: str, description: str, example: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=what, description=description, epilog=f"example: d2v-fast {example}", allow_abbrev=False
        )

    train = add(
        "train",
        "pre-train from one JSON file",
        "Pre-train a data2vec encoder from one JSON file, in one process; docs/launch.md says how to start several.",
        "train configs/digits.json --set d2v.schedule.steps=500 --run mine",
    )
    add_options(train)
    _add_check(add)
    _add_models(add)
    _add_import(add)
    _add_data(add)
    bench = add(
        "bench",
        "measure the operations, the masks and a training step on this machine",
        "Run the benchmarks of the source tree; table and plots go to bench/results, and with --check nowhere.",
        "bench --check",
    )
    bench.add_argument("--check", action="store_true", help="fail where a ratio is below what bench/goals.json expects")
    bench.add_argument("--only", metavar="WORDS", help="those whose names match, as of pytest's -k; to build/bench")
    bench.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: cpu)")
    presets = add(
        "presets",
        "list the configurations that come with this library, or write one",
        "List the configurations that come with this library; with a name, print that one, or write it with --to.",
        "presets digits --to mine.json",
    )
    presets.add_argument("name", nargs="?", metavar="NAME", help="as in the list, such as digits")
    presets.add_argument("--to", type=path_argument, metavar="FILE", help="write it there")
    _add_overwrite(presets, "the file of --to")
    doctor = add(
        "doctor",
        "look for what is missing or broken on this machine, each with its fix",
        "Look at versions, compiler, packages, locks and limits, and say of everything that is wrong how to mend it. "
        "Every package is imported in a process of its own. Exit status 1 where training cannot work.",
        "doctor",
    )
    doctor.add_argument(
        "--timeout",
        type=seconds_argument,
        default=120.0,
        metavar="SECONDS",
        help="for each package to import (default: 120)",
    )
    return parser


_Add = Callable[[str, str, str, str], argparse.ArgumentParser]


def _add_check(add: _Add) -> None:
    check = add(
        "check",
        "validate a configuration and try one step of it; starts no run",
        "Validate a configuration, read one batch, run one forward and backward pass, and tell parameters, memory, "
        "seconds per step and the time of the whole schedule. Writes nothing but the cached tokens of text.",
        "check configs/digits.json --set train_batch_size=128",
    )
    check.add_argument("file", type=path_argument, metavar="FILE", help="a file or the name of a preset, as for train")
    _add_overrides(check)
    check.add_argument(
        "--processes", type=count_argument, metavar="N", help="of the run that is planned (default: as launched, or 1)"
    )


def _add_models(add: _Add) -> None:
    probe = add(
        "probe",
        "what the features of a checkpoint tell about labels",
        "Probe student and teacher of a saved checkpoint beside the untrained network and a simple baseline, and print "
        "the table. The labels are those of --data, of d2v.probe.path, or of the sample set that the run trained on.",
        "probe runs/mine --data /my/labeled/images",
    )
    _add_run(probe)
    _add_step(probe)
    probe.add_argument(
        "--data",
        type=path_argument,
        metavar="PATH",
        help="labeled data: a folder whose sub-folders are classes; for text also .jsonl or .parquet with a label in "
        "each row (default: d2v.probe.path of the run)",
    )
    probe.add_argument("--label-field", metavar="NAME", help="field or column of a text's label (default: label)")
    probe.add_argument("--field", metavar="NAME", help="field or column of the text (default: d2v.data.field)")
    probe.add_argument(
        "--max-samples", type=count_argument, metavar="N", help="labeled samples to use at most (default: 2000)"
    )
    embed = add(
        "embed",
        "features of a folder of images, recordings or lines of text",
        "Write the features of files, in the order of their sorted paths: of each, the mean over the encoder's output "
        "at its patches, frames or tokens. Files that cannot be read are left out, named and counted.",
        "embed runs/mine /my/images --to features.npy",
    )
    embed.add_argument("model", type=path_argument, metavar="MODEL", help="a run folder, or a Transformers folder")
    embed.add_argument(
        "inputs",
        type=path_argument,
        metavar="INPUTS",
        help="a folder of images or of recordings; for text a folder of .txt files or one, a sample per line",
    )
    embed.add_argument(
        "--to",
        type=path_argument,
        required=True,
        metavar="FILE",
        help=".npy (fp32 rows; the paths beside it in a .paths.txt) or .parquet (columns path, feature)",
    )
    embed.add_argument(
        "--frames", action="store_true", help="no mean: an .npz with one array per sample, a row per patch or frame"
    )
    embed.add_argument(
        "--weights", choices=("student", "teacher"), default=None, help="of a run folder (default: student)"
    )
    _add_step(embed)
    embed.add_argument(
        "--tokenizer",
        type=path_argument,
        metavar="PATH",
        help="of text (default: what the run names, or the folder holds)",
    )
    embed.add_argument(
        "--batch-size", type=count_argument, metavar="N", help="(default: 64 images, 8 recordings, 32 lines)"
    )
    embed.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: a GPU if there is)")
    _add_overwrite(embed, "the file of --to, and the names beside it")
    export = add(
        "export",
        "write a checkpoint's weights for Transformers, fairseq or ONNX",
        "Write full-precision weights from a checkpoint, sharded or not. Needs no GPU.",
        "export runs/mine --weights teacher",
    )
    _add_run(export)
    export.add_argument("--weights", choices=("student", "teacher"), default="student", help="whose (default: student)")
    export.add_argument(
        "--to",
        type=path_argument,
        default=None,
        metavar="PATH",
        help="default: export, export.pt or export.onnx in runs/NAME; export-teacher or export-teacher.onnx for it",
    )
    _add_step(export)
    export.add_argument(
        "--format",
        choices=("transformers", "fairseq", "beit", "onnx"),
        default="transformers",
        help="a folder for Transformers with a model card (default); of speech and text a .pt for fairseq, with "
        "student, head and teacher; of images a .pth for the published code; or an .onnx file",
    )
    export.add_argument(
        "--tokenizer",
        type=path_argument,
        default=None,
        metavar="PATH",
        help="of a text run, for Transformers (default: what its config.json names)",
    )
    _add_overwrite(export, "the file of --to, or in its folder what an earlier export wrote and nobody changed")
    draw = add(
        "draw",
        "a picture of inputs, masks and features, before and after pre-training",
        "Draw images or recordings, masks, and features, before and after pre-training.",
        "draw runs/base --data /data/birds --count 12 --weights teacher --out birds.png",
    )
    _add_run(draw)
    draw.add_argument("--data", type=path_argument, metavar="FOLDER", help="what to show instead of the run's own data")
    draw.add_argument("--count", type=int, default=8, help="how many samples, at most 24 (default: 8)")
    draw.add_argument("--weights", choices=("student", "teacher"), default="student", help="(default: student)")
    draw.add_argument("--out", type=path_argument, metavar="FILE", help="(default: RUN_FOLDER/features.png)")
    _add_overwrite(draw, "the file of --out")


def _add_import(add: _Add) -> None:
    bring = add(
        "import",
        "make a Transformers folder, or a run that begins with them, of other libraries' weights",
        "Read a checkpoint of the published data2vec code (a .pt of fairseq, of speech or text; a .pth of the code for "
        "images) or a Transformers folder. Without --ds_config the checkpoint becomes a Transformers folder. With it, "
        "--to becomes the folder of a run that begins with these weights; d2v-fast train --run NAME --resume trains. "
        "What a checkpoint does not say of its model is listed; --set d2v.model.KEY=VALUE has precedence.",
        "import audio_base_ls.pt --to exported",
    )
    bring.add_argument(
        "source", type=path_argument, help="a .pt or .pth file, or a folder with config.json and model.safetensors"
    )
    bring.add_argument("--to", type=path_argument, required=True, metavar="FOLDER", help="the folder to write")
    bring.add_argument(
        "--weights",
        choices=("student", "teacher"),
        default="student",
        help="whose, of a .pt, for a Transformers folder; a run takes both (default: student)",
    )
    bring.add_argument(
        "--heads",
        type=count_argument,
        default=None,
        metavar="N",
        help="of attention, where a .pt does not tell (default: as a run's configuration says, or width / 64)",
    )
    bring.add_argument(
        "--tokenizer",
        type=path_argument,
        default=None,
        metavar="PATH",
        help="of text, to put into a Transformers folder",
    )
    bring.add_argument(
        "--ds_config", type=path_argument, default=None, metavar="FILE", help="of the run that is to begin"
    )
    _add_overwrite(bring, "in a Transformers folder what an earlier export wrote and nobody changed")
    _add_overrides(bring)


def _add_data(add: _Add) -> None:
    tokenize = add(
        "tokenize",
        "train a tokenizer, or tokenize the text of a configuration now",
        "Without --train, SOURCE is a configuration, and its text is tokenized into the cache that training reads. "
        "With --train, SOURCE is a file or a folder of .txt, JSON lines and .parquet, to train a byte-level BPE on.",
        "tokenize /my/text --train --vocab-size 32000 --to my_tokenizer",
    )
    tokenize.add_argument("source", type=path_argument, metavar="SOURCE", help="a configuration; with --train, text")
    tokenize.add_argument("--train", action="store_true", help="train a tokenizer")
    tokenize.add_argument("--vocab-size", type=count_argument, metavar="N", help="its tokens, at least 261")
    tokenize.add_argument(
        "--to", type=path_argument, metavar="FOLDER", help="its folder, which Transformers reads, too"
    )
    _add_overrides(tokenize)


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", type=path_argument, metavar="RUN_FOLDER", help="such as runs/digits-1")


def _add_step(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--step", type=int, default=None, metavar="N", help="of the checkpoint (default: the newest)")


def _add_overwrite(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--overwrite", action="store_true", help=f"replace {what}")


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        dest="overrides",
        help="override one key of the configuration, such as d2v.model.depth=6; repeatable",
    )


if __name__ == "__main__":
    sys.exit(main())
