"""Tokenizers: read from what others wrote, or a byte-level BPE trained here; text to token ids with all cores.

Hugging Face's `tokenizers` does the work (extra `train`), imported when it is needed. What this module adds: which ids
are special, that text which spells a special token stays text, that nothing is truncated or drawn at random, and a
digest that tells tokenizers apart.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from d2v_fast.data.batch import DataError
from d2v_fast.paths import expand_path
from d2v_fast.untrusted import parse_json, printable, read_text

__all__ = ["MIN_VOCAB_SIZE", "Specials", "Tokenizer", "load_tokenizer", "train_tokenizer"]

MAX_TOKENIZER_BYTES = 256_000_000
MAX_MAP_BYTES = 16_000_000

# RoBERTa's first four, in this order; the mask is last
FIRST_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
MASK_TOKEN = "<mask>"
# these, and a token for every byte
MIN_VOCAB_SIZE = len(FIRST_TOKENS) + 256 + 1

# role -> keys of special_tokens_map.json and tokenizer_config.json, and names where neither says any
_ROLES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "bos": (("bos_token", "cls_token"), ("<s>", "[CLS]")),
    "pad": (("pad_token",), ("<pad>", "[PAD]")),
    "eos": (("eos_token", "sep_token"), ("</s>", "[SEP]")),
    "unk": (("unk_token",), ("<unk>", "[UNK]")),
    "mask": (("mask_token",), ("<mask>", "[MASK]")),
}
_WHAT = {"bos": "begin", "pad": "padding", "eos": "end", "unk": "unknown", "mask": "mask"}
# parts of tokenizer.json that decide which ids a text becomes; the others are for decoding, and for callers
_DECISIVE = ("added_tokens", "normalizer", "pre_tokenizer", "model")


class Specials(NamedTuple):
    """Ids of the special tokens: begin, padding, end, unknown (None where there is none), mask."""

    bos: int
    pad: int
    eos: int
    unk: int | None
    mask: int

    @property
    def ids(self) -> tuple[int, ...]:
        """All of them, ascending, each once."""
        return tuple(sorted({special for special in self if special is not None}))


class Tokenizer:
    """Text to token ids.

    Attributes:
        specials: see `Specials`.
        vocab_size: the largest id, plus 1.
        digest: SHA-256 over everything that decides which ids a text becomes, and over `specials`.
        dtype: of ids: uint16, or uint32 where they need it.
        name: where it is from, for messages.
    """

    def __init__(self, inner: Any, content: dict[str, Any], names: dict[str, str], name: str) -> None:
        inner.no_truncation()
        inner.no_padding()
        # a text that spells <mask> is a text
        inner.encode_special_tokens = True
        self._inner, self._names = inner, names
        self.name = name
        found = {role: inner.token_to_id(token) for role, token in names.items()}
        self.specials = Specials(found["bos"], found["pad"], found["eos"], found.get("unk"), found["mask"])
        self.vocab_size = max(inner.get_vocab(with_added_tokens=True).values()) + 1
        self.dtype: type[np.unsignedinteger] = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32
        decisive = {part: content.get(part) for part in _DECISIVE} | {"specials": self.specials}
        self.digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
        self._reserved = np.array([i for i in self.specials.ids if i != self.specials.unk], dtype=self.dtype)

    def encode(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.unsignedinteger], npt.NDArray[np.int64]]:
        """The token ids of all texts, one after the other, without special tokens, and how many each has, int64 `[B]`.

        Uses all cores.
        """
        found = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        lengths = np.fromiter(map(len, found), dtype=np.int64, count=len(found))
        each = chain.from_iterable(encoding.ids for encoding in found)
        ids = np.fromiter(each, dtype=self.dtype, count=int(lengths.sum()))
        taken = np.isin(ids, self._reserved)
        if taken.any():
            # some tokenizers take the name of a special token for it all the same
            lengths -= np.bincount(np.repeat(np.arange(len(found)), lengths)[taken], minlength=len(found))
            ids = ids[~taken]
        return ids, lengths

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, special ones by their names."""
        return str(self._inner.decode([int(i) for i in ids], skip_special_tokens=False))

    def require(self, digest: str, where: str) -> None:
        """Raise DataError unless this is the tokenizer of the given digest; `where` says whose that is."""
        if digest != self.digest:
            raise DataError(
                f"`d2v.data.tokenizer` must be the tokenizer that {where} was trained with (digest {digest[:12]}), but "
                f"is {self.name} (digest {self.digest[:12]}) instead: its ids stand for other tokens."
            )

    def fit(self, vocab_size: int) -> None:
        """Raise DataError if a model with so many token embeddings lacks some of its tokens."""
        if self.vocab_size > vocab_size:
            raise DataError(
                f"`d2v.model.vocab_size` must be >= {self.vocab_size}, the tokens of {self.name}, but is {vocab_size} "
                f"instead."
            )

    def save(self, folder: str | Path, max_length: int = 512) -> None:
        """Write what `transformers.AutoTokenizer.from_pretrained` reads.

        Args:
            folder: must exist; `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json` are replaced.
            max_length: longest sequence of the model, in tokens.
        """
        names = {key: self._names[role] for role, (keys, _) in _ROLES.items() if role in self._names for key in keys}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": max_length,
            "model_input_names": ["input_ids", "attention_mask"],
            "clean_up_tokenization_spaces": False,
            **names,
        }
        files = {
            "tokenizer.json": self._inner.to_str(pretty=False),
            "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False),
            "special_tokens_map.json": json.dumps(names, indent=2, ensure_ascii=False),
        }
        for file, text in files.items():
            (Path(folder) / file).write_text(text + "\n", encoding="utf-8")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer: a `tokenizer.json` file, a folder with one, or a folder with vocab.json and merges.txt.

    Vocabulary and merges are taken for a byte-level BPE like GPT-2's and RoBERTa's. Special tokens are those that
    special_tokens_map.json or tokenizer_config.json of the folder name, else RoBERTa's or BERT's.

    Raises:
        DataError: there is none, it cannot be read, or it lacks a special token.
    """
    path = Path(os.path.abspath(expand_path(path)))
    name = f"'{printable(str(path))}'"
    try:
        if not path.is_dir():
            content, said = _read(path, MAX_TOKENIZER_BYTES), {}
        else:
            said = _said_names(path)
            if (path / "tokenizer.json").exists():
                content = _read(path / "tokenizer.json", MAX_TOKENIZER_BYTES)
            elif (path / "vocab.json").exists() and (path / "merges.txt").exists():
                content = _from_vocab_and_merges(path)
            else:
                raise ValueError("a folder without tokenizer.json, and without vocab.json and merges.txt.")
        if not isinstance(content.get("model"), dict):
            raise ValueError("JSON, but no tokenizer: it has no section `model`.")
        if content["model"].get("dropout") is not None:
            content["model"]["dropout"] = None
        inner = _library().Tokenizer.from_str(json.dumps(content))
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"`d2v.data.tokenizer` must be a tokenizer, but {name}: {error.strerror or error}.") from None
    except Exception as error:
        # the library raises plain exceptions
        text = printable(str(error))[:300]
        raise DataError(f"`d2v.data.tokenizer` must be a tokenizer, but {name} cannot be read: {text}") from None
    return Tokenizer(inner, content, _names_of_specials(inner, said, name), name)


def train_tokenizer(texts: Iterable[str], vocab_size: int, name: str = "the trained tokenizer") -> Tokenizer:
    """A byte-level BPE with RoBERTa's special tokens: `<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3, and `<mask>` last.

    The same texts give the same tokenizer, with any number of threads. Memory grows with the number of different words,
    not with the length of the text.

    Args:
        vocab_size: tokens in all; fewer come out if the texts do not have as many pairs that occur twice.
        name: for messages.
    Raises:
        ValueError: `vocab_size` is too small for the bytes and the special tokens.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"`vocab_size` must be >= {MIN_VOCAB_SIZE}, but is {vocab_size} instead.")
    library = _library()
    raw = library.Tokenizer(library.models.BPE())
    raw.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=2,
        special_tokens=list(FIRST_TOKENS),
        initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    raw.train_from_iterator(iter(texts), trainer)
    model = json.loads(raw.to_str())["model"]
    model["vocab"][MASK_TOKEN] = len(model["vocab"])
    content = _byte_level(model, {token: model["vocab"][token] for token in (*FIRST_TOKENS, MASK_TOKEN)})
    inner = library.Tokenizer.from_str(json.dumps(content))
    return Tokenizer(inner, content, _names_of_specials(inner, {}, name), name)


