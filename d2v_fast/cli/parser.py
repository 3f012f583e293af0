"""The options of every `d2v-fast` command. It imports no heavy package, so that `--help` answers at once."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from d2v_fast.cli.arguments import count_argument, number_argument, path_argument, seconds_argument
from d2v_fast.cli.train_options import add_overrides, add_train_options
from d2v_fast.modalities import modality_names
from d2v_fast.packages import add_version_option

# name, one line for the list of commands, description, example without `d2v-fast`
_Add = Callable[[str, str, str, str], argparse.ArgumentParser]


def tool_parser() -> argparse.ArgumentParser:
    """Return the parser of `d2v-fast`; the name of the chosen command is `command` of its options."""
    parser = argparse.ArgumentParser(
        prog="d2v-fast",
        description="Pre-train data2vec encoders, evaluate them, and exchange weights with other libraries.",
        epilog="example: d2v-fast presets; d2v-fast COMMAND --help shows one for each command",
        allow_abbrev=False,
    )
    add_version_option(parser)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, summary: str, description: str, example: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=summary, description=description, epilog=f"example: d2v-fast {example}", allow_abbrev=False
        )

    for add_command in (
        *(_add_train, _add_finetune, _add_check, _add_probe, _add_embed, _add_predict),
        *(_add_export, _add_draw, _add_import, _add_tokenize, _add_bench, _add_presets, _add_doctor),
    ):
        add_command(add)
    return parser


def _add_train(add: _Add) -> None:
    train = add(
        "train",
        "pre-train from one JSON file",
        "Pre-train a data2vec encoder from one JSON file, in one process. docs/launch.md shows how to start several.",
        "train digits --set d2v.schedule.steps=500 --run mine",
    )
    add_train_options(train)
    add_version_option(train)


def _add_finetune(add: _Add) -> None:
    finetune = add(
        "finetune",
        "fine-tune a pre-trained encoder on labeled data",
        "Train an encoder with a new head on labeled samples, score held-out ones, and keep the best checkpoint. It is "
        "`train` with a configuration of fine-tuning, and has the same options.",
        "finetune runs/digits-1 --ds_config finetune_digits --run mine",
    )
    finetune.add_argument(
        "source",
        type=path_argument,
        metavar="SOURCE",
        nargs="?",
        help="a run, one of its checkpoints, an export, a Transformers folder, or a .pt or .pth of the published code "
        "(default: d2v.finetune.source; with --resume none is needed)",
    )
    finetune.add_argument(
        "--weights", choices=("student", "teacher"), default=None, help="whose weights of SOURCE (default: student)"
    )
    finetune.add_argument(
        "--step",
        type=int,
        default=None,
        metavar="N",
        help="step of the checkpoint of SOURCE (default: the newest, of a fine-tuned run the best)",
    )
    finetune.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY=V,V",
        help="make one run for each value of a key, one after another, and compare them; several make a grid. The same "
        "command continues an interrupted sweep",
    )
    finetune.add_argument(
        "--seeds",
        type=count_argument,
        metavar="N",
        help="with --sweep: runs of each value, with d2v.run.seed from 0 on",
    )
    add_train_options(finetune, file=False)
    add_version_option(finetune)


def _add_check(add: _Add) -> None:
    check = add(
        "check",
        "validate a configuration and time a few steps without starting a run",
        f"Validate a configuration ({_modalities()}), run a few steps, and report parameter count, memory, step time "
        "and the time of the whole run. Only the tokens of text are written, to their cache.",
        "check digits --set train_batch_size=128",
    )
    check.add_argument("file", type=path_argument, metavar="FILE", help="JSON file or name of a preset, as for train")
    add_overrides(check)
    check.add_argument(
        "--processes",
        type=count_argument,
        metavar="N",
        help="processes of the planned run (default: as launched, or 1)",
    )


def _add_probe(add: _Add) -> None:
    probe = add(
        "probe",
        "evaluate the features of a checkpoint on labeled data",
        "Fit classifiers to frozen features of student, teacher and untrained network and to a simple baseline, and "
        "print their accuracies. The labels come from --data, from d2v.probe.path, or from the sample data of the run.",
        "probe runs/mine --data /my/labeled/images",
    )
    _add_run(probe)
    _add_step(probe)
    probe.add_argument(
        "--data",
        type=path_argument,
        metavar="PATH",
        help="labeled data: a folder with one sub-folder for each class; for text also .jsonl or .parquet with a label "
        "in each row (default: d2v.probe.path of the run)",
    )
    probe.add_argument("--label-field", metavar="NAME", help="field or column of a text's label (default: label)")
    probe.add_argument("--field", metavar="NAME", help="field or column of the text (default: d2v.data.field)")
    probe.add_argument(
        "--max-samples", type=count_argument, metavar="N", help="use at most N labeled samples (default: 2000)"
    )


def _add_embed(add: _Add) -> None:
    embed = add(
        "embed",
        "write the features of files or lines of text",
        "Write one feature vector for each input: the encoder's output, averaged over patches, frames or tokens. "
        "Inputs are sorted by path. Unreadable files are left out and listed.",
        "embed runs/mine /my/images --to features.npy",
    )
    embed.add_argument("model", type=path_argument, metavar="MODEL", help="run folder or Transformers folder")
    embed.add_argument(
        "inputs",
        type=path_argument,
        metavar="INPUTS",
        help="folder of images or recordings; for text a .txt file or a folder of them, with one sample per line",
    )
    embed.add_argument(
        "--to",
        type=path_argument,
        required=True,
        metavar="FILE",
        help=".npy (fp32 rows, with the paths in a .paths.txt beside it) or .parquet (columns path and feature)",
    )
    embed.add_argument(
        "--frames", action="store_true", help="do not average; write an .npz with one array of rows for each input"
    )
    embed.add_argument(
        "--weights",
        choices=("student", "teacher"),
        default=None,
        help="whose weights of a run (default: student; of a fine-tuned run its average, if it keeps one)",
    )
    _add_step(embed, "newest, or best of a fine-tuned run")
    embed.add_argument(
        "--tokenizer",
        type=path_argument,
        metavar="PATH",
        help="tokenizer for text (default: the run's or the model folder's)",
    )
    embed.add_argument(
        "--batch-size",
        type=count_argument,
        metavar="N",
        help="inputs per batch (default: 64 images, 8 recordings, 32 lines)",
    )
    _add_device(embed)
    _add_overwrite(embed, "FILE and the files beside it")


def _add_predict(add: _Add) -> None:
    predict = add(
        "predict",
        "write the answers of a fine-tuned run to files",
        "Write one row for each input: path, and label with probability, score or transcript. Inputs are sorted by "
        "path. Unreadable files are left out and listed.",
        "predict runs/mine /my/images --to answers.jsonl",
    )
    _add_run(predict)
    predict.add_argument(
        "inputs", type=path_argument, metavar="INPUTS", help="files of the run's modality, as embed reads them"
    )
    predict.add_argument(
        "--to", type=path_argument, required=True, metavar="FILE", help=".jsonl, .csv or .parquet file to write"
    )
    _add_step(predict, "the best one")
    predict.add_argument("--batch-size", type=count_argument, metavar="N", help="inputs per batch")
    _add_device(predict)
    _add_overwrite(predict, "FILE")
    search = predict.add_argument_group("transcripts with an n-gram language model")
    search.add_argument(
        "--lm", type=path_argument, metavar="FILE", help="search with this model: ARPA text, or a binary file of KenLM"
    )
    search.add_argument(
        "--lexicon",
        type=path_argument,
        metavar="FILE",
        help="file with a word at the start of each line (default: the words of the ARPA file)",
    )
    search.add_argument(
        "--lm-weight", type=number_argument, metavar="X", help="weight of the model's score (default: 2)"
    )
    search.add_argument("--word-score", type=number_argument, metavar="X", help="added for each word (default: -1)")
    search.add_argument("--beam-size", type=count_argument, metavar="N", help="hypotheses kept per frame (default: 50)")


def _add_export(add: _Add) -> None:
    export = add(
        "export",
        "write a checkpoint's weights for Transformers, fairseq or ONNX",
        "Write full-precision weights from a checkpoint, sharded or not. Needs no GPU.",
        "export runs/mine --weights teacher",
    )
    _add_run(export)
    export.add_argument(
        "--weights", choices=("student", "teacher"), default="student", help="whose weights (default: student)"
    )
    export.add_argument(
        "--to",
        type=path_argument,
        default=None,
        metavar="PATH",
        help="file or folder to write (default: export, export.pt or export.onnx in RUN_FOLDER; with --weights teacher "
        "export-teacher or export-teacher.onnx)",
    )
    _add_step(export, "newest, or best of a fine-tuned run")
    export.add_argument(
        "--format",
        choices=("transformers", "fairseq", "beit", "onnx"),
        default="transformers",
        help="transformers: a folder with a model card (default); fairseq: a .pt with student, head and teacher, of "
        "speech, text and data2vec 2.0; beit: a .pth of the published vision code; onnx: an .onnx file",
    )
    export.add_argument(
        "--tokenizer",
        type=path_argument,
        default=None,
        metavar="PATH",
        help="tokenizer for the Transformers folder of a text run (default: the one named in its config.json)",
    )
    _add_overwrite(export, "the file at PATH or, in a folder, unchanged files of an earlier export")


def _add_draw(add: _Add) -> None:
    draw = add(
        "draw",
        "draw inputs, masks and features before and after pre-training",
        "Draw images or recordings with their masks and features, before and after pre-training.",
        "draw runs/base --data /data/birds --count 12 --weights teacher --out birds.png",
    )
    _add_run(draw)
    draw.add_argument(
        "--data", type=path_argument, metavar="FOLDER", help="samples to draw instead of those of the run"
    )
    draw.add_argument("--count", type=int, default=8, metavar="N", help="number of samples, at most 24 (default: 8)")
    draw.add_argument(
        "--weights", choices=("student", "teacher"), default="student", help="whose weights (default: student)"
    )
    draw.add_argument(
        "--out", type=path_argument, metavar="FILE", help="picture to write (default: RUN_FOLDER/features.png)"
    )
    _add_overwrite(draw, "FILE")


def _add_import(add: _Add) -> None:
    bring = add(
        "import",
        "convert published weights to a Transformers folder, or start a run from them",
        "Read a checkpoint of the published data2vec code (a .pt of fairseq; a .pth of version 1 on images) or a "
        "Transformers folder. Without --ds_config, write a Transformers folder. With it, write the folder of a run "
        "that begins with these weights; d2v-fast train --run NAME --resume trains it. Settings that the checkpoint "
        "does not hold are printed; --set d2v.model.KEY=VALUE overrides them.",
        "import audio_base_ls.pt --to exported",
    )
    bring.add_argument(
        "source",
        type=path_argument,
        metavar="SOURCE",
        help=".pt or .pth file, or folder with config.json and model.safetensors",
    )
    bring.add_argument("--to", type=path_argument, required=True, metavar="FOLDER", help="folder to write")
    bring.add_argument(
        "--weights",
        choices=("student", "teacher"),
        default="student",
        help="whose weights of a .pt go into a Transformers folder; a run takes both (default: student)",
    )
    bring.add_argument(
        "--heads",
        type=count_argument,
        default=None,
        metavar="N",
        help="attention heads, if a .pt does not say (default: as --ds_config says, or width / 64)",
    )
    bring.add_argument(
        "--tokenizer",
        type=path_argument,
        default=None,
        metavar="PATH",
        help="tokenizer to put into the Transformers folder of a text model",
    )
    bring.add_argument(
        "--ds_config", type=path_argument, default=None, metavar="FILE", help="configuration of the run to begin"
    )
    _add_overwrite(bring, "unchanged files of an earlier export in a Transformers folder")
    add_overrides(bring)


def _add_tokenize(add: _Add) -> None:
    tokenize = add(
        "tokenize",
        "train a tokenizer, or tokenize the text of a configuration",
        "Without --train, SOURCE is a configuration; its text is tokenized into the cache that training reads. With "
        "--train, SOURCE is text (.txt, .jsonl or .parquet, a file or a folder) to train a byte-level BPE on.",
        "tokenize /my/text --train --vocab-size 32000 --to my_tokenizer",
    )
    tokenize.add_argument(
        "source", type=path_argument, metavar="SOURCE", help="configuration, or with --train a file or folder of text"
    )
    tokenize.add_argument("--train", action="store_true", help="train a tokenizer")
    tokenize.add_argument(
        "--vocab-size", type=count_argument, metavar="N", help="tokens of the new tokenizer, at least 261"
    )
    tokenize.add_argument(
        "--to", type=path_argument, metavar="FOLDER", help="folder of the new tokenizer; Transformers can read it"
    )
    add_overrides(tokenize)


def _add_bench(add: _Add) -> None:
    bench = add(
        "bench",
        "time the operations, the masks and a training step on this machine",
        "Run the benchmarks of the source tree and write tables and plots to bench/results. With --check, compare with "
        "the goals and write nothing.",
        "bench --check",
    )
    bench.add_argument(
        "--check", action="store_true", help="exit with status 1 if a ratio is below its goal in bench/goals.json"
    )
    bench.add_argument(
        "--only",
        metavar="WORDS",
        help="run benchmarks whose names match, as for pytest's -k, and write to build/bench",
    )
    bench.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="what to measure (default: cpu)")


def _add_presets(add: _Add) -> None:
    presets = add(
        "presets",
        "list, print or copy the configurations that come with this library",
        f"List the presets ({_modalities()}), print one, or write it to a file to edit.",
        "presets digits --to mine.json",
    )
    presets.add_argument("name", nargs="?", metavar="NAME", help="name from the list, such as digits")
    presets.add_argument("--to", type=path_argument, metavar="FILE", help="file to write")
    _add_overwrite(presets, "FILE")


def _add_doctor(add: _Add) -> None:
    doctor = add(
        "doctor",
        "find what is missing or broken on this machine, and how to fix it",
        "Check versions, compiler, packages, locks and limits, and print a fix for each problem. Each package is "
        "imported in its own process. The exit status is 1 if training cannot work.",
        "doctor",
    )
    doctor.add_argument(
        "--timeout",
        type=seconds_argument,
        default=120.0,
        metavar="SECONDS",
        help="time for each package to import (default: 120)",
    )


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", type=path_argument, metavar="RUN_FOLDER", help="such as runs/digits-1")


def _add_step(parser: argparse.ArgumentParser, default: str = "newest") -> None:
    parser.add_argument(
        "--step", type=int, default=None, metavar="N", help=f"step of the checkpoint (default: {default})"
    )


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where the encoder runs (default: a GPU if there is one)",
    )


def _add_overwrite(parser: argparse.ArgumentParser, replaced: str) -> None:
    parser.add_argument("--overwrite", action="store_true", help=f"replace {replaced}")


def _modalities() -> str:
    """Return the modalities of this installation, as in "vision, speech or text"."""
    *most, last = modality_names()
    return f"{', '.join(most)} or {last}" if most else last
