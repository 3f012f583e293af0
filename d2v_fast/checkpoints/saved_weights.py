"""Weights out of the checkpoints of a run, whatever division they were written in, and their export.

    d2v-fast export runs/NAME                 # the student of the newest good checkpoint -> runs/NAME/export
    d2v-fast export runs/NAME --weights teacher          # its teacher -> runs/NAME/export-teacher
    d2v-fast export runs/NAME --format fairseq           # student, head and teacher -> runs/NAME/export.pt
    d2v-fast export runs/NAME --format beit              # of images, for the published code -> runs/NAME/export.pth
    d2v-fast export runs/NAME --format onnx              # the student -> runs/NAME/export.onnx

No GPU and none of the processes of the run are needed, and no more than one file of weights is in memory at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2v_fast.checkpoints.files import Checkpoint, complete_steps, verified_checkpoint
from d2v_fast.checkpoints.hold import hold
from d2v_fast.checkpoints.saved_config import saved_config
from d2v_fast.checkpoints.shard_files import DamageError
from d2v_fast.config import ConfigError, D2VConfig, TextConfig, VisionConfig, check_d2v
from d2v_fast.config.errors import OptionError
from d2v_fast.files.outputs import require_file, require_free, require_writable, set_aside_changed
from d2v_fast.interop.layout import require_finite
from d2v_fast.interop.sources import explain
from d2v_fast.modalities import build_student, modality_of
from d2v_fast.models.student import Student

WEIGHTS = ("student", "teacher")
# to open the newest checkpoint of a run that saves, and deletes the one before
_MOST_TRIES = 100


class SavedWeights(Mapping[str, Tensor]):
    """The whole encoder of student or teacher in a checkpoint: fp32 tensors by name, each read when it is asked for.

    Args:
        checkpoint: open, and verified.
        weights: "student" or "teacher".
        averaged_prefix: of the encoder's class, see `Student.averaged_prefix`: what the teacher's names lack. The rest
            of the teacher is the student's.
    Attributes:
        vocabulary: digest of the tokenizer whose ids the model was trained with; None where there is none, or where
            it is not known.
    Raises:
        ValueError: `weights` is something else.
    """

    def __init__(self, checkpoint: Checkpoint, weights: str, averaged_prefix: str = "") -> None:
        if weights not in WEIGHTS:
            raise ValueError(f"`weights` must be student or teacher, but is {weights} instead.")
        shapes, self.vocabulary = checkpoint.state["shapes"], checkpoint.state.get("vocabulary")
        self._reader = checkpoint.reader()
        # a student is saved together with its head, as parts of one model
        self._saved = {
            name.removeprefix("student/student."): name for name in shapes if name.startswith("student/student.")
        }
        if weights == "teacher":
            averages = [name for name in shapes if name.startswith("teacher/")]
            self._saved |= {averaged_prefix + name.removeprefix("teacher/"): name for name in averages}

    def __getitem__(self, name: str) -> Tensor:
        return self._reader.whole(self._saved[name])

    def __contains__(self, name: object) -> bool:
        return name in self._saved

    def __iter__(self) -> Iterator[str]:
        return iter(self._saved)

    def __len__(self) -> int:
        return len(self._saved)

    def head(self) -> dict[str, Tensor]:
        """The regression head, by its own names."""
        prefix = "student/head."
        names = [name for name in self._reader.shapes if name.startswith(prefix)]
        return {name.removeprefix(prefix): self._reader.whole(name) for name in names}


def read_run_config(run_folder: Path) -> D2VConfig:
    """The `"d2v"` section of the run's `config.json`.

    Raises:
        ValueError: it is no run folder, or the section is refused.
    """
    path = run_folder / "config.json"
    if not os.path.lexists(path) and not (run_folder / "checkpoints").is_dir():
        what = f"`{run_folder}` must be the folder of a run, but holds no config.json."
        raise ValueError(" ".join(filter(None, (what, explain(run_folder)))))
    raw = saved_config(run_folder)
    if "d2v" not in raw and "model_type" in raw:
        raise ValueError(f"`{run_folder}` must be the folder of a run, but is a Transformers folder already.")
    config, problems = check_d2v(raw.get("d2v"))
    if config is None:
        raise ConfigError(problems, str(path))
    return config


@contextmanager
def open_checkpoint(run_folder: Path, step: int | None = None) -> Iterator[Checkpoint]:
    """Open a checkpoint, check every byte of it, and keep a run that goes on from deleting it while the block runs.

    Args:
        run_folder: of the run, which may be training, and may be on media that cannot be written.
        step: of the checkpoint; None takes the newest.
    Yields:
        The checkpoint, which is closed when the block has ended.
    Raises:
        OptionError: there is none of this step.
        ValueError: there is none at all, or it is damaged; or, where the file system has no locks, it was deleted
            while it was opened.
        OSError: it could not be read, which says nothing about it.
    """
    with ExitStack() as held:
        folder, found = _hold_checkpoint(run_folder, step, held)
        try:
            yield held.enter_context(verified_checkpoint(folder, found))
        except (DamageError, OSError) as error:
            if not folder.is_dir():
                raise ValueError(
                    f"the run deleted the checkpoint {folder} while it was read ({error}): try again, or raise "
                    "`d2v.run.keep`."
                ) from error
            if isinstance(error, DamageError):
                raise ValueError(
                    f"the checkpoint {folder} is damaged ({error}): choose another one with `--step`."
                ) from error
            raise


def _hold_checkpoint(run_folder: Path, step: int | None, held: ExitStack) -> tuple[Path, int]:
    for _ in range(_MOST_TRIES):
        steps = complete_steps(run_folder / "checkpoints")
        if not steps:
            raise ValueError(f"`{run_folder}` must hold a checkpoint, but has none yet. Let the run save one first.")
        if step is not None and step not in steps:
            there = ", ".join(map(str, steps))
            raise OptionError(f"`--step` must be of a checkpoint in {run_folder} ({there}), but is {step} instead.")
        chosen = steps[0] if step is None else step
        folder = run_folder / "checkpoints" / f"step-{chosen}"
        # deleted in between: the run has saved a newer one by then
        with suppress(FileNotFoundError):
            held.enter_context(hold(folder))
            return folder, chosen
    raise ValueError(f"the run in {run_folder} deletes its checkpoints faster than they can be opened: try again.")


def load_encoder(checkpoint: Checkpoint, config: D2VConfig, weights: str) -> Student:
    """Return the encoder of a checkpoint, fp32 on the CPU, in training mode.

    Args:
        checkpoint: open, and verified.
        config: of the run.
        weights: "student" or "teacher".
    Raises:
        ValueError: see `load_weights`.
    """
    model = build_student(config)
    saved = SavedWeights(checkpoint, weights, modality_of(config).encoder().averaged_prefix())
    load_weights(model, saved, checkpoint.folder)
    return model


def load_weights(model: torch.nn.Module, saved: SavedWeights, source: Path) -> None:
    """Copy saved weights into a model.

    Raises:
        ValueError: one is missing or has another shape.
    """
    expected = model.state_dict()
    found = {name: saved[name] for name in expected if name in saved}
    wrong = [name for name in expected if name not in found or found[name].shape != expected[name].shape]
    if wrong:
        named = ", ".join(wrong[:5])
        raise ValueError(f"{source} does not fit the run's config.json: {named} is missing or misshapen.")
    require_finite(found.items(), f"`{source}`")
    model.load_state_dict(found)


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
        to: the folder to write, or for fairseq and ONNX the file; None is `export`, `export.pt` or `export.onnx` in the
            run folder, and of the teacher `export-teacher` or `export-teacher.onnx`. These are the run's own and are
            replaced; what somebody changed in its folder is kept under another name.
        weights: "student" or "teacher"; a file for fairseq holds both.
        step: of the checkpoint; None takes the newest.
        form: "transformers", "fairseq", "beit" or "onnx".
        tokenizer: of a text run, for Transformers; None is the one that the run's configuration names.
        overwrite: replace the file `to`, or in the folder `to` what an earlier export wrote.
        options: of `export_model`.
    Raises:
        ValueError: no run, no such checkpoint, or it is damaged; there is no such encoder in this form; `to` exists; or
            a text run's tokenizer cannot be read, or is not the model's.
    """
    config = read_run_config(run_folder)
    _require_form(config, form, weights, tokenizer)
    kept = None
    # a name of its own, so that it does not take the place of the student that the run left there
    name = "export" if weights == "student" else f"export-{weights}"
    if to is None:
        require_writable(run_folder)
        names = {"transformers": name, "onnx": f"{name}.onnx", "beit": "export.pth", "fairseq": "export.pt"}
        to = run_folder / names[form]
        kept = set_aside_changed(to) if form == "transformers" else None
    elif form == "transformers":
        require_free(to, overwrite)
    else:
        require_file(to, overwrite)
    with open_checkpoint(run_folder, step) as checkpoint:
        found = checkpoint.step
        if form == "transformers":
            _export_folder(checkpoint, config, weights, to, tokenizer, **options)
            line = f"export: {to} ({weights}, step {found}, for Transformers)"
        elif form == "onnx":
            from d2v_fast.interop.onnx import export_onnx

            export_onnx(load_encoder(checkpoint, config, weights), config, to)
            line = f"export: {to} ({weights}, step {found}, as ONNX)"
        else:
            for_whom = _export_file(checkpoint, config, to)
            line = f"export: {to} (student and teacher, step {found}, for {for_whom})"
    return line if kept is None else f"{kept}\n{line}"


