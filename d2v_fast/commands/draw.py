"""`d2v-fast draw`: a picture of inputs, masks and features, before and after pre-training.

    d2v-fast draw runs/digits-1
    d2v-fast draw runs/base --data /data/birds --count 12 --weights teacher --out birds.png

The untrained network goes through the same procedure as the trained one.
"""

from __future__ import annotations

from pathlib import Path

import torch

from d2v_fast.checkpoints.saved_weights import load_encoder, open_checkpoint, read_run_config
from d2v_fast.config.finetune import FinetuneConfig
from d2v_fast.errors import DataError, OptionError
from d2v_fast.figures.sheet import MAX_COUNT, save_figure
from d2v_fast.files.outputs import require_file, require_writable
from d2v_fast.modalities import all_modalities, build_student, modality_of


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
        run_folder: Folder of a run that has saved a checkpoint.
        data: A folder of images or recordings to show; None shows the run's own data, held out if there are such.
        count: How many of them.
        weights: "student" or "teacher".
        out: The file to write; None replaces `features.png` in the run folder.
        overwrite: Replace the file `out`.
    Raises:
        ValueError: There is no run, no checkpoint or no data, `count` is out of range, or the modality has no pictures.
    """
    if not 1 <= count <= MAX_COUNT:
        raise OptionError(f"`--count` must be in [1, {MAX_COUNT}], but is {count} instead.")
    if out is not None:
        require_file(out, overwrite, "`--out`")
    config = read_run_config(run_folder)
    if out is None:
        require_writable(run_folder, "`--out`")
    modality = modality_of(config)
    if isinstance(config, FinetuneConfig):
        raise ValueError(f"`RUN_FOLDER` must be a pre-trained run, but {run_folder} is fine-tuned: see its curves.png.")
    if modality.draw is None:
        drawn = " or ".join(one.name for one in all_modalities() if one.draw is not None)
        raise ValueError(
            f"`RUN_FOLDER` must be a run on {drawn} to be drawn, but {run_folder} is one on {modality.name}. "
            "`d2v-fast probe` and `d2v-fast embed` look into its features."
        )
    with open_checkpoint(run_folder) as checkpoint:
        trained, step = load_encoder(checkpoint, config, weights), checkpoint.step
    torch.manual_seed(config.run.seed)
    models = {"untrained": build_student(config), f"{weights},\nstep {step:,}": trained}
    try:
        figure = modality.draw(models, config, data, count, run_folder.resolve().name)
    except DataError as error:
        if data is None:
            raise
        raise OptionError(str(error).replace("`d2v.data.path`", "`--data`")) from None
    out = run_folder / "features.png" if out is None else out
    save_figure(figure, out)
    return out
