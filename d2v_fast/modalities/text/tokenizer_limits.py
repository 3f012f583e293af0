"""What a tokenizer that somebody else wrote may cost: how much longer it makes a text, and how long it works at one.

A tokenizer.json can replace a letter by two, and each of these by two, thirty times over; or look for a pattern that
takes a regular expression hours to refute. The library has no limits of its own, and panics where its parts have.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

__all__ = ["MAX_SECONDS", "Growth", "check_parts", "within_limits"]

# parts of a normalizer, of a pre-tokenizer and of a decoder; one that replaces digits and letters has dozens
MAX_PARTS = 256
# characters that a part may put in the place of a match, and of a word that is taken apart in time that grows with its
# cube; both far above what published tokenizers have
MAX_CONTENT, MAX_WORD = 100, 256
# so many times as long a text may become by what cannot be tried out letter by letter, and in all
MAX_FACTOR, MAX_GROWTH = 32, 64
# below it, nothing needs to be measured
NO_GROWTH = 4
# characters after normalization that are tokenized together
MAX_TOGETHER = 1 << 23
# a batch takes seconds, on the slowest of machines
MAX_SECONDS = 600.0

# a regular expression that begins with a letter, an escape or a class which has to be there, so that it never matches
# between two letters; `\K` or an alternative could change that
_NEVER_EMPTY = re.compile(
    r"(?:\\[sSdDwWnrtf]|\\[pP]\{\w+\}|\\u[0-9a-fA-F]{4}|\\[^\w\s]|\[\^?(?:\\.|[^][\\&])+\]|[^\\^$|?*+()\[\]{}])"
    r"(?![*?]|\{(?![1-9]))(?:(?!\\K)[^|])*",
    re.DOTALL,
)

_Value = TypeVar("_Value")


class Growth:
    """How much longer a normalizer makes a text.

    Letters are tried out one by one as they occur, which finds every normalizer that replaces letters. For what
    replaces longer patterns, the worst case is assumed.

    Args:
        content: of a tokenizer.json that `check_parts` has passed.
        make: from a normalizer's section to the normalizer.
    """

    def __init__(self, content: dict[str, Any], make: Callable[[dict[str, Any]], Any]) -> None:
        parts = list(_parts(content.get("normalizer"), "normalizers"))
        self._factor = math.prod(map(_factor, [*parts, *_pre_tokenizers(content)]))
        # a pattern is not tried out: it may take hours
        self._steps = [make(part) for part in parts if _regex(part) is None]
        self._lengths: npt.NDArray[np.float32] | None = None

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Characters that each text has at most after normalization."""
        if not self._steps and self._factor <= NO_GROWTH:
            return list(map(len, texts))
        return [self._length(text) for text in texts]

    def _length(self, text: str) -> int:
        if self._lengths is None:
            # zero where a letter has not been tried
            self._lengths = np.zeros(0x110000, dtype=np.float32)
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        for code in np.unique(codes[self._lengths[codes] == 0]).tolist():
            self._lengths[code] = self._of_letter(chr(code))
        return math.ceil(float(self._lengths[codes].sum(dtype=np.float64)) * self._factor)

    def _of_letter(self, letter: str) -> int:
        for step in self._steps:
            letter = step.normalize_str(letter)
            if len(letter) > 1000:
                break
        return max(1, len(letter))


def groups(lengths: Sequence[int]) -> Iterator[slice]:
    """Divide texts of these lengths into runs of at most `MAX_TOGETHER` characters, or of one text."""
    start = held = 0
    for position, length in enumerate(lengths):
        if position > start and held + length > MAX_TOGETHER:
            yield slice(start, position)
            start, held = position, 0
        held += length
    if start < len(lengths):
        yield slice(start, len(lengths))


