"""The folder `runs/NAME/` with a run's files, and the lock that keeps other processes out of it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import IO, Any

from d2v_fast.command_lines import SUPERVISION, resume_command
from d2v_fast.config import RunConfig
from d2v_fast.distributed.world import World
from d2v_fast.errors import RunError
from d2v_fast.files.atomic import write_text
from d2v_fast.files.locks import Holder, own_record
from d2v_fast.files.reading import append_regular, open_regular, read_json, read_text

# lists unreadable files of the data set as `path: reason`
BAD_FILES = "bad_files.txt"
# characters to read of the record of the lock's holder
_MAX_RECORD = 1000
# name of the file with the mark of the supervision that began the run
_MARK = "supervision"
_MAX_REPORT_BYTES = 64_000_000
_MAX_MARK_BYTES = 1000
# reports that a new run deletes if it replaces one that saved nothing
_REPORTS = (
    *("config.json", "log.jsonl", "tensorboard", "curves.png", "profile.json"),
    *(BAD_FILES, "nonfinite.json", "probe.json", "checkpoints", _MARK),
)


class RunFolder:
    """An open run folder, locked until the process ends.

    Attributes:
        path: The folder.
        name: Last component of its path.
        reopened: Whether the run was started before.
        replaced: Whether the folder belonged to an earlier run that ended before it saved anything.
    """

    def __init__(
        self, path: Path, lock: IO[str] | None = None, *, reopened: bool = False, replaced: bool = False
    ) -> None:
        self.path = path
        self.name = path.name
        self.reopened = reopened
        self.replaced = replaced
        self._lock = lock

    @classmethod
    def open(cls, config: RunConfig, world: World, *, resume: bool, stem: str) -> RunFolder:
        """Create or reopen the folder that `config` names, in the first process; every process calls it.

        Under `--supervise`, attempts after the first find the folder by its mark and ignore `resume`.

        Raises:
            RunError: See `create` and `reopen`. Every process raises it.
        """
        run = config.d2v.run
        held: list[RunFolder] = []
        mark = os.environ.get(SUPERVISION)

        def claim() -> tuple[str, bool, bool]:
            before = find_supervised(Path(run.dir), mark) if mark else None
            if resume or before is not None:
                name = str(run.name) if before is None else before.name
                found = cls.reopen(Path(run.dir), name)
            else:
                found = cls.create(Path(run.dir), run.name, stem)
            held.append(found)
            if mark and before is None:
                found.write_text(_MARK, mark)
            return str(found.path), found.reopened, found.replaced

        path, reopened, replaced = world.decide(claim)
        return held[0] if held else cls(Path(path), reopened=reopened, replaced=replaced)

    @classmethod
    def create(cls, root: Path, name: str | None, stem: str) -> RunFolder:
        """Create a folder, or reuse that of a run that ended before it saved anything, and delete its reports.

        Args:
            root: The folder of all runs, created if missing.
            name: The run's name; None chooses the first free `<stem>-<n>`.
            stem: Start of a chosen name.
        Raises:
            RunError: The name belongs to a run that is training or has saved something, or to another file or folder;
                or the folder cannot be written.
        """
        try:
            root.mkdir(parents=True, exist_ok=True)
            for candidate in [name] if name is not None else map(f"{stem}-{{}}".format, count(1)):
                with suppress(FileExistsError):
                    (root / candidate).mkdir()
                    return cls._open(root / candidate)
        except OSError as error:
            raise RunError(f"the run folder cannot be made in {root}: {error}") from error
        path = root / str(name)
        if not is_begun(path) and (not path.is_dir() or any(path.iterdir())):
            raise RunError(f"{path} exists and is not the folder of a run: choose another name with --run.")
        found = cls._open(path, replaced=True)
        try:
            refuse_saved(path)
        except (RunError, OSError):
            found.close()
            raise
        for report in (path / name for name in _REPORTS):
            if report.is_symlink() and report.is_dir():
                # a link to another disk: the next save deletes leftovers there
                continue
            if report.is_dir():
                shutil.rmtree(report)
            else:
                report.unlink(missing_ok=True)
        return found

    @classmethod
    def reopen(cls, root: Path, name: str) -> RunFolder:
        """Open the folder of a run that was started before.

        Raises:
            RunError: There is no such run, it cannot be written, or another process trains in it.
        """
        if not (root / name).is_dir():
            there = sorted(entry.name for entry in root.iterdir() if entry.is_dir()) if root.is_dir() else []
            known = f"Runs there: {', '.join(there)}." if there else "There are no runs there."
            raise RunError(f"there is no run {name} in {root} to resume. {known}")
        return cls._open(root / name, reopened=True)

    @classmethod
    def _open(cls, path: Path, *, reopened: bool = False, replaced: bool = False) -> RunFolder:
        if (path / "checkpoints").exists() and not (path / "checkpoints").is_dir():
            raise RunError(f"{path / 'checkpoints'} must be a folder, but is not: restore the original one.")
        if os.path.lexists(path / "lock") and ((path / "lock").is_symlink() or not (path / "lock").is_file()):
            # opening a link would truncate a file elsewhere
            raise RunError(f"{path / 'lock'} must be a regular file, but is not: remove it.")
        for place in (path, path / "checkpoints"):
            # fail now, not at the first save after hours of training
            if os.path.lexists(place) and not os.access(place, os.W_OK | os.X_OK):
                raise RunError(f"{place} cannot be written: is its file system mounted read-only, or gone?")
        lock = (path / "lock").open("a+", encoding="utf-8", errors="replace")
        try:
            # loader workers do not inherit a record lock, so that they cannot hold it when they outlive this process
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            lock.seek(0)
            owner = Holder(lock.read(_MAX_RECORD))
            lock.close()
            raise RunError(
                f"another process ({owner}) is training in {path}. Wait for it, or signal it: SIGTERM makes it save "
                f"and end. {owner.remedy()}."
            ) from None
        except OSError as error:
            lock.close()
            raise RunError(
                f"{path / 'lock'} cannot be locked ({error.strerror}), so a second process could train in the same "
                "folder: set `d2v.run.dir` to a file system with locks."
            ) from None
        lock.truncate(0)
        lock.write(f"{own_record()}\n")
        lock.flush()
        return cls(path, lock, reopened=reopened, replaced=replaced)

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.close()

    def repair(self) -> list[str]:
        """Rename damaged reports to `NAME.damaged-<n>`, and return a line for each.

        A run whose `result.json` was renamed counts as unfinished, and its last part runs again.
        """
        lines = []
        for name in (*_REPORTS, "result.json", "export"):
            path = self.path / name
            reason = _problem_of_report(path) if os.path.lexists(path) else None
            if reason is not None:
                others = (path.with_name(f"{name}.damaged-{number}") for number in count(1))
                aside = next(other for other in others if not os.path.lexists(other))
                path.rename(aside)
                lines.append(f"{name} of the run {reason}: renamed to {aside.name}")
        return lines

    def finished_steps(self) -> int:
        """Return the number of steps of the finished run; 0 if the run is not finished."""
        path = self.path / "result.json"
        return int(read_json(path, _MAX_REPORT_BYTES)["step"]) if path.exists() else 0

    def stalled_with(self) -> int | None:
        """Return the patience with which the run ended before its schedule; None if it did not."""
        path = self.path / "result.json"
        patience = read_json(path, _MAX_REPORT_BYTES).get("patience") if path.exists() else None
        return patience if is_number(patience, int) else None

    def write_config(self, config: RunConfig) -> None:
        """Write the resolved configuration with the run's actual name as `config.json`."""
        content = config.to_dict()
        content["d2v"]["run"]["name"] = self.name
        self.write_json("config.json", content)

    def write_json(self, name: str, content: Any) -> None:
        """Replace a JSON file atomically."""
        self.write_text(name, json.dumps(content, indent=2) + "\n")

    def append_json(self, name: str, entry: dict[str, Any]) -> None:
        """Add an entry to a JSON list. Entries of the same or later steps are dropped: they are of a lost part."""
        path = self.path / name
        before = read_json(path, _MAX_REPORT_BYTES) if path.exists() else []
        self.write_json(name, [*(old for old in before if old["step"] < entry["step"]), entry])

    def add_line(self, name: str, line: str) -> None:
        """Append a line to a text file unless the file holds it already. Any process of the run may call it."""
        # file names may contain line breaks
        line = line.translate({ord("\n"): "\\n", ord("\r"): "\\r"})
        if line not in self.lines(name):
            # one write, so that lines of several processes do not interleave
            with append_regular(self.path / name) as file:
                file.write(f"{line}\n".encode("utf-8", "surrogateescape"))

    def lines(self, name: str) -> list[str]:
        """Return the lines of a text file, or none if there is no such file."""
        path = self.path / name
        if not path.exists():
            return []
        with open_regular(path) as file:
            return file.read().decode("utf-8", "replace").split("\n")[:-1]

    def write_text(self, name: str, text: str) -> None:
        """Replace a file atomically: readers see the old or the new content, also after a crash."""
        write_text(self.path / name, text)


