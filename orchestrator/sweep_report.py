"""`arriero sweep status | report`: what stands in the run directories of a sweep, read from the disk."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dashboards.carbon import CarbonStatement
from dashboards.sweep_page import APART, SweepPoint, equals, sweep_page
from model.cost import parameter_count
from orchestrator import spec as specs
from orchestrator.carbon_report import accounted
from orchestrator.columns import read_columns
from orchestrator.energy.report import account
from orchestrator.errors import UserError
from orchestrator.launch import last_record
from orchestrator.record import Event, read_events
from orchestrator.registry import steps_of
from orchestrator.run_dir import RunDir
from orchestrator.sweep import Journal, Point
from orchestrator.sweep_slurm import live_points

CURVE_POINTS = 150
_UNKNOWN = "UNKNOWN"  # Slurm does not answer


@dataclass(frozen=True, kw_only=True)
class SweepReport:
    root: Path
    axes: list[str]  # overrides that differ between points
    points: list[SweepPoint]  # of each corpus best first; those without a held-out loss last
    steps_saved_share: float  # of all steps, those that points dropped by halving did not train
    total: CarbonStatement | None  # of all points: each physical device counts once

    def as_json(self) -> dict[str, Any]:
        names = (
            "name state corpus values held_out_loss parameters tokens steps_s energy_kwh energy_site_kwh co2e_kg detail".split()  # noqa: SIM905
        )
        return {
            "sweep": str(self.root),
            "axes": self.axes,
            "points": [{n: getattr(p, n) for n in names} for p in self.points],
            "steps_saved_share": self.steps_saved_share,
            "energy_site_kwh": _central(self.total, "site_energy_kwh"),
            "co2e_kg": _central(self.total, "co2e_kg"),
        }


def _central(statement: CarbonStatement | None, name: str) -> float | None:
    figure = getattr(statement, name, None)
    return figure.central if figure else None


def status(root: Path) -> list[dict[str, Any]]:
    """One row a point, in the journal's order."""
    points = Journal.read(root).points
    live = _live(root, points)
    return [_status(root, point, live) for point in points]


def _live(root: Path, points: Sequence[Point]) -> dict[str, str]:
    """Slurm's word for each point; that nobody knows, for all, where it does not answer."""
    found = live_points(root)
    return {p.directory: _UNKNOWN for p in points} if found is None else found


def _status(root: Path, point: Point, live: dict[str, str]) -> dict[str, Any]:
    run_dir = RunDir(root / point.directory)
    events = read_events(run_dir.events)
    newest = last_record(run_dir)
    steps = steps_of(run_dir) if run_dir.spec.exists() else None
    state, detail = _state(run_dir, events, live.get(point.directory))
    return {
        "point": point.directory,
        "state": state,
        "step": newest.step if newest else 0,
        "steps": steps,
        "loss": newest.loss if newest else None,
        "held_out_loss": _held_out(events),
        "attempts": len({e.attempt for e in events if e.attempt is not None}),
        "detail": detail,
    }


def _state(run_dir: RunDir, events: list[Event], slurms_word: str | None) -> tuple[str, str]:
    """What it is, and why where it failed or was dropped.

    finished, running, queued (on Slurm), failed, dropped (by halving), stopped (saved, to go on), interrupted (without a word)
    or waiting; unknown where Slurm does not answer.
    """
    if any(e.kind == "finished" for e in events):
        return "finished", ""
    if run_dir.is_at_work() or slurms_word == "RUNNING":
        return "running", ""
    if slurms_word and slurms_word != _UNKNOWN:
        return "queued", ""
    last = events[-1] if events else None
    if last and last.kind in ("failed", "dropped"):
        return last.kind, last.detail.splitlines()[0]
    if slurms_word == _UNKNOWN:
        return "unknown", "squeue does not answer"
    if last is None:
        return "waiting", ""
    return ("stopped" if last.kind == "stopped" else "interrupted"), ""


def _held_out(events: list[Event]) -> float | None:
    found = [float(e.data["loss"]) for e in events if e.kind == "evaluated" and "loss" in e.data]
    return found[-1] if found else None


def status_table(root: Path, rows: list[dict[str, Any]]) -> str:
    width = max(len(r["point"]) for r in rows)
    states = [r["state"] for r in rows]
    counts = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))
    lines = [
        f"{root}: {len(rows)} points, {counts}",
        f"{'point':<{width}}  state        step          loss    held-out",
    ]
    for r in rows:
        step = f"{r['step']}/{r['steps']}" if r["steps"] else "-"
        losses = [f"{v:>8.4f}" if v is not None else f"{'-':>8}" for v in (r["loss"], r["held_out_loss"])]
        lines.append(
            f"{r['point']:<{width}}  {r['state']:<11}  {step:<11}  {'  '.join(losses)}  {r['detail']}".rstrip()
        )
    return "\n".join(lines)


