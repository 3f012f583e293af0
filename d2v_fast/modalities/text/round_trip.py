"""Detection of tokenizers that lose text: compare a sample of the texts with what their tokens decode to."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from d2v_fast.files.reading import printable

if TYPE_CHECKING:
    from d2v_fast.modalities.text.tokenizer import Tokenizer

__all__ = ["RoundTrip"]

# report a larger share of lost characters
MAX_LOST = 0.01
# texts to compare of those that are encoded together, and characters of each
NUM_TEXTS, NUM_CHARACTERS = 32, 512
# some tokenizers write a blank as this character
_BLANK = "▁"


class RoundTrip:
    """Count of the characters that encoding loses, ignoring white space and normalization.

    Attributes:
        num_characters, num_lost: Characters of the sample so far. Blanks count as lost only where most of them are.
        example: A word of the sample and its decoded form; None while nothing is lost.
    """

    def __init__(self) -> None:
        self.num_characters = self.num_lost = 0
        self.example: tuple[str, str] | None = None

    def add(self, tokenizer: Tokenizer, texts: Sequence[str]) -> RoundTrip:
        """Compare a sample of the texts, and return self."""
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
        """Add the counts of another sample."""
        self.num_characters += other.num_characters
        self.num_lost += other.num_lost
        self.example = self.example or other.example

    def to_dict(self) -> dict[str, Any]:
        """Return the counts and the example, for a JSON file."""
        return {"num_characters": self.num_characters, "num_lost": self.num_lost, "example": self.example}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> RoundTrip:
        """Invert `to_dict`."""
        found = cls()
        found.num_characters, found.num_lost = content["num_characters"], content["num_lost"]
        found.example = content["example"]
        return found

    def problem(self, name: str) -> str | None:
        """Return a warning with the share of lost characters and an example; None if the share is small.

        Args:
            name: Name of the tokenizer.
        """
        if self.num_lost <= MAX_LOST * self.num_characters or self.example is None:
            return None
        word, becomes = self.example
        return (
            f"the tokenizer {name} loses {100 * self.num_lost / self.num_characters:.1f} % of the characters of this "
            f"text (of a sample of {self.num_characters:,}): '{printable(word)}' becomes '{printable(becomes)}'. Use a "
            "tokenizer for such text; `d2v-fast tokenize TEXT --train --vocab-size N --to FOLDER` trains one."
        )


def _compare(expected: str, found: str) -> tuple[int, int]:
    """Return the number of characters expected, and how many of them are missing from what was found."""
    expected, found = (unicodedata.normalize("NFKC", text.replace(_BLANK, " ")) for text in (expected, found))
    words, letters = expected.split(), Counter(found)
    wanted = Counter("".join(words))
    lost = sum((wanted - letters).values())
    # decoders add and drop single blanks around punctuation
    gone = len(words) - len(found.split())
    return wanted.total() + len(words), lost + (gone if 2 * gone > len(words) else 0)


def _example(tokenizer: Tokenizer, text: str) -> tuple[str, str]:
    """Return the first word that loses characters and its decoded form; if no word does, the beginning of the text."""
    for word in text.split():
        expected, found = tokenizer.round_trip(word[:40])
        if _compare(expected, found)[1]:
            return word[:40], found.strip()
    return text[:40], tokenizer.round_trip(text[:40])[1].strip()
