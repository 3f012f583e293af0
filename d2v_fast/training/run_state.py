"""Save a run to a checkpoint, and restore a run from one."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

import d2v_fast
from d2v_fast.checkpoints.files import Checkpoint
from d2v_fast.checkpoints.saved_counters import check_counters
from d2v_fast.checkpoints.shard_files import Kept
from d2v_fast.checkpoints.store import Checkpoints, require_same_shapes
from d2v_fast.config import RunConfig, changed_keys
from d2v_fast.data import BatchMaker, Samples
from d2v_fast.distributed.deepspeed_internals import is_partitioned
from d2v_fast.distributed.shards import full_shape, gather_whole
from d2v_fast.distributed.world import World
from d2v_fast.errors import RunError
from d2v_fast.modalities import build_student
from d2v_fast.models.student import Student
from d2v_fast.objectives.base import Objective
from d2v_fast.teacher import Teacher
from d2v_fast.training.engine import Engine
from d2v_fast.training.resume_rules import refused_changes, reported_changes
from d2v_fast.training.step import NO_SKIPS, SkipCounts


class SavedEngine(Protocol):
    """The methods of an `Engine` that saving needs."""

    def kept(self) -> list[Kept]:
        """See `Engine`."""

    def state(self) -> dict[str, Any]:
        """See `Engine`."""

    def signature(self) -> dict[str, Any]:
        """See `Engine`."""


class Networks(NamedTuple):
    """The networks of a run.

    Attributes:
        model: Encoder and head.
        teacher: The moving average of the model, or of a part of it.
        engine: The model's engine.
    """

    model: Objective
    teacher: Teacher
    engine: Engine


class DataIdentity(NamedTuple):
    """Which data a run trains on. A checkpoint of a run on other data is refused.

    Attributes:
        vocabulary: Digest of the tokenizer, as of the `BatchMaker`; None without one.
        samples: Number and digests of the samples; None if nothing has been trained yet. `d2v.data.on_change` can
            accept other samples.
    """

    vocabulary: str | None
    samples: Samples | None


class Resumed(NamedTuple):
    """Where a run continues: the steps made, and how many of them were skipped."""

    step: int = 0
    counts: SkipCounts = NO_SKIPS


class RunSaver:
    """Saves student, teacher, optimizer and counters of a run.

    The order of the data, masks, augmentation, dropout and schedules follow from the seed and the step number.

    Args:
        config: The run's configuration.
        world: The processes of the run.
        teacher: The teacher to save.
        engine: The engine whose model and optimizer to save.
        checkpoints: The run's checkpoints.
        data: The data that the run trains on.
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        teacher: Teacher,
        engine: SavedEngine,
        checkpoints: Checkpoints,
        data: DataIdentity,
    ) -> None:
        self._config, self._world = config, world
        self._teacher, self._saved_engine = teacher, engine
        self._checkpoints = checkpoints
        self._vocabulary, self._samples = data

    def save(self, step: int, counts: SkipCounts = NO_SKIPS, *, wait: bool = True) -> None:
        """Write the checkpoint of `step`; every process calls it.

        Args:
            step: Number of steps made.
            counts: How many of them were skipped.
            wait: Wait until the checkpoint is on the disk, not only until it is copied to host memory.
        """
        state = {
            "global_batch": self._global_batch,
            "vocabulary": self._vocabulary,
            "samples": None if self._samples is None else self._samples._asdict(),
            **counts._asdict(),
            "teacher_step": self._teacher.last_step,
            "engine": {**self._saved_engine.signature(), **self._saved_engine.state()},
            "digest": self._config.digest(),
            "config": self._config.to_dict(),
            "conditions": _conditions(self._world.device),
        }
        in_background = self._config.d2v.run.background_save and not wait
        kept = [*self._saved_engine.kept(), *(Kept("teacher", shard) for shard in self._teacher.shards)]
        self._checkpoints.save(step, state, kept, in_background=in_background)

    def protect(self, validation: Mapping[str, Any] | None) -> None:
        """Keep the checkpoint of a validation, if there is one, however many newer ones there are."""
        self._checkpoints.protected = None if validation is None else int(validation["step"])

    def advance_save(self) -> None:
        """Rename a checkpoint that was written in the background to its final name once it is on the disk."""
        self._checkpoints.advance()

    def finish_save(self) -> None:
        """Wait for a checkpoint that is being written in the background."""
        self._checkpoints.finish()

    @property
    def _global_batch(self) -> int:
        return self._config.deepspeed.batch_split(self._world.size).global_batch


