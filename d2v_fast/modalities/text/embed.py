"""Lines of text for `d2v-fast embed` and the probe."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from d2v_fast.data.files import UnreadableFile, refuse_system_error
from d2v_fast.data.listing import FileKinds
from d2v_fast.evaluation.inputs import Encoder, Sample, Source
from d2v_fast.files.reading import printable
from d2v_fast.modalities.text.config import TextDataConfig, TextModelSection
from d2v_fast.modalities.text.files import KINDS, REPLACEMENT
from d2v_fast.modalities.text.round_trip import RoundTrip
from d2v_fast.modalities.text.streams import check_byte_order_mark, open_text
from d2v_fast.modalities.text.tasks import run_tokenizer
from d2v_fast.modalities.text.tokenizer import Tokenizer, load_tokenizer
from d2v_fast.models.student import Student

# limits in bytes, per line and per file
MAX_LINE = 1 << 20
MAX_TEXT_BYTES = 1 << 40


def open_lines(encoder: Encoder, inputs: Path, tokenizer: Path | None) -> Source:
    """Open the lines of a .txt file, or of the .txt files in a folder.

    Args:
        encoder: The encoder that will embed them.
        inputs: The file or the folder.
        tokenizer: The tokenizer; None uses the one that the encoder's run names or its folder holds.
    Raises:
        ValueError: There are no lines, or the tokenizer cannot be read or is not the model's.
    """
    if encoder.run is None:
        found, data = load_tokenizer(tokenizer or encoder.folder), TextDataConfig()
    else:
        found = run_tokenizer(encoder.run, tokenizer, encoder.vocabulary, str(encoder.folder))
        data = encoder.run.data
    return Lines(encoder.model, encoder.origin, inputs, encoder.config, data, found)


class Lines(Source):
    """Lines of .txt files, compressed or not, each between begin and end token. Empty lines are left out."""

    what = "line"
    batch_size = 32

    def __init__(
        self,
        model: Student,
        origin: str,
        inputs: Path,
        config: TextModelSection,
        data: TextDataConfig,
        tokenizer: Tokenizer,
        paths: list[str] | None = None,
    ) -> None:
        read = tuple(ending for ending in KINDS.read if ending.startswith(".txt"))
        others = [ending for ending in KINDS.read if ending not in read]
        unread = {**KINDS.unread, **dict.fromkeys(others, "write one line per sample into a .txt file")}
        kinds = FileKinds("lines of text", read, unread)
        super().__init__(model, origin, inputs, kinds, data.follow_outside, paths)
        tokenizer.fit(config)
        self._tokenizer, self._round_trip = tokenizer, RoundTrip()
        self._replaces = data.encoding_errors == "replace"
        self._max_tokens = config.max_positions - 2
        self.padding = float(tokenizer.specials.pad)
        self.num_places = lambda length: length

    def samples(self) -> Iterator[Sample | str]:
        """See `Source`."""
        for path in self._paths:
            try:
                yield from self._of_file(path)
            except (OSError, UnreadableFile) as error:
                refuse_system_error(error, path)
                yield printable(f"{path}: {error}")

    def problem(self) -> str | None:
        """Return a warning if the tokenizer loses characters of these texts."""
        return self._round_trip.problem(self._tokenizer.name)

    def _of_file(self, path: str) -> Iterator[Sample | str]:
        with open_text(self._absolute(path), self._inside, MAX_TEXT_BYTES) as stream:
            number = before = 0
            while line := stream.content.readline(MAX_LINE):
                number += 1
                if number == 1:
                    check_byte_order_mark(line)
                if len(line) == MAX_LINE:
                    raise UnreadableFile(f"line {number} is longer than {MAX_LINE:,} bytes; the rest is left out")
                name = printable(f"{path}:{number}")
                try:
                    encoding = "utf-8-sig" if number == 1 else "utf-8"
                    text = line.decode(encoding, "replace" if self._replaces else "strict").strip()
                except UnicodeDecodeError:
                    yield f"{name}: not UTF-8"
                    continue
                if "\0" in text:
                    if not self._replaces:
                        # for example UTF-16 without a byte order mark
                        yield f"{name}: not text: it has zero bytes"
                        continue
                    text = text.replace("\0", REPLACEMENT)
                if text:
                    # position in the file as stored, which may be compressed
                    position = stream.file.tell()
                    yield self.sample(name, text, position - before)
                    before = position

    def sample(self, name: str, text: str, num_bytes: int = 0) -> Sample:
        """Return the sample of one text, cut to the longest sequence that the model accepts."""
        ids, _ = self._tokenizer.encode([text])
        self.num_cut += len(ids) > self._max_tokens
        self._round_trip.add(self._tokenizer, [text])
        specials = self._tokenizer.specials
        tokens = torch.tensor([specials.bos, *ids[: self._max_tokens].tolist(), specials.eos])
        return Sample(name, [tokens], num_bytes)
