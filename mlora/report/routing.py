"""Charts of router.jsonl: how the routers of mixtures spread tokens over their experts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from mlora.report.chart import HeatMap, Line, LineChart
from mlora.report.curve import Curve
from mlora.report.figures import Styles
from mlora.report.record import Record

MAPS = 24
"""Heat maps in one report, which keeps the page small where a run has many mixtures."""

Profile = dict[str, Any]


def routing_charts(records: Sequence[Record], styles: Styles) -> list[LineChart | HeatMap]:
    """Return the last load of each layer and expert, the load by task, and how entropy and balance went."""
    maps = [chart for record in records for chart in [*_maps(record, styles), *_by_task(record, styles)]]
    courses = [
        _course(
            records, styles, "entropy", "Router entropy", "entropy / log experts", "1: undecided; 0: always certain."
        ),
        _course(records, styles, "balance", "Balance of load", "entropy of the load / log experts", "1: even."),
    ]
    return [*(one for one in courses if one.drawn), *maps[:MAPS]]


def routing_note(records: Sequence[Record], styles: Styles) -> str:
    """Return what the reader must know of the heat maps."""
    dead = [
        f"{styles.of(record.name, adapter).label} ({experts})"
        for record in records
        for adapter, profile in sorted(_last(record).items())
        if (experts := sum(len(layer.get("dead", ())) for layer in profile["layers"]))
    ]
    text = "Colour tells how far a share is from an even one: plain is even, blue above, orange below."
    if dead:
        text += f" Experts that no token chose in the last profile: {', '.join(dead)}."
    return text


def _last(record: Record) -> dict[str, Profile]:
    """Return each adapter's last profile of a training step, or of an evaluation where it was not trained."""
    found: dict[str, Profile] = {}
    for profile in record.router:
        before = found.get(profile["adapter"])
        if before is None or _rank(profile) >= _rank(before):
            found[profile["adapter"]] = profile
    return found


def _rank(profile: Profile) -> tuple[bool, float]:
    return profile.get("split") == "train", profile.get("step") or 0


def _maps(record: Record, styles: Styles) -> list[HeatMap]:
    maps = []
    for adapter, profile in _last(record).items():
        modules: dict[str, list[Profile]] = defaultdict(list)
        for layer in profile["layers"]:
            modules[_module(layer)].append(layer)
        when = f"step {profile['step']:,}" if profile.get("step") else "evaluation"
        for module, layers in modules.items():
            place = f", {module}" if len(modules) > 1 else ""
            title = f"{styles.of(record.name, adapter).label}{place}: load at {when}"
            maps.append(HeatMap(title, [str(layer["layer"]) for layer in layers], [layer["share"] for layer in layers]))
    return maps


def _by_task(record: Record, styles: Styles) -> list[HeatMap]:
    """Return a map of tasks by experts, means over layers, for each adapter that was evaluated on several tasks."""
    adapters: dict[str, dict[tuple[str, str | None], Profile]] = defaultdict(dict)
    for profile in record.router:
        if profile.get("split") != "train" and profile.get("task"):
            adapters[profile["adapter"]][profile["task"], profile.get("protocol")] = profile
    maps = []
    for adapter, tasks in adapters.items():
        if len(tasks) < 2:
            continue
        title = f"{styles.of(record.name, adapter).label}: load by task"
        maps.append(
            HeatMap(
                title,
                [task for task, _ in tasks],
                [_mean_shares(p) for p in tasks.values()],
                "Means over layers.",
                "task",
            )
        )
    return maps


def _mean_shares(profile: Profile) -> list[float]:
    shares = [layer["share"] for layer in profile["layers"]]
    return [sum(column) / len(shares) for column in zip(*shares, strict=True)]


def _course(records: Sequence[Record], styles: Styles, key: str, title: str, label: str, note: str) -> LineChart:
    lines = []
    for record in records:
        curves: dict[str, Curve] = defaultdict(Curve)
        for profile in record.router:
            values = [layer[key] for layer in profile["layers"] if layer.get(key) is not None]
            if profile.get("split") == "train" and values:
                curves[profile["adapter"]].add(profile["step"], sum(values) / len(values))
        lines += [Line(styles.of(record.name, name), curve.sorted()) for name, curve in curves.items()]
    return LineChart(title, label, lines, f"{note} Means over layers.", points=True)


def _module(layer: Profile) -> str:
    """Return where in its decoder layer a router sits: what follows the layer's number in its path."""
    return str(layer.get("path", "")).partition(f".{layer['layer']}.")[2]
