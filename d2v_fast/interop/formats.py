"""What a modality defines of another library's format, for the functions that choose it by the modality's name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from torch import Tensor

from d2v_fast.config import D2VConfig
from d2v_fast.config.errors import Section
from d2v_fast.interop.fairseq_recipe import Settings
from d2v_fast.interop.heads import SavedHead
from d2v_fast.modalities import Modality, modality_named, modality_names
from d2v_fast.models.student import Student

FormatT = TypeVar("FormatT")


class Pretrained(Protocol):
    """Content of a checkpoint of the published code: fp32 on the CPU, models in training mode.

    Attributes:
        student: The student, or the encoder of a fine-tuned model.
        teacher: The whole teacher; None if the checkpoint holds no average.
        head: Tensors of the regression head; None if the checkpoint holds none.
        config: The model's configuration.
        assumed: In words, each value of `config` that neither the checkpoint nor the caller gave.
        pending_decay: Decay of the update that the average still lacks; None if it lacks none or this is unknown.
    """

    @property
    def student(self) -> Student: ...
    @property
    def teacher(self) -> Student | None: ...
    @property
    def head(self) -> dict[str, Tensor] | None: ...
    @property
    def config(self) -> Section: ...
    @property
    def assumed(self) -> tuple[str, ...]: ...
    @property
    def pending_decay(self) -> float | None: ...


def _no_options(raw: Mapping[str, Any], wanted: Section) -> dict[str, Any]:
    return {}


class HuggingFace(NamedTuple):
    """The Transformers folders of a modality.

    Attributes:
        kind: `model_type` in their `config.json`.
        write: Write an encoder: `(model, config, folder, **options)`, see the function of the modality.
        read: Read an encoder: `(folder, **options)` to the model and its configuration.
        options_of_run: From a folder's `config.json` and the model section of a run that is to begin with the folder to
            options of `read`.
        vocabulary: Return the digest of the tokenizer in a folder, or None.
        head: Return the head in a folder of a fine-tuned model; None if there is none.
        more_kinds: Further values of `model_type` that `read` knows: of models whose head needs a name of its own.
    """

    kind: str
    write: Callable[..., None]
    read: Callable[..., tuple[Student, Section]]
    options_of_run: Callable[[Mapping[str, Any], Any], dict[str, Any]] = _no_options
    vocabulary: Callable[[Path], str | None] = lambda folder: None
    head: Callable[[Path], SavedHead | None] = lambda folder: None
    more_kinds: tuple[str, ...] = ()

    def reads(self, config: Mapping[str, Any]) -> bool:
        """Return whether `read` knows a folder, by its `config.json`."""
        return config.get("model_type") in (self.kind, *self.more_kinds)


class Published(NamedTuple):
    """The checkpoints of the published code of a modality.

    Attributes:
        form: The name of the format as a value of `export --format`.
        suffix: Of a file, such as ".pt".
        owner: Whose format it is, in a message.
        average: The key of the teacher's average.
        is_own: Whether what a pickle holds is, by its names, of this modality.
        read: From the content of a file, its path and settings to everything in it.
        write: Write a checkpoint from student, head, teacher, the run's configuration, the path and the step.
        check: Raise OptionError if a run has what this format cannot hold.
        classes: Classes that a pickle may need. Making an instance of one must execute nothing.
        step: From the content of a file and its path to the sections of `"d2v"`, besides the model, that the training
            step which made it had. Raise ValueError where one is unknown or not supported. None: files do not tell.
    """

    form: str
    suffix: str
    owner: str
    average: str
    is_own: Callable[[Any], bool]
    read: Callable[[Mapping[Any, Any], Path, Settings], Pretrained]
    write: Callable[..., None]
    check: Callable[[Any], None] = lambda config: None
    classes: tuple[type, ...] = ()
    step: Callable[[Mapping[str, Any], Path], dict[str, Any]] | None = None


def huggingface_formats() -> Iterator[tuple[str, HuggingFace]]:
    """Yield name and Transformers format of every modality that has one, those of this library first."""
    return _formats(lambda modality: modality.huggingface)


def published_formats(objective: str | None = None) -> Iterator[tuple[str, Published]]:
    """Yield name and published format of every modality that has one, those of this library first.

    Args:
        objective: Value of `d2v.objective` that the format is for; None yields those of all.
    """
    return _formats(lambda modality: modality.published if objective in (None, modality.objective) else None)


def _formats(field: Callable[[Modality[Any]], Callable[[], FormatT] | None]) -> Iterator[tuple[str, FormatT]]:
    # a modality of another package that cannot be imported is an error only where no other one fits
    for name in modality_names():
        for modality in modality_named(name).objectives.values():
            # fine-tuned encoders have the formats of their version
            if modality.finetuning is None and (make := field(modality)) is not None:
                yield name, make()


def forms_of(modality: Modality[D2VConfig]) -> dict[str, str]:
    """Return the values of `export --format` that a modality has, and the suffix of the file of each."""
    forms = {} if modality.huggingface is None else {"transformers": ""}
    if modality.published is not None:
        published = modality.published()
        forms[published.form] = published.suffix
    return forms if modality.onnx is None else {**forms, "onnx": ".onnx"}


def require_format(modality: Modality[Any], format_: FormatT | None, name: str) -> FormatT:
    """Return a format, or refuse a modality that has none.

    Args:
        modality: Whose field it is.
        format_: The field of the record.
        name: Of the format, for the message.
    Raises:
        ValueError: The field is None. The message says what the modality can be written as.
    """
    if format_ is None:
        forms = ", ".join(forms_of(modality))
        instead = f"its encoders can be written as {forms}" if forms else "its weights stay in the run's checkpoints"
        raise ValueError(f'there is no {name} for modality "{modality.name}": {instead}.')
    return format_
