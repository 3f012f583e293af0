"""The sections of `"d2v"` for text.

The defaults are the published Base run (arXiv 2202.03555, section 4.3) with the masks of its released recipe.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from d2v_fast.config.errors import MAX_SIZE, MAX_WORKERS, PathText, Problem, Section, problem_of_heads, refuse_if
from d2v_fast.config.probe import ProbeConfig
from d2v_fast.config.schema import (
    DataSection,
    LossConfig,
    ModelSection,
    PretrainConfig,
    ScheduleConfig,
    TargetConfig,
    TeacherConfig,
)

# as in RoBERTa, the first token has row 2 of the position table and a padding token row 1
POSITION_OFFSET = 2
MAX_VOCAB = 1 << 24
# sizes of RoBERTa, and so of the published runs: used while no tokenizer has set its own
PUBLISHED_VOCAB, PUBLISHED_PADDING = 50_265, 1

# values that `mode` implies: "bert" is the paper's main text, "span" its released recipe
_MODES: dict[str, dict[str, Any]] = {
    "bert": {"prob": 0.15, "length": 1, "keep_prob": 0.1, "random_prob": 0.1},
    "span": {"prob": 0.35, "length": 4, "keep_prob": 0.0, "random_prob": 0.0},
}


class TextModelSection(ModelSection):
    """What every text encoder has: the sizes of its embeddings.

    Attributes:
        vocab_size: Number of token embeddings, at least as many as the tokenizer has tokens; null uses that number.
        padding_id: Id of the padding token, whose embedding stays zero. It must be the tokenizer's; null uses it.
        max_positions: Longest sequence in tokens, special tokens included.
        token_std: Standard deviation of the token embeddings at the start of training. That of the positions is 0.02,
            as both are in published runs; a larger one for tokens lets positions weigh less in the sum.
    """

    required: ClassVar[tuple[str, ...]] = ()

    vocab_size: int | None = Field(default=None, ge=8, le=MAX_VOCAB)
    padding_id: int | None = Field(default=None, ge=0, lt=MAX_VOCAB)
    max_positions: int = Field(default=512, ge=4, le=MAX_SIZE)
    token_std: float = Field(default=0.02, gt=0, le=10)

    @property
    def position_rows(self) -> int:
        """Rows of the position table: the first token of a sequence has row 2, padding row 1."""
        return self.max_positions + POSITION_OFFSET

    @property
    def token_rows(self) -> int:
        """Rows of the token table: `vocab_size`, or RoBERTa's if that is not set."""
        return PUBLISHED_VOCAB if self.vocab_size is None else self.vocab_size

    @property
    def padding_row(self) -> int:
        """Row of the token table that stays zero: `padding_id`, or RoBERTa's if that is not set."""
        return PUBLISHED_PADDING if self.padding_id is None else self.padding_id

    def num_places(self, shape: Sequence[int]) -> int:
        """See `ModelSection`."""
        return shape[1]

    @model_validator(mode="after")
    def _check_padding(self) -> Self:
        if self.padding_row >= self.token_rows:
            refuse_if([Problem("padding_id", f"be < `vocab_size` ({self.token_rows})", self.padding_row)])
        return self


class TextModelConfig(TextModelSection):
    """The text encoder: token and position embeddings, a norm, post-norm blocks.

    Attributes:
        heads: Attention heads; must divide `width`.
        mlp_ratio: Hidden width of the MLP over `width`.
        dropout: Dropout of embeddings and residual branches.
        attention_dropout: Dropout of attention weights.
        activation_dropout: Dropout inside the MLP.
        layer_drop: Probability that a sample skips a block.
        norm_eps: Added to the variance in every norm.
        attention: "padded" pads to the longest block; "packed" skips padding, with PyTorch's kernel on a GPU in 16-bit
            precision without dropout of attention weights; "xformers" skips it with that package's, with dropout too.
        gradient_checkpointing: Recompute each block in the backward pass to save memory.
    """

    width: int = Field(default=768, ge=1, le=MAX_SIZE)
    depth: int = Field(default=12, ge=1, le=MAX_SIZE)
    heads: int = Field(default=12, ge=1, le=MAX_SIZE)
    mlp_ratio: float = Field(default=4.0, gt=0, le=MAX_SIZE)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    attention_dropout: float = Field(default=0.1, ge=0, lt=1)
    activation_dropout: float = Field(default=0.0, ge=0, lt=1)
    layer_drop: float = Field(default=0.0, ge=0, lt=1)
    norm_eps: float = Field(default=1e-5, gt=0, le=1)
    attention: Literal["padded", "packed", "xformers"] = "padded"
    gradient_checkpointing: bool = False

    def without_skipping(self) -> Self:
        """See `ModelSection`."""
        return self.model_copy(update={"layer_drop": 0.0})

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = problem_of_heads(self.width, self.heads)
        if int(self.width * self.mlp_ratio) < 1:
            problems.append(Problem("mlp_ratio", "leave at least one hidden unit", self.mlp_ratio))
        refuse_if(problems)
        return self


