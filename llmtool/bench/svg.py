"""Line charts as inline SVG: small enough to read, with nothing to install and nothing to fetch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 520, 280
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 14, 44
# Okabe and Ito's colours, distinguishable without full colour vision.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MAX_POINTS = 600


@dataclass(frozen=True, slots=True)
class Series:
    """x, y: equally long; x ascending. step: the value holds until the next x. dots: mark the points."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    step: bool = False
    dots: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    """x_max, y_max: None takes the data's. marks: (x, text) vertical lines."""

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    x_max: float | None = None
    y_max: float | None = None
    marks: tuple[tuple[float, str], ...] = ()


def render(chart: Chart) -> str:
    """The chart as an <svg> element. Axes start at 0."""
    x_top = chart.x_max or max((v for s in chart.series for v in s.x), default=0.0)
    y_top = chart.y_max or max((v for s in chart.series for v in s.y), default=0.0)
    x_ticks, y_ticks = ticks(x_top), ticks(y_top)
    frame = _Frame(max(x_top, x_ticks[-1] if chart.x_max is None else x_top), max(y_top, y_ticks[-1]))
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(chart.title)}">',
        f"<title>{escape(chart.title)}</title>",
        *_axes(frame, chart, x_ticks, y_ticks),
        *(_mark(frame, x, text) for x, text in chart.marks if x <= frame.x_top),
    ]
    for i, series in enumerate(chart.series):
        parts += _line(frame, series, COLOURS[i % len(COLOURS)])
    if len(chart.series) > 1:
        parts += _legend(chart.series)
    return "\n".join([*parts, "</svg>"])


@dataclass(frozen=True, slots=True)
class _Frame:
    x_top: float
    y_top: float

    def x(self, value: float) -> float:
        share = value / self.x_top if self.x_top > 0 else 0.0
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 2)

    def y(self, value: float) -> float:
        share = value / self.y_top if self.y_top > 0 else 0.0
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 2)


def ticks(top: float, wanted: int = 5) -> list[float]:
    """Round values from 0 up to the first at or above `top`: steps of 1, 2 or 5 times a power of ten."""
    if not top > 1e-300:  # below, steps would be no normal floats
        return [0.0, 1.0]
    magnitude = 10.0 ** math.floor(math.log10(top / wanted))
    step = next(f * magnitude for f in (1, 2, 5, 10) if f * magnitude * wanted >= top * 0.999)
    return [i * step for i in range(math.ceil(top / step - 1e-9) + 1)]


def _axes(frame: _Frame, chart: Chart, x_ticks: list[float], y_ticks: list[float]) -> list[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for value in y_ticks:
        y = frame.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y}" x2="{right}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{value:g}</text>')
    parts += [
        f'<text x="{frame.x(value)}" y="{bottom + 16}" text-anchor="middle">{value:g}</text>'
        for value in x_ticks
        if value <= frame.x_top * 1.0001
    ]
    parts.append(f'<line class="axis" x1="{LEFT}" y1="{bottom}" x2="{right}" y2="{bottom}"/>')
    middle = (LEFT + right) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(chart.x_label)}</text>')
    centre = (TOP + bottom) / 2
    turn = f'text-anchor="middle" transform="rotate(-90 14 {centre})"'
    parts.append(f'<text x="14" y="{centre}" {turn}>{escape(chart.y_label)}</text>')
    return parts


def _line(frame: _Frame, series: Series, colour: str) -> list[str]:
    points = [(frame.x(min(x, frame.x_top)), frame.y(min(y, frame.y_top))) for x, y in _thinned(series)]
    if not points:
        return []
    path = f"M{points[0][0]} {points[0][1]}"
    for x, y in points[1:]:
        path += f"H{x}V{y}" if series.step else f"L{x} {y}"
    parts = [f'<path class="line" stroke="{colour}" d="{path}"><title>{escape(series.name)}</title></path>']
    if series.dots:
        parts += [f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>' for x, y in points]
    return parts


def _thinned(series: Series) -> list[tuple[float, float]]:
    """At most ~MAX_POINTS points; of each run of dropped ones the highest stays, so that peaks do."""
    points = list(zip(series.x, series.y, strict=True))
    if len(points) <= MAX_POINTS:
        return points
    size = math.ceil(len(points) / MAX_POINTS)
    kept = [max(points[i : i + size], key=lambda p: p[1]) for i in range(0, len(points), size)]
    return [points[0], *kept, points[-1]]


def _mark(frame: _Frame, x: float, text: str) -> str:
    at = frame.x(x)
    return (
        f'<line class="mark" x1="{at}" y1="{TOP}" x2="{at}" y2="{HEIGHT - BOTTOM}"/>'
        f'<text x="{at + 4}" y="{TOP + 10}">{escape(text)}</text>'
    )


def _legend(series: Sequence[Series]) -> list[str]:
    parts = []
    for i, s in enumerate(series):
        y = TOP + 12 + 16 * i
        colour = COLOURS[i % len(COLOURS)]
        stroke = f'stroke="{colour}" stroke-width="3"'
        parts.append(f'<line x1="{LEFT + 10}" y1="{y - 4}" x2="{LEFT + 28}" y2="{y - 4}" {stroke}/>')
        parts.append(f'<text x="{LEFT + 34}" y="{y}">{escape(s.name)}</text>')
    return parts
