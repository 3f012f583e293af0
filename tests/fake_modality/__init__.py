"""A fourth modality, written as another package would write it: sequences of small vectors.

It shows what a modality must define. Nothing in `d2v_fast` names it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from d2v_fast.modalities import Modality
from tests.fake_modality.config import CurvesConfig

if TYPE_CHECKING:
    from pathlib import Path

    from d2v_fast.data import Batch, BatchMaker
    from d2v_fast.evaluation.inputs import Encoder, Source
    from d2v_fast.evaluation.probing import Probing
    from tests.fake_modality.encoder import CurvesModel


def _encoder() -> type[CurvesModel]:
    from tests.fake_modality.encoder import CurvesModel

    return CurvesModel


def _batches(config: CurvesConfig) -> BatchMaker:
    from tests.fake_modality.batches import CurvesBatches

    return CurvesBatches(config)


def _largest_batch(config: CurvesConfig, num_samples: int) -> Batch:
    from tests.fake_modality.batches import largest_batch

    return largest_batch(config, num_samples)


def _open_inputs(encoder: Encoder, inputs: Path, tokenizer: Path | None) -> Source:
    from tests.fake_modality.embed import open_curves

    return open_curves(encoder, inputs)


def _probing() -> Probing:
    from tests.fake_modality.probe import PROBING

    return PROBING


MODALITY = Modality(
    name="curves",
    place="point",
    config=CurvesConfig,
    encoder=_encoder,
    batches=_batches,
    largest_batch=_largest_batch,
    open_inputs=_open_inputs,
    probing=_probing,
)
