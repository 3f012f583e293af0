"""Turn a recognizer's log-probabilities into text: the likeliest class of each frame, or a beam with an n-gram model.

The beam search is flashlight-text's (Kahn et al. 2022), with the words of a lexicon and a KenLM language model.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from d2v_fast.errors import DataError
from d2v_fast.files.reading import open_regular, printable, refuse_pointer, require_regular
from d2v_fast.modalities.speech.config_finetune import SpeechCtcConfig
from d2v_fast.modalities.speech.vocabulary import BOUNDARY, Vocabulary
from d2v_fast.objectives.finetune import Beam, Decoder
from d2v_fast.packages import MissingPackageError, install_command

__all__ = ["beam_decoder", "greedy_transcripts", "recognizing", "searching"]

MAX_LINE = 100_000
_SECTION = re.compile(r"\\(\d+)-grams:")


def recognizing(config: SpeechCtcConfig) -> tuple[int, Decoder]:
    """Return the class of the blank, and the decoder that takes the likeliest letters."""
    vocabulary = Vocabulary(config.labels or ())
    return vocabulary.blank, greedy_transcripts(vocabulary)


def searching(config: SpeechCtcConfig, beam: Beam) -> Decoder:
    """Return the decoder of a run that searches with a language model; see `beam_decoder`."""
    return beam_decoder(Vocabulary(config.labels or ()), beam)


def greedy_transcripts(vocabulary: Vocabulary) -> Decoder:
    """Return the decoder that takes the likeliest class of every frame."""

    def decode(log_probs: Tensor, lengths: Sequence[int]) -> list[str]:
        best = log_probs.argmax(-1).cpu()
        return [vocabulary.decode(row[:length].tolist()) for row, length in zip(best, lengths, strict=True)]

    return decode


def beam_decoder(vocabulary: Vocabulary, beam: Beam) -> Decoder:
    """Return a decoder that searches for the likeliest words under an n-gram language model.

    Words that cannot be spelled with the vocabulary are left out and counted on the error stream.

    Raises:
        MissingPackageError: flashlight-text is not installed.
        DataError: a file cannot be read, or no word of the lexicon can be spelled with the vocabulary.
    """
    decoder, dictionary, kenlm = _flashlight()
    words = list(dict.fromkeys(_lexicon(beam)))
    spelled = [(word, vocabulary.encode(word)) for word in words if not vocabulary.outside(word)]
    if not spelled:
        raise DataError(
            f"the words of '{printable(beam.lexicon or beam.language_model)}' must be spelled in the letters of the "
            f"run, but none of the {len(words):,} is. Is its letter case that of the transcripts?"
        )
    if outside := len(words) - len(spelled):
        print(f"{outside:,} of {len(words):,} words have letters that the run lacks and are left out", file=sys.stderr)
    _require_file(beam.language_model)
    indices = dictionary.Dictionary([word for word, _ in spelled] + ["<unk>"])
    try:
        model = kenlm.KenLM(beam.language_model, indices)
    except RuntimeError as error:
        why = printable(" ".join(str(error).rpartition(" threw ")[2].split()))
        raise DataError(
            f"'{printable(beam.language_model)}' must be ARPA text or a binary file of KenLM, which cannot read it: "
            f"{why}"
        ) from None
    boundary, blank = vocabulary.tokens.index(BOUNDARY), vocabulary.blank
    trie = decoder.Trie(len(vocabulary.tokens), boundary)
    start = model.start(False)
    for number, (_, letters) in enumerate(spelled):
        trie.insert(letters, number, model.score(start, number)[1])
    trie.smear(decoder.SmearingMode.MAX)
    options = decoder.LexiconDecoderOptions(
        beam_size=beam.size,
        beam_size_token=len(vocabulary.tokens),
        beam_threshold=beam.threshold,
        lm_weight=beam.weight,
        word_score=beam.word_score,
        unk_score=-math.inf,
        sil_score=0.0,
        log_add=False,
        criterion_type=decoder.CriterionType.CTC,
    )
    search = decoder.LexiconDecoder(options, trie, model, boundary, blank, len(spelled), [], False)

    def decode(log_probs: Tensor, lengths: Sequence[int]) -> list[str]:
        rows = log_probs.to("cpu", torch.float32).contiguous()
        # the search reads the memory of the tensor, which `rows` keeps
        found = (search.decode(row.data_ptr(), length, row.shape[1]) for row, length in zip(rows, lengths, strict=True))
        return [_text(best[0].words, spelled) if best else "" for best in found]

    # `model` and `indices` must outlive the search, which refers to them
    decode.owned = (model, indices, trie)  # type: ignore[attr-defined]
    return decode


def _text(words: Iterable[int], spelled: Sequence[tuple[str, list[int]]]) -> str:
    return " ".join(spelled[index][0] for index in words if 0 <= index < len(spelled))


def _flashlight() -> tuple[Any, Any, Any]:
    """Return the modules of flashlight-text."""
    try:
        from flashlight.lib.text import decoder, dictionary
        from flashlight.lib.text.decoder import kenlm
    except ImportError as error:
        raise MissingPackageError(
            f"decoding with a language model needs flashlight-text, which cannot be imported: {error}. "
            f"`{install_command('flashlight')}` installs it for Python 3.10 to 3.12, for which there are wheels."
        ) from error
    return decoder, dictionary, kenlm


def _lexicon(beam: Beam) -> Iterator[str]:
    """Yield the words of the lexicon, or the unigrams of an ARPA file."""
    if beam.lexicon is not None:
        yield from (line.split()[0] for line in _lines(beam.lexicon) if line.strip())
        return
    order, found = 0, False
    for number, line in enumerate(_lines(beam.language_model)):
        section = _SECTION.match(line)
        if section:
            order, found = int(section[1]), True
        elif order == 1 and (fields := line.split()) and len(fields) >= 2 and not fields[1].startswith("<"):
            yield fields[1]
        if order > 1:
            return
        if not found and number > MAX_LINE:
            break
    if not found:
        raise DataError(
            f"`--lexicon` must name a file of words, because '{printable(beam.language_model)}' is no ARPA "
            "file, whose words could be read."
        )


def _require_file(path: str) -> None:
    try:
        require_regular(path)
        refuse_pointer(path)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None


def _lines(path: str) -> Iterator[str]:
    try:
        refuse_pointer(path)
        with open_regular(path) as file:
            while line := file.readline(MAX_LINE):
                yield line.decode("utf-8", "replace")
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: str, error: Exception) -> DataError:
    why = (error.strerror or type(error).__name__) if isinstance(error, OSError) else str(error)
    return DataError(f"'{printable(os.fspath(path))}' cannot be read: {why}")