class TokenMaskConfig(Section):
    """Masking of the student's input, drawn anew every epoch. `mode` sets the defaults of `prob`, `length`,
    `keep_prob` and `random_prob`: "span" 0.35, 4, 0, 0; "bert" 0.15, 1, 0.1, 0.1.

    Attributes:
        kind: Kind of the masks.
        mode: "span" chooses spans of tokens, "bert" single tokens.
        prob: Share of the tokens that would be chosen if no spans overlapped.
        length: Tokens in a span.
        keep_prob: Probability that a chosen token stays unchanged.
        random_prob: Probability that a chosen token becomes a random token; otherwise it becomes the mask token.
        loss_on_kept: Also compute the loss at unchanged and random tokens, not only at mask tokens.
        mask_specials: Allow special tokens (begin, end, padding, unknown, mask) to be chosen, as the published code
            does for begin and end.
    """

    kind: Literal["token"] = "token"
    mode: Literal["span", "bert"] = "span"
    prob: float = Field(default=0.35, gt=0, le=1)
    length: int = Field(default=4, ge=1, le=MAX_SIZE)
    keep_prob: float = Field(default=0.0, ge=0, le=1)
    random_prob: float = Field(default=0.0, ge=0, le=1)
    loss_on_kept: bool = False
    mask_specials: bool = False

    @model_validator(mode="before")
    @classmethod
    def _follow_mode(cls, raw: Any) -> Any:
        mode = raw.get("mode", "span") if isinstance(raw, dict) else None
        return {**_MODES[mode], **raw} if isinstance(mode, str) and mode in _MODES else raw

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = []
        if self.mode == "bert" and self.length != 1:
            problems.append(
                Problem("length", 'be 1 with `mode` "bert"', self.length, 'For spans, set `mode` to "span".')
            )
        if self.keep_prob + self.random_prob > 1:
            must = f"be <= {1 - self.random_prob:g}, which is 1 - `random_prob` ({self.random_prob})"
            problems.append(Problem("keep_prob", must, self.keep_prob))
        if self.keep_prob + self.random_prob == 1 and not self.loss_on_kept:
            hint = "Otherwise no token becomes the mask token, and there is no loss."
            problems.append(Problem("loss_on_kept", "be true where `keep_prob` + `random_prob` is 1", False, hint))
        refuse_if(problems)
        return self


