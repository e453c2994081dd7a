"""What a report says in words and plain tables: the runs at a glance, speed, differences, environment, commands."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from mlora.report.axes import duration, number, short, size
from mlora.report.record import Record


@dataclass(frozen=True)
class Facts:
    """A table of facts: what they are about in the first column, one column for each who has them.

    Attributes:
        columns: who.
        rows: what, with a text for each column; whether they differ is seen from these.
    """

    columns: list[str]
    rows: list[tuple[str, list[str]]]

    @property
    def differing(self) -> Facts:
        """The rows in which the columns differ."""
        return Facts(self.columns, [(key, texts) for key, texts in self.rows if len(set(texts)) > 1])

    @property
    def common(self) -> list[tuple[str, str]]:
        """The rows in which they do not."""
        return [(key, texts[0]) for key, texts in self.rows if len(set(texts)) == 1]


@dataclass(frozen=True)
class Pace:
    """What an adapter's training took.

    Attributes:
        run, adapter: whose.
        steps, tokens, seconds: optimizer steps, real tokens and the time in which it took part.
        memory: bytes at the peak of the process; nan where it was not recorded.
        skipped: steps without a finite gradient.
    """

    run: str
    adapter: str
    steps: int
    tokens: float
    seconds: float
    memory: float
    skipped: int

    @property
    def texts(self) -> list[str]:
        """The cells of its row."""
        rate = self.tokens / self.seconds if self.seconds else math.nan
        cells = [f"{self.steps:,}", short(self.tokens), duration(self.seconds), number(rate), size(self.memory)]
        return [*cells, str(self.skipped or "–")]


PACE_HEADER = ("steps", "real tokens", "time", "tokens/s", "peak memory", "steps left out")


def paces(record: Record) -> list[Pace]:
    """Return what each adapter's training took, as far as it was recorded."""
    found = []
    for adapter, curves in record.curves.items():
        if "loss" not in curves:
            continue
        tokens, seconds, memory = (
            [v for v in curves[key].values if math.isfinite(v)] if key in curves else []
            for key in ("num_tokens", "seconds", "max_memory_bytes")
        )
        skipped = sum(not math.isfinite(value) for value in curves.get("grad_norm", curves["loss"]).values)
        peak = max(memory, default=math.nan)
        found.append(Pace(record.name, adapter, len(curves["loss"]), sum(tokens), sum(seconds), peak, skipped))
    return found


def training_seconds(record: Record) -> float:
    """Return how long the training took, when adapters trained together as the config says.

    Each adapter tells in how much time its steps were taken; those that share forwards share that time.
    """
    simultaneously = record.config.get("train_lora_simultaneously_num")
    ends = [0.0] * max(1, simultaneously if isinstance(simultaneously, int) else len(record.curves))
    for pace in paces(record):
        ends[ends.index(min(ends))] += pace.seconds
    return max(ends)


def glance(records: Sequence[Record]) -> Facts:
    """Return the runs at a glance."""
    rows: list[tuple[str, list[str]]] = []
    for key, say in {
        "base model": lambda r: _text(r.environment.get("options", {}).get("base_model")),
        "device": lambda r: _text(r.environment.get("device")),
        "started": _started,
        "adapters": lambda r: str(len(r.adapters)),
        "optimizer steps": lambda r: f"{sum(pace.steps for pace in paces(r)):,}",
        "real tokens": lambda r: short(sum(pace.tokens for pace in paces(r))),
        "training time": lambda r: duration(training_seconds(r)),
        "tokens per second": _tokens_per_second,
        "peak memory": lambda r: size(max((p.memory for p in paces(r) if p.memory == p.memory), default=math.nan)),
    }.items():
        rows.append((key, [say(record) for record in records]))
    return Facts([record.name for record in records], rows)


def settings(records: Sequence[Record]) -> Facts:
    """Return every setting of every adapter; keys that no adapter's file has are left out."""
    several = len(records) > 1
    entries = {
        f"{record.name}: {name}" if several else name: _flat(entry)
        for record in records
        for name, entry in record.entries.items()
    }
    keys = dict.fromkeys(key for entry in entries.values() for key in entry if key != "name")
    return Facts(list(entries), [(key, [_text(e.get(key, "")) for e in entries.values()]) for key in keys])


def run_settings(records: Sequence[Record]) -> Facts:
    """Return what all adapters of a run share."""
    shared = [{k: v for k, v in record.config.items() if k != "lora"} for record in records]
    keys = dict.fromkeys(key for config in shared for key in config)
    return Facts([r.name for r in records], [(key, [_text(c.get(key)) for c in shared]) for key in keys])


def environment(records: Sequence[Record]) -> Facts:
    """Return what the runs ran on."""
    flat = [_flat({k: v for k, v in r.environment.items() if k not in ("command", "options")}) for r in records]
    flat = [{key.removeprefix("versions."): value for key, value in one.items()} for one in flat]
    keys = dict.fromkeys(key for one in flat for key in one)
    return Facts([r.name for r in records], [(key, [_text(one.get(key)) for one in flat]) for key in keys])


def command(record: Record) -> str:
    """Return the command that made the run, as it can be pasted into a shell; empty where it is not known."""
    words = record.environment.get("command")
    if not isinstance(words, list) or not words:
        return ""
    first = ["python"] if str(words[0]).endswith(".py") else []
    return shlex.join([*first, *map(str, words)])


def _started(record: Record) -> str:
    try:
        return f"{datetime.fromisoformat(record.environment['date']).astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    except (KeyError, TypeError, ValueError):
        return "–"


def _tokens_per_second(record: Record) -> str:
    seconds = training_seconds(record)
    return number(sum(pace.tokens for pace in paces(record)) / seconds) if seconds else "–"


def _flat(entry: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in entry.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value, 4)
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "none"
    return value if isinstance(value, str) else json.dumps(value)
