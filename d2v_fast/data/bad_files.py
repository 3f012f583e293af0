"""Count and log the unreadable files of a data set, and compare them with `max_bad_fraction`."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from d2v_fast.data.batch import Batch
from d2v_fast.data.files import NUM_NAMED
from d2v_fast.errors import DataError

if TYPE_CHECKING:
    from d2v_fast.config import DataSection
    from d2v_fast.data.makers import BatchMaker

__all__ = ["BadFiles", "judge_listing"]

# the share of unreadable files is computed over at least so many samples, or the whole data set if it is smaller
MIN_JUDGED = 1000
# standard deviations by which the files seen so far, a random sample, may exceed the limit
NUM_DEVIATIONS = 4.0

_log = logging.getLogger(__name__)


class BadFiles:
    """Count and log unreadable files, and stop the run if there are too many.

    Args:
        config: Section with `max_bad_fraction` and `strict`.
        maker: Batch maker of the data set. The unreadable files of its listing, which `judge_listing` has accepted, are
            logged at once.
        on_bad: Called once with every unreadable file, as `path: reason`.
    Attributes:
        files: The unreadable files, as `path: reason`, in the order of their discovery.
    """

    def __init__(
        self,
        config: DataSection,
        maker: BatchMaker,
        on_bad: Callable[[str], None] = lambda file: None,
    ) -> None:
        self.files: dict[str, None] = {}
        self._max_fraction, self._strict = config.max_bad_fraction, config.strict
        self._num_samples, self._what = maker.num_samples, maker.what
        self._num_files = _num_files(maker)
        self._on_bad = on_bad
        self._num_seen = 0
        self._name(maker.listing.bad_files)
        self._num_listed = len(self.files)

    def add(self, batch: Batch) -> None:
        """Count the samples of a batch, and count and log its unreadable files that are new.

        Raises:
            DataError: There are too many unreadable files, or one with `strict`.
        """
        self._num_seen += len(batch.sample_ids)
        new = self._name(batch.bad)
        if not new:
            return
        if self._strict:
            raise _refusal_of_strict(self._what, new)
        found = len(self.files) - self._num_listed
        seen = min(max(self._num_seen, found), self._num_samples)
        judged = max(seen, min(self._num_samples, MIN_JUDGED))
        expected = self._max_fraction * judged
        limit = math.ceil(min(expected + NUM_DEVIATIONS * math.sqrt(expected), self._max_fraction * self._num_samples))
        if found > limit:
            raise _refusal(found, seen, self._what, self._max_fraction, list(self.files)[self._num_listed :])
        # compare the files of the listing and those found since with all files
        if len(self.files) > math.ceil(self._max_fraction * self._num_files):
            raise _refusal(len(self.files), self._num_files, self._what, self._max_fraction, list(self.files))

    def _name(self, bad: Iterable[str]) -> list[str]:
        """Log the unreadable files that are new, and return them."""
        new = [file for file in dict.fromkeys(bad) if file not in self.files]
        for file in new:
            self.files[file] = None
            _log.warning("skipped unreadable %s number %d: %s", self._what, len(self.files), file)
            self._on_bad(file)
        return new


def judge_listing(config: DataSection, maker: BatchMaker) -> None:
    """Compare the files that were unreadable when a data set was listed with `max_bad_fraction` of all files.

    Raises:
        DataError: There are too many unreadable files, or one with `strict`.
    """
    bad, total = maker.listing.bad_files, _num_files(maker)
    if bad and config.strict:
        raise _refusal_of_strict(maker.what, bad)
    if len(bad) > math.ceil(config.max_bad_fraction * total):
        raise _refusal(len(bad), total, maker.what, config.max_bad_fraction, bad)


def _num_files(maker: BatchMaker) -> int:
    return max(sum(maker.listing.used.values()), maker.num_samples + len(maker.listing.bad_files))


def _refusal_of_strict(what: str, bad: Iterable[str]) -> DataError:
    return DataError(
        f"there is an unreadable {what}, and `d2v.data.strict` is true. Repair or remove it:\n  "
        + "\n  ".join(list(bad)[:NUM_NAMED])
    )


def _refusal(num_bad: int, seen: int, what: str, max_fraction: float, bad: Iterable[str]) -> DataError:
    named = list(bad)[:NUM_NAMED]
    more = num_bad - len(named)
    return DataError(
        f"{num_bad:,} of {seen:,} {what}s are unreadable, and `d2v.data.max_bad_fraction` is {max_fraction}. Repair or "
        "remove them, or raise the limit:\n  " + "\n  ".join(named) + (f"\n  and {more:,} more" if more else "")
    )
