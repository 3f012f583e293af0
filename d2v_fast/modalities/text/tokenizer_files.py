"""Reading of tokenizer files in all accepted forms, as the content of one tokenizer.json.

vocab.json and merges.txt do not say how to prepare text. Their tokens show whether they are byte-level, and are then
read as GPT-2's. For any other kind, `tokenizer_class` in tokenizer_config.json or config.json must name it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from d2v_fast.files.reading import MAX_DIGITS, parse_json, printable, read_text

__all__ = ["MASK_TOKEN", "ROLES", "byte_level", "check_added", "read_tokenizer_files"]

_log = logging.getLogger(__name__)

MAX_TOKENIZER_BYTES = 256_000_000
MAX_MAP_BYTES = 16_000_000
# the largest published vocabularies have 256,000 tokens and 580,000 merges of three values each
MAX_VALUES = 4_000_000

MASK_TOKEN = "<mask>"
# role -> keys of special_tokens_map.json and tokenizer_config.json, and the default names if neither has one
ROLES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "bos": (("bos_token", "cls_token"), ("<s>", "[CLS]")),
    "pad": (("pad_token",), ("<pad>", "[PAD]")),
    "eos": (("eos_token", "sep_token"), ("</s>", "[SEP]")),
    "unk": (("unk_token",), ("<unk>", "[UNK]")),
    "mask": (("mask_token",), ("<mask>", "[MASK]")),
}
# files of tokenizers that only other libraries read
_OTHER_FILES = ("vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "bpe.codes")
WORD_END, WORD_START = "</w>", "▁"
_ADVICE = (
    "If Transformers reads it, AutoTokenizer.from_pretrained(FOLDER).save_pretrained(OTHER) writes a complete "
    "tokenizer.json; name that folder instead."
)


class TokenizerFiles(NamedTuple):
    """The content of a tokenizer's files.

    Attributes:
        content: Content of a tokenizer.json.
        names: Special tokens that the files name, by key such as `mask_token`.
    """

    content: dict[str, Any]
    names: dict[str, str]


def read_tokenizer_files(path: Path) -> TokenizerFiles:
    """Read a tokenizer.json, a folder with one, or a folder with vocab.json and merges.txt.

    Raises:
        OSError: A file cannot be read.
        ValueError: The files are not a tokenizer, or do not say enough to use it.
    """
    if not path.is_dir():
        content, names = _read(path, MAX_TOKENIZER_BYTES), {}
    else:
        settings = _settings(path)
        names = settings.names
        if (path / "tokenizer.json").exists():
            content = _read(path / "tokenizer.json", MAX_TOKENIZER_BYTES)
            there = content.get("added_tokens") or []
            added = _with_added(path, _vocabulary(content.get("model")), there, settings)
            # with nothing to add, leave the entries and thus the digest unchanged
            if len(added) > len(there):
                content["added_tokens"] = added
            _warn_of_contradictions(path, content.get("normalizer"), settings.raw)
        elif (path / "vocab.json").exists() and (path / "merges.txt").exists():
            content = _from_vocab_and_merges(path, settings)
        else:
            found = [name for name in _OTHER_FILES if (path / name).exists()]
            advice = f" {found[0]} cannot be read alone. {_ADVICE}" if found else ""
            raise ValueError(f"a folder without tokenizer.json, and without vocab.json and merges.txt.{advice}")
    if not isinstance(content.get("model"), dict):
        raise ValueError("JSON, but not a tokenizer: it has no section `model`.")
    return TokenizerFiles(content, names)


def check_added(content: dict[str, Any], id_of: Callable[[str], int | None]) -> None:
    """Raise ValueError if an added token has another id than in the file.

    Args:
        content: Content of a tokenizer.json.
        id_of: Return the id of a token in the tokenizer that was built from `content`. The library numbers added tokens
            consecutively after the vocabulary and ignores the ids in the file.
    """
    for entry in content.get("added_tokens") or []:
        if id_of(entry["content"]) != entry["id"]:
            raise ValueError(
                f"the added token '{printable(entry['content'])}' must have the id {id_of(entry['content'])}, but has "
                f"{entry['id']} instead: added tokens are numbered consecutively after the vocabulary."
            )


def byte_level(
    model: dict[str, Any], added: Iterable[dict[str, Any]], add_prefix_space: bool = False
) -> dict[str, Any]:
    """Return the content of tokenizer.json for a byte-level BPE like RoBERTa's.

    Args:
        model: The section `model`.
        added: Entries of `added_tokens`, see `added_token`.
        add_prefix_space: Add a blank to a text that does not begin with one.
    """
    content = _content(model, added)
    content["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": add_prefix_space,
        "trim_offsets": True,
        "use_regex": True,
    }
    content["decoder"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    ids = {entry["content"]: entry["id"] for entry in content["added_tokens"]}
    if "<s>" in ids and "</s>" in ids:
        content["post_processor"] = {
            "type": "RobertaProcessing",
            "sep": ["</s>", ids["</s>"]],
            "cls": ["<s>", ids["<s>"]],
            "trim_offsets": True,
            "add_prefix_space": add_prefix_space,
        }
    return content


def added_token(token: str, number: int) -> dict[str, Any]:
    """Return the entry of a special token in `added_tokens`."""
    return {
        "id": number,
        "content": token,
        "single_word": False,
        "lstrip": token == MASK_TOKEN,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def _content(model: dict[str, Any], added: Iterable[dict[str, Any]]) -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(added, key=lambda entry: entry["id"]),
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": model,
    }


def _bert_like(model: dict[str, Any], added: Iterable[dict[str, Any]], settings: _Settings) -> dict[str, Any]:
    """Return the content for a BPE like HerBERT's and the first GPT's, whose words end with `</w>`."""
    content = _content({**model, "end_of_word_suffix": WORD_END}, added)
    lower = settings.tokenizer_class == "OpenAIGPT"
    content["normalizer"] = {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": True,
        "strip_accents": None if lower else False,
        "lowercase": lower,
    }
    content["pre_tokenizer"] = {"type": "BertPreTokenizer"}
    content["decoder"] = {"type": "BPEDecoder", "suffix": WORD_END}
    return content


def _llama_like(model: dict[str, Any], added: Iterable[dict[str, Any]], settings: _Settings) -> dict[str, Any]:
    """Return the content for a BPE like Llama's: words begin with U+2581, and unknown letters become bytes."""
    has_bytes = "<0x00>" in model["vocab"]
    content = _content({**model, "fuse_unk": True, "byte_fallback": has_bytes}, added)
    prefix = settings.raw.get("add_prefix_space")
    scheme = "never" if prefix is False else "always" if settings.raw.get("legacy") else "first"
    content["pre_tokenizer"] = {
        "type": "Metaspace",
        "replacement": WORD_START,
        "prepend_scheme": scheme,
        "split": False,
    }
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": WORD_START}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if scheme != "never":
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    content["decoder"] = {"type": "Sequence", "decoders": steps}
    return content


