"""`runs/NAME/`: everything that a run leaves behind, and the lock that keeps a second process out of it."""

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

# the unreadable files of the data set, as `path: reason`
BAD_FILES = "bad_files.txt"
# letters of the file that names the holder of the lock
_MAX_RECORD = 1000
# of the file that holds the mark
_MARK = "supervision"
_MAX_REPORT_BYTES = 64_000_000
_MAX_MARK_BYTES = 1000
# of a run that saved nothing: what a new run in its place would otherwise continue
_REPORTS = (
    *("config.json", "log.jsonl", "tensorboard", "curves.png", "profile.json"),
    *(BAD_FILES, "nonfinite.json", "probe.json", "checkpoints", _MARK),
)


class RunFolder:
    """An open run folder, locked until the process ends.

    Attributes:
        path: the folder.
        name: its last part.
        reopened: whether it belongs to a run that was started before.
        replaced: whether it belonged to another run, which ended before it saved anything.
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
        """The folder that `config` names, made or found by the first process.

        Under `--supervise` it is found by its mark once an attempt has made it, whatever `resume` says.

        Raises:
            RunError: see `create` and `reopen`; in every process.
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
        """A new folder. Without a name it is `<stem>-<n>`, with the first n that is free. The folder of a run that
        ended before it saved anything is used again, without its log.

        Raises:
            RunError: the name belongs to a run that can be continued or is training, or to something else; or the
                folder cannot be written.
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
                # to another disk: what a save left there is deleted by the next one
                continue
            if report.is_dir():
                shutil.rmtree(report)
            else:
                report.unlink(missing_ok=True)
        return found

    @classmethod
    def reopen(cls, root: Path, name: str) -> RunFolder:
        """The folder of a run that was started before.

        Raises:
            RunError: there is none of this name, it cannot be written, or another process trains in it.
        """
        if not (root / name).is_dir():
            there = sorted(entry.name for entry in root.iterdir() if entry.is_dir()) if root.is_dir() else []
            known = f"Runs there: {', '.join(there)}." if there else "There are no runs there."
            raise RunError(f"there is no run {name} in {root} to resume. {known}")
        return cls._open(root / name, reopened=True)

    @classmethod
    def _open(cls, path: Path, *, reopened: bool = False, replaced: bool = False) -> RunFolder:
        if (path / "checkpoints").exists() and not (path / "checkpoints").is_dir():
            raise RunError(f"{path / 'checkpoints'} must be a folder, but is none: bring back the one that was there.")
        if os.path.lexists(path / "lock") and ((path / "lock").is_symlink() or not (path / "lock").is_file()):
            # opened through a link, a file from elsewhere would be emptied
            raise RunError(f"{path / 'lock'} must be a file, but is none: remove it.")
        for place in (path, path / "checkpoints"):
            # found out now, and not when hours of training are to be saved
            if os.path.lexists(place) and not os.access(place, os.W_OK | os.X_OK):
                raise RunError(f"{place} cannot be written: is it on a file system that is mounted read-only, or gone?")
        lock = (path / "lock").open("a+", encoding="utf-8", errors="replace")
        try:
            # a record lock belongs to this process alone: data loading workers that outlive it do not hold it
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
                f"{path / 'lock'} cannot be locked ({error.strerror}), so that a second process could train in the "
                "same folder: set `d2v.run.dir` to a file system with locks."
            ) from None
        lock.truncate(0)
        lock.write(f"{own_record()}\n")
        lock.flush()
        return cls(path, lock, reopened=reopened, replaced=replaced)

    def close(self) -> None:
        """Give the folder free for another process."""
        if self._lock is not None:
            self._lock.close()

    def repair(self) -> list[str]:
        """Move reports out of the way that cannot be read, or are no files; return a line for each.

        They are kept as `NAME.damaged-1`. A run without its `result.json` is not finished: its end is made again.
        """
        lines = []
        for name in (*_REPORTS, "result.json", "export"):
            path = self.path / name
            reason = _problem_of_report(path) if os.path.lexists(path) else None
            if reason is not None:
                others = (path.with_name(f"{name}.damaged-{number}") for number in count(1))
                aside = next(other for other in others if not os.path.lexists(other))
                path.rename(aside)
                lines.append(f"{name} of the run {reason}: kept as {aside.name}")
        return lines

    def finished_steps(self) -> int:
        """Length of the run that was brought to its end here; 0 where none was."""
        path = self.path / "result.json"
        return int(read_json(path, _MAX_REPORT_BYTES)["step"]) if path.exists() else 0

    def write_config(self, config: RunConfig) -> None:
        """Write the resolved configuration as `config.json`, with the name that the run got."""
        content = config.to_dict()
        content["d2v"]["run"]["name"] = self.name
        self.write_json("config.json", content)

    def write_json(self, name: str, content: Any) -> None:
        """Replace a JSON file as a whole."""
        self.write_text(name, json.dumps(content, indent=2) + "\n")

    def append_json(self, name: str, entry: dict[str, Any]) -> None:
        """Add an entry to a JSON list; entries of the same or a later step belong to a lost part of the run."""
        path = self.path / name
        before = read_json(path, _MAX_REPORT_BYTES) if path.exists() else []
        self.write_json(name, [*(old for old in before if old["step"] < entry["step"]), entry])

    def add_line(self, name: str, line: str) -> None:
        """Append a line to a text file unless it is there already. Any process of the run may."""
        # a file's name may hold a line break
        line = line.translate({ord("\n"): "\\n", ord("\r"): "\\r"})
        if line not in self.lines(name):
            # in one write, so that the lines of several processes do not mix
            with append_regular(self.path / name) as file:
                file.write(f"{line}\n".encode("utf-8", "surrogateescape"))

    def lines(self, name: str) -> list[str]:
        """The lines of a text file; none where there is no such file."""
        path = self.path / name
        if not path.exists():
            return []
        with open_regular(path) as file:
            return file.read().decode("utf-8", "replace").split("\n")[:-1]

    def write_text(self, name: str, text: str) -> None:
        """Replace a file as a whole: a reader, or a crash, sees the old one or the new one."""
        write_text(self.path / name, text)


def _problem_of_report(path: Path) -> str | None:
    """Say why a report of a run cannot be gone on with, None where it can."""
    folders = ("tensorboard", "checkpoints", "export")
    if path.name in folders:
        return None if path.is_dir() else "is no folder"
    if not path.is_file():
        return "is no file"
    needed = {"result.json": is_result, "probe.json": is_probes}.get(path.name)
    if needed is None:
        return None
    try:
        return None if needed(read_json(path, _MAX_REPORT_BYTES)) else "does not hold what a run writes there"
    except ValueError as error:
        # an error of the system is none of the file: it is raised
        return f"cannot be read ({error})"


def is_result(content: Any) -> bool:
    """Return whether this is what `result.json` holds."""
    return isinstance(content, dict) and is_number(content.get("step"), int)


def is_probes(content: Any) -> bool:
    """Return whether this is what `probe.json` holds: of each probe the step, and scores by network."""

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
    """Return whether a value of a JSON file is a number."""
    return isinstance(value, kind) and not isinstance(value, bool)


def is_begun(path: Path) -> bool:
    """Whether this is the folder of a run, whatever came of it."""
    return (path / "lock").is_file()


def is_saved(path: Path) -> bool:
    """Whether the run in this folder has saved anything: a checkpoint, complete or damaged, or its result.

    Anything else among the checkpoints counts, too, unless a save left it that was cut off.

    Raises:
        OSError: the folder cannot be listed.
    """
    checkpoints = path / "checkpoints"
    # not a glob, which finds nothing in a folder that cannot be listed
    names = os.listdir(checkpoints) if os.path.lexists(checkpoints) else []
    return any(".tmp-" not in name for name in names) or os.path.lexists(path / "result.json")


def refuse_saved(path: Path) -> None:
    """Refuse to start a run in the folder of one that has saved something.

    Raises:
        RunError: with the command that continues that run.
    """
    if is_saved(path):
        raise RunError(f"the run {path} exists: choose another name with --run, or continue it: {resume_command(path)}")


def find_supervised(root: Path, mark: str) -> Path | None:
    """The run folder in `root` that the supervision with this mark has begun; None before it has."""
    for path in root.glob(f"*/{_MARK}"):
        # that of another run may be damaged
        with suppress(OSError, ValueError):
            if read_text(path, _MAX_MARK_BYTES) == mark:
                return path.parent
    return None
