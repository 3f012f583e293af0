"""Read the configuration and the weights of a run's checkpoints, however many processes wrote them.

Neither a GPU nor the processes of the run are needed. A tensor is read when it is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from d2v_fast.checkpoints.files import Checkpoint, complete_steps, verified_checkpoint
from d2v_fast.checkpoints.hold import hold
from d2v_fast.checkpoints.saved_config import saved_config
from d2v_fast.checkpoints.shard_files import DamageError
from d2v_fast.config import ConfigError, D2VConfig, check_d2v
from d2v_fast.config.model_paths import explain
from d2v_fast.errors import OptionError
from d2v_fast.modalities import build_student, encoder_of
from d2v_fast.models.student import Student
from d2v_fast.models.weights import require_finite

WEIGHTS = ("student", "teacher")
# a run may delete the newest checkpoint between listing and opening it
_MOST_TRIES = 100


class SavedWeights(Mapping[str, Tensor]):
    """The whole encoder of student or teacher in a checkpoint: fp32 tensors by name, each read when it is asked for.

    Args:
        checkpoint: Open and verified.
        weights: "student" or "teacher".
        averaged_prefix: `Student.averaged_prefix` of the encoder, which the names of the teacher's tensors lack. All
            other tensors of the teacher are the student's.
    Attributes:
        vocabulary: Digest of the tokenizer that the model was trained with; None if there is none or it is unknown.
    Raises:
        ValueError: `weights` has another value.
    """

    def __init__(self, checkpoint: Checkpoint, weights: str, averaged_prefix: str = "") -> None:
        if weights not in WEIGHTS:
            raise ValueError(f"`weights` must be student or teacher, but is {weights} instead.")
        shapes, self.vocabulary = checkpoint.state["shapes"], checkpoint.state.get("vocabulary")
        self._reader = checkpoint.reader()
        # the checkpoint holds the student and its head as one model
        self._saved = {
            name.removeprefix("student/student."): name for name in shapes if name.startswith("student/student.")
        }
        self._heads = "student/head."
        averages = [name for name in shapes if name.startswith("teacher/")]
        if weights == "teacher" and any(name.startswith("teacher/student.") for name in averages):
            # the average of encoder and head
            self._heads = "teacher/head."
            self._saved = {
                name.removeprefix("teacher/student."): name for name in averages if not name.startswith(self._heads)
            }
        elif weights == "teacher":
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
        """Read the head's tensors, by their names in it."""
        prefix = self._heads
        names = [name for name in self._reader.shapes if name.startswith(prefix)]
        return {name.removeprefix(prefix): self._reader.whole(name) for name in names}


def read_run_config(run_folder: Path) -> D2VConfig:
    """Read the `"d2v"` section of a run's `config.json`.

    Raises:
        ValueError: The folder is not that of a run, or the section is refused.
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
    """Open and verify a checkpoint, and keep a run that is training from deleting it while the block runs.

    Args:
        run_folder: `runs/NAME`. The run may be training, and its file system may be read-only.
        step: Step of the checkpoint; None opens the newest.
    Yields:
        The checkpoint; it is closed when the block ends.
    Raises:
        OptionError: There is no checkpoint of this step.
        ValueError: There is no checkpoint at all, it is damaged, or, on a file system without locks, the run deleted
            it while it was being opened.
        OSError: The checkpoint could not be read. This does not mean that it is damaged.
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


def chosen_step(run_folder: Path, step: int | None = None) -> int:
    """Return the step of a run's checkpoint: `step`, or that of the newest one.

    Raises:
        OptionError: There is no checkpoint of this step.
        ValueError: There is no checkpoint at all.
    """
    steps = complete_steps(run_folder / "checkpoints")
    if not steps:
        raise ValueError(f"`{run_folder}` must hold a checkpoint, but has none yet. Let the run save one first.")
    if step is not None and step not in steps:
        there = ", ".join(map(str, steps))
        raise OptionError(f"`--step` must be of a checkpoint in {run_folder} ({there}), but is {step} instead.")
    return steps[0] if step is None else step


def _hold_checkpoint(run_folder: Path, step: int | None, held: ExitStack) -> tuple[Path, int]:
    for _ in range(_MOST_TRIES):
        chosen = chosen_step(run_folder, step)
        folder = run_folder / "checkpoints" / f"step-{chosen}"
        # if the run has deleted it meanwhile, it has saved a newer one
        with suppress(FileNotFoundError):
            held.enter_context(hold(folder))
            return folder, chosen
    raise ValueError(f"the run in {run_folder} deletes its checkpoints faster than they can be opened: try again.")


def encoder_weights(checkpoint: Checkpoint, config: D2VConfig, weights: str) -> SavedWeights:
    """Return the tensors of a whole encoder in a checkpoint.

    Args:
        checkpoint: Open and verified.
        config: The run's.
        weights: "student" or "teacher".
    """
    return SavedWeights(checkpoint, weights, encoder_of(config).averaged_prefix())


def load_encoder(checkpoint: Checkpoint, config: D2VConfig, weights: str) -> Student:
    """Return an encoder of a checkpoint, fp32 on the CPU, in training mode.

    Args:
        checkpoint: Open and verified.
        config: The run's.
        weights: "student" or "teacher".
    Raises:
        ValueError: A tensor is missing, has another shape than `config` says, or is not finite.
    """
    model = build_student(config)
    _load(model, encoder_weights(checkpoint, config, weights), checkpoint.folder)
    return model


def load_head(checkpoint: Checkpoint, config: D2VConfig, encoder: Student) -> torch.nn.Module:
    """Return the student's head in a checkpoint of pre-training, fp32 on the CPU, in training mode.

    Args:
        checkpoint: Open and verified.
        config: The run's.
        encoder: Of the run, which knows its head.
    Raises:
        ValueError: As for `load_encoder`.
    """
    head = encoder.make_head()
    _load(head, encoder_weights(checkpoint, config, "student").head(), checkpoint.folder)
    return head


def _load(model: torch.nn.Module, saved: Mapping[str, Tensor], source: Path) -> None:
    """Copy saved weights into a model.

    Raises:
        ValueError: A tensor is missing, has another shape, or is not finite.
    """
    expected = model.state_dict()
    found = {name: saved[name] for name in expected if name in saved}
    wrong = [name for name in expected if name not in found or found[name].shape != expected[name].shape]
    if wrong:
        named = ", ".join(wrong[:5])
        raise ValueError(f"{source} does not fit the run's config.json: {named} is missing or misshapen.")
    require_finite(found.items(), f"`{source}`")
    model.load_state_dict(found)