def _require_form(config: D2VConfig, form: str, weights: str, tokenizer: Path | None) -> None:
    """OptionError where the options of an export do not go together, or not with the run."""
    if tokenizer is not None and (form != "transformers" or not isinstance(config, TextConfig)):
        raise OptionError("`--tokenizer` is for text runs, and for Transformers: nothing else holds one.")
    own = "beit" if isinstance(config, VisionConfig) else "fairseq"
    if form not in ("transformers", own, "onnx"):
        raise OptionError(f"`--format` must be transformers, {own} or onnx for {config.modality}, but is {form}.")
    if form == own and weights == "teacher":
        name = "model_ema" if form == "beit" else "_ema"
        raise OptionError(
            f"`--weights` is for the other formats: a file for {form} holds both, the teacher as `{name}`."
        )


def _export_folder(
    checkpoint: Checkpoint, config: D2VConfig, weights: str, to: Path, tokenizer: Path | None, **options: Any
) -> None:
    from d2v_fast.interop.huggingface import export_model

    saved = SavedWeights(checkpoint, weights, modality_of(config).encoder().averaged_prefix())
    # before anything is written; one tensor is in memory at a time
    require_finite(saved.items(), f"`{checkpoint.folder}`")
    if isinstance(config, TextConfig):
        where = str(checkpoint.folder.parent.parent)
        options["tokenizer"] = run_tokenizer(config, tokenizer, saved.vocabulary, where)
    export_model(saved, config, to, info={"weights": weights, "step": checkpoint.step}, **options)


