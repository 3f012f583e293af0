"""Tokenizers that would use all memory or time end in a clear error; ordinary ones are within the limits."""

from __future__ import annotations

import json
import re
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from d2v_fast.errors import DataError
from d2v_fast.modalities.text import tokenizer_limits
from d2v_fast.modalities.text.tokenizer import Tokenizer, load_tokenizer
from tests.helpers.bounded_memory import measured

pytest.importorskip("tokenizers")

SPECIALS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def replace(pattern: str, content: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def sequence(*parts: dict[str, Any], key: str = "normalizers") -> dict[str, Any]:
    return {"type": "Sequence", key: list(parts)}


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def load(folder: Path, **sections: Any) -> Tokenizer:
    """Load a tokenizer of letters with the given sections."""
    vocab = {token: number for number, token in enumerate([*SPECIALS, "a", "b", "ab"])}
    model = {"type": "BPE", "vocab": vocab, "merges": [["a", "b"]], "unk_token": "<unk>", "fuse_unk": True}
    added = [
        {"id": number, "content": token, "special": True, "normalized": False, "single_word": False}
        | {"lstrip": False, "rstrip": False}
        for number, token in enumerate(SPECIALS)
    ]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": added, "model": model, **sections}))
    return load_tokenizer(folder)


BOMBS: dict[str, tuple[dict[str, Any], str]] = {
    "letters": ({"normalizer": sequence(*[replace("a", "aa")] * 30)}, "its normalizer makes .* characters of 50,000"),
    "nested": (
        {"normalizer": sequence(*[sequence(replace("a", "ab"), replace("b", "aa"))] * 12)},
        "its normalizer makes .* characters of 50,000",
    ),
    "patterns": ({"normalizer": sequence(*[replace("aa", "aaaa")] * 30)}, "1,073,741,824 times as long, more than 32"),
    "expressions": ({"normalizer": sequence(*[replace("", "aa", "Regex")] * 20)}, "times as long, more than 32"),
    "classes": ({"normalizer": sequence(*[replace("[a]", "aa", "Regex")] * 6)}, "64 times as long, more than 32"),
    "many": ({"normalizer": sequence(*[replace("a", "aa")] * 400)}, "its normalizer has 400 parts, more than 256"),
    "long": ({"normalizer": replace("a", "a" * 1_000_000)}, "inserts 1,000,000 characters at a time, more than 100"),
    "prefix": ({"normalizer": sequence(*[{"type": "Prepend", "prepend": "aaa"}] * 9)}, "times as long, more than 32"),
    "bytes": (
        {"pre_tokenizer": sequence(*[{"type": "ByteLevel", "add_prefix_space": False}] * 20, key="pretokenizers")},
        "times as long, more than 32",
    ),
    "decoder": ({"decoder": sequence(*[replace("a", "aa")] * 30, key="decoders")}, "its decoder makes a text up to"),
    "words": (
        {"model": {"type": "WordPiece", "vocab": {token: i for i, token in enumerate([*SPECIALS, "a", "##a"])}}
         | {"unk_token": "<unk>", "continuing_subword_prefix": "##", "max_input_chars_per_word": 10**9}},
        "`max_input_chars_per_word` must be <= 256, but is 1,000,000,000",
    ),
    "ids": (
        {"model": {"type": "WordLevel", "unk_token": "<unk>"}
         | {"vocab": {token: i for i, token in enumerate(SPECIALS)} | {"a": 2**32 - 1}}},
        "must have ids < 16,777,216, but .* has 4,294,967,295",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BOMBS)
def test_tokenizers_that_would_become_large(tmp_path: Path, kind: str) -> None:
    sections, reason = BOMBS[kind]
    used, said = measured(lambda: load(tmp_path, **sections).encode(["a" * 50_000]))
    assert said.startswith("DataError: `d2v.data.tokenizer` must")
    assert re.search(reason, said), said
    assert used < 60e6


def test_normalizers_that_clean_text_are_read(tmp_path: Path) -> None:
    """Many parts are fine if they do not lengthen text: regular expressions, and one replacement per letter."""
    clean = {r"\s+": " ", "[“”„]": '"', "[‘’]": "'", "[–—]": "-", "…": "...", r"https?://\S+": "url", " {2,}": " "}
    clean |= {r"\p{Cc}": "", r"[\u200c\u200d]": ""}
    expressions = [replace(pattern, content, "Regex") for pattern, content in clean.items()]
    letters = [replace(chr(0x660 + digit), "ab"[digit % 2]) for digit in range(10)]
    parts = [*expressions, *letters, *[replace(chr(code), "") for code in range(0x64B, 0x660)]]
    assert len(parts) > 32
    tokenizer = load(tmp_path, normalizer=sequence(*parts))
    ids, sizes = tokenizer.encode(["\u0660\u0661\u064b\u200c" * 100, "ab" * 100])
    assert sizes.tolist() == [100, 100]
    assert len(set(ids.tolist())) == 1


@pytest.mark.parametrize("pattern", [r"\s*", "a?", "a|", "(?=a)", "^", "a{0,3}", "a{,3}", r"a\K", "[a]*", "a|b*"])
def test_expressions_that_match_between_letters(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(DataError, match="a text up to 64 times as long"):
        load(tmp_path, normalizer=sequence(*[replace(pattern, "a", "Regex")] * 6))


def test_frames_that_double_are_replaced(tmp_path: Path) -> None:
    text = {"Sequence": {"id": "A", "type_id": 0}}
    twice = {"type": "TemplateProcessing", "single": [text, text], "pair": [text, text], "special_tokens": {}}
    tokenizer = load(tmp_path, post_processor=sequence(*[twice] * 30, key="processors"))
    (tmp_path / "saved").mkdir()
    used, said = measured(lambda: tokenizer.save(tmp_path / "saved"))
    assert said == "None"
    assert used < 60e6


def test_longer_texts_are_tokenized_in_parts_with_the_same_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load(
        tmp_path, normalizer=sequence({"type": "NFKC"}, replace("b", "ab"), replace(" {2,}", " ", "Regex"))
    )
    texts = ["ab", "", "\ufdfa", "aab" * 50, "b" * 99, "a"]
    assert tokenizer._growth.lengths(texts) == [3, 0, 18, 200, 198, 1]
    together = tokenizer.encode(texts)
    monkeypatch.setattr(tokenizer_limits, "MAX_TOGETHER", 100)
    apart = tokenizer.encode(texts)
    assert [part.tolist() for part in apart] == [part.tolist() for part in together]
    assert apart[0].dtype == together[0].dtype
    assert [part.size for part in tokenizer.encode([])] == [0, 0]


@pytest.mark.parametrize("where", ["pre_tokenizer", "normalizer"])
def test_expression_that_backtracks_for_ever(tmp_path: Path, where: str) -> None:
    pattern = "(a+)+$"
    tokenizer = load(tmp_path, **{where: split(pattern) if where == "pre_tokenizer" else replace(pattern, "", "Regex")})
    assert len(tokenizer.encode(["ab"])[0]) > 0
    for call in (lambda: tokenizer.encode(["a" * 40 + "b"]), lambda: tokenizer.round_trip("a" * 40 + "b")):
        with pytest.raises(DataError, match=r"encodes any text, but .* does not: encoding fails: .*retry-limit"):
            call()


@pytest.mark.parametrize(
    "sections",
    [
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="}},
        {"pre_tokenizer": split("(((")},
        {"model": {"type": "BPE", "vocab": {}, "merges": []}},
        {"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 7}},
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "(?<=a+)"}, "content": ""}},
        {"decoder": {"type": "Strip", "content": "ab", "start": -1, "stop": 0}},
        {"post_processor": {"type": "TemplateProcessing", "single": "$A $Z", "pair": "", "special_tokens": {}}},
    ],
)
def test_broken_sections_raise_only_data_errors(tmp_path: Path, sections: dict[str, Any]) -> None:
    # some versions of the library accept some of these sections
    with suppress(DataError):
        tokenizer = load(tmp_path, **sections)
        tokenizer.encode(["ab a b", ""])
        tokenizer.round_trip("ab a b")


def test_library_that_does_not_return(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load(tmp_path)
    freed = threading.Event()

    class Stuck:
        def encode_batch_fast(self, texts: list[str], add_special_tokens: bool) -> Any:
            freed.wait(60)

    monkeypatch.setattr(tokenizer, "_inner", Stuck())
    monkeypatch.setattr(tokenizer_limits, "MAX_SECONDS", 0.2)
    start = time.monotonic()
    with pytest.raises(DataError, match=r"does not: encoding takes more than 0 seconds. One of its regular expr"):
        tokenizer.encode(["ab"])
    assert time.monotonic() - start < 30
    freed.set()
