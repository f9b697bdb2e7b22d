"""The loss curve of a run as one SVG file that opens anywhere."""

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 760, 380
LEFT, RIGHT, TOP, BOTTOM = 56, 20, 40, 44
MAX_POINTS = 2000


def loss_curve_svg(
    title: str,
    steps: Sequence[int],
    losses: Sequence[float],
    held_out: Sequence[tuple[int, float]],
    unigram_nats: float | None,
) -> str:
    """Training loss by step, held-out loss as points, the unigram level as a line. Losses in nats per token."""
    every = max(1, len(steps) // MAX_POINTS)
    training = [
        (s, y) for s, y in zip(steps[::every], losses[::every], strict=True) if y == y and abs(y) != float("inf")
    ]
    levels = [y for _, y in training] + [y for _, y in held_out] + ([unigram_nats] if unigram_nats else [])
    low, high = min(levels), max(levels)
    low, high = low - 0.05 * (high - low or 1), high + 0.05 * (high - low or 1)
    last = max(steps)

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / last

    def y(loss: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - loss) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="system-ui, sans-serif" '
        f'font-size="12"><rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>'
        f'<text x="{LEFT}" y="22" font-size="15" fill="#111">{escape(title)}</text>'
    ]
    for i in range(6):
        level = low + (high - low) * i / 5
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(level):.1f}" y2="{y(level):.1f}" stroke="#e5e5e5"/>'
            f'<text x="{LEFT - 8}" y="{y(level) + 4:.1f}" text-anchor="end" fill="#555">{level:.2f}</text>'
        )
        step = round(last * i / 5)
        parts.append(
            f'<text x="{x(step):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle" fill="#555">{step:,}</text>'
        )
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle" fill="#555">step</text>'
        f'<text transform="rotate(-90)" x="{-HEIGHT / 2}" y="14" text-anchor="middle" fill="#555">nats per token</text>'
    )
    points = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in training)
    parts.append(f'<polyline points="{points}" fill="none" stroke="#2563eb" stroke-width="1.4"/>')
    parts += [f'<circle cx="{x(s):.1f}" cy="{y(v):.1f}" r="3.5" fill="#d97706"/>' for s, v in held_out]
    legend = [("#2563eb", f"training loss, {training[-1][1]:.2f} at the end")]
    if held_out:
        legend.append(("#d97706", f"held-out loss, {held_out[-1][1]:.2f}"))
    if unigram_nats:
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(unigram_nats):.1f}" y2="{y(unigram_nats):.1f}" stroke="#888" '
            f'stroke-dasharray="6 4"/>'
        )
        legend.append(("#888", f"unigram level, {unigram_nats:.2f}"))
    for i, (color, text) in enumerate(legend):
        at = TOP + 14 + 18 * i
        parts.append(
            f'<rect x="{WIDTH - RIGHT - 220}" y="{at - 9}" width="12" height="10" fill="{color}"/>'
            f'<text x="{WIDTH - RIGHT - 202}" y="{at}" fill="#333">{escape(text)}</text>'
        )
    return "".join(parts) + "</svg>\n"


COLORS = ("#2563eb", "#d97706", "#059669", "#7c3aed", "#dc2626", "#555")


def lines_svg(
    title: str, x_label: str, y_label: str, lines: Sequence[tuple[str, Sequence[float], Sequence[float]]]
) -> str:
    """Named lines (name, x, y) over a logarithmic x axis, as one SVG file that opens anywhere."""
    xs, ys = [x for _, line_x, _ in lines for x in line_x], [y for _, _, line_y in lines for y in line_y]
    low_x, high_x = math.log(min(xs)), math.log(max(xs))
    low, high = min(ys), max(ys)
    low, high = low - 0.05 * (high - low or 1), high + 0.05 * (high - low or 1)

    def at_x(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (math.log(x) - low_x) / (high_x - low_x or 1)

    def at_y(y: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - y) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="system-ui, sans-serif" '
        f'font-size="12"><rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>'
        f'<text x="{LEFT}" y="22" font-size="15" fill="#111">{escape(title)}</text>'
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle" fill="#555">{escape(x_label)}</text>'
        f'<text transform="rotate(-90)" x="{-HEIGHT / 2}" y="14" text-anchor="middle" fill="#555">{escape(y_label)}</text>'
    ]
    for i in range(6):
        level, x = low + (high - low) * i / 5, math.exp(low_x + (high_x - low_x) * i / 5)
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at_y(level):.1f}" y2="{at_y(level):.1f}" stroke="#e5e5e5"/>'
            f'<text x="{LEFT - 8}" y="{at_y(level) + 4:.1f}" text-anchor="end" fill="#555">{level:.3f}</text>'
            f'<text x="{at_x(x):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle" fill="#555">{x:,.0f}</text>'
        )
    for i, (name, line_x, line_y) in enumerate(lines):
        color = COLORS[i % len(COLORS)]
        points = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in zip(line_x, line_y, strict=True))
        at = HEIGHT - BOTTOM - 12 - 18 * (len(lines) - 1 - i)
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.6"/>'
            f'<rect x="{LEFT + 12}" y="{at - 9}" width="12" height="10" fill="{color}"/>'
            f'<text x="{LEFT + 30}" y="{at}" fill="#333">{escape(name)}</text>'
        )
    return "".join(parts) + "</svg>\n"
