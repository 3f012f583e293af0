"""Word and character error rates of transcripts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

__all__ = ["Errors", "count_errors"]


class Errors(NamedTuple):
    """Counts of errors, which add up over samples and processes.

    Attributes:
        word_errors, words: insertions, deletions and substitutions of words, and words of the references.
        letter_errors, letters: the same of characters, spaces included.
    """

    word_errors: int
    words: int
    letter_errors: int
    letters: int

    @property
    def wer(self) -> float:
        """Word errors per word of the references; above 1 where many words are inserted."""
        return self.word_errors / max(self.words, 1)

    @property
    def cer(self) -> float:
        """Character errors per character of the references."""
        return self.letter_errors / max(self.letters, 1)


def count_errors(pairs: Iterable[tuple[str, str]]) -> Errors:
    """Count the errors of transcripts.

    Args:
        pairs: reference and transcript of each recording. Runs of spaces count as one.
    """
    from rapidfuzz.distance import Levenshtein

    totals = [0, 0, 0, 0]
    for reference, transcript in pairs:
        theirs, ours = reference.split(), transcript.split()
        letters, written = " ".join(theirs), " ".join(ours)
        found = (Levenshtein.distance(theirs, ours), len(theirs), Levenshtein.distance(letters, written), len(letters))
        totals = [total + count for total, count in zip(totals, found, strict=True)]
    return Errors(*totals)
