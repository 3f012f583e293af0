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
from d2v_fast.figures.sheet import Sheet, Spacing, choose_samples, label_of, say_if_fewer
from d2v_fast.masking import block_masks
from d2v_fast.modalities.vision.batches import image_dataset
from d2v_fast.modalities.vision.config import VisionConfig
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


def choose_images(config: VisionConfig, folder: Path | None, count: int) -> Images:
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


def vision_figure(models: dict[str, Student], images: Images, config: VisionConfig, title: str) -> Figure:
    """Draw one column per image: the image, the masked image, and the patch colors of each model.

    Args:
        models: Encoders, by the name of their row.
        images: From `choose_images`.
        config: The run's.
        title: Of the figure.
    """
    top_k = config.target.top_k
    colors = {name: principal_colors(patch_features(model, images.pixels, top_k)) for name, model in models.items()}
    return _figure(_displayable(images.pixels, config), _draw_masks(config, images.ids), colors, images.names, title)


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


def _draw_masks(config: VisionConfig, sample_ids: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return the masks of the run's first epoch, bool `[B, G, G]`."""
    mask = config.mask
    return block_masks(
        config.run.seed,
        0,
        sample_ids,
        config.model.grid_size,
        mask.num_patches,
        mask.min_patches,
        mask.max_patches,
        mask.min_aspect,
    )


def _displayable(pixels: Tensor, config: VisionConfig) -> NDArray[np.float32]:
    """Undo the normalization: `[B, H, W, 3]` in [0, 1]."""
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (config.data.mean, config.data.std))
    shown = (pixels * std + mean).clamp(0, 1).permute(0, 2, 3, 1)
    return shown.expand(-1, -1, -1, 3).numpy()


def _figure(
    images: NDArray[np.float32],
    masks: NDArray[np.bool_],
    colors: dict[str, NDArray[np.float32]],
    names: list[str],
    title: str,
) -> Figure:
    """Draw one column per image: input, masked input, one picture for each set of colors, and the name."""
    grid_size, patch_size = masks.shape[1], images.shape[1] // masks.shape[1]
    hidden = masks.repeat(patch_size, 1).repeat(patch_size, 2)[..., None]
    rows = {"input": images, "masked input": np.where(hidden, MASK_COLOR, images)}
    rows |= {name: patches.reshape(-1, grid_size, grid_size, 3) for name, patches in colors.items()}
    sheet = Sheet(
        len(images),
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