def report(root: Path, overrides: Sequence[str] = ()) -> SweepReport:
    """`overrides`: `carbon.KEY=VALUE` in place of the points' own. Raises UserError, also where no point has begun."""
    if wrong := [o for o in overrides if not (o.startswith("carbon.") and "=" in o)]:
        raise UserError(f"{' '.join(wrong)}: a report takes overrides of carbon alone, such as carbon.zone=FRA")
    points = Journal.read(root).points
    values = {p.directory: dict(o.split("=", 1) for o in p.overrides if "=" in o) for p in points}
    keys = list(dict.fromkeys(k for v in values.values() for k in v))
    axes = [k for k in keys if len({v.get(k) for v in values.values()}) > 1]
    begun = [root / p.directory for p in points if (root / p.directory / "spec.yaml").exists()]
    if not begun:
        raise UserError(f"no point of {root} has begun: nothing to report")
    statements = account([accounted(run, overrides) for run in begun], ask_slurm=False)
    by_run = dict(zip(begun, statements, strict=False))
    live = _live(root, points)
    found = [_point(root, p, {a: values[p.directory].get(a, "") for a in axes}, by_run, live) for p in points]
    found.sort(key=lambda p: p.held_out_loss if p.held_out_loss is not None and p.state == "finished" else math.inf)
    found = [p for same in equals(found).values() for p in same]
    rows = [_status(root, p, live) for p in points]
    planned = sum(r["steps"] or 0 for r in rows)
    saved = sum(r["steps"] - r["step"] for r in rows if r["state"] == "dropped")
    return SweepReport(
        root=root,
        axes=axes,
        points=found,
        steps_saved_share=saved / planned if planned else 0.0,
        total=statements[-1],
    )


def _point(
    root: Path, point: Point, values: dict[str, str], by_run: dict[Path, CarbonStatement], live: dict[str, str]
) -> SweepPoint:
    run_dir = RunDir(root / point.directory)
    events = read_events(run_dir.events)
    state, detail = _state(run_dir, events, live.get(point.directory))
    spec = specs.load(run_dir.spec) if run_dir.spec.exists() else None
    columns = read_columns(run_dir.records)
    kept = columns.where(columns.kept())
    tokens, loss = kept["tokens"], kept["loss"]
    parts = [p for p in np.array_split(np.arange(len(loss)), min(CURVE_POINTS, max(1, len(loss)))) if len(p)]
    curve = [(float(tokens[p].mean()), float(loss[p].mean())) for p in parts]
    statement = by_run.get(run_dir.root)
    return SweepPoint(
        name=point.directory,
        state=state,
        values=values,
        held_out_loss=_held_out(events),
        parameters=parameter_count(spec.model) if spec else None,
        tokens=int(tokens[-1]) if len(tokens) else 0,
        steps_s=float(columns["step_s"].sum()) if len(columns) else 0.0,
        energy_kwh=_central(statement, "energy_kwh"),
        energy_site_kwh=_central(statement, "site_energy_kwh"),
        co2e_kg=_central(statement, "co2e_kg"),
        curve=[(t, y) for t, y in curve if math.isfinite(y) and t > 0],
        detail=detail,
        corpus=corpus(spec) if spec else "",
    )


def corpus(spec: specs.RunSpec) -> str:
    """What its losses per token are of; its last word stands for the sources and the tokenizer, all of them."""
    data = specs.as_dict(spec)["data"]
    rows = [data["held_out_share"], spec.eval_rows_per_source]  # that are evaluated
    texts = json.dumps([data["sources"], data["tokenizer"], rows], sort_keys=True)
    digest = hashlib.sha256(texts.encode()).hexdigest()[:6]
    return f"vocabulary of {spec.model.vocab_size:,}, data {spec.data.name} {digest}"


def markdown(found: SweepReport) -> str:
    heads = [*found.axes, "state", "held-out loss", "tokens", "Wh (site)", "g CO2e"]
    groups = equals(found.points)
    lines = [APART] if len(groups) > 1 else []
    for name, same in groups.items():
        lines += ["", f"{name}:", ""] if name else []
        lines += [" | ".join(["", *heads, ""]).strip(), " | ".join(["", *("---" for _ in heads), ""]).strip()]
        for p in same:
            cells = [
                *(p.values[a] for a in found.axes),
                p.state,
                f"{p.held_out_loss:.4f}" if p.held_out_loss is not None else "",
                f"{p.tokens:,}",
                _thousandths(p.energy_site_kwh),
                _thousandths(p.co2e_kg),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    energy, carbon = _central(found.total, "site_energy_kwh"), _central(found.total, "co2e_kg")
    together = f"{_thousandths(energy)} Wh (site)" if energy is not None else "no energy was measured"
    together += f", {_thousandths(carbon)} g CO2e" if carbon is not None else ", no carbon intensity is configured"
    if found.steps_saved_share:
        lines += ["", f"Successive halving saved {found.steps_saved_share:.0%} of all steps."]
    lines += ["", f"All points together, each device once: {together}"]
    return "\n".join(lines) + "\n"


def _thousandths(value: float | None) -> str:
    return "" if value is None else f"{1000 * value:.3g}"


def write_page(found: SweepReport, output: Path) -> Path:
    if output.is_dir():
        raise UserError(f"--output {output} is a folder: name a file")
    output.parent.mkdir(parents=True, exist_ok=True)
    text = sweep_page(
        found.root.resolve().name,
        found.axes,
        found.points,
        _central(found.total, "site_energy_kwh"),
        _central(found.total, "co2e_kg"),
        f"halving saved {found.steps_saved_share:.0%} of all steps" if found.steps_saved_share else "",
    )
    temporary = output.with_name(f".{output.name}.new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(output)
    return output
