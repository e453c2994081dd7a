"""Stopping by Ctrl-C, SIGTERM, a closed terminal (after the step; at once the second time) or the clock."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType


class Stopped(Exception):
    """A run that was asked to stop and has saved what it did."""


class Paused(Stopped):
    """A run that has come to the end of its time limit and has saved what it did."""


class Deadline:
    """The end of a time limit.

    Args:
        minutes: from now; None for no limit.
    """

    def __init__(self, minutes: float | None = None) -> None:
        self._end = math.inf if minutes is None else time.monotonic() + 60 * minutes

    @property
    def passed(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() >= self._end

    @property
    def minutes_left(self) -> float | None:
        """Minutes until then, above 0; None without a limit."""
        return None if self._end == math.inf else max((self._end - time.monotonic()) / 60, 1e-9)


def heeded() -> list[signal.Signals]:
    """Return the signals that stop a run: those that who started it has not turned off, as nohup does."""
    return [number for number in Stop.SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM and a closed terminal end the block as Ctrl-C does, with KeyboardInterrupt."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in heeded()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Stop:
    """Within this context, a first signal sets `requested`, a second ends the program as usual."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.requested = self._raises = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Stop:
        self._before = {number: signal.signal(number, self._on_signal) for number in heeded()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within this block, which changes nothing that lasts, a signal raises Stopped rather than wait."""
        if self.requested:
            raise Stopped
        self._raises = True
        try:
            yield
        finally:
            self._raises = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()
        with suppress(OSError):  # the terminal may be gone; and print() must not be entered twice
            os.write(2, b"stopping after this step; once more stops at once\n")
        if self._raises:
            raise Stopped

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}
