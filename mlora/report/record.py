"""What a run folder tells, read so that a missing or damaged file costs only what it held."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlora.report.curve import Curve

BASE = "base model"
"""What results call the plain base model."""
LARGEST = 1e100
"""Numbers from here on are taken for damage."""
MISSING = object()
"""What is read of a file that cannot be."""


@dataclass
class Record:
    """One run as its folder tells it.

    Attributes:
        path: the run folder.
        name: what the report calls the run.
        config: the resolved config; empty where it cannot be read.
        environment: what the run ran on; empty where it cannot be read.
        results: entries of results.json.
        curves: of each adapter, each quantity over optimizer steps.
        evaluations: results measured during training, each with its step.
        router: lines of router.jsonl.
        notes: what is missing or damaged, a sentence each.
    """

    path: Path
    name: str
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    results: list[dict[str, Any]] = field(default_factory=list)
    curves: dict[str, dict[str, Curve]] = field(default_factory=dict)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    router: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def entries(self) -> dict[str, dict[str, Any]]:
        """Entries of the config's `lora` by adapter."""
        return {entry["name"]: entry for entry in self.config.get("lora", [])}

    @property
    def adapters(self) -> list[str]:
        """Adapters that any file tells of, those of the config first."""
        told = [r["adapter"] for r in (*self.results, *self.evaluations, *self.router) if r["adapter"] != BASE]
        return list(dict.fromkeys([*self.entries, *self.curves, *told]))

    def parameters(self, adapter: str) -> int | None:
        """Return how many numbers a saved adapter holds; None where it is not saved."""
        for folder in (self.path / "adapters" / adapter, self.path / adapter):
            count = _count_parameters(folder / "adapter_model.safetensors")
            if count is not None:
                return count
        return None


def read(path: str | Path) -> Record:
    """Read a run folder.

    Raises:
        FileNotFoundError: the folder does not exist, or holds no file of a run.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder")
    record = Record(path, path.resolve().name)
    if not any((path / name).exists() for name in ("config.json", "metrics.jsonl", "results.json")):
        raise FileNotFoundError(f"{path}: no run folder, it holds no config.json, metrics.jsonl or results.json")
    record.config = _object(record, "config.json", lambda v: isinstance(v.get("lora"), list))
    if record.config:
        record.config["lora"] = [e for e in record.config["lora"] if isinstance(e, dict) and _is_text(e.get("name"))]
    record.environment = _object(record, "environment.json", lambda v: isinstance(v.get("options", {}), dict))
    record.results = _results(record)
    _read_metrics(record)
    if (path / "router.jsonl").exists():
        record.router = list(_lines(record, "router.jsonl", _is_profile))
    return record


def _object(record: Record, name: str, fits: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    value = _json(record, name)
    if value is MISSING:
        return {}
    if not isinstance(value, dict) or not fits(value):
        record.notes.append(f"{name} is not as a run writes it and is left out.")
        return {}
    return value


def _results(record: Record) -> list[dict[str, Any]]:
    value = _json(record, "results.json")
    if value is MISSING:
        return []
    entries = value if isinstance(value, list) else [value]
    good = [entry for entry in entries if _is_result(entry)]
    if len(good) < len(entries):
        record.notes.append(f"results.json: {len(entries) - len(good)} of {len(entries)} entries are no results.")
    return good


def _json(record: Record, name: str) -> Any:
    try:
        return json.loads((record.path / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        record.notes.append(f"{name} is missing.")
    except (OSError, ValueError, RecursionError) as error:
        record.notes.append(f"{name} cannot be read: {error}.")
    return MISSING


def _read_metrics(record: Record) -> None:
    curves: dict[str, dict[str, Curve]] = defaultdict(lambda: defaultdict(Curve))
    if not (record.path / "metrics.jsonl").exists():
        record.notes.append("metrics.jsonl is missing.")
        return
    for line in _lines(record, "metrics.jsonl", lambda line: _is_step(line.get("step"))):
        if "task" in line:
            if _is_result(line):
                record.evaluations.append(line)
            continue
        for key, value in line.items():
            if key in ("adapter", "step"):
                continue
            if value is None or isinstance(value, int | float):
                number = math.nan if value is None or not _is_number(value) else float(value)
                curves[line["adapter"]][key].add(line["step"], number)
    record.curves = {name: {k: c.sorted() for k, c in quantities.items()} for name, quantities in curves.items()}


def _lines(record: Record, name: str, fits: Callable[[dict[str, Any]], bool]) -> Iterator[dict[str, Any]]:
    """Yield the lines of a file that tell of an adapter, and note how many do not."""
    bad = 0
    try:
        with (record.path / name).open(encoding="utf-8", errors="replace") as file:
            for text in file:
                try:
                    line = json.loads(text)
                except (ValueError, RecursionError):
                    line = None
                if isinstance(line, dict) and _is_text(line.get("adapter")) and fits(line):
                    yield line
                else:
                    bad += bool(text.strip())
    except OSError as error:
        record.notes.append(f"{name} cannot be read: {error}.")
    if bad:
        record.notes.append(f"{name}: {bad} {'line is' if bad == 1 else 'lines are'} damaged and left out.")


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_number(value: object) -> bool:
    """Whether a value is a number that can be drawn: what is larger is no measurement, and its square no float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST


def _is_step(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**12


def _is_result(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and all(_is_text(entry.get(key)) for key in ("adapter", "task", "metric"))
        and _is_number(entry.get("value"))
        and all(entry.get(key) is None or _is_number(entry[key]) for key in ("standard_error", "n", "chance"))
        and (entry.get("protocol") is None or _is_text(entry["protocol"]))
    )


def _is_profile(line: dict[str, Any]) -> bool:
    """Whether a line holds shares of every router; a profile that is only of an evaluation has no step."""
    layers = line.get("layers")
    return (
        (_is_step(line.get("step")) or (line.get("step", 0) is None and line.get("split") != "train"))
        and all(line.get(key) is None or _is_text(line[key]) for key in ("task", "protocol", "split"))
        and isinstance(layers, list)
        and len(layers) > 0
        and all(map(_is_layer, layers))
        and len({len(layer["share"]) for layer in layers}) == 1
    )


def _is_layer(layer: object) -> bool:
    return (
        isinstance(layer, dict)
        and "layer" in layer
        and _are_shares(layer.get("share"))
        and isinstance(layer.get("dead", []), list)
        and all(layer.get(key) is None or _is_number(layer[key]) for key in ("entropy", "balance"))
    )


def _are_shares(value: object) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(map(_is_number, value))


def _count_parameters(file: Path) -> int | None:
    """Sum the sizes in the header of a safetensors file: a length of eight bytes, then JSON."""
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(min(length, 1 << 26)))
        return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
