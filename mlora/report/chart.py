"""Charts as geometry: what `charts.html` draws as inline SVG, in pixels of a drawing 460 wide."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlora.report.axes import Axis, number, spanning
from mlora.report.curve import Curve

WIDTH = 460.0
LEFT, RIGHT, TOP, BOTTOM = 54.0, 12.0, 30.0, 42.0
HEIGHT = 270.0


@dataclass(frozen=True)
class Style:
    """How one adapter of one run looks in every chart.

    Attributes:
        label: its name in legends.
        colour: index of a colour of the page.
        dash: index of a dash pattern of the page.
    """

    label: str
    colour: int | str
    dash: int = 0

    @property
    def css(self) -> str:
        """Classes of the page."""
        return f"c{self.colour} d{self.dash}"


@dataclass
class Line:
    """One line of a chart.

    Attributes:
        style: whose it is.
        curve: its points.
        raw: points that are drawn faintly behind it.
        errors: half heights of whiskers at the points.
    """

    style: Style
    curve: Curve
    raw: Curve | None = None
    errors: list[float | None] = field(default_factory=list)


@dataclass
class LineChart:
    """Quantities over optimizer steps.

    Attributes:
        title: of the figure.
        label: quantity and unit, of the vertical axis.
        lines: what is drawn.
        note: what the reader must know to read it.
        points: whether the points are marked.
        zero: whether the vertical axis starts at zero.
        levels: horizontal lines with their names.
    """

    kind = "lines"
    title: str
    label: str
    lines: list[Line]
    note: str = ""
    points: bool = False
    zero: bool = False
    levels: list[tuple[Style, float]] = field(default_factory=list)
    width, height = WIDTH, HEIGHT

    @property
    def drawn(self) -> bool:
        """Whether there is anything to draw."""
        return any(math.isfinite(value) for line in self.lines for value in line.curve.values)

    @property
    def x(self) -> Axis:
        """Optimizer steps."""
        steps = [step for line in self.lines for step in line.curve.steps]
        low, high = min(steps), max(steps)
        low = 0.0 if low <= 0.1 * high else low
        return Axis("optimizer step", low, high if high > low else low + 1, LEFT, WIDTH - RIGHT)

    @property
    def y(self) -> Axis:
        """The quantity."""
        values = [v for line in self.lines for c in (line.curve, line.raw) if c is not None for v in c.values]
        for line in self.lines:
            for value, error in zip(line.curve.values, line.errors, strict=False):
                values += [value - (error or 0), value + (error or 0)]
        values += [level for _, level in self.levels]
        axis = spanning(self.label, values, HEIGHT - BOTTOM, TOP, zero=self.zero)
        if axis is None:
            raise ValueError(f"{self.title}: there is nothing to draw")
        return axis

    @property
    def legend(self) -> list[Style]:
        """Who is drawn."""
        return [line.style for line in self.lines] + [style for style, _ in self.levels]

    @property
    def text(self) -> str:
        """The chart in a sentence, for those who do not see it."""
        ends = [
            f"{line.style.label} from {number(line.curve.values[0])} to {number(line.curve.values[-1])}"
            for line in self.lines
            if len(line.curve)
        ]
        return f"{self.title}: {self.label} over optimizer steps. {'; '.join(ends[:12])}."

    def path(self, curve: Curve, x: Axis, y: Axis) -> str:
        """Return a curve as an SVG path, broken where a value is not finite."""
        parts, pen = [], "M"
        for step, value in curve:
            if math.isfinite(value):
                parts.append(f"{pen}{x.at(step):.1f} {y.at(value):.1f}")
                pen = "L"
            else:
                pen = "M"
        return "".join(parts)

    def whiskers(self, line: Line, x: Axis, y: Axis) -> list[tuple[float, float, float]]:
        """Return (x, top, bottom) of a line's errors."""
        points = zip(line.curve, line.errors, strict=False)
        return [(x.at(s), y.at(v + e), y.at(v - e)) for (s, v), e in points if e is not None]

    @property
    def values(self) -> dict[str, Any]:
        """What the page shows where a reader points at."""
        x, y = self.x, self.y
        return {
            "x": [x.low, x.high, x.start, x.end],
            "y": [y.low, y.high, y.start, y.end],
            "unit": self.label,
            "lines": [
                {
                    "name": line.style.label,
                    "steps": [int(step) for step in line.curve.steps],
                    "values": [_short(v) for v in line.curve.values],
                    **({"errors": [_short(e) for e in line.errors]} if line.errors else {}),
                }
                for line in self.lines
            ],
        }


@dataclass(frozen=True)
class Dot:
    """A value with its standard error in a dot chart."""

    style: Style
    value: float
    error: float | None
    tip: str


