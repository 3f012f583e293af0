"""Folders of tokenizers of every kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from d2v_fast.modalities.text.tokenizer import Tokenizer, load_tokenizer
from tests.helpers.text_files import sentences


def word_piece(**changed: str) -> dict:
    """Return a small WordPiece tokenizer like BERT's as JSON."""
    names = {"unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "mask": "[MASK]", **changed}
    vocab = ["[unused]", names["pad"], "the", "stud", "##ent", names["unk"], names["cls"], names["sep"], names["mask"]]
    ids = {token: number for number, token in enumerate(vocab)}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    normalizer = {"clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": True}
    model = {"unk_token": names["unk"], "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    return {
        "version": "1.0",
        "added_tokens": [{"id": ids[name], "content": name, **plain} for name in sorted(names.values(), key=ids.get)],
        "normalizer": {"type": "BertNormalizer", **normalizer},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": None,
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {"type": "WordPiece", **model, "vocab": ids},
    }


def tokenizer_with_padding_at(pad: int, folder: Path) -> Tokenizer:
    """Make a WordPiece tokenizer like BERT's with this id of the padding token."""
    content = word_piece()
    tokens = [token for token in content["model"]["vocab"] if token != "[PAD]"]
    tokens.insert(pad, "[PAD]")
    ids = {token: number for number, token in enumerate(tokens)}
    content["model"]["vocab"] = ids
    for added in content["added_tokens"]:
        added["id"] = ids[added["content"]]
    content["added_tokens"].sort(key=lambda added: added["id"])
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return load_tokenizer(folder)


SPECIALS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


POLISH = "Zażółć gęślą jaźń, powiedział chłopiec do dziewczyny."


def write(folder: Path, **files: Any) -> Path:
    """Write JSON files, given by their stems, and merges.txt."""
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for name, content in files.items():
        if name == "merges":
            (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, content), ""]))
        else:
            (folder / f"{name}.json").write_text(json.dumps(content, ensure_ascii=False))
    return folder


def word_pieces(folder: Path) -> Path:
    import tokenizers

    inner = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    inner.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = tokenizers.trainers.WordPieceTrainer(vocab_size=200, special_tokens=names, show_progress=False)
    inner.train_from_iterator(sentences(200), trainer)
    return write(folder, tokenizer=json.loads(inner.to_str()))


def unigrams(folder: Path) -> Path:
    import tokenizers

    inner = tokenizers.Tokenizer(tokenizers.models.Unigram())
    inner.normalizer = tokenizers.normalizers.NFKC()
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    inner.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=150, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False
    )
    inner.train_from_iterator([*sentences(200), POLISH], trainer)
    return write(folder, tokenizer=json.loads(inner.to_str()))
