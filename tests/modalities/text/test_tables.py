"""Labeled tables: GLUE's own files, quotes, bad rows, other formats, and errors that name the column."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from d2v_fast.errors import DataError
from d2v_fast.modalities.text.config_finetune import GLUE, LabeledTextConfig, TableFields
from d2v_fast.modalities.text.files import BadText
from d2v_fast.modalities.text.tables import Table, TableRow, class_name, score_of

# header and two rows of each task's train.tsv, dev.tsv or dev_matched.tsv, cut short
FILES = {
    "CoLA": "gj04\t1\t\tOur friends won't buy this.\ngj04\t0\t*\tThey drank the pub.\n",
    "SST-2": 'sentence\tlabel\nhide new secretions \t0\na "quoted start is kept\t1\n',
    "MRPC": '﻿Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t70\t71\tHe said "yes.\tYes, he said.\r\n'
    "0\t9\t8\tOne.\tTwo.\r\n",
    "QQP": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tWhy?\tHow?\t0\n4\t5\t6\tWho?\tWhom?\t1\n",
    "STS-B": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
    "0\tg\tf\t2012\t1\tnone\tnone\tA plane.\tAn air plane.\t5.000\n"
    "1\tg\tf\t2012\t4\tnone\tnone\tA man.\tA cat.\t0.25\n",
    "MNLI": "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
    "sentence2_parse\tsentence1\tsentence2\tlabel1\tlabel2\tgold_label\n"
    "0\t1\t1n\tg\t( a )\t( b )\t(R a)\t(R b)\tNew.\tOld.\tneutral\tneutral\tneutral\n"
    "1\t1\t1e\tg\t( a )\t( b )\t(R a)\t(R b)\tOne.\tTwo.\tneutral\tentailment\tentailment\n",
    "QNLI": "index\tquestion\tsentence\tlabel\n0\tWhen?\tIn May.\tentailment\n1\tWhere?\tIn May.\tnot_entailment\n",
    "RTE": "index\tsentence1\tsentence2\tlabel\n0\tNo.\tYes.\tnot_entailment\n1\tIt is.\tIs it.\tentailment\n",
    "WNLI": "index\tsentence1\tsentence2\tlabel\n0\tI stuck.\tIt did.\t1\n1\tWe won.\tThey did.\t0\n",
}
EXPECTED = {
    "CoLA": [(1, "Our friends won't buy this.", None, "1"), (2, "They drank the pub.", None, "0")],
    "SST-2": [(2, "hide new secretions", None, "0"), (3, 'a "quoted start is kept', None, "1")],
    "MRPC": [(2, 'He said "yes.', "Yes, he said.", "1"), (3, "One.", "Two.", "0")],
    "QQP": [(2, "Why?", "How?", "0"), (3, "Who?", "Whom?", "1")],
    "STS-B": [(2, "A plane.", "An air plane.", 5.0), (3, "A man.", "A cat.", 0.25)],
    "MNLI": [(2, "New.", "Old.", "neutral"), (3, "One.", "Two.", "entailment")],
    "QNLI": [(2, "When?", "In May.", "entailment"), (3, "Where?", "In May.", "not_entailment")],
    "RTE": [(2, "No.", "Yes.", "not_entailment"), (3, "It is.", "Is it.", "entailment")],
    "WNLI": [(2, "I stuck.", "It did.", "1"), (3, "We won.", "They did.", "0")],
}


def bad(fraction: float = 1.0) -> BadText:
    return BadText(fraction, False, "rows")


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


@pytest.mark.parametrize("task", GLUE)
def test_files_of_glue_read_as_they_are(task: str, tmp_path: Path) -> None:
    parse = score_of if task == "STS-B" else class_name
    path = write(tmp_path / "train.tsv", FILES[task])
    fields = LabeledTextConfig.model_validate({"glue": task, "path": path}).fields()
    table = Table(path, fields, bad(0.0), parse_label=parse)
    assert list(table.rows()) == EXPECTED[task]
    assert table.bad.num_entries == 2
    if task == "CoLA":
        # unlike train.tsv and dev.tsv, test.tsv has a header, and no labels
        path = write(tmp_path / "test.tsv", "index\tsentence\n0\tBill pushed him.\n")
        assert list(Table(path, fields._replace(label=None), bad(0.0)).rows()) == [(2, "Bill pushed him.", None, None)]


def test_bad_rows_are_counted_with_their_lines(tmp_path: Path) -> None:
    lines = ["sentence\tlabel", "good\t1", "no label", "\t1", "more\t1\t2", "empty label\t", "", "good too\t0"]
    path = write(tmp_path / "a.tsv", "\n".join(lines).encode() + b"\nlatin \xe9\t1\nzero \0\t1\n")
    table = Table(path, TableFields("sentence", None, "label"), bad())
    assert [(row.number, row.label) for row in table.rows()] == [(2, "1"), (8, "0")]
    assert table.bad.named == [
        f"{path}, line 3: 1 fields instead of 2",
        f"{path}, line 4: column 'sentence' is empty",
        f"{path}, line 5: 3 fields instead of 2",
        f"{path}, line 6: the label 'label' is empty",
        f'{path}, line 9: not UTF-8 at byte 6 (to read it, set `d2v.data.encoding_errors` to "replace")',
        f"{path}, line 10: not text: it has zero bytes",
    ]
    with pytest.raises(DataError, match=r"6 of 8 rows are unreadable, and `d2v.data.max_bad_fraction` is 0.5"):
        list(Table(path, TableFields("sentence", None, "label"), bad(0.5)).rows())
    replaced = list(Table(path, TableFields("sentence", None, "label"), bad(), replaces=True).rows())
    assert [row.text for row in replaced[2:]] == ["latin \ufffd", "zero \ufffd"]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_other_formats_hold_the_same_rows(kind: str, tmp_path: Path) -> None:
    rows = [
        {"a": "one", "b": "two", "score": 1},
        {"a": "x\ty", "b": "z", "score": 2.5},
        {"a": None, "b": "", "score": 0},
    ]
    path = tmp_path / f"t.{kind}"
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        content = "\n".join(map(json.dumps, rows)).encode()
        path.write_bytes(gzip.compress(content) if kind.endswith("gz") else content)
    table = Table(str(path), TableFields("a", "b", "score"), bad(), parse_label=score_of)
    assert list(table.rows()) == [TableRow(1, "one", "two", 1.0), TableRow(2, "x\ty", "z", 2.5)]
    assert table.bad.named == [
        f"{path}, {'row' if kind == 'parquet' else 'line'} 3: column 'a' holds null instead of text"
    ]
    with pytest.raises(DataError, match=r"`d2v\.data\.max_bad_fraction`.*|cannot be read.*no column 'text'") as caught:
        list(Table(str(path), TableFields("text"), bad(0.0)).rows())
    assert "`d2v.data.field`); it has 'a', 'b', 'score'" in str(caught.value)


@pytest.mark.parametrize("value", ["4,5", "", "nan", True, None, [1]])
def test_scores_are_finite_numbers(value: object) -> None:
    with pytest.raises(ValueError, match=r"the label 'score' holds .* instead of a finite number"):
        score_of(value, "score")


def test_errors_name_the_key(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", "one\ttwo\ttwo\nx\ty\tz\n")
    with pytest.raises(
        DataError, match=r"`d2v.data.label_field` must name a column of .*'label'.*it has 'one', 'two', 'two'"
    ):
        list(Table(path, TableFields("one", None, "label"), bad()).rows())
    with pytest.raises(DataError, match=r"`d2v.data.field` must name .*has it twice.*`d2v.data.columns`"):
        list(Table(path, TableFields("two"), bad()).rows())
    with pytest.raises(DataError, match="must be different columns, but two of them are 'one'"):
        Table(path, TableFields("one", "one"), bad())
    with pytest.raises(DataError, match=r"must be a file that ends with \.tsv"):
        Table(str(tmp_path / "a.csv"), TableFields("one"), bad())
    with pytest.raises(DataError, match=r"cannot be read: .*No such file"):
        list(Table(str(tmp_path / "b.tsv"), TableFields("one"), bad()).rows())
    with pytest.raises(DataError, match="UTF-16 instead of UTF-8"):
        list(Table(write(tmp_path / "c.tsv", "a\tb\n".encode("utf-16")), TableFields("a"), bad()).rows())
