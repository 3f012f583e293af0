"""Letters that a recognizer writes: from transcripts or a file, to and from the classes of CTC.

Class 0 of a new vocabulary is the blank, named `<pad>` as in Transformers. `|` ends each word, as in fairseq's `.ltr`
files.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path

from d2v_fast.errors import DataError
from d2v_fast.files.reading import parse_json, printable, read_text

__all__ = ["BLANK", "BOUNDARY", "Vocabulary", "normalized_text", "read_vocabulary", "vocabulary_of"]

BLANK, BOUNDARY = "<pad>", "|"
UNKNOWN = "<unk>"
# the first classes of a fairseq dictionary; its blank is the class that it calls `<s>`
_FAIRSEQ = (BLANK, "<s>", "</s>", UNKNOWN)
# more than any alphabet, and far fewer than the characters of Unicode
MAX_LETTERS = 32_768
MAX_FILE_BYTES = 10_000_000
_COUNTED = re.compile(r"(\S+) \d+")
_SPECIAL = re.compile(r"<[^<>\s]+>|\[[A-Z]+\]")


@dataclass(frozen=True)
class Vocabulary:
    """The names of the classes of a recognizer.

    Attributes:
        tokens: name of each class: single characters, `|` for the end of a word, `<pad>` for the blank, and other names
            in angle brackets, which stand for no text.
    """

    tokens: tuple[str, ...]

    @property
    def blank(self) -> int:
        """Class of the blank."""
        return self.tokens.index(BLANK)

    @cached_property
    def _classes(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.tokens)}

    def encode(self, text: str) -> list[int]:
        """Return the classes of a text, with a boundary after every word.

        Characters outside the vocabulary become `<unk>` if there is such a class, and are left out otherwise.
        """
        unknown = self._classes.get(UNKNOWN)
        boundary = self._classes[BOUNDARY]
        classes = []
        for word in text.split():
            letters = [self._classes.get(letter, unknown) for letter in word]
            known = [letter for letter in letters if letter is not None]
            classes += [*known, boundary] if known else []
        return classes

    def outside(self, text: str) -> Counter[str]:
        """Count the characters of a text that have no class."""
        return Counter(letter for word in text.split() for letter in word if letter not in self._classes)

    def decode(self, classes: Iterable[int]) -> str:
        """Return the text of the classes of consecutive frames: repeats are merged, then blanks removed."""
        kept = [self.tokens[index] for index, _ in groupby(classes)]
        text = "".join(token for token in kept if token == BOUNDARY or not _SPECIAL.fullmatch(token))
        return text.replace(BOUNDARY, " ").strip()


def normalized_text(text: str, letter_case: str = "keep") -> str:
    """Return a transcript in composed Unicode (NFC) with single spaces.

    Args:
        text: the transcript.
        letter_case: "keep", "lower" or "upper".
    """
    text = unicodedata.normalize("NFC", text)
    if letter_case != "keep":
        text = text.lower() if letter_case == "lower" else text.upper()
    # a boundary in a text means what it means in a vocabulary
    return " ".join(text.replace(BOUNDARY, " ").split())


def vocabulary_of(texts: Iterable[str]) -> Vocabulary:
    """Return the vocabulary of transcripts: the blank, the boundary, and every character, in the order of Unicode.

    Raises:
        DataError: there are more characters than any alphabet has.
    """
    letters = sorted({letter for text in texts for word in text.split() for letter in word})
    if len(letters) > MAX_LETTERS:
        raise DataError(
            f"the transcripts must use at most {MAX_LETTERS:,} characters, but use {len(letters):,}. Are these texts?"
        )
    return Vocabulary((BLANK, BOUNDARY, *letters))


def read_vocabulary(path: str) -> Vocabulary:
    """Read a vocabulary: a fairseq dictionary (`dict.ltr.txt`), one letter per line, or a Transformers `vocab.json`.

    Raises:
        DataError: the file cannot be read, or does not hold single characters.
    """
    key = "`d2v.data.vocabulary`"
    try:
        text = read_text(path, MAX_FILE_BYTES)
        tokens = _of_json(text) if Path(path).suffix.lower() == ".json" else _of_lines(text.splitlines())
        return _checked(tokens)
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise DataError(f"{key} must be a file of letters, but '{printable(path)}' cannot be read: {why}.") from None
    except ValueError as error:
        reason = "not UTF-8 text." if isinstance(error, UnicodeDecodeError) else str(error)
        raise DataError(f"{key} must be a file of letters, but '{printable(path)}' is not: {reason}") from None


def _of_lines(lines: Sequence[str]) -> list[str]:
    lines = [line.strip() for line in lines if line.strip()]
    counted = [_COUNTED.fullmatch(line) for line in lines]
    if lines and all(counted):
        return [*_FAIRSEQ, *(match[1] for match in counted if match)]
    extra = [token for token in (BLANK, BOUNDARY) if token not in lines]
    return [*extra, *lines]


def _of_json(text: str) -> list[str]:
    """Return the tokens of a Transformers `vocab.json`, which maps each to its class."""
    found = parse_json(text)
    if not isinstance(found, dict) or sorted(map(str, found.values())) != sorted(map(str, range(len(found)))):
        raise ValueError('it must map each letter to a class, 0 to the number of letters - 1, such as {"<pad>": 0}.')
    return sorted(found, key=lambda token: int(found[token]))


def _checked(tokens: list[str]) -> Vocabulary:
    """Return the vocabulary of tokens; raise ValueError with a sentence if they are none."""
    tokens = [unicodedata.normalize("NFC", token) for token in tokens]
    twice = [token for token, count in Counter(tokens).items() if count > 1]
    if twice:
        raise ValueError(f"'{printable(twice[0][:20])}' is in it twice.")
    long = [token for token in tokens if len(token) != 1 and not _SPECIAL.fullmatch(token)]
    if long:
        raise ValueError(f"'{printable(long[0][:20])}' is not a single character.")
    missing = [token for token in (BLANK, BOUNDARY) if token not in tokens]
    if missing:
        raise ValueError(f"it lacks '{missing[0]}', {'the blank' if missing[0] == BLANK else 'the end of a word'}.")
    if not any(len(token) == 1 and token != BOUNDARY for token in tokens):
        raise ValueError("it holds no letter.")
    if len(tokens) > MAX_LETTERS:
        raise ValueError(f"it holds {len(tokens):,} letters; at most {MAX_LETTERS:,} are possible.")
    return Vocabulary(tuple(tokens))
