"""Small texts, tokenizers and shards."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np

from d2v_fast.modalities.text.config import TextDataConfig
from d2v_fast.modalities.text.files import TextFiles
from d2v_fast.modalities.text.tokenizer import Tokenizer, train_tokenizer
from d2v_fast.modalities.text.tokens import Tokens, tokenized

TEXT = """the student reads what is left of a sentence and guesses what the teacher made of all of it while every word
that was hidden counts once and naïve letters such as é or 你 and numbers like 2202 count as bytes"""
WORDS = TEXT.split()


def sentences(num: int, seed: int = 0) -> list[str]:
    """Return lines of 3 to 30 words."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(3, 31, num)
    return [" ".join(WORDS[i] for i in generator.integers(0, len(WORDS), length)) + "." for length in lengths]


@lru_cache(maxsize=1)
def small_tokenizer() -> Tokenizer:
    """Return a byte-level BPE tokenizer with 360 tokens."""
    return train_tokenizer(sentences(300), 360)


def config(path: Path, **options: object) -> TextDataConfig:
    """Return a data configuration of the files below `path`."""
    return TextDataConfig.model_validate({"kind": "text", "path": str(path), "tokenizer": "given", **options})


def tokens_of(path: Path, root: Path, min_tokens: int = 1, **options: object) -> Tokens:
    """Tokenize files with `small_tokenizer`."""
    return tokenized(TextFiles(config(path, **options)), small_tokenizer(), str(root), min_tokens=min_tokens)


def documents(tokens: Tokens) -> list[str]:
    """Decode all documents."""
    ends = np.cumsum(tokens.document_lengths()).tolist()
    starts = [0, *ends[:-1]]
    return [small_tokenizer().decode(tokens.read(start, end)) for start, end in zip(starts, ends, strict=True)]


def texts(path: Path, **options: object) -> list[str]:
    """Read all documents below a path."""
    found = [""]
    for piece in TextFiles(config(path, **options)).pieces():
        found[-1] += piece.text
        if piece.ends:
            found.append("")
    return found[:-1]
