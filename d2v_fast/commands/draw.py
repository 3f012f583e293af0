"""What an encoder makes of its input: images or recordings, masks, and features, before and after pre-training.

    d2v-fast draw runs/digits-1
    d2v-fast draw runs/base --data /data/birds --count 12 --weights teacher --out birds.png

Of an image, a patch gets the color of its feature on the first three principal components of all patches shown:
patches that the encoder takes for similar have similar colors. Of a recording, a square shows which moments have
similar features. The untrained network goes through the same procedure.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from d2v_fast.checkpoints.saved_weights import load_encoder, open_checkpoint, read_run_config
from d2v_fast.config import D2VConfig, SpeechConfig, VisionConfig
from d2v_fast.config.errors import OptionError
from d2v_fast.data import DataError
from d2v_fast.data.listing import counted, print_listing
from d2v_fast.evaluation.features import patch_features
from d2v_fast.figures.sheet import MAX_COUNT, Sheet, choose_samples, label_of, save_figure, say_if_fewer
from d2v_fast.files.outputs import require_file, require_writable
from d2v_fast.masking import block_masks
from d2v_fast.modalities.vision.batches import image_dataset
from d2v_fast.modalities.vision.images import ImagesDataset
from d2v_fast.models.student import Student
from d2v_fast.objectives.data2vec import build_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MASK_COLOR = (0.42, 0.45, 0.50)

# of the colors: the few patches beyond are clipped, or they would take the whole range for themselves
LOWEST_SHARE, HIGHEST_SHARE = 0.01, 0.99


class Weights(NamedTuple):
    """An encoder out of a checkpoint, and where it came from."""

    model: Student
    name: str
    step: int


def main(arguments: Sequence[str] | None = None) -> int:
    """`d2v-fast draw`; returns the exit status."""
    from d2v_fast.commands.console import main as console

    return console(["draw", *(sys.argv[1:] if arguments is None else arguments)])


def draw(
    run_folder: Path,
    *,
    data: Path | None = None,
    count: int = 8,
    weights: str = "student",
    out: Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Draw one picture; returns its path.

    Args:
        run_folder: of a run that has saved a checkpoint.
        data: a folder of images or recordings to show; None shows the run's own data, held-out ones where there are.
        count: how many of them.
        weights: "student" or "teacher".
        out: where to write; None writes `features.png` into the run folder, which is replaced.
        overwrite: replace the file `out`.
    Raises:
        ValueError: no run, no checkpoint, no data, or an impossible count.
    """
    if not 1 <= count <= MAX_COUNT:
        raise OptionError(f"`--count` must be in [1, {MAX_COUNT}], but is {count} instead.")
    if out is not None:
        require_file(out, overwrite, "`--out`")
    config = read_run_config(run_folder)
    if out is None:
        require_writable(run_folder, "`--out`")
    if not isinstance(config, VisionConfig | SpeechConfig):
        raise ValueError(
            f"`RUN_FOLDER` must be a run on images or recordings to be drawn, but {run_folder} is one on "
            f"{config.modality}. `d2v-fast probe` and `d2v-fast embed` look into its features."
        )
    trained = newest_weights(run_folder, config, weights)
    torch.manual_seed(config.run.seed)
    models = {"untrained": build_model(config).student, f"{trained.name},\nstep {trained.step:,}": trained.model}
    out = run_folder / "features.png" if out is None else out
    title = run_folder.resolve().name
    if isinstance(config, SpeechConfig):
        from d2v_fast.modalities.speech.pictures import choose_recordings, speech_figure

        with _naming_option(data):
            recordings = choose_recordings(config, data, count)
        say_if_fewer(len(recordings), count, "recordings")
        save_figure(speech_figure(models, recordings, config, title), out)
        return out
    with _naming_option(data):
        images = _choose_images(config, data, count)
    say_if_fewer(len(images.names), count, "images")
    masks = _draw_masks(config, images.ids)
    colors = {
        name: principal_colors(patch_features(model, images.pixels, config.target.top_k))
        for name, model in models.items()
    }
    save_figure(_figure(_displayable(images.pixels, config), masks, colors, images.names, title), out)
    return out


@contextmanager
def _naming_option(data: Path | None) -> Iterator[None]:
    """Let errors of a data set name the option that it comes from."""
    try:
        yield
    except DataError as error:
        if data is None:
            raise
        raise OptionError(str(error).replace("`d2v.data.path`", "`--data`")) from None


def newest_weights(run_folder: Path, config: D2VConfig, name: str) -> Weights:
    """The encoder `name` ("student" or "teacher") of the newest checkpoint."""
    with open_checkpoint(run_folder) as checkpoint:
        return Weights(load_encoder(checkpoint, config, name), name, checkpoint.step)


def principal_colors(features: Tensor) -> NDArray[np.float32]:
    """Red, green, blue in [0, 1], fp32 `[B, P, 3]`: the first three principal components over all B * P patches.

    Each component is scaled to fill the range; its sign, which is arbitrary, makes the longer tail bright. Components
    that the features do not have (three or fewer patches, width under 3) are 0.5.
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


class _Images(NamedTuple):
    """Normalized pixels `[B, C, H, W]`, sample ids `[B]`, and a name for each."""

    pixels: Tensor
    ids: NDArray[np.int64]
    names: list[str]


def _choose_images(config: VisionConfig, folder: Path | None, count: int) -> _Images:
    """Images spread evenly over the data set, no two of them alike."""
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
    return _Images(torch.stack(list(found.values())), ids, names)


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
    """One column per image: input, masked input, one picture for each set of colors, and the name."""
    grid_size, patch_size = masks.shape[1], images.shape[1] // masks.shape[1]
    hidden = masks.repeat(patch_size, 1).repeat(patch_size, 2)[..., None]
    rows = {"input": images, "masked input": np.where(hidden, MASK_COLOR, images)}
    rows |= {name: patches.reshape(-1, grid_size, grid_size, 3) for name, patches in colors.items()}
    sheet = Sheet(
        len(images),
        list(rows),
        cell=1.1,
        below=0.42,
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


if __name__ == "__main__":
    sys.exit(main())
