"""Tokenizers: read from files or trained as a byte-level BPE; they encode text on all cores.

The work is done by Hugging Face's `tokenizers` (extra `train`), imported on first use. This module adds the ids of the
special tokens, encodes text that spells a special token as ordinary characters, disables truncation and random
dropout, and computes a digest that identifies a tokenizer.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from d2v_fast.errors import DataError
from d2v_fast.files.paths import expand_path
from d2v_fast.files.reading import printable
from d2v_fast.modalities.text.config import MAX_VOCAB, TextModelSection
from d2v_fast.modalities.text.tokenizer_files import (
    MASK_TOKEN,
    ROLES,
    added_token,
    byte_level,
    check_added,
    read_tokenizer_files,
)
from d2v_fast.modalities.text.tokenizer_limits import (
    MAX_GROWTH,
    Growth,
    check_parts,
    groups,
    is_simple_frame,
    within_limits,
)
from d2v_fast.packages import install_command

__all__ = ["MIN_VOCAB_SIZE", "Specials", "Tokenizer", "load_tokenizer", "missing_tokens", "train_tokenizer"]

# RoBERTa's first four, in this order; the mask is last
FIRST_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
# the special tokens, and a token for every byte
MIN_VOCAB_SIZE = len(FIRST_TOKENS) + 256 + 1

_WHAT = {"bos": "begin", "pad": "padding", "eos": "end", "unk": "unknown", "mask": "mask"}
# sections of tokenizer.json that determine the ids of a text; the others are for decoding and for callers
_DECISIVE = ("added_tokens", "normalizer", "pre_tokenizer", "model")


class Specials(NamedTuple):
    """Ids of the special tokens: begin, padding, end, unknown (None if there is none), mask."""

    bos: int
    pad: int
    eos: int
    unk: int | None
    mask: int

    @property
    def ids(self) -> tuple[int, ...]:
        """All ids, ascending, without duplicates."""
        return tuple(sorted({special for special in self if special is not None}))


class Tokenizer:
    """Encoder of text to token ids.

    Attributes:
        specials: Ids of the special tokens.
        vocab_size: The largest id, plus 1.
        digest: SHA-256 of everything that determines the ids of a text, and of `specials`.
        dtype: Type of the ids: uint16, or uint32 for a larger vocabulary.
        name: Its origin, for messages.
    """

    def __init__(self, inner: Any, content: dict[str, Any], names: dict[str, str], name: str) -> None:
        # text never becomes a special token with a role, but special tokens without one are matched in text
        self._others = {
            entry["content"]
            for entry in content.get("added_tokens") or []
            if entry.get("special") and entry["content"] not in names.values()
        }
        # kept for `save`: the library changes the last digits of scores when it serializes them
        self._content = json.dumps({**content, "truncation": None, "padding": None}, ensure_ascii=False)
        if self._others:
            content = _not_special(content, self._others)
            inner = _library().Tokenizer.from_str(json.dumps(content))
        inner.no_truncation()
        inner.no_padding()
        inner.encode_special_tokens = True
        self._inner, self._names = inner, names
        self._growth = Growth(content, _normalizer)
        self.name = name
        found = {role: inner.token_to_id(token) for role, token in names.items()}
        self.specials = Specials(found["bos"], found["pad"], found["eos"], found.get("unk"), found["mask"])
        self.vocab_size = max(inner.get_vocab(with_added_tokens=True).values()) + 1
        if self.vocab_size > MAX_VOCAB:
            # the model has one row per id
            raise DataError(
                f"`d2v.data.tokenizer` must have ids < {MAX_VOCAB:,}, but {name} has {self.vocab_size - 1:,}."
            )
        self.dtype: type[np.unsignedinteger] = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32
        decisive = {part: content.get(part) for part in _DECISIVE} | {"specials": self.specials}
        self.digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
        self._reserved = np.array([i for i in self.specials.ids if i != self.specials.unk], dtype=self.dtype)

    def encode(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.unsignedinteger], npt.NDArray[np.int64]]:
        """Encode texts on all cores, without special tokens.

        Returns:
            The ids of all texts, concatenated, in `dtype`; and the number of ids of each text, int64 `[B]`.
        Raises:
            DataError: A text is outside of the vocabulary and the tokenizer has no unknown token, or the library fails.
        """
        texts = list(texts)
        sizes = self._growth.lengths(texts)
        for text, size in zip(texts, sizes, strict=True):
            if size > MAX_GROWTH * len(text) + 1000:
                raise self._fails(f"its normalizer makes {size:,} characters of {len(text):,}")
        parts = [self._encode(texts[part]) for part in groups(sizes)]
        if len(parts) == 1:
            return parts[0]
        ids = np.concatenate([np.empty(0, dtype=self.dtype), *(part[0] for part in parts)])
        return ids, np.concatenate([np.empty(0, dtype=np.int64), *(part[1] for part in parts)])

    def _encode(self, texts: list[str]) -> tuple[npt.NDArray[np.unsignedinteger], npt.NDArray[np.int64]]:
        try:
            # the library releases the GIL only for batches
            found = within_limits(lambda: self._inner.encode_batch_fast(texts, add_special_tokens=False), "encoding")
        except (TimeoutError, RuntimeError) as error:
            raise self._fails(str(error)) from None
        except Exception as error:
            # the library raises bare Exceptions
            advice = "Set its unknown token (`unk_token` or `unk_id`) to one of its vocabulary."
            raise self._fails(str(error), advice) from None
        lengths = np.fromiter(map(len, found), dtype=np.int64, count=len(found))
        each = chain.from_iterable(encoding.ids for encoding in found)
        ids = np.fromiter(each, dtype=self.dtype, count=int(lengths.sum()))
        is_special = np.isin(ids, self._reserved)
        if is_special.any():
            # some tokenizers match the name of a special token all the same
            lengths -= np.bincount(np.repeat(np.arange(len(found)), lengths)[is_special], minlength=len(found))
            ids = ids[~is_special]
        return ids, lengths

    def decode(self, ids: Iterable[int]) -> str:
        """Decode token ids to text, with special tokens by name.

        Raises:
            DataError: The tokenizer cannot decode them.
        """
        numbers = [int(i) for i in ids]
        return self._call(lambda: str(self._inner.decode(numbers, skip_special_tokens=False)), "decoding")

    def round_trip(self, text: str) -> tuple[str, str]:
        """Return a text and what its known tokens decode to, both normalized by the tokenizer.

        Without a decoder, return the text itself, and the characters of it that its tokens cover.
        """
        # encoded as a batch, like training data, so that the ids are the same
        [encoding] = self._call(lambda: self._inner.encode_batch([text], add_special_tokens=False), "encoding")
        left_out = {self.specials.unk, *self._reserved.tolist()}
        known = [position for position, token in enumerate(encoding.ids) if token not in left_out]
        if self._inner.decoder is None:
            # blanks separate words and belong to no token
            covered = np.array([letter.isspace() for letter in text], dtype=np.bool_)
            for position in known:
                covered[slice(*encoding.offsets[position])] = True
            return text, "".join(letter for letter, there in zip(text, covered, strict=True) if there)
        decoded = self.decode([encoding.ids[position] for position in known])
        # CLIP's decoder does not remove the word ends
        if suffix := getattr(self._inner.model, "end_of_word_suffix", None):
            decoded = decoded.replace(suffix, " ")
        normalizer = self._inner.normalizer
        # normalize both: some decoders undo part of the normalization, such as a substitute for the blank
        if normalizer is None:
            return text, decoded
        both = (text, decoded)
        first, second = self._call(lambda: [str(normalizer.normalize_str(one)) for one in both], "normalizing")
        return first, second

    def _call(self, call: Callable[[], Any], what: str) -> Any:
        """Call the library and return its result.

        Raises:
            DataError: The call fails or does not end.
        """
        try:
            return within_limits(call, what)
        except Exception as error:
            raise self._fails(str(error)) from None

    def _fails(self, reason: str, advice: str = "Use another tokenizer.") -> DataError:
        return DataError(
            f"`d2v.data.tokenizer` must be a tokenizer that encodes any text, but {self.name} does not: "
            f"{printable(reason)[:300].rstrip('.')}. {advice}"
        )

    def require(self, digest: str, where: str) -> None:
        """Raise DataError unless this tokenizer has the given digest; `where` names the run that requires it."""
        if digest != self.digest:
            raise DataError(
                f"`d2v.data.tokenizer` must be the tokenizer that {where} was trained with (digest {digest[:12]}), but "
                f"is {self.name} (digest {self.digest[:12]}) instead: its ids stand for other tokens."
            )

    def fit(self, model: TextModelSection) -> None:
        """Raise DataError unless a model has a row for every token, and the same padding id. Null values always fit."""
        if model.vocab_size is not None and self.vocab_size > model.vocab_size:
            raise DataError(
                f"`d2v.model.vocab_size` must be >= {self.vocab_size}, the tokens of {self.name}, but is "
                f"{model.vocab_size} instead. Leave the key out to use the tokenizer's number."
            )
        if model.padding_id not in (None, self.specials.pad):
            raise DataError(
                f"`d2v.model.padding_id` must be {self.specials.pad}, the padding token of {self.name}, but is "
                f"{model.padding_id} instead. Leave the key out for a new run, or use the tokenizer that the weights "
                f"were trained with."
            )

    def save(self, folder: str | Path, max_length: int = 512) -> None:
        """Write files from which `transformers.AutoTokenizer.from_pretrained` encodes as training does.

        The written tokenizer puts begin and end tokens around every text, even if the one that was read does not.

        Args:
            folder: An existing folder; `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json` are
                replaced.
            max_length: Longest sequence of the model, in tokens.
        """
        names = {key: self._names[role] for role, (keys, _) in ROLES.items() if role in self._names for key in keys}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": max_length,
            "model_input_names": ["input_ids", "attention_mask"],
            "padding_side": "right",
            "truncation_side": "right",
            "clean_up_tokenization_spaces": False,
            **names,
        }
        content = json.loads(self._content)
        if not self._is_framed():
            content["post_processor"] = _frame(self._names, self.specials)
        files = {
            "tokenizer.json": json.dumps(content, ensure_ascii=False, separators=(",", ":")),
            "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False),
            "special_tokens_map.json": json.dumps(names, indent=2, ensure_ascii=False),
        }
        for file, text in files.items():
            (Path(folder) / file).write_text(text + "\n", encoding="utf-8")

    def _is_framed(self) -> bool:
        """Return whether the post-processor frames a text and a pair as `_frame` does, and does nothing else."""
        specials = self.specials
        if not is_simple_frame(json.loads(self._content).get("post_processor")):
            return False
        for text in ("", "a b"):
            try:
                ids = self.encode([text])[0].tolist()
            except DataError:
                # a letter is not in the vocabulary, and there is no unknown token
                return False
            single = [specials.bos, *ids, specials.eos]
            for given, expected in ((text, single), ((text, text), [*single, specials.eos, *ids, specials.eos])):
                [framed] = self._call(partial(self._inner.encode_batch, [given]), "encoding")
                if framed.ids != expected:
                    return False
        return True


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer: a `tokenizer.json` file, a folder with one, or a folder with vocab.json and merges.txt.

    Vocabulary and merges form a byte-level BPE like GPT-2's and RoBERTa's, or one of the class that a file beside them
    names. added_tokens.json and `added_tokens_decoder` of tokenizer_config.json are read too. The special tokens are
    those that special_tokens_map.json or tokenizer_config.json names, otherwise RoBERTa's or BERT's.

    Raises:
        DataError: The tokenizer does not exist, cannot be read, or lacks a special token.
    """
    path = Path(os.path.abspath(expand_path(path)))
    name = f"'{printable(str(path))}'"
    try:
        files = read_tokenizer_files(path)
        content = files.content
        if content["model"].get("dropout") is not None:
            content["model"]["dropout"] = None
        check_parts(content)
        inner = within_limits(lambda: _library().Tokenizer.from_str(json.dumps(content)), "reading it")
        check_added(content, inner.token_to_id)
        names = _names_of_specials(inner, files.names, name)
        return Tokenizer(inner, content, names, name)
    except DataError:
        raise
    except OSError as error:
        text = error.strerror or str(error)
        raise DataError(f"`d2v.data.tokenizer` must be a tokenizer, but {name} cannot be read: {text}.") from None
    except Exception as error:
        # the library raises bare Exceptions
        text = printable(str(error))[:1000]
        raise DataError(f"`d2v.data.tokenizer` must be a tokenizer, but {name} cannot be read: {text}") from None


