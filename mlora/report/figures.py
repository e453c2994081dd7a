"""Which charts a report shows, from what the runs recorded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from mlora.report.chart import Dot, DotChart, Line, LineChart, Style
from mlora.report.curve import Curve
from mlora.report.record import BASE, Record
from mlora.report.standings import Competitor, Standings

COLOURS = 7
"""Colours of the page; more adapters than that tell themselves apart by dashes as well."""
DASHES = 4
"""Dash patterns of the page."""
POINTS_OF_ALL, POINTS_OF_A_LINE = 40_000, 400
"""Points drawn in all charts together, which keeps the page below 2 MB, and in a line."""


class Styles:
    """Gives each adapter of each run one look in all charts: its name the colour, its run the dashes.

    Args:
        records: the runs of the report.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        names = list(dict.fromkeys(name for record in records for name in record.adapters))
        self._names = {name: i for i, name in enumerate(names)}
        self._runs = {record.name: i for i, record in enumerate(records)}

    def of(self, run: str, adapter: str) -> Style:
        """Return the look of an adapter of a run."""
        label = f"{run}: {adapter}" if len(self._runs) > 1 else adapter
        if adapter == BASE:
            return Style(label, "base", self._runs[run] % DASHES)
        cycle, colour = divmod(self._names[adapter], COLOURS)
        return Style(label, colour, (self._runs[run] + len(self._runs) * cycle) % DASHES)

    def of_row(self, row: Competitor) -> Style:
        """Return the look of a row of the results."""
        look = self.of(row.run, row.adapters[0])
        label = f"{row.run}: {row.label}" if len(self._runs) > 1 else row.label
        return Style(label, look.colour, look.dash)


def result_charts(tables: Sequence[Standings], styles: Styles) -> list[DotChart]:
    """Return the results with error bars, a chart for each table."""
    charts = []
    for table in tables:
        groups = []
        for column, task in enumerate(table.tasks):
            dots = []
            for row, scores, _ in table.rows:
                score = scores[column]
                if score is not None:
                    error = None if score.error is None else 100 * score.error
                    tip = f"{styles.of_row(row).label}, {task}: {100 * score.value:.1f}"
                    tip += " %" if error is None else f" ± {error:.1f} %"
                    dots.append(Dot(styles.of_row(row), 100 * score.value, error, tip))
            groups.append((task, dots))
        note = "Bars reach one standard error to each side" + (", of seeds one deviation." if table.seeded else ".")
        charts.append(DotChart(f"{table.metric}, {table.protocol}", f"{table.metric} (%)", groups, note))
    return charts


def training_charts(records: Sequence[Record], styles: Styles) -> list[LineChart]:
    """Return what was measured in training over optimizer steps."""
    limit = _points_of_a_line(records)

    def chart(key: str, title: str, label: str, smooth: bool, points: bool = False, zero: bool = False) -> LineChart:
        drawn = list(_measured(records, styles, key))
        window = _window([curve for _, curve in drawn]) if smooth else 1
        note = f"Faint: each step. Strong: the mean over {window} steps." if window > 1 else ""
        lines = [_line(style, curve, window, limit) for style, curve in _joined(drawn)]
        return LineChart(title, label, lines, note, points, zero)

    charts = [
        chart("loss", "Training loss", "loss (nats per token)", smooth=True),
        chart("eval_loss", "Held-out loss", "loss (nats per token)", smooth=False, points=True),
        chart("lr", "Learning rate", "learning rate", smooth=False, zero=True),
        chart("grad_norm", "Gradient norm", "norm of the gradient", smooth=True, zero=True),
        _only_positive(chart("aux_loss", "Router loss", "auxiliary loss, weighted", smooth=True)),
    ]
    return [one for one in charts if one.drawn]


def speed_charts(records: Sequence[Record], styles: Styles) -> list[LineChart]:
    """Return tokens per second and memory over optimizer steps."""
    limit = _points_of_a_line(records)
    rates = [
        (styles.of(record.name, adapter), _ratio(curves.get("num_tokens"), curves.get("seconds")))
        for record in records
        for adapter, curves in record.curves.items()
    ]
    window = _window([rate for _, rate in rates])
    speeds = [_line(style, rate, window, limit) for style, rate in _joined(rates) if len(rate)]
    memory = [
        Line(style, _scaled(curve, 1 / 2**30).thinned(limit))
        for style, curve in _joined(_measured(records, styles, "max_memory_bytes"))
    ]
    note = (
        f"Faint: each step. Strong: the mean over {window} steps. There is no padding to count." if window > 1 else ""
    )
    charts = [
        LineChart("Throughput", "real tokens per second", speeds, note, zero=True),
        LineChart("Peak memory", "memory (GiB)", memory, "The highest so far.", zero=True),
    ]
    return [one for one in charts if one.drawn]


