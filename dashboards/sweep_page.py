"""A sweep as one HTML file without a script: parallel coordinates, curves, the points by loss with energy and carbon."""

import base64
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from dashboards.charts import Chart, Series, charts_svg, short

_STYLE = (
    "body{font:14px system-ui,sans-serif;margin:24px auto;max-width:1100px;padding:0 16px;color:#111;background:#fff}"
    "table{border-collapse:collapse;width:100%;font-size:12px}td,th{padding:3px 8px;border-bottom:1px solid #e5e5e5;"
    "text-align:right}td:first-child,th:first-child{text-align:left}svg{max-width:100%}"
    ".failed{color:#b91c1c}.muted{color:#666}tr.best{background:#ecfdf5}"
)
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 1000, 330, 60, 40, 24
_NO_LOSS = "#9ca3af"


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    name: str
    state: str
    values: dict[str, str]  # of each axis
    step: int  # reached
    loss: float | None  # of the training, nats per token: the mean of the last tenth of its steps, as halving compares
    held_out_loss: float | None  # nats per token
    parameters: int | None
    tokens: int  # trained
    steps_s: float  # time in steps, the undone ones too
    energy_kwh: float | None  # of the devices
    energy_site_kwh: float | None  # times PUE
    co2e_kg: float | None
    curve: list[tuple[float, float]]  # tokens, training loss
    detail: str  # why it failed or was dropped
    corpus: str  # the tokens and texts that its losses are of; empty before it begins


APART = (
    "These points differ in vocabulary or data: a loss per token of other tokens or texts does not compare, so each point is "
    "ranked only among its equals."
)


def equals(points: Sequence[SweepPoint]) -> dict[str, list[SweepPoint]]:
    """The points whose losses compare, by what these are of; no name where all of them do."""
    corpora = dict.fromkeys(p.corpus for p in points if p.corpus)
    if len(corpora) < 2:
        return {"": list(points)}
    found = {c or "not begun": [p for p in points if p.corpus == c] for c in (*corpora, "")}
    return {name: same for name, same in found.items() if same}


def sweep_page(
    name: str,
    axes: Sequence[str],
    points: Sequence[SweepPoint],
    energy_site_kwh: float | None,
    co2e_kg: float | None,
    saved: str = "",
) -> str:
    """The whole file. `points` in the order of their table; `saved`: what halving saved, in words.

    Its content security policy lets no script run and no request leave.
    """
    digest = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    finished = sum(p.state == "finished" for p in points)
    summary = [f"{len(points)} points, {finished} finished"]
    if energy_site_kwh is not None:
        summary.append(f"{1000 * energy_site_kwh:.3g} Wh")
    summary.append(f"{1000 * co2e_kg:.3g} g CO2e" if co2e_kg is not None else "no carbon intensity is configured")
    if saved:
        summary.append(saved)
    body = [
        f"<h1>{escape(name)}</h1><p>{escape(', '.join(summary))} (energy of all points together, each device once)</p>"
    ]
    groups = equals(points)
    if len(groups) > 1:
        body.append(f'<p class="failed">{APART}</p>')
    for corpus, same in groups.items():
        body.append(f"<h1>{escape(corpus)}</h1>{_compared(axes, same)}" if corpus else _compared(axes, same))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f"<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(name)}</title><style>{_STYLE}</style></head>\n<body>{''.join(body)}</body></html>\n"
    )


def _compared(axes: Sequence[str], points: Sequence[SweepPoint]) -> str:
    """Points whose losses compare, the best first."""
    colors = _colors(points)
    body = []
    shown = [p for p in points if _loss(p) is not None]
    dropped = [p for p in points if p.state == "dropped" and p.held_out_loss and math.isfinite(p.held_out_loss)]
    if shown and axes:
        told = ["dashed: dropped by halving, with the held-out loss of then"] if dropped else []
        if missing := len(points) - len(shown) - len(dropped):
            who = f"{missing} of {len(points)} points {'is' if missing == 1 else 'are'} not in the picture"
            told.append(f"{who}: neither finished nor dropped with a held-out loss")
        body.append(
            "<h2>Parallel coordinates</h2>"
            + "".join(f"<p>{line}</p>" for line in told)
            + _coordinates(axes, [*shown, *dropped], colors)
        )
    curves = [Series("", colors[p.name], line=p.curve) for p in reversed(points) if len(p.curve) > 1]
    if curves:
        chart = Chart(
            title="training loss; the darker, the lower the held-out loss at the end",
            x_label="tokens",
            y_label="loss (nats per token)",
            series=curves,
        )
        body.append("<h2>Curves</h2>" + charts_svg("", [chart], 1000))
    return "".join(body) + "<h2>Points</h2>" + _table(axes, points, colors)


def _loss(point: SweepPoint) -> float | None:
    finite = point.held_out_loss is not None and math.isfinite(point.held_out_loss)
    return point.held_out_loss if point.state == "finished" and finite else None


