"""Signals: a run finishes its step and saves; everything else cleans up and ends at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import NoReturn

# what `signal.signal` accepts and returns
_Handler = Callable[[int, FrameType | None], object] | int | None
# SIGHUP stays ignored under nohup
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# a signal this soon after another is the same request: launchers pass on what the terminal sent
_SAME_REQUEST_S = 1.0
# time to clean up, or for a library to return to Python
_PATIENCE_S = 10.0


class Interrupted(KeyboardInterrupt):
    """A signal that ends a command.

    Attributes:
        status: exit status that shells expect: 128 plus the number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.status = 128 + number


class _Handlers:
    """Signal handlers of a context. Only the main thread can install them; in others the context does nothing."""

    def __init__(self) -> None:
        self._before: dict[int, _Handler] = {}
        # after a hang-up they are no terminals any more
        self._terminals = [number for number in (1, 2) if os.isatty(number)]

    def _install(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._receive)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _receive(self, number: int, frame: object) -> None:
        raise NotImplementedError

    def _leave_terminal(self, number: int) -> None:
        """After a hang-up, send messages to /dev/null: writing them to the terminal would fail."""
        if number == signal.SIGHUP and self._terminals:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for terminal in self._terminals:
                os.dup2(nowhere, terminal)
            os.close(nowhere)


class StopRequest(_Handlers):
    """A context in which SIGINT, SIGTERM, SIGUSR1 or SIGHUP sets `requested`. A second signal ends the process."""

    def __init__(self) -> None:
        super().__init__()
        self.requested = False
        self._last = 0.0

    def __enter__(self) -> StopRequest:
        ending = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
        if isinstance(ending, EndOnSignal):
            # a library may have swallowed the exception
            ending.raise_if_received()
        self._install()
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _receive(self, number: int, frame: object) -> None:
        self._leave_terminal(number)
        now = time.monotonic()
        if self.requested and now - self._last > _SAME_REQUEST_S:
            os._exit(128 + number)
        self.requested, self._last = True, now


class EndOnSignal(_Handlers):
    """A context in which a signal raises `Interrupted`, so that partly written files are removed.

    A second signal more than a second later ends the process at once. A watching thread ends it after ten seconds if a
    library does not return or swallows the exception. If a library replaces the exception, the context still ends with
    `Interrupted`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._number: int | None = None
        self._last = 0.0
        self._wakeup: tuple[int, int] | None = None
        self._hook = sys.unraisablehook

    def __enter__(self) -> EndOnSignal:
        self._install()
        if self._before:
            self._hook, sys.unraisablehook = sys.unraisablehook, self._ignore_own
            reading, writing = os.pipe()
            os.set_blocking(writing, False)
            self._wakeup = (signal.set_wakeup_fd(writing, warn_on_full_buffer=False), writing)
            threading.Thread(target=self._watch, args=(reading,), name="signals", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._wakeup is not None:
            before, writing = self._wakeup
            self._wakeup = None
            signal.set_wakeup_fd(before)
            # ends the thread
            os.close(writing)
            sys.unraisablehook = self._hook
        self._restore()
        if error is not None and not isinstance(error, Interrupted):
            self.raise_if_received()

    def raise_if_received(self) -> None:
        """Raise `Interrupted` if a signal was received."""
        if self._number is not None:
            raise Interrupted(self._number) from None

    def _receive(self, number: int, frame: object) -> None:
        self._leave_terminal(number)
        now = time.monotonic()
        if self._number is not None:
            if now - self._last > _SAME_REQUEST_S:
                _end(number)
            return
        self._number, self._last = number, now
        raise Interrupted(number)

    def _watch(self, reading: int) -> None:
        """Wait for signals in another thread, since the main thread may be unable to handle them."""
        first: float | None = None
        with suppress(OSError), open(reading, "rb", buffering=0) as signals:
            while received := signals.read(1):
                # also called for signals that `StopRequest` handles
                handler = signal.getsignal(received[0])
                if getattr(handler, "__self__", None) is not self:
                    continue
                if first is not None and time.monotonic() - first > _SAME_REQUEST_S:
                    _end(received[0])
                if first is None:
                    first = time.monotonic()
                    timer = threading.Timer(_PATIENCE_S, self._end_if_here, (received[0],))
                    timer.daemon = True
                    timer.start()

    def _end_if_here(self, number: int) -> None:
        if self._wakeup is not None:
            _end(number)

    def _ignore_own(self, unraisable: sys.UnraisableHookArgs) -> None:
        if not isinstance(unraisable.exc_value, Interrupted):
            self._hook(unraisable)


def end_on_import() -> None:
    """Let a signal end the process with a message while modules are imported; nothing is written yet."""
    for number in _SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda received, frame: _end(received))


def _end(number: int) -> NoReturn:
    """End this process and its children at once."""
    # imported late: this module is the first that a command imports
    from d2v_fast.processes.state import children_of

    with suppress(OSError):
        os.write(2, f"interrupted by {signal.Signals(number).name}\n".encode())
    for child in children_of(os.getpid()):
        with suppress(OSError):
            os.kill(child, signal.SIGKILL)
    os._exit(128 + number)
