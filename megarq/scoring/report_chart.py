"""Line charts of scores against checkpoint steps, as SVG in the page."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megarq.scoring.report_html import Html, escape, join, tag

WIDTH, HEIGHT = 360, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 12, 28
_DASHES = (None, "6 4", "2 3", "9 3 2 3")
"""Lines differ in dashes as well as colour, for print and for eyes that see fewer colours."""


@dataclass(frozen=True)
class Point:
    """A score at a step."""

    step: int
    value: float
    interval: Sequence[float] | None = None
    """[low, high], if known."""


def number(value: float) -> str:
    """Four digits that count."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else str(value).replace("inf", "infinite")
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}".replace("-", "\N{MINUS SIGN}", value < 0)


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers between low and high."""
    span = (high - low) or abs(high) or 1.0
    raw = span / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    unit = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    return [unit * place for place in range(math.ceil(low / unit - 1e-9), math.floor(high / unit + 1e-9) + 1)]


def line_chart(metric: str, series: dict[str, list[Point]]) -> Html:
    """One line for each of `series`, whose points are finite and have at least two steps between them."""
    points = [point for line in series.values() for point in line]
    steps = [point.step for point in points]
    ends = [end for point in points for end in (point.value, *(point.interval or ())) if math.isfinite(end)]
    low, high = min(ends), max(ends)
    margin = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    first = 0 if 4 * min(steps) < max(steps) else min(steps)
    scale = _Scale(first, max(steps), low - margin, high + margin)
    lines = [
        tag("g", _line(scale, line, _DASHES[index % len(_DASHES)]), class_=f"line s{index % 4}")
        for index, line in enumerate(series.values())
    ]
    told = "; ".join(
        (f"{name}: " if len(series) > 1 else "")
        + ", ".join(f"{number(point.value)} at step {point.step:,}" for point in line)
        for name, line in series.items()
    )
    label = f"{metric} against checkpoint step. {told}"
    box = f"0 0 {WIDTH} {HEIGHT}"
    svg = tag("svg", _axes(scale), *lines, viewBox=box, role="img", aria_label=label)
    return tag("figure", tag("figcaption", tag("b", metric), _legend(series)), svg, class_="chart")


@dataclass(frozen=True)
class _Scale:
    first: int
    last: int
    low: float
    high: float

    def x(self, step: float) -> float:
        return _LEFT + (step - self.first) / (self.last - self.first) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return _TOP + (self.high - value) / (self.high - self.low) * (HEIGHT - _TOP - _BOTTOM)


def _axes(scale: _Scale) -> Html:
    parts = []
    for value in ticks(scale.low, scale.high, 4):
        y = f"{scale.y(value):.1f}"
        parts.append(tag("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=y, y2=y, class_="grid"))
        parts.append(tag("text", number(value), x=_LEFT - 8, y=y, dy="0.32em", text_anchor="end"))
    for step in ticks(scale.first, scale.last, 4):
        x = f"{scale.x(step):.1f}"
        parts.append(tag("text", _short(step), x=x, y=HEIGHT - _BOTTOM + 18, text_anchor="middle"))
    return join(*parts)


def _short(step: float) -> str:
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if step >= size:
            return f"{step / size:g}{unit}"
    return f"{step:g}"


def _line(scale: _Scale, points: Sequence[Point], dash: str | None) -> Html:
    places = [(f"{scale.x(point.step):.1f}", f"{scale.y(point.value):.1f}", point) for point in points]
    way = "M" + " L".join(f"{x} {y}" for x, y, _ in places)
    parts = [tag("path", d=way, stroke_dasharray=dash)]
    for x, y, point in places:
        told = f"step {point.step:,}: {number(point.value)}"
        if point.interval and all(map(math.isfinite, point.interval)):
            low, high = (f"{scale.y(end):.1f}" for end in point.interval)
            parts.append(tag("line", x1=x, x2=x, y1=low, y2=high, class_="spread"))
            told += f", {' to '.join(map(number, point.interval))}"
        # An SVG circle with a title is no void element.
        parts.append(Html(f'<circle cx="{x}" cy="{y}" r="3.5"><title>{escape(told)}</title></circle>'))
    return join(*parts)


def _legend(series: dict[str, list[Point]]) -> Html | None:
    if len(series) < 2:
        return None
    names = []
    for index, name in enumerate(series):
        stroke = tag("path", d="M0 5H26", stroke_dasharray=_DASHES[index % len(_DASHES)])
        sample = tag("svg", stroke, viewBox="0 0 26 10", aria_hidden="true", class_=f"line s{index % 4}")
        names.append(tag("span", sample, name))
    return tag("span", *names, class_="legend")
