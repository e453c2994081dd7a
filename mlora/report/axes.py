"""Axes of charts, and numbers as people read them."""

from __future__ import annotations

import math
from dataclasses import dataclass

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_SUFFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Tick:
    """A place on an axis, in pixels of the drawing, and what stands there."""

    at: float
    text: str


@dataclass(frozen=True)
class Axis:
    """A linear axis.

    Attributes:
        label: quantity and unit.
        low, high: ends in the quantity's unit.
        start, end: the same ends in pixels of the drawing.
        wanted: about how many ticks there is room for.
    """

    label: str
    low: float
    high: float
    start: float
    end: float
    wanted: int = 5

    def at(self, value: float) -> float:
        """Return the pixel of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    @property
    def exponent(self) -> int:
        """Power of ten that tick texts leave to the axis's title, so that learning rates read as 0, 1, 2."""
        largest = max(abs(self.low), abs(self.high))
        return math.floor(math.log10(largest)) if 0 < largest < 0.01 else 0

    @property
    def title(self) -> str:
        """The label, with the power of ten where ticks leave one out."""
        return f"{self.label} × 10{str(self.exponent).translate(_SUPERSCRIPT)}" if self.exponent else self.label

    @property
    def ticks(self) -> list[Tick]:
        """Round values between the ends."""
        step = _round_step((self.high - self.low) / self.wanted)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        scale = 10.0**self.exponent
        digits = max(0, -math.floor(math.log10(step / scale) + 1e-9))
        if round(step / scale * 10**digits, 6) % 1:  # a step of 2.5
            digits += 1
        return [Tick(self.at(i * step), _tick_text(i * step / scale, digits)) for i in range(first, last + 1)]


def spanning(
    label: str, values: list[float], start: float, end: float, wanted: int = 5, zero: bool = False
) -> Axis | None:
    """Return an axis that holds all finite values, with a little room; from zero where asked. None without values."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return None
    low, high = min(finite), max(finite)
    least = (
        max(0.05 * max(abs(low), abs(high)), 1e-30) if low or high else 1.0
    )  # closer than that, rounding noise would fill the chart
    if high - low < least:
        low, high = (low + high - least) / 2, (low + high + least) / 2
    room = 0.04 * (high - low)
    low = min(0.0, low) if zero or 0 <= low <= room else low - room
    return Axis(label, low, high + room, start, end, wanted)


def number(value: float | None, digits: int = 3) -> str:
    """Return a number to so many significant digits, as 0.0123, 12,300 or 2 × 10⁻⁴."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if exponent < -3:
        mantissa = f"{value / 10.0**exponent:.{digits - 1}f}".rstrip("0").rstrip(".")
        return f"{mantissa} × 10{str(exponent).translate(_SUPERSCRIPT)}"
    text = f"{value:,.{max(0, digits - 1 - exponent)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def short(value: float | None) -> str:
    """Return a count as 950, 2.4 M or 15 k."""
    if value is None or not math.isfinite(value):
        return "–"
    for size, suffix in _SUFFIXES:
        if abs(value) >= 0.9995 * size:
            return f"{number(value / size)} {suffix}"
    return number(value)


def size(count: float | None) -> str:
    """Return a number of bytes as 1.2 GiB."""
    if count is None or not math.isfinite(count):
        return "–"
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if count >= 1024**power:
            return f"{count / 1024**power:.{1 if power > 2 else 0}f} {unit}"
    return f"{count:.0f} B"


def duration(seconds: float | None) -> str:
    """Return a time as 48 s, 12 min 5 s or 3 h 20 min."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))


def _tick_text(value: float, digits: int) -> str:
    if abs(value) >= 10_000:
        return short(value)
    return f"{value:,.{digits}f}".replace("-", "−")
