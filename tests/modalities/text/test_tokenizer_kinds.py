"""For every accepted kind of tokenizer, Transformers encodes with its export as training and `embed` do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from d2v_fast.errors import DataError
from d2v_fast.modalities.text.files import TextFiles
from d2v_fast.modalities.text.round_trip import RoundTrip
from d2v_fast.modalities.text.tokenizer import Tokenizer, load_tokenizer
from d2v_fast.modalities.text.tokens import tokenized
from tests.helpers.text_files import config, sentences, small_tokenizer
from tests.helpers.tokenizer_folders import POLISH, SPECIALS, unigrams, word_pieces, write

tokenizers = pytest.importorskip("tokenizers")

TEXTS = ["", "a", "the student reads", "  two  blanks and a word ", "what the teacher made of it, naïve é.", POLISH]


def saved(folder: Path) -> dict[str, Any]:
    """Save a byte-level tokenizer that was trained here, and return the content of its tokenizer.json."""
    folder.mkdir(exist_ok=True)
    small_tokenizer().save(folder)
    content: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text())
    return content


def trained(folder: Path) -> Path:
    saved(folder)
    return folder


def without_post_processor(folder: Path) -> Path:
    return write(folder, tokenizer={**saved(folder), "post_processor": None})


def only_an_end(folder: Path) -> Path:
    content = saved(folder)
    end = {"id": "</s>", "ids": [2], "tokens": ["</s>"]}
    steps = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}]
    template = {"type": "TemplateProcessing", "single": steps, "pair": steps, "special_tokens": {"</s>": end}}
    return write(folder, tokenizer={**content, "post_processor": template})


def word_pieces_of_transformers(folder: Path) -> Path:
    transformers = pytest.importorskip("transformers")
    model = json.loads((word_pieces(folder) / "tokenizer.json").read_text())["model"]
    transformers.BertTokenizer(vocab=model["vocab"]).save_pretrained(folder / "bert")
    return folder / "bert"


def vocab_and_merges(folder: Path, **files: Any) -> Path:
    model = saved(folder)["model"]
    return write(folder, vocab=model["vocab"], merges=model["merges"], **files)


def with_a_blank_in_front(folder: Path) -> Path:
    settings = {"tokenizer_class": "RobertaTokenizer", "add_prefix_space": True, "mask_token": "<mask>"}
    return vocab_and_merges(folder, tokenizer_config=settings)


def with_added_tokens(folder: Path) -> Path:
    names = {"mask_token": {"content": "<mask>", "lstrip": True}, "additional_special_tokens": ["student"]}
    added = {"student": 360, "naïve": 361}
    return vocab_and_merges(folder, added_tokens=added, special_tokens_map=names)


def with_an_added_tokens_decoder(folder: Path) -> Path:
    plain = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": False}
    decoder = {
        "1": {"content": "<pad>", **plain, "special": True},
        "360": {"content": "teacher", **plain, "lstrip": True},
    }
    return vocab_and_merges(folder, tokenizer_config={"added_tokens_decoder": decoder})


def with_added_tokens_beside(folder: Path) -> Path:
    """Tokens added to a tokenizer.json by other files, as Transformers does."""
    content = saved(folder)
    names = {"additional_special_tokens": ["student", "q"]}
    return write(folder, tokenizer=content, added_tokens={"student": 360}, special_tokens_map=names)


def roberta_of_transformers(folder: Path) -> Path:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.RobertaTokenizer.from_pretrained(vocab_and_merges(folder))
    theirs.add_special_tokens({"additional_special_tokens": ["student"]})
    theirs.add_tokens(["naïve"])
    theirs.save_pretrained(folder / "roberta")
    return folder / "roberta"


def ends_of_words(folder: Path) -> Path:
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIALS, end_of_word_suffix="</w>", show_progress=False
    )
    inner.train_from_iterator([*sentences(200), POLISH, POLISH], trainer)
    model = json.loads(inner.to_str())["model"]
    settings = {"tokenizer_class": "HerbertTokenizer"}
    return write(folder, vocab=model["vocab"], merges=model["merges"], tokenizer_config=settings)


def beginnings_of_words(folder: Path) -> Path:
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    names = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=450, special_tokens=names, show_progress=False)
    inner.train_from_iterator(sentences(200), trainer)
    model = json.loads(inner.to_str())["model"]
    names = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    }
    settings = {"tokenizer_class": "LlamaTokenizer", **names}
    return write(folder, vocab=model["vocab"], merges=model["merges"], tokenizer_config=settings)


def clip(folder: Path) -> Path:
    """Bytes in words that end with `</w>`, which the decoder does not remove."""
    parts, library = tokenizers.pre_tokenizers, tokenizers.normalizers
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="</s>", end_of_word_suffix="</w>"))
    inner.normalizer = library.Sequence(
        [library.NFC(), library.Replace(tokenizers.Regex(r"\s+"), " "), library.Lowercase()]
    )
    words = parts.Split(tokenizers.Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), "removed", invert=True)
    inner.pre_tokenizer = parts.Sequence([words, parts.ByteLevel(add_prefix_space=False)])
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<s>", "</s>", "<pad>", "<mask>"],
        end_of_word_suffix="</w>",
        initial_alphabet=parts.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([*sentences(200), POLISH, POLISH], trainer)
    return write(folder, tokenizer=json.loads(inner.to_str()))


def characters(folder: Path) -> Path:
    """One token per character; the normalizer writes a blank as `_`, and the decoder reverts that."""
    letters = sorted(set("".join([*sentences(200), POLISH]).replace(" ", "_")))
    vocab = {token: number for number, token in enumerate([*SPECIALS, *letters])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    inner.normalizer = tokenizers.normalizers.Replace(" ", "_")
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    decoders = tokenizers.decoders
    inner.decoder = decoders.Sequence([decoders.Replace("_", " "), decoders.Fuse()])
    inner.add_special_tokens(SPECIALS)
    return write(folder, tokenizer=json.loads(inner.to_str()))


KINDS: list[Callable[[Path], Path]] = [
    trained,
    without_post_processor,
    only_an_end,
    word_pieces,
    word_pieces_of_transformers,
    vocab_and_merges,
    with_a_blank_in_front,
    with_added_tokens,
    with_an_added_tokens_decoder,
    with_added_tokens_beside,
    roberta_of_transformers,
    ends_of_words,
    beginnings_of_words,
    unigrams,
    clip,
    characters,
]


def framed(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode a text as a block of training and a line of `embed` are."""
    ids, _ = tokenizer.encode([text])
    return [tokenizer.specials.bos, *ids.tolist(), tokenizer.specials.eos]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_export_encodes_as_training_does(kind: Callable[[Path], Path], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = load_tokenizer(kind(tmp_path / "given"))
    (tmp_path / "export").mkdir()
    ours.save(tmp_path / "export", max_length=64)
    # beside the configuration of a model, as in an export
    transformers.Data2VecTextConfig(vocab_size=ours.vocab_size).save_pretrained(tmp_path / "export")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    for text in TEXTS:
        assert theirs(text)["input_ids"] == framed(ours, text), text
    specials = ours.specials
    first, second = framed(ours, TEXTS[0]), framed(ours, TEXTS[-1])
    # a pair as RoBERTa's: <s> a </s></s> b </s>
    assert theirs(TEXTS[0], TEXTS[-1])["input_ids"] == [*first, specials.eos, *second[1:]]
    assert (theirs.bos_token_id, theirs.cls_token_id) == (specials.bos, specials.bos)
    assert (theirs.eos_token_id, theirs.sep_token_id) == (specials.eos, specials.eos)
    assert (theirs.pad_token_id, theirs.mask_token_id, theirs.unk_token_id) == (
        specials.pad,
        specials.mask,
        specials.unk,
    )
    assert (theirs.model_max_length, theirs.padding_side, theirs.truncation_side) == (64, "right", "right")
    assert len(theirs) == ours.vocab_size
    batch = theirs(["the student reads", "a"], padding=True)
    assert batch.keys() == {"input_ids", "attention_mask"}
    assert batch["input_ids"][1][-1] == specials.pad
    cut = theirs("the student reads " * 40, truncation=True)["input_ids"]
    assert len(cut) == 64
    assert (cut[0], cut[-1]) == (specials.bos, specials.eos)
    # a mask in the text becomes one mask token
    hidden = theirs("the <mask> reads" if theirs.mask_token == "<mask>" else "the [MASK] reads")["input_ids"]
    assert hidden.count(specials.mask) == 1
    again = load_tokenizer(tmp_path / "export")
    assert (again.digest, again.specials) == (ours.digest, ours.specials)


@pytest.mark.parametrize(
    "kind",
    [with_a_blank_in_front, roberta_of_transformers, ends_of_words, word_pieces_of_transformers],
    ids=lambda kind: kind.__name__,
)
def test_given_files_are_read_as_transformers_reads_them(kind: Callable[[Path], Path], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = kind(tmp_path / "given")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    for text in TEXTS:
        assert theirs(text, add_special_tokens=False)["input_ids"] == framed(ours, text)[1:-1], text


def test_beginnings_of_words_are_encoded_as_llama_does(tmp_path: Path) -> None:
    """Transformers does not read these two files, but accepts their content."""
    transformers = pytest.importorskip("transformers")
    folder = beginnings_of_words(tmp_path / "given")
    merges = [tuple(line.split(" ")) for line in (folder / "merges.txt").read_text().split("\n")[1:-1]]
    theirs = transformers.LlamaTokenizer(vocab=json.loads((folder / "vocab.json").read_text()), merges=merges)
    for text in TEXTS:
        ids, _ = load_tokenizer(folder).encode([text])
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids.tolist(), text


def test_words_end_and_begin_with_marks(tmp_path: Path) -> None:
    herbert = load_tokenizer(ends_of_words(tmp_path / "a"))
    ids, _ = herbert.encode([POLISH])
    assert herbert.decode(ids) == "Zażółć gęślą jaźń , powiedział chłopiec do dziewczyny ."
    llama = load_tokenizer(beginnings_of_words(tmp_path / "b"))
    ids, _ = llama.encode([POLISH])
    # letters outside of its training text become bytes
    assert llama.decode(ids) == POLISH


@pytest.mark.parametrize("kind", [ends_of_words, beginnings_of_words], ids=lambda kind: kind.__name__)
def test_a_kind_that_no_file_names_is_refused(kind: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = kind(tmp_path / "given")
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(
        DataError, match=r"not byte-level: words (end with </w>|begin with ▁) .*writes a complete tokenizer.json"
    ):
        load_tokenizer(folder)
    # a model's configuration may name the kind, as HerBERT's does
    kind(folder)
    (folder / "tokenizer_config.json").rename(folder / "config.json")
    load_tokenizer(folder)


@pytest.mark.parametrize(
    ("vocab", "merges", "reason"),
    [
        (["Ġ", "a", "ż"], [], "the token 'ż' has a character that stands for no byte"),
        (["a", "b", "ab"], [["a", "b"]], "there is no token for a blank"),
        (["Ġ", "a", "語", "a語"], [["a", "語"]], "the token 'a語' has a character that stands for no byte"),
    ],
)
def test_letters_instead_of_bytes_are_refused(
    vocab: list[str], merges: list[list[str]], reason: str, tmp_path: Path
) -> None:
    ids = {token: number for number, token in enumerate([*SPECIALS, *vocab])}
    with pytest.raises(DataError, match=f"not byte-level: {reason}"):
        load_tokenizer(write(tmp_path, vocab=ids, merges=merges))


def test_other_byte_level_classes_and_lone_vocabularies_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"of the class Qwen2Tokenizer, which prepares text differently from GPT-2"):
        load_tokenizer(vocab_and_merges(tmp_path / "a", tokenizer_config={"tokenizer_class": "Qwen2TokenizerFast"}))
    (tmp_path / "vocab.txt").write_text("[PAD]\n")
    with pytest.raises(DataError, match=r"vocab\.txt cannot be read alone\. If Transformers reads it"):
        load_tokenizer(tmp_path)


def test_added_tokens_are_found_in_text(tmp_path: Path) -> None:
    ours = load_tokenizer(with_added_tokens(tmp_path / "a"))
    assert ours.vocab_size == 362
    ids, _ = ours.encode(["the student is naïve <mask>"])
    assert {360, 361} <= set(ids.tolist())
    # special tokens with a role are never matched in text
    assert ours.specials.mask not in ids
    with_decoder = load_tokenizer(with_an_added_tokens_decoder(tmp_path / "b"))
    ids, _ = with_decoder.encode(["the teacher"])
    assert ids[-1] == 360
    assert with_decoder.vocab_size == 361


def test_named_tokens_beside_a_tokenizer_are_found_in_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ours = load_tokenizer(with_added_tokens_beside(tmp_path / "a"))
    ids, _ = ours.encode(["the student"])
    assert ids[-1] == 360
    assert ours.vocab_size == 361
    assert not caplog.records
    (tmp_path / "a" / "special_tokens_map.json").write_text('{"additional_special_tokens": ["<none>"]}')
    load_tokenizer(tmp_path / "a")
    assert "names the token '<none>', which the tokenizer does not have" in caplog.text


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ({"<x>": 400}, r"the added token '<x>' must have the id 360, but has 400 instead"),
        ({"<x>": 3}, r"the added token '<x>' must have the id 360, but has 3 instead"),
        ({"<s>": 360}, r"added_tokens\.json: '<s>' must have an id >= 0, the vocabulary's .*, but has 360"),
        ({"<x>": "360"}, r"added_tokens\.json: '<x>' must have an id >= 0, .*, but has '360'"),
    ],
)
def test_added_tokens_that_cannot_be_numbered_so_are_refused(
    added: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        load_tokenizer(vocab_and_merges(tmp_path, added_tokens=added))
    content = saved(tmp_path)
    entry = {**content["added_tokens"][0], "content": "<x>", "id": 400}
    with pytest.raises(DataError, match=r"the added token '<x>' must have the id 360, but has 400 instead"):
        load_tokenizer(write(tmp_path, tokenizer={**content, "added_tokens": [*content["added_tokens"], entry]}))


def test_contradicting_normalization_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = json.loads((word_pieces(tmp_path) / "tokenizer.json").read_text())
    for lower, strips, settings, is_logged in (
        (True, None, {"do_lower_case": False}, True),
        (True, None, {"do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": True}, False),
        (True, None, {"strip_accents": True}, False),
        (False, None, {"do_lower_case": False, "strip_accents": True}, True),
    ):
        caplog.clear()
        normalizer = {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": strips,
            "lowercase": lower,
        }
        load_tokenizer(write(tmp_path, tokenizer={**content, "normalizer": normalizer}, tokenizer_config=settings))
        assert ("tokenizer_config.json sets" in caplog.text) == is_logged, (lower, strips, settings)


@pytest.mark.parametrize(("kind", "change"), [(word_pieces, {"unk_token": "[?]"}), (unigrams, {"unk_id": None})])
def test_a_text_that_cannot_be_encoded_is_named(
    kind: Callable[[Path], Path], change: dict[str, Any], tmp_path: Path
) -> None:
    folder = kind(tmp_path / "given")
    content = json.loads((folder / "tokenizer.json").read_text())
    tokenizer = load_tokenizer(write(folder, tokenizer={**content, "model": {**content["model"], **change}}))
    tokenizer.encode(["the student"])
    with pytest.raises(DataError, match=r"any text, but .*given.* does not: .*unk_id|any text.*Missing"):
        tokenizer.encode(["the ДОМ"])


def test_export_of_a_vocabulary_of_four_letters(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    vocab = {token: number for number, token in enumerate([*SPECIALS, *"ACGT"])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer = load_tokenizer(write(tmp_path, tokenizer=json.loads(inner.to_str())))
    tokenizer.save(tmp_path)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)("GATC")["input_ids"] == framed(tokenizer, "GATC")


def lossy(folder: Path) -> Path:
    """A byte-level tokenizer whose vocabulary lacks blanks and all letters that are not ASCII."""
    content = saved(folder)
    model = json.loads((ends_of_words(folder) / "vocab.json").read_text())
    inner = {**content["model"], "vocab": model, "merges": []}
    added = [{**entry, "id": model[entry["content"]]} for entry in content["added_tokens"]]
    return write(folder, tokenizer={**content, "model": inner, "added_tokens": added})


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_lossless_tokenizers_are_not_reported(kind: Callable[[Path], Path], tmp_path: Path) -> None:
    found = RoundTrip().add(load_tokenizer(kind(tmp_path / "given")), sentences(100))
    assert found.problem("it") is None, found.to_dict()
    assert found.num_characters > 1000


@pytest.mark.parametrize(
    ("kind", "text", "example"),
    [
        (lossy, POLISH, "'Zażółć' becomes 'Za'"),
        (lossy, "a b c d", "'a b c d' becomes 'abcd'"),
        (word_pieces, "你好 the student", "'你好' becomes '你'"),
        (unigrams, "the ДОМ", "'ДОМ' becomes ''"),
    ],
)
def test_lost_characters_are_reported(
    kind: Callable[[Path], Path], text: str, example: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = load_tokenizer(kind(tmp_path / "given"))
    (tmp_path / "a.txt").write_text(text)
    for _ in range(2):
        # both when it is tokenized and when the tokens exist
        caplog.clear()
        tokenized(TextFiles(config(tmp_path / "a.txt")), tokenizer, str(tmp_path / "cache"))
        assert "% of the characters of this text" in caplog.text
        assert example in caplog.text


def test_a_rare_loss_is_not_reported() -> None:
    found = RoundTrip()
    found.num_characters, found.num_lost, found.example = 1000, 10, ("é", "")
    assert found.problem("it") is None
    found.num_lost = 11
    assert found.problem("it") is not None
    assert RoundTrip.from_dict(json.loads(json.dumps(found.to_dict()))).problem("it") == found.problem("it")
    assert np.isclose(found.num_lost / found.num_characters, 0.011)
