"""Tokenizers: reading in every form, training, digests, and writing for Transformers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2v_fast.commands.console import main
from d2v_fast.errors import DataError
from d2v_fast.modalities.text.config import TextModelConfig
from d2v_fast.modalities.text.tasks import make_tokenizer
from d2v_fast.modalities.text.tokenizer import MIN_VOCAB_SIZE, Specials, Tokenizer, load_tokenizer, train_tokenizer
from tests.helpers.runs import fork, wait
from tests.helpers.text_files import config, sentences, small_tokenizer
from tests.helpers.tokenizer_folders import word_piece

pytest.importorskip("tokenizers")

TEXTS = ["", "a", "the student reads", "  two  blanks\n\nand lines ", "naïve 你好 \U0001f600", "x" * 3000, "\0\x7f"]


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    ids, lengths = tokenizer.encode([text])
    assert lengths.tolist() == [len(ids)]
    return ids.tolist()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small_tokenizer().save(tmp_path)
    return tmp_path


def write_vocab_and_merges(folder: Path, to: Path) -> Path:
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    to.mkdir()
    (to / "vocab.json").write_text(json.dumps(model["vocab"]))
    (to / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, model["merges"]), ""]))
    return to


def edit(folder: Path, change) -> Path:
    """Change the content of tokenizer.json."""
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def test_trained_one_has_the_places_of_roberta() -> None:
    tokenizer = small_tokenizer()
    assert tokenizer.specials == Specials(bos=0, pad=1, eos=2, unk=3, mask=359)
    assert tokenizer.specials.ids == (0, 1, 2, 3, 359)
    assert tokenizer.vocab_size == 360
    assert tokenizer.dtype == np.uint16
    ids, lengths = tokenizer.encode(TEXTS)
    assert ids.dtype == np.uint16
    assert lengths.tolist() == [len(encode(tokenizer, text)) for text in TEXTS]
    # byte-level: nothing is unknown or lost
    assert not np.isin(ids, tokenizer.specials.ids).any()
    for text, part in zip(TEXTS, np.split(ids, np.cumsum(lengths)[:-1]), strict=True):
        assert tokenizer.decode(part) == text


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(text: str) -> None:
    ids = encode(small_tokenizer(), text)
    assert small_tokenizer().decode(ids) == text
    assert not set(ids) & set(small_tokenizer().specials.ids)


@pytest.mark.parametrize("text", ["<mask>", "a <mask> b", "</s><s>", "<pad>", "<unk>", "<s>the student</s>"])
def test_text_that_spells_a_special_token_is_text(text: str) -> None:
    ids = encode(small_tokenizer(), text)
    assert not set(ids) & set(small_tokenizer().specials.ids)
    assert small_tokenizer().decode(ids) == text


def test_training_depends_on_text_and_size_alone() -> None:
    # test_data_text.py covers other numbers of threads
    assert train_tokenizer(iter(sentences(300)), 360).digest == small_tokenizer().digest
    assert train_tokenizer(sentences(300), 361).digest != small_tokenizer().digest
    assert train_tokenizer(sentences(299), 360).digest != small_tokenizer().digest


def test_training_without_enough_text() -> None:
    few = train_tokenizer(["ab ab", "ab"], 5000)
    assert few.vocab_size < 300
    assert few.specials.mask == few.vocab_size - 1
    with pytest.raises(ValueError, match=f"`vocab_size` must be >= {MIN_VOCAB_SIZE}, but is 260 instead"):
        train_tokenizer(["a"], 260)
    assert train_tokenizer(["a"], MIN_VOCAB_SIZE).vocab_size == MIN_VOCAB_SIZE


def test_a_vocabulary_smaller_than_asked_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "the student reads, the student writes"}\n{"text": 7}\n')
    train = ["tokenize", str(tmp_path / "a.jsonl"), "--train", "--set", "d2v.data.max_bad_fraction=1", "--to"]
    assert main([*train, str(tmp_path / "few"), "--vocab-size", "9000"]) == 0
    found = load_tokenizer(tmp_path / "few").vocab_size
    assert MIN_VOCAB_SIZE < found < 300
    said = capsys.readouterr().out
    assert f"it has {found} tokens instead of 9,000: no further pair of tokens occurs twice" in said
    assert "left out 1 unreadable of 2 files, lines and rows" in caplog.text
    assert main([*train, str(tmp_path / "all"), "--vocab-size", str(found)]) == 0
    assert "instead of" not in capsys.readouterr().out


def test_every_form_is_the_same_tokenizer(folder: Path, tmp_path: Path) -> None:
    forms = [folder, folder / "tokenizer.json", write_vocab_and_merges(folder, tmp_path / "forms")]
    for form in forms:
        tokenizer = load_tokenizer(form)
        assert tokenizer.digest == small_tokenizer().digest
        assert tokenizer.specials == small_tokenizer().specials
        assert [encode(tokenizer, text) for text in TEXTS] == [encode(small_tokenizer(), text) for text in TEXTS]
        assert str(form) in tokenizer.name


def test_digest_is_of_what_decides_the_ids(folder: Path) -> None:
    def loaded(change) -> str:
        small_tokenizer().save(folder)
        return load_tokenizer(edit(folder, change)).digest

    same = small_tokenizer().digest
    assert loaded(lambda content: None) == same
    assert loaded(lambda content: content.update(post_processor=None, decoder=None)) == same
    assert loaded(lambda content: content.update(truncation=None)) == same
    assert loaded(lambda content: content["pre_tokenizer"].update(add_prefix_space=True)) != same
    assert loaded(lambda content: content.update(normalizer={"type": "Lowercase"})) != same
    assert loaded(lambda content: content["model"]["merges"].pop()) != same


def test_nothing_is_truncated_padded_or_drawn(folder: Path) -> None:
    def change(content: dict) -> None:
        content["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
        content["padding"] = {
            "strategy": {"Fixed": 64},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 1,
            "pad_type_id": 0,
            "pad_token": "<pad>",
        }
        content["model"]["dropout"] = 0.9

    tokenizer = load_tokenizer(edit(folder, change))
    for text in TEXTS:
        assert encode(tokenizer, text) == encode(small_tokenizer(), text)


def test_word_pieces(tmp_path: Path) -> None:
    (tmp_path / "bert.json").write_text(json.dumps(word_piece()))
    tokenizer = load_tokenizer(tmp_path / "bert.json")
    assert tokenizer.specials == Specials(bos=6, pad=1, eos=7, unk=5, mask=8)
    # the unknown token stays, and text never becomes a mask
    assert encode(tokenizer, "The student zzz") == [2, 3, 4, 5]
    assert 8 not in encode(tokenizer, "the [MASK] student [SEP]")


def test_names_of_special_tokens_beside_the_tokenizer(tmp_path: Path) -> None:
    content = word_piece(mask="<hidden>", cls="<begin>")
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"has no begin token \(<s> or \[CLS\]\), no mask token \(<mask> or \[MASK\]\)"):
        load_tokenizer(tmp_path)
    names = {"mask_token": {"content": "<hidden>", "lstrip": True}, "cls_token": "<begin>", "extra": 3}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names))
    assert load_tokenizer(tmp_path).specials == Specials(bos=6, pad=1, eos=7, unk=5, mask=8)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({**names, "mask_token": "<other>"}))
    with pytest.raises(DataError, match=r"has no mask token \(<other>\)"):
        load_tokenizer(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({**names, "pad_token": "[SEP]"}))
    with pytest.raises(DataError, match=r"must have a separate padding token, .* also uses '\[SEP\]' as end token"):
        load_tokenizer(tmp_path)


def test_transformers_reads_it(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = small_tokenizer()
    specials = Specials(
        theirs.bos_token_id, theirs.pad_token_id, theirs.eos_token_id, theirs.unk_token_id, theirs.mask_token_id
    )
    assert specials == ours.specials
    assert (theirs.cls_token_id, theirs.sep_token_id, theirs.model_max_length) == (0, 2, 512)
    for text in TEXTS:
        assert theirs(text)["input_ids"] == [0, *encode(ours, text), 2]
    # Transformers does match a mask in the text
    assert theirs("the <mask> reads")["input_ids"].count(ours.specials.mask) == 1
    # beside a model's configuration, whose default tokenizer is another class
    transformers.Data2VecTextConfig(vocab_size=360).save_pretrained(folder)
    assert transformers.AutoTokenizer.from_pretrained(folder)("the student")["input_ids"] == [
        0,
        *encode(ours, "the student"),
        2,
    ]
    with_theirs = transformers.RobertaTokenizerFast.from_pretrained(write_vocab_and_merges(folder, folder / "roberta"))
    assert with_theirs("the student")["input_ids"] == [0, *encode(ours, "the student"), 2]


def test_saved_again_it_is_the_same(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    load_tokenizer(folder).save(tmp_path / "again", max_length=64)
    assert load_tokenizer(tmp_path / "again").digest == small_tokenizer().digest
    assert json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())["model_max_length"] == 64


def test_other_tokenizer_and_small_vocabulary_are_refused() -> None:
    tokenizer = small_tokenizer()
    tokenizer.require(tokenizer.digest, "runs/a")
    with pytest.raises(
        DataError, match=r"must be the tokenizer that runs/a was trained with \(digest 00ff.*its ids stand"
    ):
        tokenizer.require("00ff" * 16, "runs/a")
    tokenizer.fit(TextModelConfig())
    tokenizer.fit(TextModelConfig(vocab_size=360, padding_id=1))
    with pytest.raises(DataError, match=r"`d2v.model.vocab_size` must be >= 360, .*but is 359 instead"):
        tokenizer.fit(TextModelConfig(vocab_size=359))
    with pytest.raises(DataError, match=r"`d2v.model.padding_id` must be 1, the padding token of .*, but is 0 instead"):
        tokenizer.fit(TextModelConfig(vocab_size=360, padding_id=0))


def test_large_vocabulary_takes_four_bytes(folder: Path) -> None:
    def change(content: dict) -> None:
        for number in range(360, 70_000):
            content["model"]["vocab"][f"word{number}"] = number

    assert load_tokenizer(edit(folder, change)).dtype == np.uint32


def test_made_from_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(sentences(300)))
    made = make_tokenizer(config(tmp_path / "a.txt"), 360, tmp_path / "made", max_length=128)
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "made"]
    assert load_tokenizer(tmp_path / "made").digest == made.digest
    assert made.vocab_size == 360
    with pytest.raises(DataError, match=r"must not exist, but '.*made' does"):
        make_tokenizer(config(tmp_path / "a.txt"), 360, tmp_path / "made")
    # a failed training leaves nothing behind
    (tmp_path / "b.txt").write_bytes(b"\0\1")
    with pytest.raises(DataError, match="unreadable"):
        make_tokenizer(config(tmp_path / "b.txt", strict=True), 360, tmp_path / "other")
    with pytest.raises(DataError, match=r"none of 1 files .* has any"):
        make_tokenizer(config(tmp_path / "b.txt"), 360, tmp_path / "other")
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "b.txt", "made"]


def test_forked_process_encodes_and_trains(tmp_path: Path) -> None:
    """A process forked after the library used its threads does not have them."""
    tokenizer = small_tokenizer()
    tokenizer.encode(TEXTS * 100)

    def again() -> int:
        tokenizer.encode(TEXTS * 100)
        return 0 if train_tokenizer(sentences(300), 360).vocab_size == tokenizer.vocab_size else 1

    assert wait(fork(again, tmp_path / "output"), timeout_s=60) == [0]