def train_tokenizer(texts: Iterable[str], vocab_size: int, name: str = "the trained tokenizer") -> Tokenizer:
    """Train a byte-level BPE with RoBERTa's special tokens: `<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3, and `<mask>` last.

    The same texts give the same tokenizer, with any number of threads. Memory grows with the number of distinct words,
    not with the length of the text.

    Args:
        texts: The texts to train on.
        vocab_size: Number of tokens; the result has fewer if the texts have too few pairs that occur twice.
        name: Name of the tokenizer, for messages.
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
    content = byte_level(model, [added_token(token, model["vocab"][token]) for token in (*FIRST_TOKENS, MASK_TOKEN)])
    inner = library.Tokenizer.from_str(json.dumps(content))
    return Tokenizer(inner, content, _names_of_specials(inner, {}, name), name)


def missing_tokens(tokenizer: Tokenizer, vocab_size: int) -> str | None:
    """Return why a trained tokenizer has fewer tokens than requested; None if it has as many."""
    if tokenizer.vocab_size >= vocab_size:
        return None
    return (
        f"{tokenizer.vocab_size:,} tokens instead of {vocab_size:,}: no further pair of tokens occurs twice within the "
        f"words of this text. More text gives more tokens."
    )


@functools.cache
def _use_threads_until_forked() -> None:
    """Enable the library's threads, but not in forked processes, where they do not exist and a call would hang."""
    if os.environ.setdefault("TOKENIZERS_PARALLELISM", "true") == "true":
        os.register_at_fork(after_in_child=lambda: os.environ.update(TOKENIZERS_PARALLELISM="false"))


