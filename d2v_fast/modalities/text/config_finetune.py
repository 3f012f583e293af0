"""Configuration sections of fine-tuning on text: classes and scores of single texts and of pairs of texts.

The defaults are the published fine-tuning on GLUE (arXiv 2202.03555, section 4.3, and RoBERTa's recipe).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import Field, model_validator
from typing_extensions import Self

from d2v_fast.config.errors import MAX_SIZE, MAX_WORKERS, PathText, Problem, Section, refuse_if
from d2v_fast.config.finetune import (
    ClassHeadSection,
    ClassifyConfig,
    FewLabelsSection,
    FinetuneConfig,
    ValidSection,
)
from d2v_fast.config.schema import DataSection, ScheduleConfig
from d2v_fast.modalities.text.config import TextModelConfig, TextModelSection, longer_than_positions
from d2v_fast.modalities.text.config2 import MaskedTextModelConfig

# columns of the files of GLUE (gluebenchmark.com), by task
GLUE: dict[str, dict[str, Any]] = {
    "CoLA": {"field": "sentence", "columns": ["source", "label", "mark", "sentence"]},
    "SST-2": {"field": "sentence"},
    "MRPC": {"field": "#1 String", "pair_field": "#2 String", "label_field": "Quality"},
    "QQP": {"field": "question1", "pair_field": "question2", "label_field": "is_duplicate"},
    "STS-B": {"field": "sentence1", "pair_field": "sentence2", "label_field": "score"},
    "MNLI": {"field": "sentence1", "pair_field": "sentence2", "label_field": "gold_label"},
    "QNLI": {"field": "question", "pair_field": "sentence"},
    "RTE": {"field": "sentence1", "pair_field": "sentence2"},
    "WNLI": {"field": "sentence1", "pair_field": "sentence2"},
}


class TableFields(NamedTuple):
    """The columns of a table that are read.

    Attributes:
        text: Column of the text, or of the first text of a pair.
        pair: Column of the second text; None for single texts.
        label: Column of the label; None reads no labels.
        header: Column names of a .tsv file without a header line; empty if the first line is the header.
    """

    text: str
    pair: str | None = None
    label: str | None = None
    header: tuple[str, ...] = ()

    def columns(self) -> dict[str, str]:
        """Return the columns, each with the configuration key that names it."""
        keys = {self.text: "`d2v.data.field`"}
        if self.pair is not None:
            keys[self.pair] = "`d2v.data.pair_field`"
        if self.label is not None:
            keys[self.label] = "`d2v.data.label_field`"
        return keys


class TableSection(DataSection):
    """Labeled texts, or labeled pairs of texts.

    Attributes:
        kind: "table" is a .tsv, JSON-lines (.jsonl, .ndjson, .json) or .parquet file, all but the last also as .gz or
            .zst. Quotes in a .tsv file are ordinary characters.
        path: The file.
        glue: A task of GLUE, whose columns are then the defaults of the four keys below.
        field: Column of the text, or of the first text of a pair.
        pair_field: Column of the second text; null for single texts.
        label_field: Column of the label.
        columns: Names of the columns of a .tsv file without a header line; empty if the first line is the header.
        encoding_errors: "strict" counts a row that is not UTF-8 as unreadable; "replace" replaces its invalid bytes and
            zero bytes with U+FFFD.
        tokenizer: A `tokenizer.json`, or a folder with one or with vocab.json and merges.txt; null uses that of
            `d2v.finetune.source`.
        tokens_path: Folder of the tokenizer of the sample set; null uses `d2v_fast` in the user's cache folder.
        block_size: Largest number of tokens of a text or a pair, special tokens included. Of a pair, the longer text is
            cut first.
        test_fraction: Share of the sample set that pre-training did not see and that is held out here too.
    """

    only_for: ClassVar[dict[str, tuple[str, ...]]] = {
        "docs": ("test_fraction",),
        "table": ("glue", "field", "pair_field", "label_field", "columns", "encoding_errors", "max_bad_fraction"),
    }

    kind: Literal["table", "docs"] = "table"
    path: PathText | None = None
    on_change: Literal["refuse", "accept"] = "refuse"
    glue: Literal["CoLA", "SST-2", "MRPC", "QQP", "STS-B", "MNLI", "QNLI", "RTE", "WNLI"] | None = None
    field: str = Field(default="text", min_length=1)
    pair_field: str | None = Field(default=None, min_length=1)
    label_field: str = Field(default="label", min_length=1)
    columns: tuple[str, ...] = Field(default=(), strict=False)
    encoding_errors: Literal["strict", "replace"] = "strict"
    tokenizer: PathText | None = None
    tokens_path: PathText | None = None
    block_size: int = Field(default=512, ge=8, le=MAX_SIZE)
    num_workers: int = Field(default=2, ge=0, le=MAX_WORKERS)
    test_fraction: float = Field(default=0.2, gt=0, lt=1)
    max_bad_fraction: float = Field(default=0.01, ge=0, le=1)
    strict: bool = False

    def fields(self, *, labeled: bool = True) -> TableFields:
        """Return the columns to read.

        Args:
            labeled: Whether the labels are read too.
        """
        return TableFields(self.field, self.pair_field, self.label_field if labeled else None, self.columns)

    @model_validator(mode="before")
    @classmethod
    def _follow_glue(cls, raw: Any) -> Any:
        task = raw.get("glue") if isinstance(raw, dict) else None
        return {**GLUE[task], **raw} if isinstance(task, str) and task in GLUE else raw

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = []
        if self.kind == "table" and not self.path:
            hint = "Name the file: `--set d2v.data.path=/my/train.tsv`."
            problems.append(Problem("path", 'be a file with `kind` "table"', self.path, hint))
        if self.kind == "docs" and self.path is not None:
            hint = 'Your own file is `kind` "table": add `--set d2v.data.kind=table`.'
            problems.append(Problem("path", 'be null with `kind` "docs", a sample set', self.path, hint))
        named = [name for name in (self.field, self.pair_field, self.label_field) if name is not None]
        if len(set(named)) < len(named):
            must = "be another column than `pair_field` and `label_field`, which also differ"
            problems.append(Problem("field", must, self.field))
        if self.columns and (missing := [name for name in named if self.columns.count(name) != 1]):
            problems.append(Problem("columns", f'name the column "{missing[0]}" once', list(self.columns)))
        refuse_if(problems)
        return self


class LabeledTextConfig(TableSection, FewLabelsSection):
    """Texts, or pairs of texts, with a class each.

    Attributes:
        kind: "table" is a .tsv, JSON-lines (.jsonl, .ndjson, .json) or .parquet file, all but the last also as .gz or
            .zst, in which quotes are ordinary characters; "docs" is the sample set, paragraphs of Python's own
            reference pages with their topics.
    """

    only_for: ClassVar[dict[str, tuple[str, ...]]] = TableSection.only_for


class ScoredTextConfig(TableSection):
    """Texts, or pairs of texts, with a number each."""

    only_for: ClassVar[dict[str, tuple[str, ...]]] = {}

    kind: Literal["table"] = "table"


class TextHeadSection(Section):
    """Two layers on the encoder's pooled output.

    Attributes:
        pooling: What the head reads: the output at the begin "token", as published, or the "mean" over all tokens of a
            text or a pair. Pre-training never masks the begin token.
        dropout: Dropout before both layers of the head.
    """

    pooling: Literal["token", "mean"] = "token"
    dropout: float = Field(default=0.0, ge=0, lt=1)


class TextClassHeadSection(TextHeadSection, ClassHeadSection):
    """A classifier on the encoder's pooled output."""


