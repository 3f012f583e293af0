"""`d2v-fast export`: write a checkpoint's weights for another library.

    d2v-fast export runs/NAME                            # student of the newest checkpoint -> runs/NAME/export
    d2v-fast export runs/NAME --weights teacher          # its teacher -> runs/NAME/export-teacher
    d2v-fast export runs/NAME --format fairseq           # speech, text: student, head, teacher -> runs/NAME/export.pt
    d2v-fast export runs/NAME --format beit              # images, for the published code -> runs/NAME/export.pth
    d2v-fast export runs/NAME --format onnx              # the student -> runs/NAME/export.onnx

Needs neither a GPU nor the processes of the run, and holds no more than one file of weights in memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from d2v_fast.checkpoints.best import best_step, read_validations
from d2v_fast.checkpoints.files import Checkpoint
from d2v_fast.checkpoints.saved_weights import (
    WEIGHTS,
    encoder_weights,
    load_encoder,
    open_checkpoint,
    read_run_config,
)
from d2v_fast.command_lines import resume_command
from d2v_fast.config import D2VConfig
from d2v_fast.config.finetune import FinetuneConfig
from d2v_fast.errors import OptionError, RunError
from d2v_fast.files.outputs import require_file, require_free, require_writable, set_aside_changed
from d2v_fast.interop.formats import HuggingFace, Published, forms_of
from d2v_fast.interop.sources import averaged
from d2v_fast.modalities import modality_of
from d2v_fast.models.weights import require_finite


def export_run(
    run_folder: Path,
    *,
    to: Path | None = None,
    weights: str = "student",
    step: int | None = None,
    form: str = "transformers",
    tokenizer: Path | None = None,
    overwrite: bool = False,
    **options: Any,
) -> str:
    """Write a checkpoint's weights for another library; returns a line for the user.

    Args:
        run_folder: `runs/NAME`.
        to: The folder to write, or the file for other formats than "transformers". None writes into the run folder:
            `export`, `export.pt`, `export.pth` or `export.onnx`, and for a teacher `export-teacher` or
            `export-teacher.onnx`. Earlier exports there are replaced; a folder with changed files is renamed first.
        weights: "student" or "teacher". A file of the published code's format holds both.
        step: Step of the checkpoint; None exports the newest, and of a fine-tuned run the best.
        form: "transformers", "fairseq", "beit" or "onnx", as far as the run's modality has it.
        tokenizer: Of a text run, for Transformers; None is the one that the run's configuration names.
        overwrite: Replace the file `to`, or in the folder `to` the files of an earlier export.
        options: Of the modality's function that writes Transformers folders.
    Raises:
        ValueError: There is no run or no such checkpoint, or it is damaged; the modality or the run has no such format;
            `to` exists; or the tokenizer cannot be read or is not the model's.
    """
    config = read_run_config(run_folder)
    suffix = _require_form(config, form, weights, tokenizer)
    renamed = None
    if to is None:
        require_writable(run_folder)
        # the teacher has its own name, so that it does not replace the student that the run left there
        name = f"export-{weights}" if weights == "teacher" and form in ("transformers", "onnx") else "export"
        to = run_folder / f"{name}{suffix}"
        renamed = set_aside_changed(to) if form == "transformers" else None
    elif form == "transformers":
        require_free(to, overwrite)
    else:
        require_file(to, overwrite)
    modality = modality_of(config)
    if step is None and isinstance(config, FinetuneConfig):
        step = best_step(run_folder)
    with open_checkpoint(run_folder, step) as checkpoint:
        what, owner = "encoder and head" if isinstance(config, FinetuneConfig) else weights, "as ONNX"
        if form == "onnx":
            from d2v_fast.interop.onnx import export_onnx

            export_onnx(load_encoder(checkpoint, config, weights), config, to)
        elif form == "transformers":
            assert modality.huggingface is not None
            _write_folder(modality.huggingface(), checkpoint, config, weights, to, tokenizer, **options)
            owner = "for Transformers"
        else:
            assert modality.published is not None
            published = modality.published()
            _write_published(published, checkpoint, config, to)
            what, owner = "student and teacher", f"for {published.owner}"
    line = f"export: {to} ({what}, step {checkpoint.step}, {owner})"
    return line if renamed is None else f"{renamed}\n{line}"


def export_student(run_folder: Path, *, step: int | None = None) -> str:
    """Write the student of a run's checkpoint as a Transformers folder; returns a line for the user.

    A missing package, or a model that Transformers' folders cannot hold, is reported in the line and is no error.

    Args:
        run_folder: `runs/NAME`.
        step: Step of the checkpoint; None exports the newest.
    Raises:
        RunError: Something else is missing or damaged, such as the tokenizer.
    """
    modality = modality_of(read_run_config(run_folder))
    if modality.huggingface is None:
        return f'no export: Transformers has no model of modality "{modality.name}"'
    try:
        return export_run(run_folder, step=step)
    except ImportError as error:
        return f"no export: {error.name} is not installed"
    except OptionError as error:
        return f"no export: {error}"
    except ValueError as error:
        raise RunError(
            f"the run is trained and saved, but cannot be exported: {error} After that is repaired: "
            f"{resume_command(run_folder)}"
        ) from error


def _require_form(config: D2VConfig, form: str, weights: str, tokenizer: Path | None) -> str:
    """Return the suffix of what an export writes.

    Raises:
        OptionError: The modality has no such format, or the options do not go together.
    """
    modality = modality_of(config)
    forms = forms_of(modality)
    if not forms:
        raise OptionError(
            f'`export` has no format for runs of modality "{modality.name}": no other library has such an encoder. '
            "`d2v-fast embed` writes its features."
        )
    if form not in forms:
        *others, last = forms
        known = f"{', '.join(others)} or {last}" if others else last
        raise OptionError(f"`--format` must be {known} for {modality.name}, but is {form}.")
    if tokenizer is not None and (form != "transformers" or modality.tokenizer is None):
        raise OptionError("`--tokenizer` is for text runs, and for Transformers: nothing else holds one.")
    published = None if modality.published is None else modality.published()
    if published is not None and form == published.form and weights == "teacher":
        raise OptionError(
            f"`--weights` is for the other formats: a file for {form} holds both, the teacher as `{published.average}`."
        )
    return forms[form]


def _write_folder(
    found: HuggingFace,
    checkpoint: Checkpoint,
    config: D2VConfig,
    weights: str,
    to: Path,
    tokenizer: Path | None,
    **options: Any,
) -> None:
    fine_tuned = isinstance(config, FinetuneConfig)
    saved = encoder_weights(checkpoint, config, averaged(config, weights))
    info: dict[str, object] = {"weights": weights, "step": checkpoint.step}
    if fine_tuned:
        require_finite(saved.head().items(), f"`{checkpoint.folder}`")
        info = _about_validation(checkpoint)
    # before anything is written; one tensor is in memory at a time
    require_finite(saved.items(), f"`{checkpoint.folder}`")
    load = modality_of(config).tokenizer
    if load is not None:
        options["tokenizer"] = load(config, tokenizer, saved.vocabulary, str(checkpoint.folder.parent.parent))
    found.write(saved, config, to, info=info, **options)


def _about_validation(checkpoint: Checkpoint) -> dict[str, object]:
    """Return step and metrics of a fine-tuned run's checkpoint."""
    entries = read_validations(checkpoint.folder.parent.parent)
    found = next((entry for entry in entries if entry["step"] == checkpoint.step), {})
    metrics = {key: f"{value:.4f}" for key, value in found.items() if isinstance(value, float) and key != "value"}
    held_out = {"held-out samples": found["samples"]} if found else {}
    return {"step": checkpoint.step, **held_out, **metrics}


def _write_published(found: Published, checkpoint: Checkpoint, config: D2VConfig, to: Path) -> None:
    """Write student, head and teacher."""
    saved, teacher = (encoder_weights(checkpoint, config, weights) for weights in WEIGHTS)
    head = saved.head()
    for part in (saved, teacher, head):
        require_finite(part.items(), f"`{checkpoint.folder}`")
    found.check(config)
    found.write(saved, head, teacher, config, to, num_updates=checkpoint.step)