def _problem_of_report(path: Path) -> str | None:
    """Return why a run cannot continue a report; None if it can."""
    folders = ("tensorboard", "checkpoints", "export")
    if path.name in folders:
        return None if path.is_dir() else "is not a folder"
    if not path.is_file():
        return "is not a file"
    needed = {"result.json": is_result, "probe.json": is_probes}.get(path.name)
    if needed is None:
        return None
    try:
        return None if needed(read_json(path, _MAX_REPORT_BYTES)) else "has unexpected content"
    except ValueError as error:
        # an OSError does not mean that the file is damaged, and is raised
        return f"cannot be read ({error})"


def is_result(content: Any) -> bool:
    """Return whether this is valid content of `result.json`."""
    return isinstance(content, dict) and is_number(content.get("step"), int)


def is_probes(content: Any) -> bool:
    """Return whether this is valid content of `probe.json`: the step and the scores by network of each probe."""

    def are_scores(value: Any) -> bool:
        return isinstance(value, dict) and "linear" in value and all(map(is_number, value.values()))

    def are_all_scores(values: list[Any]) -> bool:
        questions = [list(value.values()) for value in values if isinstance(value, dict)]
        return all(map(are_scores, values)) or (
            len(questions) == len(values) and all(all(map(are_scores, one)) for one in questions)
        )

    return isinstance(content, list) and all(
        isinstance(probe, dict)
        and is_number(probe.get("step"), int)
        and are_all_scores([value for key, value in probe.items() if key != "step"])
        for probe in content
    )