def _library() -> Any:
    _use_threads_until_forked()
    try:
        import tokenizers
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except Exception as error:
        raise DataError(
            f"text is tokenized with tokenizers, which cannot be imported ({type(error).__name__}: {error}): "
            f"{install_command('tokenizers')}"
        ) from None
    return tokenizers


def _normalizer(section: dict[str, Any]) -> Any:
    """Build the normalizer of a section of tokenizer.json."""
    model = {"type": "WordLevel", "vocab": {}, "unk_token": ""}
    return _library().Tokenizer.from_str(json.dumps({"model": model, "normalizer": section})).normalizer


def _not_special(content: dict[str, Any], tokens: set[str]) -> dict[str, Any]:
    """Return the content of tokenizer.json with some added tokens marked as not special, so that text matches them."""
    added = content["added_tokens"]
    changed = [{**entry, "special": False} if entry["content"] in tokens else entry for entry in added]
    return {**content, "added_tokens": changed}


def _frame(names: dict[str, str], specials: Specials) -> dict[str, Any]:
    """Return the section `post_processor` of RoBERTa: `<s> a </s>`, and for a pair `<s> a </s></s> b </s>`."""

    def token(role: str) -> dict[str, Any]:
        return {"SpecialToken": {"id": names[role], "type_id": 0}}

    def text(which: str) -> dict[str, Any]:
        return {"Sequence": {"id": which, "type_id": 0}}

    single = [token("bos"), text("A"), token("eos")]
    ids = {"bos": specials.bos, "eos": specials.eos}
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, token("eos"), text("B"), token("eos")],
        "special_tokens": {
            names[role]: {"id": names[role], "ids": [ids[role]], "tokens": [names[role]]} for role in ids
        },
    }