class TextFinetuneConfig(FinetuneConfig):
    """What every fine-tuning on text has."""

    modality: Literal["text"] = "text"
    decay_1d: bool = True
    model: TextModelSection
    data: TableSection
    head: TextHeadSection = TextHeadSection()
    schedule: ScheduleConfig = ScheduleConfig(kind="linear", epochs=10, warmup_epochs=0.6)

    @classmethod
    def problems_across(cls, sections: Mapping[str, Any]) -> Iterator[Problem]:
        """See `D2VConfig`."""
        yield from super().problems_across(sections)
        yield from longer_than_positions(sections)


class TextClassifyConfig(TextFinetuneConfig, ClassifyConfig):
    """Classification of texts or pairs of texts, by either version of the encoder."""

    objective: Literal["classify"] = "classify"
    data: LabeledTextConfig = LabeledTextConfig(kind="docs")
    head: TextClassHeadSection = TextClassHeadSection()
    valid: ValidSection = ValidSection()


class TextClassifyConfig1(TextClassifyConfig):
    """Classification of texts by an encoder of the first version."""

    encoder: Literal["data2vec"] = "data2vec"
    model: TextModelConfig = TextModelConfig()


class TextClassifyConfig2(TextClassifyConfig):
    """Classification of texts by an encoder of data2vec 2.0."""

    encoder: Literal["data2vec2"] = "data2vec2"
    model: MaskedTextModelConfig = MaskedTextModelConfig()


class ScoredValidSection(ValidSection):
    """Held-out texts with scores, and when they are scored."""

    metric: str = "pearson"


class TextRegressConfig(TextFinetuneConfig):
    """Regression on texts or pairs of texts, by either version of the encoder."""

    metrics: ClassVar[dict[str, bool]] = {"pearson": True, "spearman": True, "mse": False, "loss": False}

    objective: Literal["regress"] = "regress"
    data: ScoredTextConfig
    valid: ScoredValidSection = ScoredValidSection()

    @classmethod
    def problems_across(cls, sections: Mapping[str, Any]) -> Iterator[Problem]:
        """See `D2VConfig`."""
        yield from super().problems_across(sections)
        if sections.get("labels") is not None:
            yield Problem("labels", 'be null with `objective` "regress": a score has no classes', sections["labels"])


class TextRegressConfig1(TextRegressConfig):
    """Regression on texts by an encoder of the first version."""

    encoder: Literal["data2vec"] = "data2vec"
    model: TextModelConfig = TextModelConfig()


class TextRegressConfig2(TextRegressConfig):
    """Regression on texts by an encoder of data2vec 2.0."""

    encoder: Literal["data2vec2"] = "data2vec2"
    model: MaskedTextModelConfig = MaskedTextModelConfig()


TextClassifyConfig.by_encoder = {"data2vec": TextClassifyConfig1, "data2vec2": TextClassifyConfig2}
TextRegressConfig.by_encoder = {"data2vec": TextRegressConfig1, "data2vec2": TextRegressConfig2}