# readers of vocab.json and merges.txt, by `tokenizer_class` without "Tokenizer" and "Fast"
_KINDS = {"Herbert": _bert_like, "OpenAIGPT": _bert_like, "Llama": _llama_like}
# byte-level classes that prepare text differently from GPT-2 and RoBERTa
_OTHER_BYTE_LEVEL = ("CLIP", "Qwen2", "Clvp", "Nougat", "GPTNeoX", "Cohere")


class _Settings(NamedTuple):
    """The settings in the files beside a vocabulary.

    Attributes:
        raw: Content of tokenizer_config.json.
        names: Special tokens by key.
        others: Special tokens without a role.
        tokenizer_class: Its name without "Tokenizer" and "Fast"; empty if no file names it.
    """

    raw: dict[str, Any]
    names: dict[str, str]
    others: frozenset[str]
    tokenizer_class: str


def _settings(folder: Path) -> _Settings:
    names: dict[str, str] = {}
    others: set[str] = set()
    by_file: dict[str, dict[str, Any]] = {"tokenizer_config.json": {}, "special_tokens_map.json": {}, "config.json": {}}
    for file in by_file:
        if (folder / file).exists():
            # Transformers writes an unlimited length as the integer 1e30
            by_file[file] = _read(folder / file, MAX_MAP_BYTES, parse_int=_bounded)
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        for key, value in by_file[file].items():
            if key.endswith("_token") and (text := _text_of(value)) is not None:
                names[key] = text
            if key in ("additional_special_tokens", "extra_special_tokens") and isinstance(value, list):
                others |= {text for text in map(_text_of, value) if text is not None}
    kinds = [by_file[file].get("tokenizer_class") for file in ("tokenizer_config.json", "config.json")]
    kind = next((kind for kind in kinds if isinstance(kind, str)), "")
    kind = kind.removesuffix("Fast").removesuffix("Tokenizer")
    return _Settings(by_file["tokenizer_config.json"], names, frozenset(others), kind)


