"""`d2v-fast predict`: write the answers of a fine-tuned run to files, as JSON lines or a table."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from d2v_fast.checkpoints.best import best_step
from d2v_fast.checkpoints.saved_weights import encoder_weights, open_checkpoint, read_run_config
from d2v_fast.command_lines import tool_command
from d2v_fast.commands.left_out import import_arrow, report_left_out, require_folder, require_some
from d2v_fast.config.finetune import FinetuneConfig
from d2v_fast.data.listing import counted, print_listing
from d2v_fast.data.progress import Progress
from d2v_fast.distributed.world import World
from d2v_fast.errors import OptionError
from d2v_fast.evaluation.inputs import Encoder, Sample, Source
from d2v_fast.files.atomic import replaced
from d2v_fast.files.outputs import require_file
from d2v_fast.interop.sources import averaged
from d2v_fast.modalities import modality_of
from d2v_fast.models.weights import require_finite
from d2v_fast.objectives.build import build_objective
from d2v_fast.objectives.finetune import Answer, Beam, Finetune, finetuning_of

Row = dict[str, Any]
# from a path and the rows to their number
Write = Callable[[Path, Iterable[Row]], int]


def predict(
    run_folder: Path,
    inputs: Path,
    to: Path,
    *,
    step: int | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
    beam: Beam | None = None,
) -> str:
    """Write one row for each input, in the order of sorted paths; returns a line for the user.

    Samples that cannot be read are left out, named on the error stream, and counted.

    Args:
        run_folder: `runs/NAME` of a fine-tuned run.
        inputs: Files or folders as `d2v-fast embed` reads them.
        to: `.jsonl`, `.csv` or `.parquet`.
        step: Step of the checkpoint; None is the best one.
        batch_size: Samples that are answered together; None is the modality's own number.
        device: "auto", "cpu" or "cuda".
        overwrite: Replace `to`.
        beam: Search for the likeliest words of transcripts with a language model; None takes the likeliest letters.
    Raises:
        ValueError: The run is not fine-tuned or writes no transcripts to search for, or no input can be read.
        ImportError: A package is missing.
        RunError: There is no such device.
    """
    write = _writer(to)
    require_file(to, overwrite)
    encoder, model = load_finetuned(run_folder, step)
    source = open_inputs(encoder, inputs)
    if beam is not None:
        model.search(beam)
    model.to(World(device).device).eval()
    print_listing(source.listing, f"{source.what}s")
    bad: list[str] = []
    size = source.batch_size if batch_size is None else batch_size
    with replaced(to) as part, Progress("predicting", source.num_bytes) as progress:
        count = write(part, _rows(model, source, size, bad, progress))
        require_some(count, source, inputs, bad)
    report_left_out(count, source, bad)
    return f"predict: {to} ({counted(count, source.what)}, by the {encoder.origin})"


def load_finetuned(run_folder: Path, step: int | None = None) -> tuple[Encoder, Finetune]:
    """Return the encoder and the whole model of a fine-tuned run, fp32 on the CPU.

    Args:
        run_folder: `runs/NAME`.
        step: Step of the checkpoint; None is the best one.
    Raises:
        ValueError: There is no such run or checkpoint, it is not fine-tuned, or it is damaged.
    """
    config = read_run_config(run_folder)
    if not isinstance(config, FinetuneConfig):
        raise ValueError(
            f"`RUN` must be a fine-tuned run, but {run_folder} is pre-trained: `{tool_command('finetune', '--help')}` "
            f"says how to fine-tune it, and `{tool_command('embed', '--help')}` how to write its features."
        )
    with open_checkpoint(run_folder, best_step(run_folder) if step is None else step) as checkpoint:
        weights = averaged(config, "student")
        saved = encoder_weights(checkpoint, config, weights)
        model = build_objective(config)
        assert isinstance(model, Finetune)
        for part, found in ((model.student, dict(saved)), (model.head, saved.head())):
            require_finite(found.items(), f"`{checkpoint.folder}`")
            part.load_state_dict(found)
        which = "average of" if weights == "teacher" else "model of"
        origin = f"{which} {run_folder}, step {checkpoint.step}"
        encoder = Encoder(model.student, origin, run_folder, config.model, config, checkpoint.state.get("vocabulary"))
    return encoder, model


def open_inputs(encoder: Encoder, inputs: Path) -> Source:
    """Return the samples of a path for a fine-tuned model.

    Raises:
        ValueError: There are none, or the modality reads no files.
    """
    modality = modality_of(encoder.run)
    if modality.open_inputs is None:
        raise ValueError(f'`predict` reads no files for models of modality "{modality.name}".')
    return modality.open_inputs(encoder, inputs, None)


def _rows(model: Finetune, source: Source, size: int, bad: list[str], progress: Progress) -> Iterator[Row]:
    make, config = finetuning_of(model.config).batch, model.config
    device = next(model.parameters()).device
    done = 0
    for samples in _chunks(source.samples(), size, bad):
        parts = [part for sample in samples for part in sample.parts]
        answers: list[Answer] = []
        for start in range(0, len(parts), size):
            batch = make(config, parts[start : start + size]).to(device)
            with torch.no_grad():
                answers += model.answers(model(batch), batch)
        of_parts = iter(answers)
        for sample in samples:
            answer = model.joined(list(islice(of_parts, len(sample.parts))))
            yield {"path": sample.name, **model.columns(answer)}
        done += sum(sample.num_bytes for sample in samples)
        progress.show(done, f"{len(bad)} unreadable")


def _chunks(found: Iterator[Sample | str], size: int, bad: list[str]) -> Iterator[list[Sample]]:
    while chunk := list(islice(found, size)):
        bad += [one for one in chunk if isinstance(one, str)]
        if samples := [one for one in chunk if isinstance(one, Sample)]:
            yield samples


def _writer(to: Path) -> Write:
    writers: dict[str, Write] = {".jsonl": _write_jsonl, ".csv": _write_csv, ".parquet": _write_parquet}
    if to.suffix not in writers:
        raise OptionError(f"`--to` must end with .jsonl, .csv or .parquet, but is {to} instead.")
    require_folder(to)
    if to.suffix == ".parquet":
        import_arrow("a .jsonl or .csv file")
    return writers[to.suffix]


def _write_jsonl(path: Path, rows: Iterable[Row]) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def _write_csv(path: Path, rows: Iterable[Row]) -> int:
    count = 0
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        for row in rows:
            if count == 0:
                writer.writerow(row)
            writer.writerow(json.dumps(value) if isinstance(value, list | dict) else value for value in row.values())
            count += 1
    return count


def _write_parquet(path: Path, rows: Iterable[Row]) -> int:
    arrow, found = import_arrow("a .jsonl or .csv file"), list(rows)
    if found:
        arrow.parquet.write_table(arrow.Table.from_pylist(found), str(path))
    return len(found)
