"""Packing of documents, blocks of a data set, and the sample set."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2v_fast.data import cache
from d2v_fast.errors import DataError
from d2v_fast.masking import token_mask_rows
from d2v_fast.modalities.text import reference_pages
from d2v_fast.modalities.text.config import TextDataConfig, TextModelConfig
from d2v_fast.modalities.text.packing import pack
from d2v_fast.modalities.text.reference_pages import DocsSource, docs_for_probe, docs_tokenizer
from d2v_fast.modalities.text.tasks import TextDataset
from tests.helpers.places import ROOT
from tests.helpers.text_files import sentences, small_tokenizer

pytest.importorskip("tokenizers")

BOS, EOS = -1, -2
MODEL = TextModelConfig(vocab_size=1000, max_positions=128, width=32, depth=2, heads=2)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The cache folder of the sample set, shared by all tests."""
    return str(tmp_path_factory.mktemp("tokens"))


def docs_config(root: str, **options: object) -> TextDataConfig:
    return TextDataConfig.model_validate({"tokens_path": root, "block_size": 128, **options})


def dataset(folder: Path, **options: object) -> TextDataset:
    """Return the data set of a folder, with its tokenizer and tokens beside it."""
    tokenizer = folder.parent / "tokenizer"
    if not tokenizer.exists():
        tokenizer.mkdir()
        small_tokenizer().save(tokenizer)
    more = {"path": str(folder), "tokenizer": str(tokenizer), "tokens_path": str(folder.parent / "tokens")}
    data = TextDataConfig.model_validate({"kind": "text", "block_size": 64, **more, **options})
    return TextDataset(data, MODEL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two hundred documents of up to about sixty tokens, and one of thousands."""
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_text("\n".join(sentences(100)), encoding="utf-8")
    (folder / "b.txt").write_text(" ".join(sentences(60, seed=1)) + "\n", encoding="utf-8")
    (folder / "c.txt").write_text("\n".join(sentences(100, seed=2)), encoding="utf-8")
    return folder


def packed(lengths: list[int], block_size: int, whole: bool, separate: bool) -> list[list[list[int]]]:
    """Return the segments of each block, for documents whose tokens are numbered consecutively."""
    blocks = pack(np.array(lengths), block_size, whole=whole, separate=separate)
    found = []
    for i in range(len(blocks)):
        part = blocks.part(i)
        row = np.full(block_size + 1, -9)
        tokens = np.arange(part.start, part.stop)
        segments = blocks.fill(row, part, tokens, BOS, EOS, separate)
        assert segments.sum() == blocks.lengths[i]
        assert (row[blocks.lengths[i] :] == -9).all()
        found.append([part.tolist() for part in np.split(row[: blocks.lengths[i]], np.cumsum(segments)[:-1])])
    return found


def test_packing_by_hand() -> None:
    lengths = [2, 3, 9, 1]
    assert packed(lengths, 8, whole=True, separate=False) == [
        [[BOS, 0, 1, EOS], [2, 3, 4, EOS]],
        [[BOS, 5, 6, 7, 8, 9, 10, 11]],
        [[BOS, 12, 13, EOS], [14, EOS]],
    ]
    assert packed(lengths, 8, whole=True, separate=True) == [
        [[BOS, 0, 1, EOS]],
        [[BOS, 2, 3, 4, EOS]],
        [[BOS, 5, 6, 7, 8, 9, 10, 11]],
        [[BOS, 12, 13, EOS], [BOS, 14, EOS]],
    ]
    assert packed(lengths, 8, whole=False, separate=False) == [
        [[BOS, 0, 1, EOS], [2, 3, 4, EOS]],
        [[BOS, 5, 6, 7, 8, 9, 10, 11]],
        [[BOS, 12, 13, EOS], [14, EOS]],
    ]
    assert packed(lengths, 6, whole=False, separate=False) == [
        [[BOS, 0, 1, EOS], [2, 3]],
        [[BOS, 4, EOS], [5, 6, 7]],
        [[BOS, 8, 9, 10, 11, 12]],
        [[BOS, 13, EOS], [14, EOS]],
    ]
    # no block ends with a lone begin token
    assert packed(lengths, 5, whole=False, separate=True) == [
        [[BOS, 0, 1, EOS]],
        [[BOS, 2, 3, 4, EOS]],
        [[BOS, 5, 6, 7, 8]],
        [[BOS, 9, 10, 11, 12]],
        [[BOS, 13, EOS], [BOS, 14]],
        [[BOS, EOS]],
    ]


@settings(max_examples=300, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    block_size=st.integers(3, 30),
    whole=st.booleans(),
    separate=st.booleans(),
)
def test_packing_loses_nothing(lengths: list[int], block_size: int, whole: bool, separate: bool) -> None:
    blocks = packed(lengths, block_size, whole, separate)
    ends = np.cumsum(lengths).tolist()
    sizes = [sum(map(len, block)) for block in blocks]
    assert max(sizes) <= block_size
    flat = [token for block in blocks for segment in block for token in segment]
    assert [token for token in flat if token >= 0] == list(range(ends[-1]))
    assert flat.count(EOS) == len(lengths)
    for block in blocks:
        for number, segment in enumerate(block):
            assert (segment[0] == BOS) == (separate or number == 0)
            inner = [token for token in segment if token >= 0]
            # a segment belongs to one document, and has an end token where that ends
            assert len({int(np.searchsorted(ends, token, side="right")) for token in inner}) <= 1
            assert EOS not in segment[:-1]
            assert segment[-1] != EOS or not inner or inner[-1] + 1 in ends
    if whole:
        for length, end in zip(lengths, ends, strict=True):
            holders = [i for i, block in enumerate(blocks) if any(end - length <= t < end for s in block for t in s)]
            assert len(holders) == 1 or length + 2 > block_size
    else:
        assert all(block_size - size <= separate for size in sizes[:-1])


@pytest.mark.parametrize("packing", ["document", "stream"])
@pytest.mark.parametrize("separate", [False, True], ids=["together", "separate"])
def test_blocks_hold_the_text(folder: Path, packing: str, separate: bool) -> None:
    found = dataset(folder, documents="line", packing=packing, separate_documents=separate)
    assert found.lengths.dtype == np.int64
    assert found.lengths.max() == 64
    if packing == "stream":
        assert (found.lengths[:-1] >= 64 - separate).all()
    batch = found.read(np.arange(len(found)))
    assert batch.tokens.shape == (len(found), 64)
    assert batch.tokens.dtype == batch.lengths.dtype == np.int64
    np.testing.assert_array_equal(batch.lengths, found.lengths)
    kept = np.arange(64) < batch.lengths[:, None]
    assert (batch.tokens[~kept] == found.specials.pad).all()
    assert (batch.tokens[:, 0] == found.specials.bos).all()
    flat = batch.tokens[kept]
    text = found.tokenizer.decode(flat[flat != found.specials.bos]).split("</s>")
    lines = [line for file in sorted(folder.iterdir()) for line in file.read_text(encoding="utf-8").splitlines()]
    assert text == [*lines, ""]
    if not separate:
        assert batch.offsets is None
        return
    assert batch.offsets.dtype == np.int32
    assert batch.offsets[0] == 0
    assert batch.offsets[-1] == batch.lengths.sum()
    # segments start exactly where documents and blocks start
    starts = np.zeros(len(flat), dtype=bool)
    starts[batch.offsets[:-1]] = True
    np.testing.assert_array_equal(starts, flat == found.specials.bos)


def test_reading_some_blocks(folder: Path) -> None:
    found = dataset(folder, documents="line", separate_documents=True)
    every = found.read(np.arange(len(found)))
    ids = np.array([5, 0, 5, len(found) - 1])
    some = found.read(ids)
    assert some.tokens.shape[1] == found.lengths[ids].max()
    np.testing.assert_array_equal(some.tokens, every.tokens[ids, : some.tokens.shape[1]])
    assert some.offsets[-1] == found.lengths[ids].sum()
    empty = found.read(ids[:0])
    assert empty.tokens.shape == (0, 0)
    assert empty.offsets.tolist() == [0]
    for wrong in (-1, len(found)):
        with pytest.raises(IndexError, match=r"`sample_ids` must be in \[0, "):
            found.read(np.array([0, wrong]))


def test_masks_of_blocks(folder: Path) -> None:
    found = dataset(folder, documents="line")
    ids = np.arange(len(found))
    batch = found.read(ids)
    rows, seen = token_mask_rows(
        0,
        0,
        ids,
        batch.tokens,
        batch.lengths,
        prob=0.35,
        length=4,
        vocab_size=found.vocab_size,
        mask_id=found.specials.mask,
        special_ids=found.specials.ids,
    )
    assert not np.isin(batch.tokens.ravel()[rows], found.specials.ids).any()
    np.testing.assert_array_equal(np.flatnonzero(seen != batch.tokens), rows)
    per_block = np.bincount(rows // batch.tokens.shape[1], minlength=len(ids))
    assert (per_block[batch.lengths > 4] >= 1).all()


def test_what_does_not_fit(folder: Path) -> None:
    with pytest.raises(
        DataError, match=r"`d2v.data.block_size` must be <= `d2v.model.max_positions` \(128\), but is 129"
    ):
        dataset(folder, block_size=129)
    data = TextDataConfig(kind="text", path=str(folder), tokenizer=str(folder.parent / "tokenizer"), block_size=64)
    with pytest.raises(DataError, match=r"`d2v.model.vocab_size` must be >= 360, the tokens of '.*', but is 100"):
        TextDataset(data, TextModelConfig(vocab_size=100))
    with pytest.raises(DataError, match=r'`split` must be "train" for files, but is "test" instead'):
        TextDataset(data, MODEL, "test")


def test_ids_out_of_the_vocabulary(folder: Path) -> None:
    found = dataset(folder)
    (path,) = found.tokens.folder.glob("tokens-*.bin")
    # damage the file after it was verified
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(DataError, match=r"the tokens in '.*' must be < 360, but one is 65535\. Remove that folder"):
        found.read(np.arange(3))


def test_sample_set(root: str) -> None:
    train = TextDataset(docs_config(root), MODEL)
    test = TextDataset(docs_config(root), MODEL, "test")
    assert train.vocab_size == 1000
    assert train.specials.mask == 999
    assert train.tokenizer.digest == test.tokenizer.digest
    # a fifth of the text is held out
    assert 60_000 < train.tokens.num_tokens < 300_000
    assert test.tokens.num_tokens / train.tokens.num_tokens == pytest.approx(0.25, rel=0.3)
    assert "def" in train.tokenizer.decode(train.read(np.arange(50)).tokens.ravel())
    # a tokenizer, and the tokens of each part
    assert len(os.listdir(root)) == 3
    docs_tokenizer(docs_config(root), MODEL)
    assert len(os.listdir(root)) == 3


def test_nothing_of_the_test_part_is_trained_on() -> None:
    data = TextDataConfig()
    train, test = (
        "".join(piece.text + "\n" for piece in DocsSource(data, split).pieces()) for split in ("train", "test")
    )
    seen = {" ".join(paragraph.split()) for paragraph in train.split("\n\n")}
    held_out = [" ".join(paragraph.split()) for paragraph in test.split("\n\n")]
    assert len(held_out) > 200
    assert not [paragraph for paragraph in held_out if paragraph in seen]


def test_another_process_makes_the_same() -> None:
    code = """
from tests.helpers.text_files import small_tokenizer
from d2v_fast.modalities.text.reference_pages import DocsSource
from d2v_fast.modalities.text.config import TextDataConfig
print(small_tokenizer().digest, DocsSource(TextDataConfig(), "test").digest())
"""
    root = str(ROOT)
    env = {**os.environ, "PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1", "PYTHONPATH": root}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.split() == [small_tokenizer().digest, DocsSource(TextDataConfig(), "test").digest()]


def test_probe_of_the_sample_set(root: str) -> None:
    data = docs_config(root, block_size=64)
    probe = docs_for_probe(data, MODEL)
    assert len(probe.names) >= 10
    assert len(probe.tokens) == len(probe.labels) >= 300
    assert set(probe.labels.tolist()) == set(range(len(probe.names)))
    both = torch.cat([probe.train_indices, probe.test_indices])
    assert sorted(both.tolist()) == list(range(len(probe.tokens)))
    for indices in (probe.train_indices, probe.test_indices):
        assert len(set(probe.labels[indices].tolist())) == len(probe.names)
    assert all(tokens[0] == probe.specials.bos and tokens[-1] == probe.specials.eos for tokens in probe.tokens)
    assert max(map(len, probe.tokens)) == 64
    assert probe.tokens[0].dtype == torch.int64
    # pre-training sees the train part and not the test part
    tokenizer = docs_tokenizer(data, MODEL)
    train = "\n\n".join(piece.text for piece in DocsSource(data, "train").pieces())
    for indices, is_seen in ((probe.train_indices, True), (probe.test_indices, False)):
        for index in indices.tolist():
            text = tokenizer.decode(probe.tokens[index][1:-1])
            # white space at the ends of a document is dropped, and cut paragraphs may begin alike
            if is_seen or len(probe.tokens[index]) < 64:
                assert (text.rstrip("\ufffd").strip() in train) == is_seen


def test_sample_set_needs_room_for_the_bytes(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"`d2v.model.vocab_size` must be >= 261 .* but is 200 instead"):
        TextDataset(docs_config(root), TextModelConfig(vocab_size=200))
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    reference_pages._passages.cache_clear()
    reference_pages._held_out.cache_clear()
    with pytest.raises(DataError, match=r"this Python has no `pydoc_data.topics`"):
        TextDataset(docs_config(root), MODEL)


def test_damaged_tokenizer_of_the_sample_set(tmp_path: Path) -> None:
    data = docs_config(str(tmp_path))
    docs_tokenizer(data, MODEL)
    (folder,) = tmp_path.iterdir()
    path = folder / "tokenizer.json"
    text = path.read_text(encoding="utf-8")
    for changed in (text.replace('"add_prefix_space":false', '"add_prefix_space":true', 1), text[:1000]):
        path.write_text(changed, encoding="utf-8")
        with pytest.raises(DataError, match=r"Remove .*folder.*will be made again"):
            docs_tokenizer(data, MODEL)


def test_default_place_is_the_cache_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cache.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    data = docs_config("x").model_copy(update={"tokens_path": None})
    docs_tokenizer(data, MODEL)
    (made,) = (tmp_path / "cache" / "d2v_fast").iterdir()
    # without a writable home, a private folder among the temporary files is used
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("")
    docs_tokenizer(data, MODEL)
    (own,) = (tmp_path / "tmp").iterdir()
    assert own.name == f"d2v_fast-{os.getuid()}"
    assert stat.S_IMODE(own.stat().st_mode) == 0o700
    assert os.listdir(own) == [made.name]
    # a folder that others could have prepared is refused
    (own / made.name).rename(tmp_path / "tmp" / "kept")
    own.chmod(0o777)
    with pytest.raises(
        DataError, match=r"`d2v.data.tokens_path` must be a folder that can be written\. None of .*others may"
    ):
        docs_tokenizer(data, MODEL)


def test_place_that_cannot_be_written(folder: Path) -> None:
    (folder.parent / "file").write_text("")
    with pytest.raises(
        DataError, match=r"`d2v.data.tokens_path` must be a folder that can be written\. None of .*file"
    ):
        dataset(folder, tokens_path=str(folder.parent / "file"))