class TextDataConfig(DataSection):
    """The text of a run and its division into blocks.

    Attributes:
        kind: "text" is a file or a folder tree of .txt, JSON lines (.jsonl, .ndjson, .json) and .parquet, the first two
            also as .gz and .zst; "docs" is the sample set, Python's own reference pages.
        path: The file or the folder, for "text".
        field: Field of a JSON line or column of a .parquet file that holds the text.
        documents: Unit of a .txt file that is one document: the whole "file", each "paragraph" between empty lines, or
            each "line".
        encoding_errors: "strict" counts text that is not UTF-8 as unreadable; "replace" replaces its invalid bytes and
            zero bytes with U+FFFD.
        tokenizer: A `tokenizer.json`, or a folder with one or with vocab.json and merges.txt. For the sample set, null
            trains one.
        tokens_path: Folder of the tokenized text; null uses `d2v_fast` in the user's cache folder. The tokens are
            reused while files, tokenizer and settings stay the same.
        block_size: Largest number of tokens in a block, special tokens included.
        packing: "document" fills a block with whole documents and cuts only longer ones; "stream" fills every block to
            its end.
        separate_documents: Documents of a block do not attend to each other, and each starts with the begin token.
        min_tokens: Documents with fewer tokens are left out.
        test_fraction: Share of the sample set that is held out for the probe.
        follow_outside: Follow links that lead out of `path`; otherwise they are left out.
    """

    # keys that apply to one kind only
    only_for: ClassVar[dict[str, tuple[str, ...]]] = {
        "docs": ("test_fraction",),
        "text": ("field", "documents", "encoding_errors", "max_bad_fraction", "strict", "follow_outside"),
    }

    kind: Literal["docs", "text"] = "docs"
    path: PathText | None = None
    on_change: Literal["refuse", "accept"] = "refuse"
    field: str = "text"
    documents: Literal["file", "paragraph", "line"] = "file"
    encoding_errors: Literal["strict", "replace"] = "strict"
    tokenizer: PathText | None = None
    tokens_path: PathText | None = None
    block_size: int = Field(default=512, ge=4, le=MAX_SIZE)
    packing: Literal["document", "stream"] = "document"
    separate_documents: bool = False
    min_tokens: int = Field(default=2, ge=1, le=MAX_SIZE)
    num_workers: int = Field(default=2, ge=0, le=MAX_WORKERS)
    test_fraction: float = Field(default=0.2, gt=0, lt=1)
    max_bad_fraction: float = Field(default=0.01, ge=0, le=1)
    strict: bool = False
    follow_outside: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = []
        if self.kind == "text" and not self.path:
            hint = "Name the file or the folder: `--set d2v.data.path=/my/text`."
            problems.append(Problem("path", 'be a file or a folder with `kind` "text"', self.path, hint))
        if self.kind == "docs" and self.path is not None:
            hint = 'Your own text is `kind` "text", for which the preset `text_small` is made.'
            problems.append(Problem("path", 'be null with `kind` "docs", a sample set', self.path, hint))
        if self.kind == "text" and not self.tokenizer:
            hint = "Name a tokenizer.json of Hugging Face tokenizers, or a folder with vocab.json and merges.txt."
            problems.append(Problem("tokenizer", 'be a file or a folder with `kind` "text"', self.tokenizer, hint))
        if not self.field:
            problems.append(Problem("field", "name a field or column", self.field))
        refuse_if(problems)
        return self


class TextProbeConfig(ProbeConfig):
    """Probe of text features. The class of a .txt file is its sub-folder.

    Attributes:
        path: Labeled data: a folder with a sub-folder per class, or a .jsonl or .parquet file. Null uses the labels of
            the sample set.
        field: Field or column of the text; null uses `d2v.data.field`.
        label_field: Field or column of the label.
    """

    field: str | None = None
    label_field: str = "label"

    @model_validator(mode="after")
    def _check(self) -> Self:
        named = {"field": self.field, "label_field": self.label_field}
        problems = [Problem(key, "name a field or column", value) for key, value in named.items() if value == ""]
        if self.field == self.label_field:
            problems.append(Problem("label_field", "be another field than `field`", self.label_field))
        refuse_if(problems)
        return self


def longer_than_positions(sections: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield the problem of samples with more tokens than the model has positions."""
    model, data = sections.get("model"), sections.get("data")
    if model and data and data.block_size > model.max_positions:
        must = f"be <= `d2v.model.max_positions` ({model.max_positions})"
        yield Problem("data.block_size", must, data.block_size)


class DocumentsConfig(PretrainConfig):
    """What every objective on text has."""

    modality: Literal["text"] = "text"
    decay_1d: bool = True
    model: TextModelSection
    data: TextDataConfig
    probe: TextProbeConfig

    @classmethod
    def problems_across(cls, sections: Mapping[str, Any]) -> Iterator[Problem]:
        yield from super().problems_across(sections)
        yield from longer_than_positions(sections)


class TextConfig(DocumentsConfig):
    """Configuration of a text run. The defaults are the published Base run with the masks of its released recipe."""

    objective: Literal["data2vec"] = "data2vec"
    model: TextModelConfig = TextModelConfig()
    mask: TokenMaskConfig = TokenMaskConfig()
    target: TargetConfig = TargetConfig(top_k=10, layer_norm="layer", final_norm="none")
    loss: LossConfig = LossConfig(beta=4.0, channel_reduction="sum")
    teacher: TeacherConfig = TeacherConfig(decay_start=0.999, decay_end=0.9999, decay_steps=100_000)
    schedule: ScheduleConfig = ScheduleConfig(kind="cosine", steps=1_000_000, warmup_steps=10_000)
    data: TextDataConfig = TextDataConfig()
    probe: TextProbeConfig = TextProbeConfig()