class RunState(RunSaver):
    """Saves and restores a run.

    Args:
        config: The run's configuration.
        world: The processes of the run.
        networks: The networks to save and restore.
        checkpoints: The run's checkpoints.
        data: The data that the run trains on.
    Attributes:
        model: Encoder and head.
    """

    def __init__(
        self, config: RunConfig, world: World, networks: Networks, checkpoints: Checkpoints, data: DataIdentity
    ) -> None:
        super().__init__(config, world, networks.teacher, networks.engine, checkpoints, data)
        self.model, self._engine = networks.model, networks.engine

    def restore(self, say: Callable[[str], None]) -> Resumed:
        """Load the newest good checkpoint, from any engine, number of processes and ZeRO stage.

        Args:
            say: Prints a line.
        Returns:
            Where the run continues; step 0 if nothing has been saved yet.
        Raises:
            RunError: The checkpoint is of another model, seed or global batch, or of other samples and these are not
                accepted.
        """
        checkpoint = self._checkpoints.newest(say, check_counters)
        if checkpoint is None:
            say("nothing has been saved yet: starting from the beginning")
            return Resumed()
        with checkpoint:
            return self._restore_from(checkpoint, say)

    def _restore_from(self, checkpoint: Checkpoint, say: Callable[[str], None]) -> Resumed:
        state = checkpoint.state
        # imported weights have seen no sample
        if state["step"] and state["global_batch"] != self._global_batch:
            raise RunError(
                f"`train_batch_size` must be {state['global_batch']} as in the checkpoint, but is "
                f"{self._global_batch} instead: some samples of this epoch would be seen twice and others not at all."
            )
        # imported weights may not say which they need
        if state["vocabulary"] not in (None, self._vocabulary):
            raise RunError(
                "`d2v.data.tokenizer` must be the tokenizer that the checkpoint was trained with, but is another one. "
                "Name that tokenizer, or start a new run."
            )
        self._compare_samples(state, say)
        expected = {f"student/{name}": full_shape(p) for name, p in self.model.named_parameters()}
        expected |= {f"teacher/{name}": shape for name, shape in self._teacher.shapes.items()}
        saved = {name: shape for name, shape in state["shapes"].items() if name.startswith(("student/", "teacher/"))}
        require_same_shapes(saved, expected, "state")
        if state["step"] and (refused := refused_changes(state["config"], self._config)):
            raise RunError("\n  ".join(refused))
        reader = checkpoint.reader()
        self._engine.restore(reader.read, state["engine"])
        for shard in self._teacher.shards:
            reader.read(Kept("teacher", shard))
        self._teacher.refresh(state["teacher_step"])
        self._report_changes(state, say)
        say(f"resumed after step {state['step']}")
        return Resumed(int(state["step"]), SkipCounts(int(state["skipped"]), int(state["streak"])))

    def whole_encoders(self) -> tuple[Student, Student] | None:
        """Gather student and teacher in fp32 as modules that the first process can run alone; every process calls it.

        Returns:
            Student and teacher, in the first process; None in the others. They are the modules of the run, or copies
            if the run computes in 16 bits or ZeRO-3 has partitioned them.
        """
        teacher = self._teacher.module
        parameters = [*self.model.parameters(), *teacher.parameters()]
        if all(p.dtype == torch.float32 and not is_partitioned(p) for p in parameters):
            student = self.model.student
            return (student, student.with_averaged(teacher)) if self._world.is_first else None
        shared = self._gathered("student.")
        average = gather_whole(self._teacher.shards, self._teacher.shapes, self._world)
        if not self._world.is_first:
            return None
        prefix = self.model.student.averaged_prefix()
        encoders = []
        for state in (shared, shared | {prefix + name: value for name, value in average.items()}):
            encoder = build_student(self._config.d2v).to(self._world.device)
            encoder.load_state_dict(state)
            encoders.append(encoder)
        return encoders[0], encoders[1]

    def whole_head(self) -> nn.Module | None:
        """Gather the head as `whole_encoders` does the student; every process calls it."""
        head = self.model.head
        if all(p.dtype == torch.float32 and not is_partitioned(p) for p in head.parameters()):
            return head if self._world.is_first else None
        weights = self._gathered("head.")
        if not self._world.is_first:
            return None
        whole = build_student(self._config.d2v).make_head().to(self._world.device)
        whole.load_state_dict(weights)
        return whole

    def _gathered(self, part: str) -> dict[str, Tensor]:
        """Gather the model's weights whose names begin with `part`, which is left out; every process calls it."""
        shapes = {n: full_shape(p) for n, p in self.model.named_parameters() if n.startswith(part)}
        weights = gather_whole(self._engine.shards(), shapes, self._world)
        return {name.removeprefix(part): value for name, value in weights.items()}

    def _compare_samples(self, state: dict[str, Any], say: Callable[[str], None]) -> None:
        """Refuse a checkpoint that was trained on other samples, or report the difference if that is accepted."""
        if state["step"] == 0 or self._samples is None:
            return
        if state.get("samples") is None:
            say(
                "the checkpoint does not record its samples, so that changes of the data since then cannot be found. "
                "The next one will."
            )
            return
        difference = Samples(**state["samples"]).difference(self._samples)
        if difference is None:
            return
        keys = changed_keys(state["config"]["d2v"]["data"], self._config.to_dict()["d2v"]["data"], "d2v.data.")
        changes = [key for key in keys if not key.startswith(("d2v.data.on_change", "d2v.data.num_workers"))]
        also = f" (changed since then: {'; '.join(changes)})" if changes else ""
        if self._config.d2v.data.on_change == "refuse":
            raise RunError(
                f"the data have changed since the checkpoint of step {state['step']}: {difference}{also}. In the rest "
                "of this epoch some samples would be seen twice and others not at all. Restore the data, or accept the "
                "change by `--set d2v.data.on_change=accept`."
            )
        say(
            f"the data have changed since the checkpoint: {difference}{also}. This is accepted "
            "(`d2v.data.on_change`): the rest of this epoch follows the order of the new data, in which some samples "
            "are seen twice and others not at all. From the next epoch on every sample is seen once."
        )

    def _report_changes(self, state: dict[str, Any], say: Callable[[str], None]) -> None:
        if changes := reported_changes(state["config"], self._config):
            say(f"changed since the checkpoint, and applied from here on: {'; '.join(changes)}")
        if state["step"] == 0:
            return
        conditions = changed_keys(
            # earlier versions neither compiled nor captured
            {**state["conditions"], **{key: state["engine"].get(key, False) for key in self._engine.signature()}},
            {**_conditions(self._world.device), **self._engine.signature()},
        )
        if conditions:
            say(f"the conditions differ from the checkpoint's, so the last digits may differ: {'; '.join(conditions)}")


