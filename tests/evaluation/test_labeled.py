"""A user's labeled data: the choice of samples, their split, and the report about the rest."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from d2v_fast.config import check_d2v
from d2v_fast.data.labels import LabeledSample, choose, labeled_files, split
from d2v_fast.errors import DataError
from d2v_fast.modalities.text.labels import labeled_texts
from d2v_fast.modalities.vision.images import KINDS
from tests.helpers.runs import TINY_TEXT

KEY = "`d2v.probe.path`"


def samples_of(counts: dict[str, int]) -> list[LabeledSample]:
    return [LabeledSample(f"{label}/{i}", label) for label, count in counts.items() for i in range(count)]


def chosen(samples: list[LabeledSample], max_samples: int) -> tuple[list[LabeledSample], tuple[str, ...]]:
    samples, _, notes = choose(samples, max_samples, "images", KEY, "/data", "A class is a sub-folder.")
    return samples, notes


@pytest.mark.parametrize(
    ("counts", "max_samples", "expected"),
    [
        ({"a": 5, "b": 7}, 100, {"a": 5, "b": 7}),
        ({"a": 500, "b": 900}, 100, {"a": 50, "b": 50}),
        ({"a": 3, "b": 900, "c": 400}, 100, {"a": 3, "b": 48, "c": 48}),
        ({"a": 2, "b": 2}, 4, {"a": 2, "b": 2}),
    ],
)
def test_classes_share_the_samples(counts: dict[str, int], max_samples: int, expected: dict[str, int]) -> None:
    found, notes = chosen(samples_of(counts), max_samples)
    assert {label: sum(s.label == label for s in found) for label in counts} == expected
    assert notes == ()
    assert len(set(found)) == len(found)


def test_choice_depends_on_names_only() -> None:
    samples = samples_of({"a": 300, "b": 200})
    found, _ = chosen(samples, 50)
    order = np.random.default_rng(0).permutation(len(samples))
    assert chosen([samples[i] for i in order], 50)[0] == found
    # a tenth more samples change about a tenth of the choice
    more, _ = chosen([*samples, *(LabeledSample(f"a/new{i}", "a") for i in range(30))], 50)
    assert len(set(more) & set(found)) >= 40
    assert [s.name for s in found if s.label == "a"] != sorted(s.name for s in found if s.label == "a")


def test_too_few_and_too_many_classes() -> None:
    found, notes = chosen(samples_of({"a": 5, "rare": 1, "b": 2}), 100)
    assert {s.label for s in found} == {"a", "b"}
    assert notes == ("left out: 1 class with fewer than 2 images (rare)",)
    with pytest.raises(
        DataError, match=r"at least 2 classes of 2 or more images, but '/data' has 2 classes: a \(5\), b"
    ):
        chosen(samples_of({"a": 5, "b": 1}), 100)
    with pytest.raises(DataError, match=r"has 0 classes\. A class is a sub-folder"):
        chosen([], 100)
    with pytest.raises(DataError, match=r"at most 1,000 classes.*Are these labels\?"):
        chosen(samples_of(dict.fromkeys(map(str, range(1001)), 1)), 100)
    with pytest.raises(DataError, match=r"`d2v.probe.max_samples` must be >= 12"):
        chosen(samples_of(dict.fromkeys("abcdef", 9)), 11)


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.99])
def test_every_class_has_samples_on_both_sides(fraction: float) -> None:
    labels = np.repeat(np.arange(3), [2, 10, 50])
    train, test = split(labels, fraction)
    assert sorted([*train, *test]) == list(range(62))
    for part in (train, test):
        assert set(labels[part]) == {0, 1, 2}
    if fraction == 0.2:
        assert np.bincount(labels[test]).tolist() == [1, 2, 10]


def test_equal_texts_lie_on_one_side() -> None:
    """Copies would be told by heart."""
    texts = [LabeledSample("t", "ab"[i % 2], f"text {i // 20}, {i % 2}") for i in range(400)]
    found, _ = chosen(texts, 400)
    train, test = split(np.array([s.label == "b" for s in found]).astype(np.int64), 0.25)
    on_both = {found[i].text for i in train} & {found[i].text for i in test}
    # at most the one text of each class that the border divides
    assert len(on_both) <= 2


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def test_folders_are_classes(tmp_path: Path) -> None:
    make(
        tmp_path, "cat/1.png", "cat/deep/er/2.jpg", "dog/1.png", "dog/2.png", "loose.png", "dog/notes.doc", "cat/a.raw"
    )
    found = labeled_files(str(tmp_path), KINDS, 100, follow_outside=False)
    assert sorted(s[:2] for s in found.samples) == [
        ("cat/1.png", "cat"),
        ("cat/deep/er/2.jpg", "cat"),
        ("dog/1.png", "dog"),
        ("dog/2.png", "dog"),
    ]
    said = "\n".join(found.describe("image"))
    assert f"4 images in 2 classes in '{tmp_path}'" in said
    assert "left out: 1 file in no sub-folder" in said
    assert "not data: 1 other file (1 .doc)" in said


def test_parts_of_a_data_set_are_no_classes(tmp_path: Path) -> None:
    make(tmp_path, *(f"{part}/{name}/{i}.png" for part in ("train", "Val") for name in ("cat", "dog") for i in (1, 2)))
    with pytest.raises(DataError, match=r"look like splits of a data set\. Name one of them, such as '.*/Val'"):
        labeled_files(str(tmp_path), KINDS, 100, follow_outside=False)
    found = labeled_files(str(tmp_path / "train"), KINDS, 100, follow_outside=False)
    assert {s.label for s in found.samples} == {"cat", "dog"}
    with pytest.raises(DataError, match=r"`--data` must be a folder, but '.*nowhere' does not exist"):
        labeled_files(str(tmp_path / "nowhere"), KINDS, 100, follow_outside=False, key="`--data`")


def texts_of(path: Path, **probe: object):
    raw = {**TINY_TEXT["d2v"], "probe": {"path": str(path), **probe}}
    config, problems = check_d2v(raw)
    assert config is not None, problems
    return labeled_texts(config.data, config.probe)  # type: ignore[arg-type]


def test_rows_of_json_lines(tmp_path: Path) -> None:
    """Labels are words, whole numbers, or true and false; rows without one are counted."""
    path = tmp_path / "a.jsonl"
    rows = [
        {"body": "one", "id": 12345678901234567890123, "class": 1},
        {"body": "two", "class": 1.0},
        {"body": "three", "class": "1"},
        {"body": "four", "class": True},
        {"body": "five", "class": True},
        {"body": "six"},
        {"body": "seven", "class": None},
        {"body": "eight", "class": " "},
        {"class": 1},
        {"body": "", "class": 1},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "no json\n")
    found = texts_of(path, field="body", label_field="class")
    assert sorted((s.text, s.label) for s in found.samples) == [
        ("five", "True"),
        ("four", "True"),
        ("one", "1"),
        ("three", "1"),
        ("two", "1"),
    ]
    said = "\n".join(found.notes)
    assert "left out: 5 texts that cannot be read or have no label" in said
    assert "no field 'class' (`d2v.probe.label_field`); it has 'body'" in said
    assert "left out: 1 text without letters" in said
    with pytest.raises(DataError, match=r"no field 'label' \(`d2v.probe.label_field`\); it has 'body', 'id', 'class'"):
        texts_of(path, field="body")


def test_rows_of_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow.parquet")
    import pyarrow as arrow

    table = {"text": [f"text {i}" for i in range(9)], "label": [0, 1, 2, 0, 1, 2, 0, 1, None], "more": [b"x"] * 9}
    arrow.parquet.write_table(arrow.table(table), str(tmp_path / "a.parquet"))
    names = arrow.array(["neg", "pos"] * 2).dictionary_encode()
    arrow.parquet.write_table(arrow.table({"text": ["a", "b", "c", "d"], "label": names}), str(tmp_path / "b.parquet"))
    found = texts_of(tmp_path)
    labels = [s.label for s in found.samples]
    assert {label: labels.count(label) for label in labels} == {"0": 3, "1": 3, "2": 2, "neg": 2, "pos": 2}
    assert "left out: 1 text that cannot" in "\n".join(found.notes)
    with pytest.raises(DataError, match=r"must be another field than that of the text, but both are 'text'"):
        texts_of(tmp_path, label_field="text")


def test_text_files_in_folders(tmp_path: Path) -> None:
    for name in ("pos/1.txt", "pos/2.txt", "neg/1.txt", "neg/sub/2.txt", "loose.txt"):
        make(tmp_path, name)
        (tmp_path / name).write_text(f"the text of {name}\n\nand more of it")
    found = texts_of(tmp_path)
    assert sorted(s.label for s in found.samples) == ["neg", "neg", "pos", "pos"]
    assert any(s.text == "the text of neg/sub/2.txt\n\nand more of it" for s in found.samples)
    assert "left out: 1 .txt file in no sub-folder" in "\n".join(found.notes)


def test_memory_is_bounded() -> None:
    """No more samples are held than twice what is asked for."""
    from d2v_fast.data.labels import _Kept

    kept = _Kept[int](10)
    for i in range(1000):
        kept.add("ab"[i % 2], (i * 7919) % 1000, i)
        assert kept._num_held <= 21
    lowest = {label: sorted((i * 7919) % 1000 for i in range(n, 1000, 2))[:5] for n, label in enumerate("ab")}
    assert [(i * 7919) % 1000 for i in kept.samples()] == [*lowest["a"], *lowest["b"]]


def test_a_single_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "one text", "label": "a"}\n' * 4)
    with pytest.raises(DataError, match=r"rows\.jsonl' has 1 class: a \(4\)"):
        texts_of(tmp_path / "rows.jsonl")
