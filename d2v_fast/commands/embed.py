"""`d2v-fast embed`: write a pre-trained encoder's features of files, as an array or a table."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from d2v_fast.commands.inputs import Choice, open_source
from d2v_fast.commands.left_out import import_arrow, report_left_out, require_folder, require_some
from d2v_fast.data.listing import print_listing
from d2v_fast.data.progress import Progress
from d2v_fast.distributed.world import World
from d2v_fast.errors import OptionError
from d2v_fast.evaluation.inputs import Rows, Sample, Source, encode
from d2v_fast.files.atomic import replaced, write_text
from d2v_fast.files.outputs import require_file

# not the same stem with .txt, which may be an input
_BESIDE = ".paths.txt"


def embed(
    encoder: Choice,
    inputs: Path,
    to: Path,
    *,
    frames: bool = False,
    batch_size: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> str:
    """Write the features of all files below `inputs`, in the order of their sorted paths; returns a line for the user.

    The features of an image are the last block's output at its patches, layer-normalized, as in the probe; those of a
    recording or a line of text are the encoder's output at its frames or tokens. Samples that cannot be read are left
    out, named on the error stream, and counted.

    Args:
        encoder: A run's or a Transformers folder's.
        inputs: A folder of images or recordings; for text a `.txt` file or a folder of them, a sample per line.
        to: `.npy` (fp32 `[S, D]`, the mean over the places of each sample; names in a `.paths.txt` beside it) or
            `.parquet` (columns `path` and `feature`); with `frames` an `.npz`, where `[P, D]` has the sample's name.
        frames: Write a row for every place instead of the mean.
        batch_size: Samples that are encoded together; None is 64 images, 8 recordings or 32 lines.
        device: "auto", "cpu" or "cuda".
        overwrite: Replace `to`, and the names beside it.
    Raises:
        ValueError: `to` has another suffix, the encoder or no input can be read, or a package is missing.
        RunError: There is no such device.
    """
    write = _writer(to, frames)
    for file in (to, to.with_suffix(_BESIDE)) if to.suffix == ".npy" else (to,):
        require_file(file, overwrite)
    source = open_source(encoder, inputs)
    size = source.batch_size if batch_size is None else batch_size
    model = source.model.to(World(device).device).eval()
    print_listing(source.listing, f"{source.what}s")
    bad: list[str] = []

    def features() -> Iterator[tuple[str, Rows]]:
        done = 0
        with Progress("encoding", source.num_bytes) as progress:
            # some batches at once, so that those of like length can be encoded together
            for samples in _chunks(_readable(source, bad), 4 * size):
                for sample, rows in zip(samples, encode(model, source, samples, size), strict=True):
                    yield sample.name, rows
                done += sum(sample.num_bytes for sample in samples)
                progress.show(done, f"{len(bad)} unreadable")

    with replaced(to) as part:
        count, width = write(part, features())
        require_some(count, source, inputs, bad)
    report_left_out(count, source, bad)
    beside = f", their names in {to.with_suffix(_BESIDE)}" if to.suffix == ".npy" else ""
    rows = f"{count:,} {source.what}s x {width} features"
    return f"embed: {to} ({rows}{', one row per place' if frames else ''}, by the {source.origin}{beside})"


def _readable(source: Source, bad: list[str]) -> Iterator[Sample]:
    for found in source.samples():
        if isinstance(found, Sample):
            yield found
        else:
            bad.append(found)


def _chunks(samples: Iterator[Sample], size: int) -> Iterator[list[Sample]]:
    while chunk := list(islice(samples, size)):
        yield chunk


Write = Callable[[Path, Iterable[tuple[str, Rows]]], tuple[int, int]]
"""From a path and pairs of name and features `[P, D]` to the number of pairs, and D."""


def _writer(to: Path, frames: bool) -> Write:
    suffixes = [".npz"] if frames else [".npy", ".parquet"]
    if to.suffix not in suffixes:
        must = "end with .npz with `--frames`" if frames else "end with .npy or .parquet"
        raise OptionError(f"`--to` must {must}, but is {to} instead.")
    require_folder(to)
    if to.suffix == ".parquet":
        # imported before hours of work that it could not write
        arrow = import_arrow("an .npy file")
        return lambda path, features: _write_parquet(path, features, arrow)
    if frames:
        return _write_npz
    return lambda path, features: _write_npy(path, features, to.with_suffix(_BESIDE))


def _means(features: Iterable[tuple[str, Rows]]) -> tuple[list[str], Rows]:
    names, means = [], []
    for name, rows in features:
        names.append(name)
        means.append(rows.mean(0))
    return names, np.stack(means) if means else np.empty((0, 0), np.float32)


def _write_npy(path: Path, features: Iterable[tuple[str, Rows]], beside: Path) -> tuple[int, int]:
    names, means = _means(features)
    if names:
        with path.open("wb") as file:
            np.save(file, means)
        write_text(beside, "".join(f"{name}\n" for name in names))
    return means.shape


def _write_npz(path: Path, features: Iterable[tuple[str, Rows]]) -> tuple[int, int]:
    count = width = 0
    # array by array: all of them may be more than fits into memory
    with zipfile.ZipFile(path, "w") as archive:
        for name, rows in features:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.ascontiguousarray(rows))
            count, width = count + 1, rows.shape[1]
    return count, width


def _write_parquet(path: Path, features: Iterable[tuple[str, Rows]], arrow: Any) -> tuple[int, int]:
    names, means = _means(features)
    if names:
        values = arrow.FixedSizeListArray.from_arrays(arrow.array(means.reshape(-1)), means.shape[1])
        arrow.parquet.write_table(arrow.table({"path": arrow.array(names), "feature": values}), str(path))
    return means.shape