def _text_of(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _from_vocab_and_merges(folder: Path, settings: _Settings) -> dict[str, Any]:
    vocab = _read(folder / "vocab.json", MAX_TOKENIZER_BYTES)
    ids = [value for value in vocab.values() if type(value) is int]
    if len(ids) != len(vocab) or sorted(ids) != list(range(len(ids))):
        raise ValueError(f"vocab.json must number its {len(vocab)} tokens consecutively from 0, but does not.")
    merges = _read_merges(folder / "merges.txt", vocab)
    added = _with_added(folder, vocab, _specials_of(vocab), settings)
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
    kind = settings.tokenizer_class
    if kind in _KINDS:
        unknown = settings.names.get("unk_token", "<unk>")
        return _KINDS[kind]({**model, "unk_token": unknown if unknown in vocab else None}, added, settings)
    problem = _not_byte_level(vocab, merges)
    if problem is None and kind in _OTHER_BYTE_LEVEL:
        problem = f"of the class {kind}Tokenizer, which prepares text differently from GPT-2"
    if problem is not None:
        known = ", ".join(f"{name}Tokenizer" for name in _KINDS)
        raise ValueError(
            f"vocab.json and merges.txt are {problem}. {_ADVICE} If its class is one of {known}, you can also name it "
            f"as `tokenizer_class` in a tokenizer_config.json beside them."
        )
    return byte_level(model, added, settings.raw.get("add_prefix_space") is True)


def _not_byte_level(vocab: dict[str, int], merges: list[list[str]]) -> str | None:
    """Return why tokens are not made of bytes in GPT-2's alphabet; None if they are."""
    alphabet = _alphabet()
    merged = {token for pair in merges for token in (*pair, "".join(pair))}
    letters = {token for token in vocab if len(token) == 1}
    if ended := [token for token in vocab if token.endswith(WORD_END) and token != WORD_END]:
        return f"not byte-level: words end with {WORD_END} ('{printable(ended[-1])}')"
    if begun := [token for token in vocab if token.startswith(WORD_START) and token != WORD_START]:
        return f"not byte-level: words begin with {WORD_START} ('{printable(begun[-1])}')"
    strange = sorted(token for token in merged | letters if not alphabet.issuperset(token))
    if strange:
        return f"not byte-level: the token '{printable(strange[0])}' has a character that stands for no byte"
    blank = "Ġ"
    return None if blank in letters else f"not byte-level: there is no token for a blank ('{blank}')"


@lru_cache(maxsize=1)
def _alphabet() -> frozenset[str]:
    """Return GPT-2's characters for the 256 bytes: printable Latin-1 for itself, the others from U+0100 on."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return frozenset(map(chr, [*own, *range(256, 256 + 256 - len(own))]))


def _read_merges(path: Path, vocab: dict[str, int]) -> list[list[str]]:
    merges = []
    for number, line in enumerate(read_text(path, MAX_TOKENIZER_BYTES).split("\n"), 1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        pair = line.rstrip("\r").split(" ")
        if len(pair) != 2 or not all(part in vocab for part in (*pair, "".join(pair))):
            raise ValueError(f"line {number} of merges.txt must be a pair of tokens in vocab.json, but is not.")
        merges.append(pair)
    return merges


def _specials_of(vocab: dict[str, int]) -> list[dict[str, Any]]:
    """Return entries of `added_tokens` for the usual special tokens that are in a vocabulary."""
    names = [name for _, defaults in ROLES.values() for name in defaults if name in vocab]
    return [added_token(name, vocab[name]) for name in names]


def _with_added(
    folder: Path, vocab: Mapping[str, int], entries: Iterable[dict[str, Any]], settings: _Settings
) -> list[dict[str, Any]]:
    """Return entries of `added_tokens`, extended by those of the files beside the vocabulary.

    Args:
        folder: The folder of the files.
        vocab: The model's vocabulary.
        entries: Existing entries, which take precedence.
        settings: The settings in the folder.
    """
    found = {str(entry["content"]): entry for entry in entries}
    special = {*settings.names.values(), *settings.others}
    decoder = settings.raw.get("added_tokens_decoder")
    for key, given in decoder.items() if isinstance(decoder, dict) else ():
        where = "`added_tokens_decoder` in tokenizer_config.json"
        if not isinstance(given, dict) or not isinstance(given.get("content"), str) or not key.isdecimal():
            raise ValueError(f"{where} must hold tokens by id, but the entry '{printable(key)[:40]}' is not one.")
        token, number = str(given["content"]), int(key)
        _check_id(token, number, vocab, where)
        plain = added_token(token, number)
        flags = {name: given[name] for name, value in plain.items() if type(given.get(name)) is type(value)}
        found.setdefault(token, {**plain, **flags, "id": number})
    if (folder / "added_tokens.json").exists():
        for token, number in _read(folder / "added_tokens.json", MAX_MAP_BYTES).items():
            _check_id(token, number, vocab, "added_tokens.json")
            is_special = token in special
            plain = {**added_token(token, number), "special": is_special, "normalized": not is_special}
            found.setdefault(token, plain)
    for token in sorted(settings.others - found.keys()):
        if token in vocab:
            found[token] = added_token(token, vocab[token])
        else:
            text = "'%s' names the token '%s', which the tokenizer does not have: it is ignored"
            _log.warning(text, printable(str(folder)), printable(token))
    return sorted(found.values(), key=lambda entry: int(entry["id"]))


def _warn_of_contradictions(folder: Path, normalizer: Any, raw: Mapping[str, Any]) -> None:
    """Log a warning where tokenizer_config.json contradicts BERT's normalizer in tokenizer.json, which is used."""
    if not isinstance(normalizer, dict) or normalizer.get("type") != "BertNormalizer":
        return
    lower = normalizer.get("lowercase")
    strips = normalizer.get("strip_accents")
    does = {
        "do_lower_case": lower,
        "strip_accents": lower if strips is None else strips,
        "tokenize_chinese_chars": normalizer.get("handle_chinese_chars"),
    }
    for key, value in does.items():
        if isinstance(raw.get(key), bool) and raw[key] != value:
            _log.warning(
                "'%s': tokenizer_config.json sets %s to %s, but tokenizer.json normalizes with %s. tokenizer.json is "
                "used. For the other value, which Transformers may use, load and save the folder with Transformers",
                printable(str(folder)),
                key,
                raw[key],
                value,
            )


def _vocabulary(model: Any) -> Mapping[str, int]:
    """Return tokens and ids of the section `model`, empty if its form is unknown."""
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, list):
        # a unigram model: pairs of token and score
        tokens = [entry[0] for entry in vocab if isinstance(entry, list) and entry]
        return {token: number for number, token in enumerate(tokens) if isinstance(token, str)}
    return vocab if isinstance(vocab, dict) else {}


def _check_id(token: str, number: Any, vocab: Mapping[str, int], where: str) -> None:
    if type(number) is not int or number < 0 or vocab.get(token, number) != number or not token:
        raise ValueError(
            f"{where}: '{printable(token)[:40]}' must have an id >= 0, the vocabulary's if it is in there, but has "
            f"{number!r:.40}."
        )


def _bounded(digits: str) -> int:
    return int(digits[:MAX_DIGITS])


def _read(path: Path, max_bytes: int, **hooks: Any) -> dict[str, Any]:
    content = parse_json(read_text(path, max_bytes), max_values=MAX_VALUES, **hooks)
    if not isinstance(content, dict):
        raise ValueError("JSON, but not a tokenizer: it must be an object {...}.")
    return content
