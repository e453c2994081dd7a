"""Measurements over optimizer steps: kept small in memory, smoothed and thinned for drawing."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class Curve:
    """A quantity at optimizer steps; a value that was not finite is nan.

    Attributes:
        steps: optimizer steps, in the order of measurement.
        values: the quantity at each.
    """

    steps: array[float] = field(default_factory=lambda: array("d"))
    values: array[float] = field(default_factory=lambda: array("d"))

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[tuple[float, float]]:
        return zip(self.steps, self.values, strict=True)

    def add(self, step: float, value: float) -> None:
        """Append a point."""
        self.steps.append(step)
        self.values.append(value)

    def sorted(self) -> Curve:
        """Return the points in the order of steps; of two at one step, the one measured last."""
        points = sorted(dict(self).items())
        return Curve(array("d", (step for step, _ in points)), array("d", (value for _, value in points)))

    def finite(self) -> Curve:
        """Return the points whose values are finite."""
        kept = [(step, value) for step, value in self if math.isfinite(value)]
        return Curve(array("d", (step for step, _ in kept)), array("d", (value for _, value in kept)))

    def smoothed(self, window: int) -> Curve:
        """Return centred means over so many points, fewer near the ends."""
        sums, counts = array("d", [0.0]), array("q", [0])
        for value in self.values:
            finite = math.isfinite(value)
            sums.append(sums[-1] + (value if finite else 0.0))
            counts.append(counts[-1] + finite)
        smooth = Curve()
        for i, step in enumerate(self.steps):
            low, high = max(0, i - window // 2), min(len(self), i + window // 2 + 1)
            points = counts[high] - counts[low]
            smooth.add(step, (sums[high] - sums[low]) / points if points else math.nan)
        return smooth

    def thinned(self, limit: int) -> Curve:
        """Return at most about so many points: the lowest and the highest of each stretch, and both ends."""
        if len(self) <= limit:
            return self
        size = math.ceil(2 * len(self) / max(limit - 2, 2))
        kept = {0, len(self) - 1}
        for start in range(0, len(self), size):
            stretch = [i for i in range(start, min(start + size, len(self))) if math.isfinite(self.values[i])]
            if stretch:
                kept |= {min(stretch, key=self.values.__getitem__), max(stretch, key=self.values.__getitem__)}
        order = sorted(kept)
        return Curve(array("d", (self.steps[i] for i in order)), array("d", (self.values[i] for i in order)))