def _library() -> Any:
    # with this unset, every data loading worker that is forked later prints a warning
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        import tokenizers
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except Exception as error:
        raise DataError(
            f"text is tokenised with tokenizers, which cannot be imported ({type(error).__name__}: {error}): "
            f"pip install 'd2v_fast[train]'"
        ) from None
    return tokenizers


def _read(path: Path, max_bytes: int) -> dict[str, Any]:
    content = parse_json(read_text(path, max_bytes))
    if not isinstance(content, dict):
        raise ValueError("JSON, but no tokenizer: it holds no section {...}.")
    return content


def _from_vocab_and_merges(folder: Path) -> dict[str, Any]:
    vocab = _read(folder / "vocab.json", MAX_TOKENIZER_BYTES)
    ids = [value for value in vocab.values() if type(value) is int]
    if len(ids) != len(vocab) or sorted(ids) != list(range(len(ids))):
        raise ValueError(f"vocab.json must number its {len(vocab)} tokens from 0 on, but does not.")
    lines = read_text(folder / "merges.txt", MAX_TOKENIZER_BYTES).split("\n")
    merges = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        pair = line.rstrip("\r").split(" ")
        if len(pair) != 2 or not all(part in vocab for part in (*pair, "".join(pair))):
            raise ValueError(f"line {number} of merges.txt is no pair of tokens of vocab.json.")
        merges.append(pair)
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": merges,
    }
    names = [name for _, defaults in _ROLES.values() for name in defaults if name in vocab]
    return _byte_level(model, {name: vocab[name] for name in names})


