"""Draws a plot as a self-contained SVG, for light and dark backgrounds.

The same plot always has the same text. Positions on the axes are computed with decimals, so that no finite value is
too large or too small.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from xml.sax.saxutils import escape

from benchmarks.measure import Line, Plot

WIDTH = 720
LEFT, RIGHT, TOP, BOTTOM = 70, 690, 64, 330  # position of the axes
LEGEND_ROW = 22
# A generous width of a character: the font of the reader is unknown.
CHARACTER = 7.5
# More markers would hide the line.
MAX_MARKERS = 20

# Colours for light and dark backgrounds, after Okabe and Ito, safe for colour blindness; dashes; markers.
STYLES = (
    ("#0072b2", "#56b4e9", "", "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z"),
    ("#c04f00", "#ff8c42", "8 4", "M-3.5,-3.5h7v7h-7z"),
    ("#007a5a", "#2bc79a", "2 3", "M0,-4.5l4.5,8h-9z"),
    ("#a84f86", "#e29ac4", "10 3 2 3", "M0,-5l5,5l-5,5l-5,-5z"),
    ("#8a6100", "#e6b800", "5 2", "M0,4.5l4.5,-8h-9z"),
    ("#444444", "#cccccc", "1 4", "M-4.5,-1.5h3v-3h3v3h3v3h-3v3h-3v-3h-3z"),
)

CSS = "\n".join(
    [
        "text { font: 13px system-ui, sans-serif; fill: #222; }",
        ".title { font-size: 15px; font-weight: 600; }",
        ".grid { stroke: #888; stroke-opacity: 0.35; }",
        ".axis { stroke: #555; }",
        ".line { fill: none; stroke: currentColor; stroke-width: 2; }",
        ".marker { fill: currentColor; }",
        *(f".s{i} {{ color: {light}; }}" for i, (light, *_) in enumerate(STYLES)),
        "@media (prefers-color-scheme: dark) {",
        "text { fill: #ddd; }",
        ".axis { stroke: #aaa; }",
        *(f".s{i} {{ color: {dark}; }}" for i, (_, dark, *_) in enumerate(STYLES)),
        "}",
    ]
)


@dataclass(frozen=True, slots=True)
class Axis:
    """Maps values to positions along an axis.

    Attributes:
        ticks: two or more values in rising order; the axis goes from the first to the last.
        begin, end: position of its ends.
        log: whether the axis is logarithmic.
        binary: whether labels use powers of 1024.
    """

    ticks: Sequence[Decimal]
    begin: float
    end: float
    log: bool = False
    binary: bool = False

    @property
    def upright(self) -> bool:
        return self.end < self.begin  # y grows downwards

    def at(self, value: float | Decimal) -> float:
        low, here, high = (
            each.log10() if self.log else each for each in (self.ticks[0], Decimal(value), self.ticks[-1])
        )
        return self.begin + float((here - low) / (high - low)) * (self.end - self.begin)

    def named(self) -> list[tuple[float, str]]:
        """Return the position and the label of each tick. Labels that would touch are empty."""
        names = [shown(tick, binary=self.binary) for tick in self.ticks]
        room = abs(self.end - self.begin) / (len(names) - 1)
        taken = 16.0 if self.upright else (max(map(len, names)) + 1) * CHARACTER
        every = math.ceil(taken / room)
        return [(self.at(tick), "" if i % every else names[i]) for i, tick in enumerate(self.ticks)]


def svg(plot: Plot) -> str:
    """Return the SVG, `WIDTH` wide; its height grows with the rows of the legend.

    Raises:
        ValueError: a value is not finite, or not positive on a logarithmic axis.
    """
    for line in plot.lines:
        _check(plot, line)
    xs = [x for line in plot.lines for x, _ in line.points]
    ys = [y for line in plot.lines for _, y in line.points]
    x, y = _axis(xs, LEFT, RIGHT, log=plot.log_x), _axis([*ys, *_zero(plot)], BOTTOM, TOP, log=plot.log_y)
    legend, rows = _legend(plot.lines)
    height = BOTTOM + 58 + rows * LEGEND_ROW
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
            f'width="{WIDTH}" height="{height}" role="img">',
            f"<title>{_escaped(plot.title)}</title>",
            f"<style>\n{CSS}\n</style>",
            _text(LEFT, 24, plot.title, "start", RIGHT - LEFT, "title"),
            _text(LEFT, TOP - 14, plot.y, "start", RIGHT - LEFT),
            _text((LEFT + RIGHT) / 2, BOTTOM + 42, plot.x, "middle", RIGHT - LEFT),
            *_grid(x, y),
            *(part for i, line in enumerate(plot.lines) for part in _polyline(line, x, y, i)),
            *legend,
            "</svg>\n",
        ]
    )


def shown(value: Decimal, *, binary: bool = False) -> str:
    """Return the label of a number: 0.5, 20k, 1M, 16Ki if `binary`, or 2e-9."""
    if binary:
        power = 0
        while value >= 4096:
            value, power = value / 1024, power + 1
        return f"{value.normalize():f}{('', 'Ki', 'Mi', 'Gi', 'Ti')[power]}"
    size = value.adjusted()
    if value and not -4 < size < 15:
        return f"{value.scaleb(-size).normalize():f}e{size}"
    power = max(0, min(4, size // 3)) if value else 0
    return f"{value.scaleb(-3 * power).normalize():f}{('', 'k', 'M', 'G', 'T')[power]}"


def _check(plot: Plot, line: Line) -> None:
    for point in line.points:
        for value, log in zip(point, (plot.log_x, plot.log_y), strict=True):
            if not math.isfinite(value) or (log and value <= 0):
                wanted = "positive, as its axis is logarithmic" if log else "finite"
                raise ValueError(f"plot {plot.name!r}, line {line.name!r}: {value} must be {wanted}")


def _zero(plot: Plot) -> list[float]:
    """Extend a linear axis to zero, so that a small difference looks small."""
    return [] if plot.log_y else [0.0]


def _axis(values: Sequence[float], begin: float, end: float, *, log: bool) -> Axis:
    if not log:
        return Axis(_even_ticks(values), begin, end)
    low, high = min(values, default=1.0), max(values, default=10.0)
    if low < high <= low * 2**12 and _are_powers_of_two(values):
        powers = range(math.frexp(low)[1] - 1, math.frexp(high)[1])
        return Axis([Decimal(2.0**power) for power in powers], begin, end, log=True, binary=True)
    return Axis(_ticks_of_ten(Decimal(low), Decimal(high)), begin, end, log=True)


def _are_powers_of_two(values: Sequence[float]) -> bool:
    """Return whether all values are powers of two that are labelled well with binary prefixes."""
    return bool(values) and all(math.frexp(value)[0] == 0.5 and 2**-4 <= value <= 2**50 for value in values)


def _even_ticks(values: Sequence[float]) -> list[Decimal]:
    """Return ticks at multiples of 1, 2 or 5 times a power of ten around the values; from zero if it is near."""
    low, high = Decimal(min(values, default=0.0)), Decimal(max(values, default=1.0))
    if low == high:
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if low else (low, Decimal(1))
    if 0 < low <= high / 2:
        low = Decimal(0)
    least = (high - low) / 6
    size = Decimal(1).scaleb(least.adjusted())
    step = next(size * times for times in (1, 2, 5, 10) if size * times >= least)
    first = int((low / step).to_integral_value(ROUND_FLOOR))
    last = int((high / step).to_integral_value(ROUND_CEILING))
    return [step * i for i in range(first, last + 1)]


def _ticks_of_ten(low: Decimal, high: Decimal) -> list[Decimal]:
    """Return ticks at powers of ten, and between them if there are few."""
    first, last = low.adjusted(), high.adjusted() + 1
    if last - first > 2:
        step = -(-(last - first) // 8)
        powers = range(first, last + step, step)
        ticks = [Decimal(1).scaleb(power) for power in powers]
    else:
        ticks = [Decimal(times).scaleb(power) for power in range(first - 1, last + 1) for times in (1, 2, 5)]
    begin = max(i for i, tick in enumerate(ticks) if tick <= low)
    end = min(i for i, tick in enumerate(ticks) if tick >= high)
    return ticks[begin : end + 1] if begin < end else ticks[max(begin - 1, 0) : end + 2]


def _grid(x: Axis, y: Axis) -> list[str]:
    parts = []
    for at, name in x.named():
        parts += [_rule(at, TOP, at, BOTTOM, "grid"), _text(at, BOTTOM + 20, name, "middle")]
    for at, name in y.named():
        parts += [_rule(LEFT, at, RIGHT, at, "grid"), _text(LEFT - 8, at + 4.5, name, "end")]
    return [*parts, _rule(LEFT, BOTTOM, RIGHT, BOTTOM, "axis"), _rule(LEFT, TOP, LEFT, BOTTOM, "axis")]


def _polyline(line: Line, x: Axis, y: Axis, number: int) -> list[str]:
    places = [(x.at(a), y.at(b)) for a, b in line.points]
    if not places:
        return []
    every = -(-len(places) // MAX_MARKERS)
    marked = [*places[:-1:every], places[-1]]
    joined = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
    style = number % len(STYLES)
    return [
        f'<polyline points="{joined}" class="line s{style}" {_dashes(style)}/>',
        *(_marker(a, b, style) for a, b in marked),
    ]


def _legend(lines: Sequence[Line]) -> tuple[list[str], int]:
    """Return the parts of the legend, and its number of rows."""
    parts: list[str] = []
    left, row = float(LEFT), 0
    for number, line in enumerate(lines):
        style = number % len(STYLES)
        width = min(44 + len(line.name) * CHARACTER, RIGHT - LEFT)
        if left > LEFT and left + width > RIGHT:
            left, row = float(LEFT), row + 1
        at = BOTTOM + 72 + row * LEGEND_ROW
        ends = f'x1="{left:.1f}" y1="{at}" x2="{left + 34:.1f}" y2="{at}"'
        parts += [
            f'<line {ends} class="line s{style}" {_dashes(style)}/>',
            _marker(left + 17, at, style),
            _text(left + 42, at + 4.5, line.name, "start", RIGHT - left - 42),
        ]
        left += width + 20
    return parts, row + 1


def _dashes(style: int) -> str:
    return f'stroke-dasharray="{STYLES[style][2] or "none"}"'


def _marker(x: float, y: float, style: int) -> str:
    return f'<path d="{STYLES[style][3]}" transform="translate({x:.1f},{y:.1f})" class="marker s{style}"/>'


def _rule(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _text(x: float, y: float, text: str, anchor: str, room: float = math.inf, kind: str = "label") -> str:
    """Return a text element, compressed if it might not fit into `room`."""
    squeezed = f' textLength="{room:.0f}" lengthAdjust="spacingAndGlyphs"' if len(text) * CHARACTER > room else ""
    where = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {where} class="{kind}"{squeezed}>{_escaped(text)}</text>'


def _escaped(text: str) -> str:
    """Escape a text for XML. Characters that XML does not allow become U+FFFD."""
    return escape(re.sub("[^\t\n -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text))