def check_parts(content: dict[str, Any]) -> None:
    """Raise ValueError where a tokenizer.json makes texts far longer, or works at them for hours, whatever they are."""
    normalizers = list(_parts(content.get("normalizer"), "normalizers"))
    before = _pre_tokenizers(content)
    decoders = list(_parts(content.get("decoder"), "decoders"))
    for what, parts in (("normalizer", normalizers), ("pre_tokenizer", before), ("decoder", decoders)):
        if len(parts) > MAX_PARTS:
            raise ValueError(f"its {what} has {len(parts):,} parts, more than {MAX_PARTS}.")
        for part in parts:
            held = part.get("content", part.get("prepend"))
            if isinstance(held, str) and len(held) > MAX_CONTENT:
                raise ValueError(f"its {what} inserts {len(held):,} characters at a time, more than {MAX_CONTENT}.")
    for what, factor in (
        ("normalizer and pre_tokenizer make", math.prod(map(_factor, [*normalizers, *before]))),
        ("decoder makes", math.prod(_factor(part, letters=True) for part in decoders)),
    ):
        if factor > MAX_FACTOR:
            raise ValueError(f"its {what} a text up to {factor:,.0f} times as long, more than {MAX_FACTOR} times.")
    model = content.get("model")
    longest = model.get("max_input_chars_per_word", 0) if isinstance(model, dict) else 0
    if isinstance(longest, int) and longest > MAX_WORD:
        raise ValueError(f"`max_input_chars_per_word` must be <= {MAX_WORD}, but is {longest:,} instead.")


def is_simple_frame(processor: Any) -> bool:
    """Whether a section `post_processor` holds a text once at most, so that running it costs little."""
    return json.dumps(processor).count('"Sequence"') <= MAX_PARTS and all(
        _count_of_text(part) <= 1 for part in _parts(processor, "processors")
    )


def within_limits(call: Callable[[], _Value], what: str) -> _Value:
    """Call the tokenizers library, and return what it returns.

    Args:
        call: runs in a thread of its own, so that signals are served meanwhile.
        what: is called, for messages.
    Raises:
        TimeoutError: it takes longer than `MAX_SECONDS`. The thread is left behind; it ends with the process.
        RuntimeError: it panics.
        Exception: whatever else it raises.
    """
    results: list[_Value] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="tokenizer", daemon=True)
    thread.start()
    thread.join(MAX_SECONDS)
    if thread.is_alive():
        raise TimeoutError(
            f"{what} takes more than {MAX_SECONDS:,.0f} seconds. Is a regular expression in it made to take for ever?"
        )
    if errors:
        [error] = errors
        if type(error).__name__ == "PanicException":
            # derives from BaseException, and its class cannot be imported
            raise RuntimeError(f"{what} fails: {error}") from None
        raise error
    return results[0]


def _parts(section: Any, key: str) -> Iterator[dict[str, Any]]:
    """The parts of a normalizer and the like, in the order in which they work."""
    if not isinstance(section, dict):
        return
    inner = section.get(key)
    if section.get("type") == "Sequence" and isinstance(inner, list):
        for part in inner:
            yield from _parts(part, key)
    else:
        yield section


def _pre_tokenizers(content: dict[str, Any]) -> list[dict[str, Any]]:
    return list(_parts(content.get("pre_tokenizer"), "pretokenizers"))


def _regex(part: dict[str, Any]) -> Any:
    pattern = part.get("pattern")
    return pattern.get("Regex") if isinstance(pattern, dict) else None


def _factor(part: dict[str, Any], letters: bool = False) -> float:
    """How many times as long a part makes a text at worst.

    Args:
        part: of a normalizer, pre-tokenizer or decoder.
        letters: count the replacement of single letters, which `Growth` tries out.
    """
    kind = part.get("type")
    if kind == "ByteLevel":
        # a letter becomes one for each of its bytes
        return 4.0
    if kind == "Metaspace":
        # one more in front of every word
        return 2.0
    if kind == "Prepend":
        # in front of every part between tokens that are found as such
        return 1.0 + len(str(part.get("prepend", "")))
    if kind != "Replace":
        return 1.0
    inserted = len(str(part.get("content", "")))
    pattern = part.get("pattern")
    if isinstance(pattern, dict) and isinstance(text := pattern.get("String"), str):
        return 1.0 if len(text) == 1 and not letters else max(1.0, inserted / max(1, len(text)))
    if isinstance(regex := _regex(part), str) and _NEVER_EMPTY.fullmatch(regex):
        return max(1.0, inserted)
    # may match between any two letters
    return 1.0 + inserted


def _count_of_text(part: dict[str, Any]) -> int:
    return json.dumps(part.get("single")).count('"id": "A"')
