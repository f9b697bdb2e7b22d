"""The same at a glance in a terminal."""

import math
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.panel import Panel as Box
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dashboards.carbon import central, sentence
from dashboards.panels import PANELS
from dashboards.run_view import RunView

_BLOCKS = "▁▂▃▄▅▆▇█"
_SHOWN = ("loss", "grad_norm", "tokens_per_s", "mfu", "step_time", "memory")  # of the list of panels, by key
_TOLD = {line.source.removeprefix("event.") for p in PANELS if p.key == "events" for line in p.lines} | {"evaluated"}
_STATES = {
    **dict.fromkeys(("training", "stopping", "queued"), "blue"),
    **dict.fromkeys(("stopped", "cancelled", "dropped"), "yellow"),
    **dict.fromkeys(("failed", "no sign of life"), "red"),
    "finished": "green",
}


def sparkline(values: Sequence[float | None], width: int) -> str:
    """A line of `width` blocks; each is the mean of its share of the values, a gap where there is none."""
    if not values or width < 1:
        return ""
    shares = [
        values[i * len(values) // width : max(i * len(values) // width + 1, (i + 1) * len(values) // width)]
        for i in range(width)
    ]
    means = [sum(seen) / len(seen) if (seen := [v for v in share if v is not None]) else None for share in shares]
    there = [m for m in means if m is not None]
    if not there:
        return " " * width
    low, high = min(there), max(there)
    scale = (len(_BLOCKS) - 1) / (high - low) if high - low > 1e-6 * abs(high) else 0.0
    return "".join(" " if m is None else _BLOCKS[round((m - low) * scale)] for m in means)


def frame(run: RunView, width: int | None = None) -> RenderableType:
    """One picture of a run."""
    width = width or min(120, shutil.get_terminal_size().columns)
    h = run.headline
    state = Text(run.state, style=_STATES.get(run.state, "dim"))
    done = ProgressBar(total=max(1, run.steps_planned), completed=run.steps_done, width=max(10, width - 50))
    left = f", {_time(h['left_s'])} left" if h.get("left_s") else ""
    head = Table.grid(padding=(0, 1))
    head.add_row(Text(run.name, style="bold"), state, done, f"{run.steps_done:,}/{run.steps_planned:,}{left}")
    curves = Table.grid(padding=(0, 2))
    for panel in (p for key in _SHOWN for p in PANELS if p.key == key):
        field = panel.step_lines[0].source.removeprefix("step.")
        values = run.curve.mean.get(field, [])
        if any(v is not None for v in values):
            newest = h.get(field)
            shown = "-" if newest is None else f"{_number(newest * panel.scale)} {panel.unit}"
            curves.add_row(panel.title, Text(sparkline(values, max(10, width - 62)), style="cyan"), shown)
    if h.get("held_out_loss") is not None:
        curves.add_row("Held-out loss", "", f"{h['held_out_loss']:.4g} nats/token")
    lived = sum(run.seconds.values())
    parts = [f"{kind} {_time(s)} ({s / lived:.1%})" for kind, s in run.seconds.items() if lived and s / lived >= 0.001]
    ettr = f"ETTR {h['ettr']:.1%} in {len(run.attempts)} attempt(s): " if h.get("ettr") is not None else ""
    events = Table.grid(padding=(0, 2))
    for event in [e for e in run.events if e.kind in _TOLD][-6:]:
        at = datetime.fromtimestamp(event.time_s, UTC).strftime("%m-%d %H:%M:%S")
        events.add_row(Text(at, style="dim"), event.kind, Text(f"{event.step:,}", justify="right"), Text(event.detail))
    errors = [
        Text(f"{e.file}:{e.line} {e.text}", style="red", no_wrap=True, overflow="ellipsis") for e in run.log_errors[-3:]
    ]
    energy = Text(sentence(run.statement)) if run.statement is not None else Text("energy: nothing was measured")
    below: list[RenderableType] = [curves, Text(ettr + ", ".join(parts)), energy, Text(), events, *errors]
    return Box(Group(head, Text(), *below), width=width, border_style="dim")


def as_json(run: RunView) -> dict[str, Any]:
    """The figures of a frame, for programs."""
    return {
        "name": run.name,
        "state": run.state,
        "steps_done": run.steps_done,
        "steps_planned": run.steps_planned,
        "updated_utc": datetime.fromtimestamp(run.updated_s, UTC).isoformat(timespec="seconds"),
        **{k: v if v is None or math.isfinite(v) else None for k, v in run.headline.items()},
        "seconds": {f"{kind}_s": round(s, 3) for kind, s in run.seconds.items()},
        "attempts": len(run.attempts),
        **{name: central(run.statement, name) for name in ("energy_kwh", "site_energy_kwh", "co2e_kg")},
        "last_events": [{"kind": e.kind, "step": e.step, "detail": e.detail} for e in run.events[-6:]],
        "log_errors": [f"{e.file}:{e.line} {e.text}" for e in run.log_errors],
    }


def show(runs: Sequence[RunView]) -> None:
    console = Console(highlight=False)
    for run in runs:
        console.print(frame(run, min(120, console.width)))


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"