def _byte_level(model: dict[str, Any], specials: dict[str, int]) -> dict[str, Any]:
    """The content of tokenizer.json for a byte-level BPE that is used like RoBERTa's."""
    content: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": number,
                "content": token,
                "single_word": False,
                "lstrip": token == MASK_TOKEN,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for token, number in sorted(specials.items(), key=lambda item: item[1])
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": model,
    }
    if "<s>" in specials and "</s>" in specials:
        content["post_processor"] = {
            "type": "RobertaProcessing",
            "sep": ["</s>", specials["</s>"]],
            "cls": ["<s>", specials["<s>"]],
            "trim_offsets": True,
            "add_prefix_space": False,
        }
    return content


def _said_names(folder: Path) -> dict[str, str]:
    """What the files beside a tokenizer call their special tokens, by key such as `mask_token`."""
    names: dict[str, str] = {}
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / file).exists():
            for key, value in _read(folder / file, MAX_MAP_BYTES).items():
                text = value.get("content") if isinstance(value, dict) else value
                if key.endswith("_token") and isinstance(text, str):
                    names[key] = text
    return names


def _names_of_specials(inner: Any, said: dict[str, str], name: str) -> dict[str, str]:
    """The special tokens by role; DataError names those that are missing."""
    names: dict[str, str] = {}
    missing = []
    for role, (keys, defaults) in _ROLES.items():
        wanted = [said[key] for key in keys if key in said] or list(defaults)
        found = [token for token in wanted if inner.token_to_id(token) is not None]
        if found:
            names[role] = found[0]
        elif role != "unk":
            missing.append(f"no {_WHAT[role]} token ({' or '.join(map(printable, wanted))})")
    if missing:
        raise DataError(
            f"`d2v.data.tokenizer` must have all special tokens, but {name} has {', '.join(missing)}. Add them to it, "
            f"or name them in a special_tokens_map.json beside it."
        )
    for role in ("mask", "pad"):
        others = [other for other in names if other != role and names[other] == names[role]]
        if others:
            raise DataError(
                f"`d2v.data.tokenizer` must have a {_WHAT[role]} token of its own, but {name} uses "
                f"'{printable(names[role])}' as {_WHAT[others[0]]} token, too."
            )
    return names
