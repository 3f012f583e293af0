"""Labeled text: rows of .jsonl and .parquet files with a label field, and .txt files in one folder per class."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from d2v_fast.data.files import UnreadableFile
from d2v_fast.data.labels import PATH_KEY, LabeledSample, LabeledSet, choose, class_of, refuse_parts
from d2v_fast.data.listing import counted, describe_listing, name_list
from d2v_fast.errors import DataError
from d2v_fast.files.reading import parse_json
from d2v_fast.modalities.text.files import REPLACEMENT, TextFiles
from d2v_fast.modalities.text.streams import text_ending

if TYPE_CHECKING:
    from d2v_fast.modalities.text.config import TextDataConfig, TextProbeConfig

__all__ = ["class_name", "labeled_texts"]

MAX_LABEL = 100


def labeled_texts(data: TextDataConfig, probe: TextProbeConfig, key: str = PATH_KEY) -> LabeledSet:
    """Read all texts and labels below `probe.path` once, and choose `probe.max_samples` of them.

    Args:
        data: The settings for opening and decoding files.
        probe: The path, and the fields of text and label.
        key: The option that named the path, for messages.
    Raises:
        DataError: There is no such file or folder, or it holds fewer than two classes.
    """
    field = probe.field or data.field
    if field == probe.label_field:
        raise DataError(f"`d2v.probe.label_field` must be another field than that of the text, but both are '{field}'.")
    # leave out and count unreadable texts, however many
    changes = {"kind": "text", "path": probe.path, "field": field, "documents": "file"}
    settings = data.model_copy(update={**changes, "max_bad_fraction": 1.0, "strict": False})
    source = (
        f"The class of a row is its field '{probe.label_field}' (`d2v.probe.label_field`); the class of a .txt file is "
        f"its sub-folder."
    )
    try:
        files = _LabeledFiles(settings, probe.label_field)
        refuse_parts(files.root, files.folders(), key)
        chosen, num_found, notes = choose(files.labeled(), probe.max_samples, "texts", key, str(probe.path), source)
    except DataError as error:
        raise DataError(_with_keys(str(error), key)) from None
    bad = files.bad
    if bad.num_bad:
        such = f"such as {_with_keys(bad.named[0], key)}"
        notes = (*notes, f"left out: {counted(bad.num_bad, 'text')} that cannot be read or have no label, {such}")
    if files.num_outside:
        notes = (*notes, f"left out: {counted(files.num_outside, '.txt file')} in no sub-folder")
    if files.num_empty:
        notes = (*notes, f"left out: {counted(files.num_empty, 'text')} without letters")
    return LabeledSet(str(probe.path), chosen, num_found, (*describe_listing(files.listing, "")[1:], *notes))


class _LabeledFiles(TextFiles):
    """Text files whose documents have labels; `_label` is the label of the document being read."""

    def __init__(self, data: TextDataConfig, label_field: str) -> None:
        # the parent's constructor already calls `_field`
        self._label_field, self._label, self._where = label_field, "", ""
        self.num_outside = 0
        super().__init__(data)

    def folders(self) -> set[str]:
        """Return the names of the sub-folders that hold .txt files."""
        return {class_of(name) for name in self._names if text_ending(name) == ".txt"} - {""}

    def labeled(self) -> Iterator[LabeledSample]:
        """Yield all labeled texts, each cut to its first piece."""
        is_first = True
        for piece in self.pieces():
            if is_first:
                yield LabeledSample(self._where, self._label, piece.text)
            is_first = piece.ends

    def _txt(self, path: str) -> Iterator[str | None]:
        self._label, self._where = class_of(os.path.relpath(path, self.root)), os.path.relpath(path, self.root)
        if self._label:
            yield from super()._txt(path)
        else:
            self.num_outside += 1

    def _jsonl(self, path: str) -> Iterator[str | None]:
        self._where = os.path.relpath(path, self.root)
        yield from super()._jsonl(path)

    def _parquet(self, path: str) -> Iterator[str | None]:
        self._where = os.path.relpath(path, self.root)
        yield from super()._parquet(path)

    def _field(self, line: bytes, first: bool) -> str | None:
        text = super()._field(line, first)
        if text is not None:
            # parse again: the first parse discards numbers, and a label may be one
            try:
                entry = parse_json(line.decode("utf-8-sig", "replace").replace("\0", REPLACEMENT), parse_int=str)
            except ValueError as error:
                raise UnreadableFile(str(error)) from None
            if self._label_field not in entry:
                raise UnreadableFile(
                    f"no field '{self._label_field}' (`d2v.probe.label_field`); it has {name_list(entry)}"
                )
            self._label = class_name(entry[self._label_field], self._label_field)
        return text

    def _columns(self) -> dict[str, str]:
        return {**super()._columns(), self._label_field: "`d2v.probe.label_field`"}

    def _text_of_row(self, row: tuple[Any, ...]) -> str:
        text = super()._text_of_row(row)
        self._label = class_name(row[1], self._label_field)
        return text


def class_name(value: Any, field: str) -> str:
    """Return a label as a string.

    Args:
        value: A name, a whole number or a Boolean.
        field: Field of the label, for messages.
    Raises:
        UnreadableFile: It is none of these, empty or too long.
    """
    if isinstance(value, str):
        text = value.strip()
    elif isinstance(value, (bool, int)):
        text = str(value)
    elif isinstance(value, float) and value.is_integer():
        text = str(int(value))
    else:
        kind = "null" if value is None else type(value).__name__
        raise UnreadableFile(f"the label '{field}' holds {kind} instead of a name or a whole number")
    if not text:
        raise UnreadableFile(f"the label '{field}' is empty")
    if len(text) > MAX_LABEL:
        raise UnreadableFile(f"the label '{field}' has more than {MAX_LABEL} characters")
    return text


def _with_keys(text: str, key: str) -> str:
    """Return an error text that names the probe's keys, or the command's options if `key` is an option."""
    fields = {"`d2v.data.field`": "`d2v.probe.field`"}
    if key.startswith("`--"):
        fields = {"`d2v.data.field`": "`--field`", "`d2v.probe.label_field`": "`--label-field`"}
    text = text.replace("`d2v.data.path`", key)
    for name, own in fields.items():
        text = text.replace(name, own)
    return text