def _names_of_specials(inner: Any, given: dict[str, str], name: str) -> dict[str, str]:
    """Return the special tokens by role; raise DataError if one is missing, or mask or padding is shared.

    Args:
        inner: The library's tokenizer.
        given: Special tokens that the files name, by key such as `mask_token`.
        name: Name of the tokenizer, for messages.
    """
    names: dict[str, str] = {}
    missing = []
    for role, (keys, defaults) in ROLES.items():
        wanted = [given[key] for key in keys if key in given] or list(defaults)
        found = [token for token in wanted if inner.token_to_id(token) is not None]
        if found:
            names[role] = found[0]
        elif role != "unk":
            missing.append(f"no {_WHAT[role]} token ({' or '.join(map(printable, wanted))})")
    if missing:
        raise DataError(
            f"`d2v.data.tokenizer` must have all special tokens, but {name} has {', '.join(missing)}. Add them, or "
            f"name the tokens with these roles in a special_tokens_map.json beside it."
        )
    for role in ("mask", "pad"):
        others = [other for other in names if other != role and names[other] == names[role]]
        if others:
            raise DataError(
                f"`d2v.data.tokenizer` must have a separate {_WHAT[role]} token, but {name} also uses "
                f"'{printable(names[role])}' as {_WHAT[others[0]]} token."
            )
    return names
