"""Does a tokenizer keep the text? What tokens say is compared with what was encoded, in a sample of all text."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from d2v_fast.files.reading import printable

if TYPE_CHECKING:
    from d2v_fast.modalities.text.tokenizer import Tokenizer

__all__ = ["RoundTrip"]

# the share of lost characters that is reported
MAX_LOST = 0.01
# of texts that are encoded together, so many are compared, and so many characters of each
NUM_TEXTS, NUM_CHARACTERS = 32, 512
# stands for a blank in the tokens of some tokenizers
_BLANK = "▁"


class RoundTrip:
    """Counts characters that encoding loses, white space and normalization aside.

    Attributes:
        num_characters, num_lost: of the sample so far; a blank that goes with most others counts as one.
        example: a word of the sample and what becomes of it; None while nothing is lost.
    """

    def __init__(self) -> None:
        self.num_characters = self.num_lost = 0
        self.example: tuple[str, str] | None = None

    def add(self, tokenizer: Tokenizer, texts: Sequence[str]) -> RoundTrip:
        """Compare a sample of the texts; returns itself."""
        step = max(1, len(texts) // NUM_TEXTS)
        for text in texts[::step][:NUM_TEXTS]:
            part = text[:NUM_CHARACTERS]
            size, lost = _compare(*tokenizer.round_trip(part))
            self.num_characters += size
            self.num_lost += lost
            if lost and self.example is None:
                self.example = _example(tokenizer, part)
        return self

    def merge(self, other: RoundTrip) -> None:
        """Add another one's counts."""
        self.num_characters += other.num_characters
        self.num_lost += other.num_lost
        self.example = self.example or other.example

    def to_dict(self) -> dict[str, Any]:
        """Counts and example for a JSON file."""
        return {"num_characters": self.num_characters, "num_lost": self.num_lost, "example": self.example}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> RoundTrip:
        """The inverse of `to_dict`."""
        found = cls()
        found.num_characters, found.num_lost = content["num_characters"], content["num_lost"]
        found.example = content["example"]
        return found

    def problem(self, name: str) -> str | None:
        """What is lost, in two sentences; None where it is a small share.

        Args:
            name: of the tokenizer.
        """
        if self.num_lost <= MAX_LOST * self.num_characters or self.example is None:
            return None
        word, becomes = self.example
        return (
            f"the tokenizer {name} loses {100 * self.num_lost / self.num_characters:.1f} % of the characters of this "
            f"text (of a sample of {self.num_characters:,}): '{printable(word)}' becomes '{printable(becomes)}'. Use "
            "one that was made for such text; `d2v-fast tokenize TEXT --train --vocab-size N --to FOLDER` makes one."
        )


def _compare(expected: str, found: str) -> tuple[int, int]:
    """Characters of what was encoded, and how many of them are not in what is decoded."""
    expected, found = (unicodedata.normalize("NFKC", text.replace(_BLANK, " ")) for text in (expected, found))
    words, letters = expected.split(), Counter(found)
    wanted = Counter("".join(words))
    lost = sum((wanted - letters).values())
    # single blanks come and go around punctuation
    gone = len(words) - len(found.split())
    return wanted.total() + len(words), lost + (gone if 2 * gone > len(words) else 0)


def _example(tokenizer: Tokenizer, text: str) -> tuple[str, str]:
    """The first word that loses something, and what becomes of it; the beginning of the text if no word does."""
    for word in text.split():
        expected, found = tokenizer.round_trip(word[:40])
        if _compare(expected, found)[1]:
            return word[:40], found.strip()
    return text[:40], tokenizer.round_trip(text[:40])[1].strip()
