"""The `d2v-fast` command: call the function of the chosen command, whose modules are imported only then."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

from d2v_fast.cli.parser import tool_parser
from d2v_fast.cli.run import run_command
from d2v_fast.errors import OptionError
from d2v_fast.processes.idle import IdleWatch

if TYPE_CHECKING:
    from d2v_fast.objectives.finetune import Beam

# these end after waiting this long without progress; the others wait for programs that have their own time limits
_WATCHED = ("check", "probe", "embed", "predict", "export", "import", "tokenize", "draw")
_IDLE_S = 600.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; see `run_command`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = tool_parser()
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(parser)
    options = parser.parse_args(arguments)
    # after the name of the command, for a process that trains in its place
    options.words = arguments[1:]
    return run_command(options.command, lambda: _work(options))


def _work(options: argparse.Namespace) -> int:
    with IdleWatch(_IDLE_S) if options.command in _WATCHED else nullcontext():
        return _WORK[options.command](options)


def _train(options: argparse.Namespace) -> int:
    from d2v_fast.train import train_command

    return train_command(options, options.words)


def _finetune(options: argparse.Namespace) -> int:
    from d2v_fast.commands.finetune import finetune

    return finetune(options)


def _check(options: argparse.Namespace) -> int:
    from d2v_fast.commands.check import check

    return 0 if check(options.file, options.overrides, num_processes=options.processes) else 1


def _probe(options: argparse.Namespace) -> int:
    from d2v_fast.evaluation.run import probe_checkpoint

    print(
        probe_checkpoint(
            options.run_folder,
            step=options.step,
            path=options.data,
            field=options.field,
            label_field=options.label_field,
            max_samples=options.max_samples,
        )
    )
    return 0


def _embed(options: argparse.Namespace) -> int:
    from d2v_fast.commands.embed import embed
    from d2v_fast.commands.inputs import Choice

    print(
        embed(
            Choice(options.model, options.weights, options.step, options.tokenizer),
            options.inputs,
            options.to,
            frames=options.frames,
            batch_size=options.batch_size,
            device=options.device,
            overwrite=options.overwrite,
        )
    )
    return 0


def _predict(options: argparse.Namespace) -> int:
    from d2v_fast.commands.predict import predict

    own = {"step": options.step, "batch_size": options.batch_size, "device": options.device, "beam": _beam(options)}
    print(predict(options.run_folder, options.inputs, options.to, **own, overwrite=options.overwrite))
    return 0


def _beam(options: argparse.Namespace) -> Beam | None:
    """Return the search that the options of `predict` ask for."""
    from d2v_fast.objectives.finetune import Beam

    named = {
        "lexicon": ("--lexicon", options.lexicon and str(options.lexicon)),
        "size": ("--beam-size", options.beam_size),
        "weight": ("--lm-weight", options.lm_weight),
        "word_score": ("--word-score", options.word_score),
    }
    given = {field: value for field, (_, value) in named.items() if value is not None}
    if options.lm is None:
        if given:
            raise OptionError(f"`{named[next(iter(given))][0]}` needs `--lm FILE`, the language model of the search.")
        return None
    return Beam(str(options.lm), **given)


def _export(options: argparse.Namespace) -> int:
    from d2v_fast.interop.export import export_run

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
    from d2v_fast.training.import_weights import import_folder, start_run

    if options.ds_config is None:
        own = {"weights": options.weights, "heads": options.heads, "tokenizer": options.tokenizer}
        own["overwrite"] = options.overwrite
        print(import_folder(options.source, options.to, **own, overrides=options.overrides))
        return 0
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
    "train": _train,
    "finetune": _finetune,
    "check": _check,
    "probe": _probe,
    "embed": _embed,
    "predict": _predict,
    "export": _export,
    "import": _import,
    "tokenize": _tokenize,
    "draw": _draw,
    "bench": _bench,
    "presets": _presets,
    "doctor": _doctor,
}


if __name__ == "__main__":
    sys.exit(main())
