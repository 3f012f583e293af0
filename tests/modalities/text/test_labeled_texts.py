"""Labeled texts and pairs as batches: tokens as RoBERTa's, targets, held-out shares, and errors in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from d2v_fast.config import ConfigError, check_d2v
from d2v_fast.data.once import reading_once
from d2v_fast.data.order import MicroStep
from d2v_fast.errors import DataError
from d2v_fast.modalities.text import labeled_tokens
from d2v_fast.modalities.text.config_finetune import TextFinetuneConfig
from d2v_fast.modalities.text.labeled import batch_of, held_out_batches, labeled_batches, resolved
from d2v_fast.modalities.text.labeled_tokens import frame, shares
from d2v_fast.modalities.text.tables import Table
from tests.helpers.text_files import sentences, small_tokenizer

pytest.importorskip("tokenizers")

MODEL = {"vocab_size": 360, "padding_id": 1, "max_positions": 32, "width": 16, "depth": 2, "heads": 2}


def section(folder: Path, objective: str = "classify", **changes: Any) -> TextFinetuneConfig:
    """A section whose data are `train.tsv`; `changes` are of the section `data`, or `valid` and `labels`."""
    if not (folder / "tokenizer").exists():
        (folder / "tokenizer").mkdir()
        small_tokenizer().save(folder / "tokenizer")
    own = {key: changes.pop(key) for key in ("valid", "labels") if key in changes}
    data = {"path": str(folder / "train.tsv"), "block_size": 32, "num_workers": 0}
    raw = {"modality": "text", "objective": objective, "model": MODEL, "schedule": {"steps": 4}}
    raw["data"] = {**data, "tokenizer": str(folder / "tokenizer"), **changes}
    config, problems = check_d2v({**raw, **own})
    if config is None:
        raise ConfigError(problems)
    assert isinstance(config, TextFinetuneConfig)
    return config


def write(folder: Path, rows: list[tuple[Any, ...]], header: str, name: str = "train.tsv") -> Path:
    lines = [header, *("\t".join(map(str, row)) for row in rows)]
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder / name


def labeled(folder: Path, classes: str = "abab" * 5, name: str = "train.tsv") -> list[str]:
    texts = sentences(len(classes), seed=3)
    write(folder, list(zip(texts, classes, strict=True)), "text\tlabel", name)
    return texts


def all_of(maker: Any) -> Any:
    ids = np.arange(maker.num_samples)
    return maker.make(MicroStep(0, ids, ids), 0).batch


@pytest.mark.parametrize("most", [9, 10, 31])
def test_a_pair_is_cut_as_tokenizers_cut_it(most: int) -> None:
    tokenizer = small_tokenizer()
    inner = type(tokenizer._inner).from_str(tokenizer._inner.to_str())
    inner.enable_truncation(most, strategy="longest_first")
    texts = ["the student", "what the teacher made of all of it", "hidden once", "é"]
    firsts, seconds = zip(*((one, other) for one in texts for other in texts), strict=True)
    for pairs in (seconds, None):
        framed = frame(tokenizer, firsts, pairs, most)
        given = list(firsts) if pairs is None else list(zip(firsts, pairs, strict=True))
        assert [row.tolist() for row in framed.rows] == [found.ids for found in inner.encode_batch(given)]
    plain = type(inner).from_str(tokenizer._inner.to_str())
    lengths = [len(found.ids) for found in plain.encode_batch(list(zip(firsts, seconds, strict=True)))]
    assert frame(tokenizer, firsts, seconds, most).num_cut == sum(length > most for length in lengths)


def test_shares_of_a_pair() -> None:
    assert [shares(*lengths, 8) for lengths in ((3, 5), (9, 2), (2, 9), (9, 9), (9, 5), (0, 9))] == [
        *((3, 5), (6, 2), (2, 6), (4, 4), (4, 4), (0, 8)),
    ]
    assert [shares(*lengths, 7) for lengths in ((9, 9), (9, 5), (5, 9))] == [(3, 4), (4, 3), (3, 4)]


def test_batches_hold_tokens_and_classes(tmp_path: Path) -> None:
    texts = labeled(tmp_path, "ynynyynnyy")
    config = resolved(section(tmp_path, valid={"fraction": 0.2}))
    assert config.labels == ("n", "y")
    train, held = labeled_batches(config), held_out_batches(config)
    assert (train.num_samples, held.num_samples) == (8, 2)
    assert sorted(held.targets) == [0, 1]
    batch = all_of(train)
    assert (train.lengths == (batch.inputs != 1).sum(1).numpy()).all()
    assert batch.targets.dtype == torch.int64
    found = {
        tuple(row[row != 1].tolist()): label
        for part in (batch, all_of(held))
        for row, label in zip(part.inputs, part.targets.tolist(), strict=True)
    }
    framed = frame(small_tokenizer(), texts, None, 32).rows
    assert [found[tuple(row.tolist())] for row in framed] == [int(letter == "y") for letter in "ynynyynnyy"]
    # as predictions read them
    alone = batch_of(config, [torch.from_numpy(row) for row in framed])
    assert alone.targets is None
    assert [row[row != 1].tolist() for row in alone.inputs] == [row.tolist() for row in framed]


def test_scores_of_pairs(tmp_path: Path) -> None:
    texts = sentences(6, seed=4)
    rows = [(one, other, number / 2) for number, (one, other) in enumerate(zip(texts, texts[::-1], strict=True))]
    write(tmp_path, rows, "sentence1\tsentence2\tscore")
    fields = {"field": "sentence1", "pair_field": "sentence2", "label_field": "score"}
    valid = {"path": str(tmp_path / "train.tsv"), "metric": "mse"}
    config = resolved(section(tmp_path, "regress", **fields, valid=valid))
    assert config.labels is None
    batch = all_of(held_out_batches(config))
    assert batch.targets.tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
    assert batch.targets.dtype == torch.float32
    expected = frame(small_tokenizer(), texts, texts[::-1], 32).rows
    assert [row[row != 1].tolist() for row in batch.inputs] == [row.tolist() for row in expected]
    assert labeled_batches(config).what == "pair"


def test_few_labels(tmp_path: Path) -> None:
    labeled(tmp_path)
    labeled(tmp_path, "ab", "valid.tsv")
    path = str(tmp_path / "valid.tsv")
    one, two = (
        labeled_batches(resolved(section(tmp_path, labels_per_class=number, valid={"path": path}))) for number in (1, 2)
    )
    assert (one.num_samples, two.num_samples) == (2, 4)
    assert set(one._positions.tolist()) < set(two._positions.tolist())


def test_a_table_is_tokenized_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labeled(tmp_path)
    read: list[str] = []

    def table(path: str, *others: Any, **options: Any) -> Table:
        read.append(path)
        return Table(path, *others, **options)

    monkeypatch.setattr(labeled_tokens, "Table", table)
    with reading_once():
        config = resolved(section(tmp_path))
        assert (labeled_batches(config).num_samples, held_out_batches(config).num_samples) == (18, 2)
    assert len(read) == 1
    # the file may have changed since
    resolved(section(tmp_path))
    assert len(read) == 2


def test_scores_are_judged_by_pearson(tmp_path: Path) -> None:
    assert section(tmp_path, "regress", kind="table", valid={"every_epochs": 2}).valid.metric == "pearson"


def test_errors_name_what_is_wrong(tmp_path: Path) -> None:
    labeled(tmp_path, "aaaa")
    with pytest.raises(DataError, match=r"at least 2 classes in `d2v.data.label_field` \('label'\), but holds 1"):
        resolved(section(tmp_path))
    labeled(tmp_path, "ababab")
    labeled(tmp_path, "abc", "valid.tsv")
    valid = {"path": str(tmp_path / "valid.tsv")}
    with pytest.raises(DataError, match=r'`d2v.valid.path` must hold samples of the classes .*has some of "c"'):
        held_out_batches(resolved(section(tmp_path, valid=valid)))
    with pytest.raises(DataError, match=r'none of "z"'):
        labeled_batches(section(tmp_path, labels=["a", "b", "z"], valid=valid))
    write(tmp_path, [], "text\tlabel", "valid.tsv")
    with pytest.raises(DataError, match=r"`d2v.valid.path` must hold labeled texts, but .*valid.tsv' has none"):
        held_out_batches(resolved(section(tmp_path, valid=valid)))
    write(tmp_path, [("one text", 1.5), ("more", "much")], "text\tlabel")
    with pytest.raises(DataError, match=r"(?s)1 of 2 rows of .* are unreadable.*line 3: the label 'label' holds much"):
        labeled_batches(section(tmp_path, "regress", max_bad_fraction=0.0, valid={"metric": "mse"}))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"kind": "docs"}, r"(?s)`d2v.data.path` must be null with `kind` \"docs\".*add `--set d2v.data.kind=table`"),
        ({"path": None}, r"`d2v.data.path` must be a file with `kind` \"table\""),
        ({"field": "label"}, r"`d2v.data.field` must be another column"),
        ({"columns": ["text", "text", "label"]}, r"`d2v.data.columns` must name the column \"text\" once"),
        ({"block_size": 64}, r"`d2v.data.block_size` must be <= `d2v.model.max_positions` \(32\)"),
        ({"valid": {"metric": "pearson"}}, r"`d2v.valid.metric` must be"),
    ],
)
def test_wrong_sections_are_refused(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        section(tmp_path, **changes)


def test_scores_have_no_classes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`d2v.labels` must be null with `objective` \"regress\""):
        section(tmp_path, "regress", labels=["a", "b"])