def accuracy_charts(records: Sequence[Record], styles: Styles) -> list[LineChart]:
    """Return values over optimizer steps, as `evaluate_steps` had them measured, the base model's as a level."""
    measured = [e for record in records for e in record.evaluations]
    kinds = dict.fromkeys((e["task"], e.get("protocol"), e["metric"]) for e in measured)
    charts = []
    for task, protocol, metric in kinds:
        kind = (task, protocol, metric)
        lines, levels = [], []
        for record in records:
            for adapter in record.adapters:
                curve, errors = _course(record, adapter, kind)
                if len(curve):
                    lines.append(Line(styles.of(record.name, adapter), curve, errors=errors))
            levels += [(styles.of(record.name, BASE), 100 * r["value"]) for r in record.results if _is(r, BASE, kind)]
        note = "Whiskers reach one standard error to each side."
        title = f"{task}: {metric}" + (f", {protocol}" if protocol else "")
        charts.append(LineChart(title, f"{metric} (%)", lines, note, points=True, levels=levels))
    return charts


_Kind = tuple[str, str | None, str]


def _is(result: dict[str, Any], adapter: str, kind: _Kind) -> bool:
    return (result["adapter"], (result["task"], result.get("protocol"), result["metric"])) == (adapter, kind)


def _course(record: Record, adapter: str, kind: _Kind) -> tuple[Curve, list[float | None]]:
    """Return an adapter's values of a task in percent over steps, its final one last, with their standard errors."""
    points = {entry["step"]: entry for entry in record.evaluations if _is(entry, adapter, kind)}
    loss = record.curves.get(adapter, {}).get("loss")
    if points and loss:
        points |= {max(loss.steps): entry for entry in record.results if _is(entry, adapter, kind)}
    curve, errors = Curve(), []
    for step, entry in sorted(points.items()):
        curve.add(step, 100 * entry["value"])
        error = entry.get("standard_error")
        errors.append(None if error is None else 100 * error)
    return curve, errors


def _measured(records: Sequence[Record], styles: Styles, key: str) -> Iterator[tuple[Style, Curve]]:
    for record in records:
        for adapter, curves in record.curves.items():
            if len(curves.get(key, ())):
                yield styles.of(record.name, adapter), curves[key]


def _points_of_a_line(records: Sequence[Record]) -> int:
    """Return how many points a line may have; there are some seven charts, and each smoothed line has a raw one."""
    lines = sum(len(record.curves) for record in records)
    return max(20, min(POINTS_OF_A_LINE, POINTS_OF_ALL // max(1, 12 * lines)))


def _window(curves: Sequence[Curve]) -> int:
    """Return the steps that a smoothed line takes the mean of, odd, for the longest of several curves."""
    longest = max(map(len, curves), default=0)
    return 1 if longest < 20 else max(5, longest // 20 | 1)


def _joined(curves: Iterable[tuple[Style, Curve]]) -> list[tuple[Style, Curve]]:
    """Return curves of which none is drawn over another: those alike in all points are one, under all their names."""
    alike: dict[tuple[bytes, bytes], list[tuple[Style, Curve]]] = {}
    for style, curve in curves:
        alike.setdefault((curve.steps.tobytes(), curve.values.tobytes()), []).append((style, curve))
    joined = []
    for group in alike.values():
        style, curve = group[0]
        joined.append((replace(style, label=", ".join(one.label for one, _ in group)), curve))
    return joined


def _line(style: Style, curve: Curve, window: int, limit: int) -> Line:
    if window == 1:
        return Line(style, curve.thinned(limit))
    return Line(style, curve.smoothed(window).thinned(limit), raw=curve.thinned(limit))


def _only_positive(chart: LineChart) -> LineChart:
    chart.lines = [line for line in chart.lines if any(value > 0 for value in line.curve.values)]
    return chart


def _ratio(above: Curve | None, below: Curve | None) -> Curve:
    rate = Curve()
    if above is not None and below is not None:
        seconds = dict(below)
        for step, value in above:
            if seconds.get(step, 0) > 0:
                rate.add(step, value / seconds[step])
    return rate


def _scaled(curve: Curve, factor: float) -> Curve:
    scaled = Curve()
    for step, value in curve:
        scaled.add(step, factor * value)
    return scaled
