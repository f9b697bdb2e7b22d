"""Charts with a logarithmic x axis beside each other, as one SVG that opens anywhere: scaling laws, sweeps."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 430, 360  # of one chart
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 62, 46
_Scale = Callable[[float], float]


@dataclass(frozen=True)
class Series:
    """What is drawn in one colour. An empty label stays out of the legend."""

    label: str
    color: str
    line: list[tuple[float, float]] = field(default_factory=list)
    dots: list[tuple[float, float]] = field(default_factory=list)
    ticks: list[tuple[float, float]] = field(default_factory=list)  # crosses
    band: list[tuple[float, float, float]] = field(default_factory=list)  # x, low, high
    bars: list[tuple[float, float, float]] = field(default_factory=list)  # x, low, high


@dataclass(frozen=True, kw_only=True)
class Chart:
    title: str
    x_label: str
    y_label: str
    series: list[Series]
    log_y: bool = False
    y_range: tuple[float, float] | None = None  # what lies outside is cut off


def short(value: float) -> str:
    """1234567 as 1.23M; far numbers as 1e25."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if size <= abs(value) < 1e15:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def charts_svg(title: str, charts: Sequence[Chart], each: int = WIDTH) -> str:
    """`each`: the width of one chart."""
    width = each * len(charts)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" font-family="system-ui, sans-serif" '
        f'font-size="11"><rect width="{width}" height="{HEIGHT}" fill="#fff"/>'
        f'<text x="{LEFT}" y="20" font-size="14" fill="#111">{escape(title)}</text>'
    ]
    for number, chart in enumerate(charts):
        parts.append(f'<g transform="translate({number * each} 0)">{_chart(chart, f"clip{number}", each)}</g>')
    return "".join(parts) + "</svg>\n"


def _chart(chart: Chart, clip: str, width: int) -> str:
    xs = [p[0] for s in chart.series for p in (*s.line, *s.dots, *s.ticks, *s.band, *s.bars)]
    ys = [p[1] for s in chart.series for p in (*s.line, *s.dots, *s.ticks)]
    ys += [v for s in chart.series for p in (*s.band, *s.bars) for v in p[1:]]
    ys = [v for v in ys if math.isfinite(v) and (v > 0 or not chart.log_y)]
    to_y = math.log if chart.log_y else float
    x_low, x_high = _padded(math.log(min(xs)), math.log(max(xs)), 0.03)
    low, high = chart.y_range or (min(ys), max(ys))
    y_low, y_high = (low, high) if chart.y_range else _padded(to_y(low), to_y(high), 0.06)

    def x(value: float) -> float:
        return LEFT + (width - LEFT - RIGHT) * (math.log(value) - x_low) / (x_high - x_low)

    def y(value: float) -> float:
        if chart.log_y and value <= 0:
            return HEIGHT * 2.0  # below the clip
        return TOP + (HEIGHT - TOP - BOTTOM) * (y_high - to_y(value)) / (y_high - y_low)

    bottom, right = HEIGHT - BOTTOM, width - RIGHT
    parts = [
        f'<clipPath id="{clip}"><rect x="{LEFT}" y="{TOP}" width="{right - LEFT}" height="{bottom - TOP}"/></clipPath>'
        f'<text x="{LEFT}" y="40" fill="#333">{escape(chart.title)}</text>'
    ]
    for value in _log_ticks(x_low, x_high):
        parts.append(
            f'<line x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{TOP}" y2="{bottom}" stroke="#eee"/>'
            f'<text x="{x(value):.1f}" y="{bottom + 16}" text-anchor="middle" fill="#555">{short(value)}</text>'
        )
    levels = _log_ticks(y_low, y_high) if chart.log_y else [y_low + (y_high - y_low) * i / 5 for i in range(6)]
    for value in levels:
        told = short(value) if chart.log_y else f"{value:.2f}"
        parts.append(
            f'<line x1="{LEFT}" x2="{right}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#e5e5e5"/>'
            f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end" fill="#555">{told}</text>'
        )
    parts.append(
        f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 10}" text-anchor="middle" fill="#555">{escape(chart.x_label)}</text>'
        f'<text transform="rotate(-90)" x="{-(TOP + bottom) / 2}" y="14" text-anchor="middle" fill="#555">'
        f"{escape(chart.y_label)}</text>"
        f'<g clip-path="url(#{clip})">'
    )
    for s in chart.series:
        if s.band:
            edge = [(v, h) for v, _, h in s.band] + [(v, low) for v, low, _ in reversed(s.band)]
            parts.append(f'<polygon points="{_path(edge, x, y)}" fill="{s.color}" opacity="0.15"/>')
        if s.line:
            parts.append(
                f'<polyline points="{_path(s.line, x, y)}" fill="none" stroke="{s.color}" stroke-width="1.4"/>'
            )
        for at, least, most in s.bars:
            parts.append(
                f'<line x1="{x(at):.1f}" x2="{x(at):.1f}" y1="{y(least):.1f}" y2="{y(most):.1f}" stroke="{s.color}"/>'
            )
        parts += [
            f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="2.6" fill="{s.color}"><title>{a:.4g}, {b:.4g}</title></circle>'
            for a, b in s.dots
        ]
        parts += [
            f'<path d="M{x(a) - 4:.1f} {y(b) - 4:.1f}l8 8m0 -8l-8 8" stroke="{s.color}" stroke-width="2"/>'
            for a, b in s.ticks
        ]
    parts.append("</g>")
    at = float(LEFT)
    for s in (s for s in chart.series if s.label):
        if at + 11 + 5.2 * len(s.label) > width:  # no room for more
            parts.append(f'<text x="{at:.0f}" y="55" font-size="9" fill="#333">...</text>')
            break
        parts.append(
            f'<rect x="{at:.0f}" y="47" width="8" height="8" fill="{s.color}"/>'
            f'<text x="{at + 11:.0f}" y="55" font-size="9" fill="#333">{escape(s.label)}</text>'
        )
        at += 16 + 5.2 * len(s.label)
    return "".join(parts)


def _path(points: Sequence[tuple[float, float]], x: _Scale, y: _Scale) -> str:
    return " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points if math.isfinite(b))


def _padded(low: float, high: float, share: float) -> tuple[float, float]:
    pad = share * (high - low) or 0.5
    return low - pad, high + pad


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of each decade, or the decades alone, between e^low and e^high: about six."""
    decades = range(math.floor(low / math.log(10)), math.ceil(high / math.log(10)) + 1)
    fine = [m * 10.0**d for d in decades for m in (1, 2, 5) if low <= math.log(m * 10.0**d) <= high]
    if len(fine) <= 7:
        return fine
    whole = [10.0**d for d in decades if low <= d * math.log(10) <= high]
    return whole[:: max(1, math.ceil(len(whole) / 7))]
