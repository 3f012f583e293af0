"""Fine-tune a pre-trained encoder with a head: what every such objective shares.

Shape letters: B samples, T tokens of a sample, including a prefix such as a class token, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from d2v_fast.config import RunConfig, TeacherConfig
from d2v_fast.config.finetune import FinetuneConfig
from d2v_fast.data import Batch, BatchMaker, batch_maker, resolved
from d2v_fast.data.once import reading_once
from d2v_fast.errors import OptionError
from d2v_fast.interop.sources import read_source
from d2v_fast.modalities import build_student, modality_of
from d2v_fast.objectives.base import Objective, Rate, StepOutput

# from log-probabilities fp32 `[B, T, V]` and the number of frames of each sample to transcripts
Decoder = Callable[[Tensor, Sequence[int]], list[str]]
# answer to one sample, in values that JSON can express
Answer = dict[str, Any]


class HeldOut(BatchMaker, Protocol):
    """Makes batches of held-out samples, without augmentation.

    Attributes:
        targets: what each sample should be answered with: the number of a class, a score or a transcript.
    """

    targets: list[Any]


class Beam(NamedTuple):
    """Settings of the search for the likeliest words with a language model.

    Attributes:
        language_model: n-gram model: ARPA text, or a binary file of KenLM.
        lexicon: file with a word at the start of each line; None takes the words of an ARPA file.
        size: hypotheses that are kept after each frame.
        threshold: hypotheses further below the best one are dropped, in natural logarithms.
        weight: weight of the language model's score.
        word_score: added for every word.

    The defaults of the weight and of the word score are those of the published recipes of wav2vec 2.0.
    """

    language_model: str
    lexicon: str | None = None
    size: int = 50
    threshold: float = 50.0
    weight: float = 2.0
    word_score: float = -1.0


class Finetuning(NamedTuple):
    """What a modality defines for fine-tuning.

    Attributes:
        head: from the run's section to a new head. Its `forward` has the encoder's output `[B, T, D]` and
            `Batch.lengths` to predictions.
        held_out: from the run's section to the held-out samples. Raise DataError where there are none.
        batch: from the run's section and the parts of samples, as `open_inputs` reads them, to a batch of them.
        recognizing: from the run's section to the class of the blank, and to the decoder that takes the likeliest
            class of each frame. None: there are no transcripts.
        searching: from the run's section to a decoder that searches with a language model. None: there is none.
    """

    head: Callable[[Any], nn.Module]
    held_out: Callable[[Any], HeldOut]
    batch: Callable[[Any, list[Tensor]], Batch]
    recognizing: Callable[[Any], tuple[int, Decoder]] | None = None
    searching: Callable[[Any, Beam], Decoder] | None = None


def finetuning_of(config: FinetuneConfig) -> Finetuning:
    """Return what the configuration's modality defines for fine-tuning."""
    made = modality_of(config).finetuning
    assert made is not None, "a record with a configuration of fine-tuning has one"
    return made()


def read_data(config: RunConfig) -> tuple[RunConfig, BatchMaker, HeldOut | None]:
    """Read the data of a run, each set once.

    Returns:
        The configuration with what follows from the data, what makes the batches, and the held-out samples, which are
        None if the run does not fine-tune.
    Raises:
        ConfigError: The data do not fit the configuration.
        DataError: There are no data, or a held-out sample is of a class that is not trained on.
    """
    with reading_once():
        config = resolved(config)
        d2v, maker = config.d2v, batch_maker(config.d2v)
        return config, maker, finetuning_of(d2v).held_out(d2v) if isinstance(d2v, FinetuneConfig) else None


def losses_of(output: StepOutput, num_samples: int) -> list[float] | list[None]:
    """Return the loss of each sample of a batch in eval mode; None for each if the batch has no targets."""
    return [None] * num_samples if output.losses is None else output.losses.tolist()


