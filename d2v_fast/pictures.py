"""What an encoder makes of its input: images or recordings, masks, and features, before and after pre-training.

    d2v-fast draw runs/digits-1
    d2v-fast draw runs/base --data /data/birds --count 12 --weights teacher --out birds.png

Of an image, a patch gets the colour of its feature on the first three principal components of all patches shown:
patches that the encoder takes for similar have similar colours. Of a recording, a square shows which moments have
similar features. The untrained network goes through the same procedure.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from d2v_fast.config import D2VConfig, SpeechConfig, VisionConfig
from d2v_fast.data import image_dataset
from d2v_fast.data.listing import counted, print_listing
from d2v_fast.data2vec import build_model
from d2v_fast.export import SavedWeights, load_weights, newest_checkpoint, read_run_config
from d2v_fast.masking import block_masks
from d2v_fast.modalities import Student, encoder_class
from d2v_fast.probe import patch_features

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MASK_COLOUR = (0.42, 0.45, 0.50)
MAX_COUNT = 24

# of the colours: the few patches beyond are clipped, or they would take the whole range for themselves
LOWEST_SHARE, HIGHEST_SHARE = 0.01, 0.99


class Weights(NamedTuple):
    """An encoder out of a checkpoint, and where it came from."""

    model: Student
    name: str
    step: int


def main(arguments: Sequence[str] | None = None) -> int:
    """`d2v-fast draw`; returns the exit status."""
    from d2v_fast.console import main as console

    return console(["draw", *(sys.argv[1:] if arguments is None else arguments)])


def draw(
    run_folder: Path, *, data: Path | None = None, count: int = 8, weights: str = "student", out: Path | None = None
) -> Path:
    """Draw one picture; returns its path.

    Args:
        run_folder: of a run that has saved a checkpoint.
        data: a folder of images or recordings to show; None shows the run's own data, held-out ones where there are.
        count: how many of them.
        weights: "student" or "teacher".
        out: where to write; None writes `features.png` into the run folder.
    Raises:
        ValueError: no run, no checkpoint, no data, or an impossible count.
    """
    if not 1 <= count <= MAX_COUNT:
        raise ValueError(f"`--count` must be in [1, {MAX_COUNT}], but is {count} instead.")
    config = read_run_config(run_folder)
    if not isinstance(config, VisionConfig | SpeechConfig):
        kind = config.modality
        raise ValueError(f"`{run_folder}` must be of a run on images or recordings, but is of one on {kind}.")
    trained = newest_weights(run_folder, config, weights)
    torch.manual_seed(config.run.seed)
    models = {"untrained": build_model(config).student, f"{trained.name},\nstep {trained.step:,}": trained.model}
    out = run_folder / "features.png" if out is None else out
    title = run_folder.resolve().name
    if isinstance(config, SpeechConfig):
        from d2v_fast.speech_pictures import choose_recordings, draw_speech

        draw_speech(models, choose_recordings(config, data, count), config, title, out)
        return out
    pixels, sample_ids = _choose_images(config, data, count)
    masks = _draw_masks(config, sample_ids)
    colours = {
        name: principal_colours(patch_features(model, pixels, config.target.top_k)) for name, model in models.items()
    }
    figure = _figure(_displayable(pixels, config), masks, colours, title)
    figure.savefig(out, dpi=150, bbox_inches="tight", pad_inches=0.1)
    return out


def newest_weights(run_folder: Path, config: D2VConfig, name: str) -> Weights:
    """The encoder `name` ("student" or "teacher") of the newest checkpoint."""
    folder, step = newest_checkpoint(run_folder)
    model = build_model(config).student
    load_weights(model, SavedWeights(folder, name, encoder_class(config).averaged_prefix()), folder)
    return Weights(model, name, step)


def principal_colours(features: Tensor) -> NDArray[np.float32]:
    """Red, green, blue in [0, 1], fp32 `[B, P, 3]`: the first three principal components over all B * P patches.

    Each component is scaled to fill the range; its sign, which is arbitrary, makes the longer tail bright. Components
    that the features do not have (three or fewer patches, width under 3) are 0.5.
    """
    points = features.flatten(0, 1).double()
    centred = points - points.mean(0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    projected = centred @ directions[:3].T
    projected = projected * projected.pow(3).sum(0).sign()
    low, high = (projected.quantile(share, dim=0) for share in (LOWEST_SHARE, HIGHEST_SHARE))
    span = high - low
    negligible = span <= 1e-9 * points.abs().max()
    scaled = torch.where(negligible, 0.5, (projected - low) / torch.where(negligible, 1.0, span)).clamp(0, 1)
    colours = torch.full((len(points), 3), 0.5, dtype=torch.float64)
    colours[:, : scaled.shape[1]] = scaled
    return colours.view(*features.shape[:2], 3).float().numpy()


def _choose_images(config: VisionConfig, folder: Path | None, count: int) -> tuple[Tensor, NDArray[np.int64]]:
    """Normalised pixels `[B, C, H, W]` of samples spread evenly over the data set, and their ids."""
    data = config.data
    if folder is not None:
        data = data.model_copy(update={"kind": "images", "path": str(folder)})
    config = config.model_copy(update={"data": data})
    dataset = image_dataset(config, split="test" if data.kind == "digits" else "train")
    print_listing(dataset.listing, counted(len(dataset), "image"), sys.stderr)
    sample_ids = np.unique(np.linspace(0, len(dataset) - 1, count, dtype=np.int64))
    return dataset.plain(sample_ids), sample_ids


def _draw_masks(config: VisionConfig, sample_ids: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Bool `[B, G, G]`, as the first epoch of the run would draw them."""
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
    """Undo the normalisation: `[B, H, W, 3]` in [0, 1]."""
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (config.data.mean, config.data.std))
    shown = (pixels * std + mean).clamp(0, 1).permute(0, 2, 3, 1)
    return shown.expand(-1, -1, -1, 3).numpy()


def _figure(
    images: NDArray[np.float32], masks: NDArray[np.bool_], colours: dict[str, NDArray[np.float32]], title: str
) -> Figure:
    """One column per image; rows: input, masked input, and one for each set of colours."""
    from matplotlib.figure import Figure

    grid_size, patch_size = masks.shape[1], images.shape[1] // masks.shape[1]
    hidden = masks.repeat(patch_size, 1).repeat(patch_size, 2)[..., None]
    rows = {"input": images, "masked input": np.where(hidden, MASK_COLOUR, images)}
    rows |= {name: patches.reshape(-1, grid_size, grid_size, 3) for name, patches in colours.items()}

    # inches
    cell, label, header = 1.1, 1.15, 0.5
    width, height = label + cell * len(images), header + cell * len(rows)
    figure = Figure(figsize=(width, height), facecolor="white")
    axes = figure.subplots(len(rows), len(images), squeeze=False)
    figure.subplots_adjust(left=label / width, right=1, bottom=0, top=1 - header / height, wspace=0.06, hspace=0.06)
    for (name, pictures), row in zip(rows.items(), axes, strict=True):
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9, labelpad=6)
        for picture, axis in zip(pictures, row, strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
    figure.text(0, 1, title, fontsize=11, fontweight="bold", va="top")
    caption = "colours: first three principal components of the patch features"
    figure.text(0, 1 - 0.22 / height, caption, fontsize=8, color="0.4", va="top")
    return figure


if __name__ == "__main__":
    sys.exit(main())
