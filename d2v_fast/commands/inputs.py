"""The encoder of a run folder or a Transformers folder, and the files that it is to encode."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from d2v_fast.checkpoints.best import best_step
from d2v_fast.checkpoints.saved_weights import load_encoder, open_checkpoint, read_run_config
from d2v_fast.config.finetune import FinetuneConfig
from d2v_fast.config.model_paths import explain
from d2v_fast.config.schema import MAX_FILE_BYTES
from d2v_fast.errors import OptionError
from d2v_fast.evaluation.inputs import Encoder, Source
from d2v_fast.files.reading import read_json
from d2v_fast.interop.huggingface import import_model
from d2v_fast.interop.sources import averaged
from d2v_fast.modalities import modality_of, modality_of_model


class Choice(NamedTuple):
    """The options that choose an encoder.

    Attributes:
        folder: A run folder or a Transformers folder.
        weights: "student" or "teacher", of a run folder; None is the student, and of a fine-tuned run its average,
            if it keeps one.
        step: Step of a run's checkpoint; None is the newest, and of a fine-tuned run the best one.
        tokenizer: Of a text model; None is the one that the run names or the folder holds.
    """

    folder: Path
    weights: str | None = None
    step: int | None = None
    tokenizer: Path | None = None


def open_source(choice: Choice, inputs: Path) -> Source:
    """Load an encoder and find the files that it is to encode.

    Args:
        choice: The encoder.
        inputs: A folder of images or recordings; for text a `.txt` file or a folder of them.
    Raises:
        ValueError: The folder is neither kind of folder or cannot be read, `inputs` holds nothing to encode, an option
            does not apply, or the modality has no files to encode.
    """
    encoder = _load(choice)
    modality = modality_of_model(encoder.config) if encoder.run is None else modality_of(encoder.run)
    if modality.open_inputs is None:
        raise ValueError(f'`embed` reads no files for models of modality "{modality.name}".')
    if choice.tokenizer is not None and modality.tokenizer is None:
        raise OptionError(f"`--tokenizer` is for models of text, and that in {choice.folder} is none.")
    return modality.open_inputs(encoder, inputs, choice.tokenizer)


def _load(choice: Choice) -> Encoder:
    folder = choice.folder
    if _is_run(folder):
        run = read_run_config(folder)
        weights, step = choice.weights or averaged(run, "student"), choice.step
        if isinstance(run, FinetuneConfig):
            step = best_step(folder) if step is None else step
            if weights == "teacher" and run.finetune.average_decay is None:
                raise OptionError(f"`--weights teacher` needs an average, and {folder} keeps none. Leave it out.")
        with open_checkpoint(folder, step) as checkpoint:
            model = load_encoder(checkpoint, run, weights)
        origin = f"{weights} of {folder}, step {checkpoint.step}"
        return Encoder(model, origin, folder, run.model, run, checkpoint.state.get("vocabulary"))
    if choice.weights is not None or choice.step is not None:
        raise OptionError(f"`--weights` and `--step` are for run folders, and {folder} is a Transformers folder.")
    model, config = import_model(folder)
    return Encoder(model, f"model in {folder}", folder, config)


def _is_run(folder: Path) -> bool:
    path = folder / "config.json"
    # a run with checkpoints is one even if its configuration is damaged
    if (folder / "checkpoints").is_dir():
        return True
    if not path.is_file():
        reason = explain(folder) or f"`{folder}` holds no config.json."
        raise ValueError(f"`MODEL` must be a run folder or a Transformers folder. {reason}")
    try:
        raw = read_json(path, MAX_FILE_BYTES)
    except ValueError as error:
        raise ValueError(f"`MODEL` must be a run folder or a Transformers folder, but {path}: {error}") from None
    return isinstance(raw, dict) and "d2v" in raw
