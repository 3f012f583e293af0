"""Draw images, their masks, and an encoder's patch features as colors.

The color of a patch is its feature projected onto the first three principal components of all patches shown, so that
patches with similar features have similar colors.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from d2v_fast.data.listing import counted, print_listing
from d2v_fast.errors import DataError
from d2v_fast.evaluation.features import patch_features
from d2v_fast.figures.sheet import MAX_MASKS, Sheet, Spacing, choose_samples, label_of, say_if_fewer
from d2v_fast.masking import block_masks, several_image_masks
from d2v_fast.modalities.vision.batches import image_dataset
from d2v_fast.modalities.vision.config import ImagesConfig, VisionConfig
from d2v_fast.modalities.vision.config2 import MaskedVisionConfig
from d2v_fast.modalities.vision.images import ImagesDataset
from d2v_fast.models.student import Student

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MASK_COLOR = (0.42, 0.45, 0.50)

# quantiles at which colors are clipped, so that a few outliers do not use up the range
LOWEST_SHARE, HIGHEST_SHARE = 0.01, 0.99


class Images(NamedTuple):
    """Images to draw.

    Attributes:
        pixels: Normalized, `[B, C, H, W]`.
        ids: Sample ids, `[B]`.
        names: One for each image.
    """

    pixels: Tensor
    ids: NDArray[np.int64]
    names: list[str]


def choose_images(config: ImagesConfig, folder: Path | None, count: int) -> Images:
    """Choose different images, spread evenly over the data set.

    Args:
        config: The run's.
        folder: A folder of images; None is the run's own data, or the held-out digits.
        count: Images to choose; fewer if there are not so many.
    Raises:
        DataError: No image can be read.
    """
    data = config.data
    if folder is not None:
        data = data.model_copy(update={"kind": "images", "path": str(folder)})
    config = config.model_copy(update={"data": data})
    dataset = image_dataset(config, split="test" if data.kind == "digits" else "train")
    print_listing(dataset.listing, counted(len(dataset), "image"), sys.stderr)
    seen: set[bytes] = set()

    def read(sample_id: int) -> Tensor:
        pixels = dataset.exactly(sample_id) if isinstance(dataset, ImagesDataset) else dataset[sample_id]
        content = pixels.numpy().tobytes()
        if content in seen:
            raise DataError("shown already")
        seen.add(content)
        return pixels

    found = choose_samples(len(dataset), count, read)
    ids = np.array(list(found), dtype=np.int64)
    if isinstance(dataset, ImagesDataset):
        names = [os.path.relpath(dataset.path(sample_id), dataset.root) for sample_id in found]
    else:
        names = [f"sample {sample_id}" for sample_id in found]
    say_if_fewer(len(ids), count, "images")
    return Images(torch.stack(list(found.values())), ids, names)


def vision_figure(
    models: dict[str, Student], images: Images, config: VisionConfig | MaskedVisionConfig, title: str
) -> Figure:
    """Draw one column per image: the image, its masks, and the patch colors of each model.

    Args:
        models: Encoders, by the name of their row.
        images: From `choose_images`.
        config: The run's.
        title: Of the figure.
    """
    top_k = config.target.top_k
    colors = {name: principal_colors(patch_features(model, images.pixels, top_k)) for name, model in models.items()}
    masks = _draw_masks(config, images.ids)
    shown = _displayable(images.pixels, config)
    return _figure({"input": shown, **_masked(shown, masks)}, colors, images.names, title)


def principal_colors(features: Tensor) -> NDArray[np.float32]:
    """Return red, green, blue in [0, 1], fp32 `[B, P, 3]`: three principal components of all B * P features.

    Each component is scaled to fill the range; its sign, which is arbitrary, makes the longer tail bright. Components
    that the features lack (three or fewer patches, width under 3) are 0.5.
    """
    points = features.flatten(0, 1).double()
    centered = points - points.mean(0)
    _, _, directions = torch.linalg.svd(centered, full_matrices=False)
    projected = centered @ directions[:3].T
    projected = projected * projected.pow(3).sum(0).sign()
    low, high = (projected.quantile(share, dim=0) for share in (LOWEST_SHARE, HIGHEST_SHARE))
    span = high - low
    negligible = span <= 1e-9 * points.abs().max()
    scaled = torch.where(negligible, 0.5, (projected - low) / torch.where(negligible, 1.0, span)).clamp(0, 1)
    colors = torch.full((len(points), 3), 0.5, dtype=torch.float64)
    colors[:, : scaled.shape[1]] = scaled
    return colors.view(*features.shape[:2], 3).float().numpy()


def _draw_masks(
    config: VisionConfig | MaskedVisionConfig, sample_ids: NDArray[np.int64]
) -> dict[str, NDArray[np.bool_]]:
    """Return masks of the run's first epoch, bool `[B, G, G]` each, by the name of their row."""
    begin = config.run.seed, 0, sample_ids, config.model.grid_size
    if not isinstance(config, MaskedVisionConfig):
        mask = config.mask
        drawn = block_masks(*begin, mask.num_patches, mask.min_patches, mask.max_patches, mask.min_aspect)
        return {"masked input": drawn}
    several, (_, _, ids, size) = config.mask, begin
    num = several.num_masks
    rows = several_image_masks(*begin, several.prob, several.length, several.prob_adjust, num_masks=num).rows
    masks = np.zeros((len(ids), num, size, size), dtype=np.bool_)
    masks.flat[rows] = True
    return {f"mask {m + 1} of {num}": masks[:, m] for m in range(min(num, MAX_MASKS))}


def _masked(images: NDArray[np.float32], masks: dict[str, NDArray[np.bool_]]) -> dict[str, NDArray[np.float32]]:
    """Return the images `[B, H, W, 3]` with the masked patches in one color."""
    rows = {}
    for name, mask in masks.items():
        patch_size = images.shape[1] // mask.shape[1]
        hidden = mask.repeat(patch_size, 1).repeat(patch_size, 2)[..., None]
        rows[name] = np.where(hidden, np.asarray(MASK_COLOR, np.float32), images)
    return rows


def _displayable(pixels: Tensor, config: ImagesConfig) -> NDArray[np.float32]:
    """Undo the normalization: `[B, H, W, 3]` in [0, 1]."""
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (config.data.mean, config.data.std))
    shown = (pixels * std + mean).clamp(0, 1).permute(0, 2, 3, 1)
    return shown.expand(-1, -1, -1, 3).numpy()


def _figure(
    images: dict[str, NDArray[np.float32]],
    colors: dict[str, NDArray[np.float32]],
    names: list[str],
    title: str,
) -> Figure:
    """Draw one column per image: it and its masks, one picture for each set of colors, and the name."""
    grids = {name: round(patches.shape[1] ** 0.5) for name, patches in colors.items()}
    rows = images | {name: patches.reshape(-1, grids[name], grids[name], 3) for name, patches in colors.items()}
    sheet = Sheet(
        len(names),
        list(rows),
        Spacing(cell=1.1, below=0.42),
        title=title,
        caption="colors: first three principal components of the patch features",
    )
    for index, name in enumerate(names):
        axes = sheet.axes(index)
        for pictures, axis in zip(rows.values(), axes, strict=True):
            axis.imshow(pictures[index], interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        axes[-1].set_xlabel(label_of(name), fontsize=6, labelpad=3, parse_math=False)
    return sheet.figure
