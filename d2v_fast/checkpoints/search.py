"""Find the newest checkpoint that is complete, verified and the same for all processes of a run.

A missing file, a wrong size, a wrong hash and contradictory content are damage: such a checkpoint is renamed to
`step-N.damaged`, and the one before it is tried. Any other system error (a disk fault, a network file system that does
not answer, too many open files, a missing permission) does not condemn the checkpoint: all processes stop, and nothing
is renamed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from d2v_fast.checkpoints.files import (
    AbsentError,
    Checkpoint,
    clear_name,
    complete_steps,
    damaged_names,
    move_aside,
    strays,
)
from d2v_fast.checkpoints.shard_files import DamageError
from d2v_fast.command_lines import resume_command
from d2v_fast.distributed.world import World
from d2v_fast.errors import RunError
from d2v_fast.files.io_errors import advice


class _Outcome(NamedTuple):
    """The result of one process's look at a checkpoint.

    Attributes:
        kind: "absent" or "damage" if the checkpoint is wrong, "error" if the system failed, empty otherwise.
        text: What was found.
        manifest: Digest of the manifest that this process read; empty if it could not.
    """

    kind: str = ""
    text: str = ""
    manifest: str = ""


def find_newest(
    folder: Path, world: World, tell: Callable[[str], None], check: Callable[[Checkpoint], None]
) -> Checkpoint | None:
    """Open the newest good checkpoint; None if there is none at all. Every process calls it.

    If no other is left, the checkpoints that were set aside as damaged are verified again: an earlier version or a
    temporary fault may have condemned a good one.

    Args:
        folder: Folder `checkpoints` of a run.
        world: The processes of the run. The first one lists and renames; each reads a part of the files.
        tell: Reports every checkpoint that is not used.
        check: Raises a DamageError if the state of a checkpoint contradicts itself.
    Raises:
        RunError: Every checkpoint is damaged, or one could not be read. In the latter case nothing was renamed.
    """
    steps, damaged, others = world.decide(lambda: (complete_steps(folder), damaged_names(folder), strays(folder)))
    for sentence in others:
        tell(f"{sentence}. It stays as it is.")
    problems = list(others)
    for step in steps:
        found, problem = _open(folder / f"step-{step}", step, world, check)
        if found is not None:
            for number, name in damaged:
                if number > step:
                    tell(f"{name} was found damaged before. To have it verified again, rename it to step-{number}.")
            return found
        name = world.decide(partial(move_aside, folder, step, "damaged"))
        problems.append(f"checkpoint step-{step} is damaged ({problem}), and was kept as {name}")
        tell(f"checkpoint step-{step} is damaged ({problem}): kept as {name}, falling back to the one before it")
    for step, name in damaged:
        found, problem = _open(folder / name, step, world, check)
        if found is not None:
            world.decide(partial(_restore_name, folder, step, name))
            found.folder = folder / f"step-{step}"
            tell(f"{name} is whole, and there is no other: it is used, and is called step-{step} again")
            return found
        problems.append(f"{name} was found damaged before, and still is ({problem})")
    if problems:
        raise RunError(
            f"no usable checkpoint in {folder}: {'; '.join(problems)}. Nothing was deleted. Put a copy of one of them "
            "in its place and resume again, or start a run under another name with `--run`."
        )
    return None


def _open(
    folder: Path, step: int, world: World, check: Callable[[Checkpoint], None]
) -> tuple[Checkpoint, str] | tuple[None, str]:
    """Open and verify a checkpoint in all processes.

    Returns:
        The checkpoint and an empty text; or None and the damage, which is the same in all processes.
    Raises:
        RunError: It could not be read, or the processes find different files.
    """
    opened: list[Checkpoint] = []

    def compare_bytes() -> None:
        opened.append(Checkpoint(folder, step))
        # the processes share the files, so that many shards take no longer
        opened[0].require_content(world.rank, world.size)

    def understand() -> None:
        opened[0].load()
        opened[0].reader()
        check(opened[0])

    try:
        # parse nothing before every byte has been compared
        for work in (compare_bytes, understand):
            outcome = _outcome(work)
            if opened:
                outcome = outcome._replace(manifest=opened[0].manifest_digest)
            problem = _agree(folder, [_Outcome(*one) for one in world.collect(outcome)])
            if problem is not None:
                _close(opened)
                return None, problem
    except BaseException:
        _close(opened)
        raise
    return opened[0], ""


def _agree(folder: Path, outcomes: Sequence[_Outcome]) -> str | None:
    """Return the damage that all processes agree on; None if there is none."""
    then = f"Nothing was changed. After that is repaired: {resume_command(folder.parent.parent)}"
    for rank, outcome in enumerate(outcomes):
        if outcome.kind == "error":
            by = f" by rank {rank}" if len(outcomes) > 1 else ""
            raise RunError(f"the checkpoint {folder} could not be read{by}: {outcome.text}. {then}")
    seen = {(outcome.kind == "absent" and outcome.text, outcome.manifest) for outcome in outcomes}
    if len(seen) > 1:
        raise RunError(
            f"the processes do not find the same files in {folder}. All machines of a run must have its folder on a "
            f"file system that they share. {then}"
        )
    return next((outcome.text for outcome in outcomes if outcome.kind), None)


def _restore_name(folder: Path, step: int, name: str) -> None:
    clear_name(folder, step)
    (folder / name).rename(folder / f"step-{step}")


def _close(opened: Sequence[Checkpoint]) -> None:
    for checkpoint in opened:
        checkpoint.close()


def _outcome(work: Callable[[], None]) -> _Outcome:
    """Run one part of reading a checkpoint, and return its result."""
    try:
        work()
    except DamageError as error:
        return _Outcome("absent" if isinstance(error, AbsentError) else "damage", str(error))
    except (OSError, MemoryError) as error:
        text = str(error) or type(error).__name__
        remedy = advice(error, getattr(error, "filename", None) or "the run")
        return _Outcome("error", f"{text}. {remedy}" if remedy else text)
    return _Outcome()