class Finetune(Objective):
    """An encoder and a head on labeled samples. A subclass defines the loss.

    Args:
        config: the run's section.
    Attributes:
        task: the key of the metrics in `evaluation.metrics`.
    """

    task: str

    def __init__(self, config: FinetuneConfig) -> None:
        super().__init__()
        self.config = config
        self.student = build_student(config)
        self.head = finetuning_of(config).head(config)
        self.divisor = 1.0
        decay = config.finetune.average_decay
        self.teacher_config = None if decay is None else TeacherConfig(decay_start=decay, decay_end=decay)
        self._is_frozen = False
        # new weights must all be trained
        self._held = () if config.finetune.source is None else self.student.hold_entrance()

    @property
    def averaged(self) -> nn.Module:
        """See `Objective`: encoder and head."""
        return self

    def forward(self, batch: Batch, teacher: nn.Module | None = None, moments: bool = True) -> StepOutput:
        """Compute the loss of one batch; in eval mode also the predictions.

        Args:
            batch: samples with targets; in eval mode these may be missing.
            teacher: not read.
            moments: whether to compute `StepOutput.moments`.
        """
        with self.part("student forward"):
            with torch.no_grad() if self._is_frozen else nullcontext():
                hidden = self.student.encode(batch)
            predictions: Tensor = self.head(hidden, batch.lengths).float()
        with self.part("target + loss"):
            if batch.targets is None:
                return StepOutput(predictions.new_zeros(()), len(batch.inputs), None, predictions=predictions)
            losses = self.losses(predictions, batch)
            if not self.training:
                return StepOutput(losses.sum(), self.rows_of(batch), None, predictions=predictions, losses=losses)
            with torch.no_grad():
                sums = self.sums(predictions.detach(), batch) if moments else None
            return StepOutput(losses.sum(), self.rows_of(batch), sums)

    def losses(self, predictions: Tensor, batch: Batch) -> Tensor:
        """Return the loss of each sample, fp32 `[B]`.

        Args:
            predictions: fp32, of the head.
            batch: with targets.
        """
        raise NotImplementedError

    def sums(self, predictions: Tensor, batch: Batch) -> Tensor:
        """Return what the log shows of a batch beside the loss, summed over samples: fp32, 1-D; see `figures`."""
        raise NotImplementedError

    def answers(self, output: StepOutput, batch: Batch) -> list[Answer]:
        """Return the answer to each sample of a batch, from the output of eval mode."""
        raise NotImplementedError

    def columns(self, answer: Answer) -> dict[str, Any]:
        """Return the columns of an answer for a table: values that JSON can express."""
        raise NotImplementedError

    def joined(self, answers: Sequence[Answer]) -> Answer:
        """Return the answer to a long sample from those to its parts: that to the first one."""
        return answers[0]

    def search(self, beam: Beam) -> None:
        """Answer with the likeliest words under a language model from now on.

        Raises:
            OptionError: the run writes no transcripts.
            DataError: a file of `beam` cannot be used.
            ImportError: a package is missing.
        """
        raise OptionError(
            f'`--lm` must be left out for a run of modality "{self.config.modality}" and objective '
            f'"{self.config.objective}": a language model searches for the words of transcripts ("ctc").'
        )

    def rows_of(self, batch: Batch) -> int:
        """See `Objective`: the samples."""
        return len(batch.inputs)

    def rates(self) -> Mapping[str, Rate]:
        """See `Objective`: lower blocks learn more slowly, and the encoder may be frozen at first."""
        section = self.config.finetune
        freezes = section.freeze_encoder_steps > 0
        if section.layer_decay == 1.0 and not freezes and not self._held:
            return {}
        top = self.student.num_layers
        found = {}
        for name, _ in self.student.named_parameters():
            scale = section.layer_decay ** (top - self.student.layer_of(name))
            found[f"student.{name}"] = Rate(0.0 if name.startswith(self._held) else scale, freezes)
        return found

    def begin(self) -> None:
        """See `Objective`: load the weights of `d2v.finetune.source`."""
        section = self.config.finetune
        if section.source is not None:
            found = read_source(Path(section.source), section.weights, section.step, self.config)
            found.copy_to(self.student, self.head, self.config)

    def frozen_at(self, step: int) -> bool:
        """See `Objective`."""
        return step <= self.config.finetune.freeze_encoder_steps

    def begin_step(self, step: int) -> None:
        """See `Objective`."""
        self._is_frozen = self.frozen_at(step)

    def shape_varies(self, batch: Batch) -> str | None:
        """See `Objective`."""
        if self._is_frozen:
            return "the encoder is frozen in the first steps (`d2v.finetune.freeze_encoder_steps`)"
        return super().shape_varies(batch)
