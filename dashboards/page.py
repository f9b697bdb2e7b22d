"""One HTML file of one run, or of several beside each other, that opens with no network.

The panels are those of `panels.py`; script, style and charts (uPlot, in `vendor/`) are in the file. Its content security
policy lets only that script and that style run, by their hashes, and no request leave.
"""

import base64
import hashlib
import html
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from dashboards.carbon import central, figures, remarks
from dashboards.panels import PANELS, SECTIONS
from dashboards.run_view import BUCKETS, Happening, RunView

EVENTS = 1000  # of one kind of a run; of more, as many, evenly spread
_EVENT_DATA = ("loss", "loss_by_source", "act")  # what charts draw of an event


def buckets_for(runs: int) -> int:
    """How fine the curves of each of several runs may be, so that the page stays small."""
    return max(100, BUCKETS * 2 // max(2, runs))


def page(runs: Sequence[RunView], live_s: float | None = None) -> str:
    """The whole file. `live_s`: served, the page asks for new data as often as that (seconds)."""
    script = _asset("vendor/uPlot.iife.min.js") + "\n" + _asset("page.js")
    style = _asset("vendor/uPlot.min.css") + "\n" + _asset("page.css")
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data:; base-uri 'none'; "
        f"form-action 'none'" + ("; connect-src 'self'" if live_s else "")
    )
    data = json.dumps(page_data(runs, live_s), separators=(",", ":"), allow_nan=False)
    # "<" never stands in the data, so that no text of a run can end the element.
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark"><meta name="referrer" content="no-referrer">\n'
        f'<title>{html.escape(_title(runs))}</title><link rel="icon" href="data:,">\n'
        f"<style>{style}</style></head>\n"
        '<body><div id="page"><noscript>This page draws its charts with JavaScript.</noscript></div>\n'
        f'<script type="application/json" id="data">{data.replace("<", chr(92) + "u003c")}</script>\n'
        f"<script>{script}</script></body></html>\n"
    )


def page_data(runs: Sequence[RunView], live_s: float | None = None) -> dict[str, Any]:
    """What the script draws from."""
    configs = [_flat(run.config) for run in runs]
    keys = dict.fromkeys(k for c in configs for k in c)
    own = ("name", "run_root")  # what tells where a run lies
    differing = [k for k in keys if len(runs) > 1 and k not in own and len({str(c.get(k)) for c in configs}) > 1]
    return {
        "title": _title(runs),
        "sections": SECTIONS,
        "panels": [asdict(panel) for panel in PANELS],
        "runs": [_run(run, config) for run, config in zip(runs, configs, strict=True)],
        "differing": differing[:12],
        "live_s": live_s,
        "made_s": round(time.time()),
    }


def _run(run: RunView, config: dict[str, Any]) -> dict[str, Any]:
    s = run.statement
    measured = s is not None and s.energy_kwh is not None
    return {
        "name": run.name,
        "state": run.state,
        "updated_s": run.updated_s,
        "steps_planned": run.steps_planned,
        "steps_done": run.steps_done,
        "summary": _summary(run),
        "headline": {k: _sane(v) for k, v in run.headline.items()},
        "curve": asdict(run.curve),
        "undone": asdict(run.undone),
        "events": [_event(e) for e in _not_too_many(run.events)],
        "attempts": [
            asdict(a) | {"spans": [[round(b, 2), round(e, 2), k] for b, e, k in a.spans]} for a in run.attempts
        ],
        "seconds": run.seconds,
        "power_w": run.power_w,
        "power_note": run.power_note,
        "energy_by_class": s.by_class_kwh if s is not None and measured else None,
        "energy_by_source": s.by_source_kwh if s is not None and measured else None,
        "energy_kwh": central(s, "site_energy_kwh"),
        "energy_covered_share": s.covered_share if s is not None and measured else None,
        "co2e_kg": central(s, "co2e_kg"),
        "carbon": None
        if s is None
        else {
            "rows": [[f.key, _short(f.value), _short(f.low), _short(f.high), f.how] for f in figures(s)],
            "remarks": remarks(s),
        },
        "mix": [asdict(m) for m in run.mix],
        "forecast": None if run.forecast is None else [asdict(f) for f in run.forecast],
        "log_errors": [asdict(e) for e in run.log_errors],
        "config": config,
        "code": run.code,
    }


def _summary(run: RunView) -> str:
    c = _flat(run.config)
    words = [
        f"{c['model.name']}: {c['model.n_layers']} layers of {c['model.dim']}" if "model.dim" in c else "",
        f"{c['cluster.nodes']} node(s) of {c['cluster.gpus_per_node']} {c['gpu.name']}" if "cluster.nodes" in c else "",
        f"code {run.code[:12]}",
    ]
    return " · ".join(w for w in words if w)


def _event(event: Happening) -> dict[str, Any]:
    data = {k: _sane(v) for k, v in event.data.items() if k in _EVENT_DATA}
    shown = {"time_s": event.time_s, "kind": event.kind, "step": event.step, "detail": event.detail[:400]}
    return shown | ({"data": data} if data else {})


def _not_too_many(events: list[Happening]) -> list[Happening]:
    """Those that a panel shows."""
    shown = {line.source.split(".")[1] for p in PANELS for line in p.lines if line.source.startswith("event.")}
    of_kind: dict[str, list[Happening]] = {}
    for event in events:
        if event.kind not in shown:
            continue
        of_kind.setdefault(event.kind, []).append(event)
    kept = [e for same in of_kind.values() for e in (same if len(same) <= EVENTS else _spread(same))]
    return sorted(kept, key=lambda e: e.time_s)


def _spread(events: list[Happening]) -> list[Happening]:
    return [events[round(i * (len(events) - 1) / (EVENTS - 1))] for i in range(EVENTS)]


def _title(runs: Sequence[RunView]) -> str:
    return (
        runs[0].name
        if len(runs) == 1
        else f"{len(runs)} runs: {', '.join(r.name for r in runs[:4])}" + (", ..." if len(runs) > 4 else "")
    )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        inner = [_flat(v, f"{prefix}.{k}" if prefix else str(k)) for k, v in value.items()]
        return {k: v for part in inner for k, v in part.items()}
    return {prefix: value if isinstance(value, (str, int, float, bool, type(None))) else str(value)}


def _sane(value: Any) -> Any:
    """JSON knows no NaN: what is not finite is left out."""
    if isinstance(value, dict):
        return {k: _sane(v) for k, v in value.items()}
    return None if isinstance(value, float) and value - value != 0 else value


def _short(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _asset(name: str) -> str:
    return files("dashboards").joinpath(name).read_text(encoding="utf-8").strip()


def _hash(text: str) -> str:
    """As a content security policy names what stands between the tags."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