@dataclass
class DotChart:
    """Values with error bars, in groups one below the other.

    Attributes:
        title: of the figure.
        label: quantity and unit, of the horizontal axis.
        groups: names with their dots.
        note: what the reader must know to read it.
    """

    kind = "dots"
    title: str
    label: str
    groups: list[tuple[str, list[Dot]]]
    note: str = ""
    width = WIDTH
    row, gap = 15.0, 26.0

    @property
    def height(self) -> float:
        """Pixels of the drawing."""
        return 12 + BOTTOM + sum(self.gap + self.row * len(dots) for _, dots in self.groups)

    @property
    def x(self) -> Axis:
        """The quantity."""
        ends = [d.value + side * (d.error or 0) for _, dots in self.groups for d in dots for side in (-1, 1)]
        axis = spanning(self.label, ends, 2, WIDTH - RIGHT, wanted=6)
        if axis is None:
            raise ValueError(f"{self.title}: there is nothing to draw")
        return axis

    @property
    def legend(self) -> list[Style]:
        """Who is drawn."""
        return list(dict.fromkeys(dot.style for _, dots in self.groups for dot in dots))

    @property
    def text(self) -> str:
        """The chart in a sentence, for those who do not see it."""
        return f"{self.title}: " + "; ".join(dot.tip for _, dots in self.groups for dot in dots) + "."

    @property
    def rows(self) -> list[tuple[float, str, list[tuple[float, Dot]]]]:
        """Return (y of the name, name, [(y, dot)]) of each group."""
        top, rows = 8.0, []
        for name, dots in self.groups:
            rows.append((top + 14, name, [(top + self.gap + self.row * i, dot) for i, dot in enumerate(dots)]))
            top += self.gap + self.row * len(dots)
        return rows


@dataclass(frozen=True)
class Cell:
    """A cell of a heat map: where, whether above the even share, how strongly coloured."""

    x: float
    y: float
    over: bool
    strength: float


@dataclass
class HeatMap:
    """Shares of tokens by expert and layer, or task, coloured by how far they are from an even share.

    Attributes:
        title: of the figure.
        names: of the columns.
        shares: of each column, the share of tokens of each expert.
        note: what the reader must know to read it.
        of: what the columns are.
    """

    kind = "heat"
    title: str
    names: list[str]
    shares: list[list[float]]
    note: str = ""
    of: str = "layer"
    width = WIDTH
    legend: Sequence[Style] = ()

    @property
    def experts(self) -> int:
        """Rows of the map."""
        return max(map(len, self.shares))

    @property
    def even(self) -> float:
        """The share of each expert if all were used alike."""
        sums = [sum(column) for column in self.shares]
        return sum(sums) / max(sum(map(len, self.shares)), 1)

    @property
    def highest(self) -> float:
        """End of the colour scale: the largest share, at least twice the even one."""
        return max(2 * self.even, *(max(column) for column in self.shares if column))

    @property
    def cell(self) -> tuple[float, float]:
        """Width and height of a cell."""
        return (WIDTH - LEFT - RIGHT) / len(self.shares), min(28.0, max(5.0, 220.0 / self.experts))

    @property
    def height(self) -> float:
        """Pixels of the drawing: the map, its axis, and the colour scale."""
        return TOP + self.experts * self.cell[1] + BOTTOM + 34

    @property
    def cells(self) -> Iterable[Cell]:
        """All cells, layer by layer."""
        width, height = self.cell
        for column, shares in enumerate(self.shares):
            for expert, share in enumerate(shares):
                above = share >= self.even
                span = self.highest - self.even if above else self.even
                strength = abs(share - self.even) / span if span else 0.0
                yield Cell(LEFT + column * width, TOP + expert * height, above, round(strength, 3))

    @property
    def columns(self) -> list[tuple[float, str]]:
        """Return (x, text) below the columns, as many as there is room for."""
        every = math.ceil(len(self.names) / (12 if self.of == "layer" else 6))
        width = self.cell[0]
        return [(LEFT + (i + 0.5) * width, name) for i, name in enumerate(self.names) if i % every == 0]

    @property
    def lines(self) -> list[tuple[float, str]]:
        """Return (y, text) beside the rows, as many as there is room for."""
        every, height = math.ceil(self.experts / 12), self.cell[1]
        return [(TOP + (i + 0.5) * height, str(i)) for i in range(0, self.experts, every)]

    @property
    def text(self) -> str:
        """The chart in a sentence, for those who do not see it."""
        flat = [share for column in self.shares for share in column]
        return (
            f"{self.title}: {self.experts} experts in {len(self.names)} {self.of}s, shares from "
            f"{100 * min(flat):.1f} to {100 * max(flat):.1f} %, even {100 * self.even:.1f} %."
        )

    @property
    def values(self) -> dict[str, Any]:
        """What the page shows where a reader points at."""
        return {
            "box": [LEFT, TOP, *self.cell],
            "names": self.names,
            "of": self.of,
            "shares": [[round(100 * share, 2) for share in column] for column in self.shares],
            "even": round(100 * self.even, 2),
        }


def _short(value: float | None) -> float | None:
    return float(f"{value:.5g}") if value is not None and math.isfinite(value) else None
