"""Texts and pairs of texts for the predictions of a fine-tuned model: rows of a table, or lines of .txt files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from d2v_fast.data.listing import FileKinds
from d2v_fast.errors import DataError
from d2v_fast.evaluation.inputs import Encoder, Sample, Source
from d2v_fast.files.reading import printable
from d2v_fast.modalities.text.config import TextDataConfig
from d2v_fast.modalities.text.config_finetune import TextFinetuneConfig
from d2v_fast.modalities.text.embed import Lines
from d2v_fast.modalities.text.files import BadText
from d2v_fast.modalities.text.labeled_tokens import frame
from d2v_fast.modalities.text.tables import TABLE_ENDINGS, Table
from d2v_fast.modalities.text.tasks import run_tokenizer
from d2v_fast.modalities.text.tokenizer import Tokenizer

__all__ = ["open_rows"]


def open_rows(encoder: Encoder, inputs: Path, tokenizer: Path | None) -> Source:
    """Open the rows of a table, or the lines of .txt files.

    Args:
        encoder: That of a fine-tuned run, whose configuration names the columns.
        inputs: A table, a .txt file, or a folder of .txt files.
        tokenizer: The tokenizer; None uses the one that the run names.
    Raises:
        ValueError: There is nothing to read, the tokenizer cannot be read or is not the model's, or the model reads
            pairs and `inputs` has single texts.
    """
    run: TextFinetuneConfig = encoder.run
    found = run_tokenizer(run, tokenizer, encoder.vocabulary, str(encoder.folder))
    if inputs.is_file() and str(inputs).lower().endswith(TABLE_ENDINGS):
        return TableRows(encoder, inputs, found)
    if run.data.pair_field is not None:
        raise DataError(
            f"`INPUTS` must be a file ({', '.join(TABLE_ENDINGS)}) with the columns '{run.data.field}' and "
            f"'{run.data.pair_field}', since this model reads pairs, but is '{printable(str(inputs))}' instead."
        )
    sizes = run.model.model_copy(update={"max_positions": run.data.block_size})
    data = TextDataConfig(encoding_errors=run.data.encoding_errors)
    return Lines(encoder.model, encoder.origin, inputs, sizes, data, found)


class TableRows(Source):
    """Rows of a table, without labels, each with its special tokens."""

    what = "row"
    batch_size = 32

    def __init__(self, encoder: Encoder, inputs: Path, tokenizer: Tokenizer) -> None:
        run: TextFinetuneConfig = encoder.run
        super().__init__(encoder.model, encoder.origin, inputs, FileKinds("tables", TABLE_ENDINGS, {}), False)
        self._data, self._tokenizer = run.data, tokenizer
        self.padding = float(tokenizer.specials.pad)
        self.num_places = lambda length: length

    def samples(self) -> Iterator[Sample | str]:
        """See `Source`."""
        for path in self._paths:
            bad, replaces = _Skipped(), self._data.encoding_errors == "replace"
            fields = self._data.fields(labeled=False)
            table = Table(self._absolute(path), fields, bad, key="`INPUTS`", replaces=replaces)
            for row in table.rows():
                yield from bad.taken()
                pairs = None if row.pair is None else [row.pair]
                framed = frame(self._tokenizer, [row.text], pairs, self._data.block_size)
                self.num_cut += framed.num_cut
                yield Sample(printable(f"{path}:{row.number}"), [torch.from_numpy(framed.rows[0])], 0)
            yield from bad.taken()


class _Skipped(BadText):
    """Rows that cannot be read, held until they are taken."""

    def __init__(self) -> None:
        super().__init__(1.0, False, "rows")
        self._held: list[str] = []

    def add(self, where: str, reason: str) -> None:
        self._held.append(printable(f"{os.path.basename(where)}: {reason}"))

    def taken(self) -> Iterator[str]:
        """Yield those that were added since the last call."""
        held, self._held = self._held, []
        yield from held