def data_identity(maker: BatchMaker, world: World) -> DataIdentity:
    """Return which data a run trains on; every process calls it.

    Raises:
        RunError: The processes do not have the same samples.
    """
    return DataIdentity(maker.vocabulary, samples_of(maker, world))


def samples_of(maker: BatchMaker, world: World) -> Samples:
    """Return which samples a run trains on; every process calls it.

    Raises:
        RunError: The processes do not have the same samples.
    """
    names = maker.source.names_digest()
    everywhere = [Samples(maker.what, number, found, "") for number, found in world.collect([maker.num_samples, names])]
    for rank, other in enumerate(everywhere):
        if other != everywhere[0]:
            counts = f"{everywhere[0].number:,} {maker.what}s of rank 0 and {other.number:,} of rank {rank}"
            raise RunError(
                f"`d2v.data.path` must hold the same files for every process, but the {counts} are not the same. Copy "
                "the data again to the machines that differ, or put them on a file system that all of them share."
            )
    return everywhere[0]._replace(sizes=world.decide(maker.source.sizes_digest))


def _conditions(device: torch.device) -> dict[str, Any]:
    """Return the versions and hardware on which the last digits of results depend."""
    deepspeed = sys.modules.get("deepspeed")
    return {
        "d2v_fast": d2v_fast.__version__,
        "torch": torch.__version__,
        "deepspeed": getattr(deepspeed, "__version__", None),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else torch.backends.cpu.get_cpu_capability(),
    }
