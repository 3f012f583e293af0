"""Limits on untrusted tokenizers: how much longer they make a text, and how long they take.

A tokenizer.json can replace a letter by two, and each of these by two, thirty times over; or search for a regular
expression that backtracks for hours. The library sets no limits, and panics where its dependencies do.
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

# most parts of a normalizer, pre-tokenizer or decoder; one that replaces digits and letters has dozens
MAX_PARTS = 256
# most characters that replace a match, and of a word, which takes time cubic in its length; both are far above
# published tokenizers
MAX_CONTENT, MAX_WORD = 100, 256
# most growth of a text by parts that cannot be tried letter by letter, and by all parts
MAX_FACTOR, MAX_GROWTH = 32, 64
# growth up to this factor is not measured
NO_GROWTH = 4
# characters after normalization that are tokenized together
MAX_TOGETHER = 1 << 23
# a batch takes seconds even on slow machines
MAX_SECONDS = 600.0

# a regular expression that starts with a mandatory letter, escape or class, so that it never matches the empty string;
# `\K` or an alternative could change that
_NEVER_EMPTY = re.compile(
    r"(?:\\[sSdDwWnrtf]|\\[pP]\{\w+\}|\\u[0-9a-fA-F]{4}|\\[^\w\s]|\[\^?(?:\\.|[^][\\&])+\]|[^\\^$|?*+()\[\]{}])"
    r"(?![*?]|\{(?![1-9]))(?:(?!\\K)[^|])*",
    re.DOTALL,
)

_Value = TypeVar("_Value")


class Growth:
    """Bound on the length of a text after normalization.

    Each distinct letter is normalized once on its own, which measures all parts that replace single letters. For parts
    that replace longer patterns, the worst case is assumed.

    Args:
        content: Content of a tokenizer.json that `check_parts` has accepted.
        make: Build a normalizer from its section.
    """

    def __init__(self, content: dict[str, Any], make: Callable[[dict[str, Any]], Any]) -> None:
        parts = list(_parts(content.get("normalizer"), "normalizers"))
        self._factor = math.prod(map(_factor, [*parts, *_pre_tokenizers(content)]))
        # do not run regular expressions: one may take hours
        self._steps = [make(part) for part in parts if _regex(part) is None]
        self._lengths: npt.NDArray[np.float32] | None = None

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Return an upper bound on the characters of each text after normalization."""
        if not self._steps and self._factor <= NO_GROWTH:
            return list(map(len, texts))
        return [self._length(text) for text in texts]

    def _length(self, text: str) -> int:
        if self._lengths is None:
            # zero marks a letter that has not been measured
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
    """Divide texts of these lengths into runs of at most `MAX_TOGETHER` characters, or of one longer text."""
    start = held = 0
    for position, length in enumerate(lengths):
        if position > start and held + length > MAX_TOGETHER:
            yield slice(start, position)
            start, held = position, 0
        held += length
    if start < len(lengths):
        yield slice(start, len(lengths))


def check_parts(content: dict[str, Any]) -> None:
    """Raise ValueError if a tokenizer.json could make texts far longer or need hours for them."""
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
    """Return whether a section `post_processor` inserts the text at most once, so that running it is cheap."""
    return json.dumps(processor).count('"Sequence"') <= MAX_PARTS and all(
        _count_of_text(part) <= 1 for part in _parts(processor, "processors")
    )


def within_limits(call: Callable[[], _Value], what: str) -> _Value:
    """Call the tokenizers library with a time limit, and return its result.

    Args:
        call: The call, which runs in a thread of its own so that the main thread still handles signals.
        what: Name of the operation, for messages.
    Raises:
        TimeoutError: The call takes longer than `MAX_SECONDS`. Its thread goes on until the process ends.
        RuntimeError: The library panics.
        Exception: Any other error of the call.
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
            f"{what} takes more than {MAX_SECONDS:,.0f} seconds. One of its regular expressions may backtrack endlessly"
        )
    if errors:
        [error] = errors
        if type(error).__name__ == "PanicException":
            # a subclass of BaseException that cannot be imported
            raise RuntimeError(f"{what} fails: {error}") from None
        raise error
    return results[0]


def _parts(section: Any, key: str) -> Iterator[dict[str, Any]]:
    """Yield the parts of a normalizer, pre-tokenizer, decoder or post-processor, in the order they are applied."""
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
    """Return the worst-case factor by which a part lengthens a text.

    Args:
        part: A part of a normalizer, pre-tokenizer or decoder.
        letters: Include the replacement of single letters, which `Growth` measures.
    """
    kind = part.get("type")
    if kind == "ByteLevel":
        # one character per byte
        return 4.0
    if kind == "Metaspace":
        # one more character in front of each word
        return 2.0
    if kind == "Prepend":
        # once per stretch of text between added tokens
        return 1.0 + len(str(part.get("prepend", "")))
    if kind != "Replace":
        return 1.0
    inserted = len(str(part.get("content", "")))
    pattern = part.get("pattern")
    if isinstance(pattern, dict) and isinstance(text := pattern.get("String"), str):
        return 1.0 if len(text) == 1 and not letters else max(1.0, inserted / max(1, len(text)))
    if isinstance(regex := _regex(part), str) and _NEVER_EMPTY.fullmatch(regex):
        return max(1.0, inserted)
    # a pattern that may be empty matches between any two letters
    return 1.0 + inserted


def _count_of_text(part: dict[str, Any]) -> int:
    return json.dumps(part.get("single")).count('"id": "A"')
