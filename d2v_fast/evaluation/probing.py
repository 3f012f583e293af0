"""What a modality defines for its probes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from d2v_fast.config import PretrainConfig
from d2v_fast.data.labels import LabeledSet
from d2v_fast.errors import DataError
from d2v_fast.evaluation.classifiers import ProbeReport, ProbeReports, Task
from d2v_fast.evaluation.inputs import Rows, Sample, Source
from d2v_fast.modalities import modality_of
from d2v_fast.models.student import Student


class Probed(NamedTuple):
    """Networks to probe, by their names in the tables.

    Attributes:
        encoders: The encoders.
        heads: What predicts targets from each encoder's output.
    """

    encoders: Mapping[str, Student]
    heads: Mapping[str, nn.Module]


class Labeled(NamedTuple):
    """The probe of a user's own labels.

    Attributes:
        what: A word for a sample, such as "image".
        find: Choose the samples of `d2v.probe.path`; the argument is the key or option that named the path.
        read: From an encoder and the chosen samples to their source, and each sample or the reason why it cannot be
            read.
        pooled: From an encoder's output `[P, D]` to features `[F]`.
        baseline: Name of the plain description that the features are compared with, such as "raw pixels".
        describe: From a sample to what the baseline needs of it.
        rows: From that of all samples, and the task, to the baseline's features `[S, F]`.
    """

    what: str
    find: Callable[[str], LabeledSet]
    read: Callable[[Student, LabeledSet], tuple[Source, Iterator[Sample | str]]]
    pooled: Callable[[Rows], Rows]
    baseline: str
    describe: Callable[[Sample], Any]
    rows: Callable[[list[Any], Task], Rows]


class Probing(NamedTuple):
    """The probes of a modality.

    Attributes:
        sample_set: The value of `d2v.data.kind` that has labels; None if there is none.
        run: Probe networks on the labels of the sample set.
        labeled: The probe of `d2v.probe.path`.
        options: Options of `d2v-fast probe` that name such labels, as an example.
        samples: What they name, in words.
    """

    sample_set: str | None
    run: Callable[[Probed, Any], ProbeReport | ProbeReports]
    labeled: Callable[[Any], Labeled]
    options: tuple[str, ...]
    samples: str


def probing_of(config: PretrainConfig) -> Probing:
    """Return the probes of the configuration's modality.

    Raises:
        DataError: The modality has none.
    """
    modality = modality_of(config)
    if modality.probing is None:
        raise DataError(f'there is no probe for runs of modality "{modality.name}".')
    return modality.probing()