def is_number(value: Any, kind: type | tuple[type, ...] = (int, float)) -> bool:
    """Return whether a JSON value is a number of this type, and not a boolean."""
    return isinstance(value, kind) and not isinstance(value, bool)


def is_begun(path: Path) -> bool:
    """Return whether this is the folder of a run, even if the run saved nothing."""
    return (path / "lock").is_file()


def is_saved(path: Path) -> bool:
    """Return whether the run in this folder has saved its result or a checkpoint, complete or damaged.

    Any entry among the checkpoints counts, except leftovers of an interrupted save.

    Raises:
        OSError: The folder cannot be listed.
    """
    checkpoints = path / "checkpoints"
    # not `glob`, which finds nothing in a folder that cannot be listed
    names = os.listdir(checkpoints) if os.path.lexists(checkpoints) else []
    return any(".tmp-" not in name for name in names) or os.path.lexists(path / "result.json")


def refuse_saved(path: Path) -> None:
    """Refuse to start a run in the folder of a run that has saved something.

    Raises:
        RunError: The run has saved something; the message shows the command that continues it.
    """
    if is_saved(path):
        raise RunError(f"the run {path} exists: choose another name with --run, or continue it: {resume_command(path)}")


def find_supervised(root: Path, mark: str) -> Path | None:
    """Return the run folder in `root` with this supervision's mark; None if no attempt has made it yet."""
    for path in root.glob(f"*/{_MARK}"):
        # another run's mark may be damaged
        with suppress(OSError, ValueError):
            if read_text(path, _MAX_MARK_BYTES) == mark:
                return path.parent
    return None