def _export_file(checkpoint: Checkpoint, config: D2VConfig, to: Path) -> str:
    """Write student, head and teacher for the published code of the modality; returns whose it is."""
    prefix = modality_of(config).encoder().averaged_prefix()
    saved, teacher = (SavedWeights(checkpoint, weights, prefix) for weights in WEIGHTS)
    head = saved.head()
    for part in (saved, teacher, head):
        require_finite(part.items(), f"`{checkpoint.folder}`")
    if isinstance(config, VisionConfig):
        from d2v_fast.modalities.vision.beit import save_beit

        save_beit(saved, head, teacher, config, to)
        return "the published vision code"
    from d2v_fast.interop.fairseq import save_fairseq

    if isinstance(config, TextConfig):
        _require_fairseq_ids(config)
    save_fairseq(saved, head, teacher, config, to, num_updates=checkpoint.step)
    return "fairseq"


def _require_fairseq_ids(config: TextConfig) -> None:
    """ValueError if the run's tokenizer, where it can be read, numbers special tokens as no dictionary of fairseq."""
    from d2v_fast.modalities.text.fairseq import SPECIAL_IDS
    from d2v_fast.modalities.text.tokenizer import load_tokenizer

    if config.data.tokenizer is None:
        return
    try:
        found = load_tokenizer(config.data.tokenizer).specials[:4]
    except ValueError:
        # the tokenizer may be gone, and fairseq gets none: the padding id of the configuration is checked later
        return
    if any(own not in (None, theirs) for own, theirs in zip(found, SPECIAL_IDS, strict=True)):
        raise OptionError(
            "`--format` must be transformers for this tokenizer: fairseq numbers begin, padding, end and unknown token "
            f"{SPECIAL_IDS} in every dictionary, but '{config.data.tokenizer}' numbers them {tuple(found)}."
        )


def run_tokenizer(config: TextConfig, path: Path | None, digest: str | None, where: str) -> Any:
    """Of a text run: the one at `path`, or with None the one that its configuration names.

    Raises:
        ValueError: it cannot be read, or its digest is another one than the run's, where that is known.
    """
    from d2v_fast.modalities.text.tasks import tokenizer_of
    from d2v_fast.modalities.text.tokenizer import load_tokenizer

    try:
        found = tokenizer_of(config.data, config.model) if path is None else load_tokenizer(path)
        if digest is not None:
            found.require(digest, where)
        return found
    except ValueError as error:
        raise ValueError(f"{error} `--tokenizer` names the run's tokenizer where it is now.") from None
