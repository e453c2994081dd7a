"""Progress on the terminal: one live table of all adapters, or plain lines where no terminal is."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import Any

SECONDS_BETWEEN_LINES = 10.0


@dataclass
class _Row:
    """What is shown of one adapter."""

    total: int
    step: int = 0
    loss: float = float("nan")
    lr: float = 0.0
    tokens: float = 0.0
    seconds: float = 0.0
    started: float = field(default_factory=time.monotonic)
    begun: int = 0


class Progress:
    """Shows step, loss, learning rate, tokens per second and time left of every adapter.

    Use as a context manager around the training.

    Args:
        totals: optimizer steps of each adapter, those done before included.
        done: steps done before, of adapters that resume.
    """

    def __init__(self, totals: dict[str, int], done: dict[str, int] | None = None) -> None:
        done = done or {}
        self.rows = {n: _Row(total, done.get(n, 0), begun=done.get(n, 0)) for n, total in totals.items()}
        self._last_line = -SECONDS_BETWEEN_LINES
        self._live: Any = None

    def __enter__(self) -> Progress:
        if sys.stdout.isatty():
            from rich.live import Live

            self._live = Live(get_renderable=self._table, refresh_per_second=4)
            self._live.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        if self._live is not None:
            self._live.__exit__(*exc)
        elif self.rows:
            self._print()

    def step(self, adapter: str, step: int, measured: dict[str, float]) -> None:
        """Take in one optimizer step of an adapter."""
        row = self.rows[adapter]
        if row.step == row.begun:
            row.started = time.monotonic() - measured["seconds"]
        loss = measured["loss"]
        row.loss = loss if row.loss != row.loss else 0.9 * row.loss + 0.1 * loss
        row.step, row.lr = step, measured["lr"]
        row.tokens += measured["num_tokens"]
        row.seconds = time.monotonic() - row.started
        if self._live is None and time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._print()

    def _print(self) -> None:
        self._last_line = time.monotonic()
        for cells in self._cells():
            print("  ".join(cells), flush=True)

    def _cells(self) -> list[tuple[str, ...]]:
        width = max(map(len, self.rows))
        return [
            (
                name.ljust(width),
                f"step {row.step}/{row.total}",
                f"loss {row.loss:.4f}" if row.tokens else "loss -",
                f"lr {row.lr:.1e}",
                f"{row.tokens / max(row.seconds, 1e-9):,.0f} tokens/s",
                f"ETA {_time_left(row)}",
            )
            for name, row in self.rows.items()
        ]

    def _table(self) -> Any:
        from rich.table import Table

        table = Table(box=None, show_header=False, pad_edge=False)
        for cells in self._cells():
            table.add_row(*cells)
        return table


class Rows:
    """Shows how far an evaluation is: rows done of a task. Use as a context manager around it."""

    def __init__(self) -> None:
        self._last_line = time.monotonic()
        self._on_terminal = sys.stdout.isatty()

    def __enter__(self) -> Rows:
        return self

    def __exit__(self, *exc: Any) -> None:
        if self._on_terminal:
            print("\r\x1b[K", end="", flush=True)

    def show(self, task: str, done: int, rows: int) -> None:
        """Take in the rows done of a task."""
        seconds = time.monotonic() - self._last_line
        if seconds < (0.25 if self._on_terminal else SECONDS_BETWEEN_LINES):
            return
        self._last_line = time.monotonic()
        text = f"evaluating {task}: {done}/{rows} rows"
        print(f"\r\x1b[K{text}" if self._on_terminal else text, end="" if self._on_terminal else "\n", flush=True)


def _time_left(row: _Row) -> str:
    """Return what an adapter still needs at the pace of its steps so far; "-" where there is none to go by."""
    if row.step == row.begun and row.step < row.total:
        return "-"
    return _duration((row.total - row.step) * row.seconds / max(row.step - row.begun, 1))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