def _colors(points: Sequence[SweepPoint]) -> dict[str, str]:
    """Light to dark by rank of the held-out loss."""
    ranked = [p.name for p in points if _loss(p) is not None]
    found = {p.name: _NO_LOSS for p in points}
    for rank, name in enumerate(ranked):
        share = rank / max(1, len(ranked) - 1)  # 0 for the best
        light, dark = (190, 215, 245), (20, 50, 120)
        found[name] = "#" + "".join(f"{round(d + (a - d) * share):02x}" for a, d in zip(light, dark, strict=True))
    return found


def _coordinates(axes: Sequence[str], points: Sequence[SweepPoint], colors: dict[str, str]) -> str:
    places = [_scale([p.values[a] for p in points]) for a in axes]
    places.append(_scale([str(p.held_out_loss) for p in points]))
    heads = [*axes, "held-out loss"]
    step = (_WIDTH - 2 * _LEFT) / max(1, len(heads) - 1)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-size="11">']

    def y(share: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * share

    for p in reversed(points):  # the best on top
        values = [*(p.values[a] for a in axes), str(p.held_out_loss)]
        line = " ".join(f"{_LEFT + i * step:.1f},{y(places[i][v]):.1f}" for i, v in enumerate(values))
        tip = escape(f"{p.name}: {p.held_out_loss}")
        dashes = ' stroke-dasharray="6 4"' if p.state == "dropped" else ""
        parts.append(
            f'<polyline points="{line}" fill="none" stroke="{colors[p.name]}" stroke-width="2"{dashes}>'
            f"<title>{tip}</title></polyline>"
        )
    for i, head in enumerate(heads):
        at = _LEFT + i * step
        parts.append(
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{y(0):.1f}" y2="{y(1):.1f}" stroke="#555"/>'
            f'<text x="{at:.1f}" y="20" text-anchor="middle" fill="#111">{escape(head)}</text>'
        )
        told = sorted(places[i].items(), key=lambda item: item[1])
        if len(told) > 12:
            told = [told[0], told[-1]]
        for value, share in told:
            text = f"{float(value):.4g}" if i == len(axes) else value
            parts.append(
                f'<text x="{at + 6:.1f}" y="{y(share) + 4:.1f}" fill="#333" stroke="#fff" stroke-width="6" '
                f'stroke-linejoin="round" paint-order="stroke">{escape(text[:24])}</text>'
            )
    return "".join(parts) + "</svg>"


def _scale(values: Sequence[str]) -> dict[str, float]:
    """Where each value stands on its axis, 0 to 1: numbers by size (by ratio where they span a factor of 8), words in turn."""
    distinct = list(dict.fromkeys(values))
    try:
        numbers = {v: float(v) for v in distinct}
    except ValueError:
        return {v: i / max(1, len(distinct) - 1) for i, v in enumerate(distinct)}
    if not all(map(math.isfinite, numbers.values())):
        return {v: i / max(1, len(distinct) - 1) for i, v in enumerate(distinct)}
    if min(numbers.values()) > 0 and max(numbers.values()) >= 8 * min(numbers.values()):
        numbers = {v: math.log(x) for v, x in numbers.items()}
    low, high = min(numbers.values()), max(numbers.values())
    return {v: (x - low) / (high - low) if high > low else 0.5 for v, x in numbers.items()}


def _table(axes: Sequence[str], points: Sequence[SweepPoint], colors: dict[str, str]) -> str:
    heads = [
        "point",
        *axes,
        "state",
        "step",
        "loss",
        "held-out loss",
        "parameters",
        "tokens",
        "steps (s)",
        "Wh (site)",
        "g CO2e",
    ]
    rows = []
    for rank, p in enumerate(points):
        best = ' class="best"' if rank == 0 and len(points) > 1 and _loss(p) is not None else ""
        numbers = [
            f"{p.step:,}",
            "" if p.loss is None else f"{p.loss:.4f}",
            "" if p.held_out_loss is None else f"{p.held_out_loss:.4f}",
            "" if p.parameters is None else short(p.parameters),
            short(p.tokens),
            f"{p.steps_s:.1f}",
            "" if p.energy_site_kwh is None else f"{1000 * p.energy_site_kwh:.3g}",
            "" if p.co2e_kg is None else f"{1000 * p.co2e_kg:.3g}",
        ]
        state = f'<span class="failed">{escape(p.state)}: {escape(p.detail)}</span>' if p.detail else escape(p.state)
        cells = [f'<svg viewBox="0 0 10 10" width="10" height="10"><rect width="10" height="10" fill="{colors[p.name]}"/></svg> '
                 + escape(p.name), *(escape(p.values[a]) for a in axes), state, *numbers]  # fmt: skip
        rows.append(f"<tr{best}>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>")
    head = "".join(f"<th>{escape(h)}</th>" for h in heads)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
