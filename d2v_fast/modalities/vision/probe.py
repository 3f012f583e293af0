"""Probes of image features: on the digits of the sample set, or on a user's own labels.

Features of an image are the last block's output, layer-normalized, averaged over all patches or over the patches of
each cell of a coarse grid, which keeps rough positions (2x2 gives the four quadrants of Coates, Ng and Lee, AISTATS
2011). The baselines are the network before training and the raw pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from d2v_fast.data.labels import LabeledSet, labeled_files
from d2v_fast.evaluation.classifiers import ProbeReport, Task, score
from d2v_fast.evaluation.features import patch_features
from d2v_fast.evaluation.inputs import Rows, Sample, Source
from d2v_fast.evaluation.probing import Labeled, Probed, Probing
from d2v_fast.modalities.vision.config import ImagesConfig, VisionProbeConfig
from d2v_fast.modalities.vision.digits import ProbeData, digits_for_probe
from d2v_fast.modalities.vision.embed import Images
from d2v_fast.modalities.vision.images import KINDS
from d2v_fast.models.student import Student

PIXELS = "raw pixels"
# side of the baseline's images: more pixels take longer to classify and score no better
MAX_SIDE = 32
_BATCH = 256


def image_features(model: Student, images: Tensor, grid: int = 1) -> NDArray[np.float32]:
    """Compute the last block's `patch_features`, averaged over the patches of each cell.

    Args:
        model: The encoder.
        images: fp32 `[S, C, H, W]`, normalized.
        grid: Cells along one side. 1 averages over all patches, whose number then need not be a square.
    Returns:
        fp32 `[S, D * grid * grid]`.
    """
    pooled = [pool(patch_features(model, batch, top_k=1), grid).cpu() for batch in images.split(_BATCH)]
    return torch.cat(pooled).numpy()


def run_probe(models: Mapping[str, Student], data: ProbeData, config: VisionProbeConfig) -> ProbeReport:
    """Score every model's features, and the raw pixels.

    Args:
        models: Encoders, by their name in the table.
        data: Images prepared for the encoder, labels, and the split.
        config: Of the probe.
    """
    images = torch.as_tensor(data.images)
    task = Task(*(np.asarray(part) for part in (data.labels, data.train_indices, data.test_indices)))
    scores = {name: score(image_features(model, images, config.grid), task, config) for name, model in models.items()}
    scores[PIXELS] = score(images.flatten(1).numpy(), task, config)
    return ProbeReport(scores, config)


def pool(patches_BPD: Tensor, grid: int) -> Tensor:
    """Average patch features `[B, P, D]` over every cell of a `grid` x `grid` division of the image.

    Returns:
        `[B, D * grid * grid]`; cells overlap where `grid` does not divide the patches.
    """
    if grid == 1:
        return patches_BPD.mean(1)
    B, P, D = patches_BPD.shape
    side = math.isqrt(P)
    return F.adaptive_avg_pool2d(patches_BPD.mT.reshape(B, D, side, side), grid).flatten(1)


def _labeled(config: ImagesConfig) -> Labeled:
    side = min(config.model.image_size, MAX_SIDE)

    def find(key: str) -> LabeledSet:
        probe, follow = config.probe, config.data.follow_outside
        return labeled_files(str(probe.path), KINDS, probe.max_samples, follow_outside=follow, key=key)

    def read(model: Student, found: LabeledSet) -> tuple[Source, Iterator[Sample | str]]:
        paths = [sample.name for sample in found.samples]
        source = Images(model, "", Path(found.root), config.model, config.data, paths)
        return source, source.samples()

    def pooled(patches: Rows) -> Rows:
        return pool(torch.from_numpy(patches)[None], config.probe.grid)[0].numpy()

    def pixels(sample: Sample) -> Rows:
        return F.adaptive_avg_pool2d(sample.parts[0], side).flatten().numpy()

    name = PIXELS if side == config.model.image_size else f"pixels, {side} x {side}"
    return Labeled("image", find, read, pooled, name, pixels, lambda rows, task: np.stack(rows))


def _run(probed: Probed, config: ImagesConfig) -> ProbeReport:
    return run_probe(probed.encoders, digits_for_probe(config), config.probe)


PROBING = Probing("digits", _run, _labeled, ("--data", "FOLDER"), "images whose sub-folders are classes")
