"""`arriero sweep status | report`: what stands in the run directories of a sweep, read from the disk."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dashboards.carbon import CarbonStatement, central
from dashboards.sweep_page import APART, SweepPoint, equals, sweep_page
from model.cost import parameter_count
from orchestrator import spec as specs
from orchestrator.carbon_report import accounted
from orchestrator.columns import read_columns
from orchestrator.energy.report import account
from orchestrator.errors import UserError
from orchestrator.launch import last_record
from orchestrator.record import Event, read_events
from orchestrator.registry import RunRow, rows_of
from orchestrator.run_dir import RunDir
from orchestrator.sweep import Journal, Point
from orchestrator.sweep_slurm import live_points

CURVE_POINTS = 150


@dataclass(frozen=True, kw_only=True)
class SweepReport:
    root: Path
    axes: list[str]  # overrides that differ between points
    points: list[SweepPoint]  # of each corpus the finished by held-out loss, then the others by steps and loss
    steps_saved_share: float  # of all steps, those that points dropped by halving did not train
    total: CarbonStatement | None  # of all points: each physical device counts once

    def as_json(self) -> dict[str, Any]:
        names = "name state corpus values step loss held_out_loss parameters tokens steps_s energy_kwh energy_site_kwh co2e_kg"
        return {
            "sweep": str(self.root),
            "axes": self.axes,
            "points": [{n: getattr(p, n) for n in [*names.split(), "detail"]} for p in self.points],
            "steps_saved_share": self.steps_saved_share,
            "energy_site_kwh": central(self.total, "site_energy_kwh"),
            "co2e_kg": central(self.total, "co2e_kg"),
        }


def status(root: Path) -> list[dict[str, Any]]:
    """One row a point, in the journal's order."""
    points = Journal.read(root).points
    runs = _runs(root, points)
    return [_status(root, point, runs[point.directory]) for point in points]


def _runs(root: Path, points: Sequence[Point]) -> dict[str, RunRow]:
    """Each point as `arriero status` tells it; waiting, where it has not begun, and nobody knows where Slurm does not answer."""
    answers = live_points(root) is not None  # first: it notes the job of each point where a kill has left that undone
    found = rows_of([RunDir(root / p.directory) for p in points])
    if not answers:
        known = ("finished", "running", "failed", "dropped")
        found = [r if r.state in known else replace(r, state="unknown", why="squeue does not answer") for r in found]
    found = [replace(r, state="waiting") if r.state == "new" else r for r in found]
    return {p.directory: r for p, r in zip(points, found, strict=True)}


def _status(root: Path, point: Point, run: RunRow) -> dict[str, Any]:
    run_dir = RunDir(root / point.directory)
    newest = last_record(run_dir)
    return {
        "point": point.directory,
        "state": run.state,
        "step": newest.step if newest else 0,
        "steps": run.steps,
        "loss": newest.loss if newest else None,
        "held_out_loss": _held_out(read_events(run_dir.events)),
        "attempts": run.attempts,
        "detail": _detail(run),
    }


def _detail(run: RunRow) -> str:
    """Why, in a line, where it does not go on by itself."""
    told = ("failed", "dropped", "cancelled", "interrupted", "unknown")
    return run.why.partition("\n")[0] if run.state in told else ""


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
    runs = _runs(root, points)
    found = [_point(root, p, {a: values[p.directory].get(a, "") for a in axes}, by_run, runs) for p in points]
    found.sort(key=_place)
    found = [p for same in equals(found).values() for p in same]
    rows = [_status(root, p, runs[p.directory]) for p in points]
    planned = sum(r["steps"] or 0 for r in rows)
    saved = sum(r["steps"] - r["step"] for r in rows if r["state"] == "dropped")
    return SweepReport(
        root=root,
        axes=axes,
        points=found,
        steps_saved_share=saved / planned if planned else 0.0,
        total=statements[-1],
    )


def _place(point: SweepPoint) -> tuple[float, ...]:
    """Losses at different steps do not compare: only among points that came as far does the loss decide."""
    if point.state == "finished" and point.held_out_loss is not None:
        return 0, point.held_out_loss
    return 1, -point.step, math.inf if point.loss is None else point.loss


def _point(
    root: Path, point: Point, values: dict[str, str], by_run: dict[Path, CarbonStatement], runs: dict[str, RunRow]
) -> SweepPoint:
    run_dir = RunDir(root / point.directory)
    events = read_events(run_dir.events)
    spec = specs.load(run_dir.spec) if run_dir.spec.exists() else None
    columns = read_columns(run_dir.records)
    kept = columns.where(columns.kept())
    step, tokens, loss = kept["step"], kept["tokens"], kept["loss"]
    last = int(step[-1]) if len(step) else 0
    newest = float(loss[step > 0.9 * last].mean()) if last else math.nan
    parts = [p for p in np.array_split(np.arange(len(loss)), min(CURVE_POINTS, max(1, len(loss)))) if len(p)]
    curve = [(float(tokens[p].mean()), float(loss[p].mean())) for p in parts]
    statement = by_run.get(run_dir.root)
    return SweepPoint(
        name=point.directory,
        state=runs[point.directory].state,
        values=values,
        step=last,
        loss=newest if math.isfinite(newest) else None,
        held_out_loss=_held_out(events),
        parameters=parameter_count(spec.model) if spec else None,
        tokens=int(tokens[-1]) if len(tokens) else 0,
        steps_s=float(columns["step_s"].sum()) if len(columns) else 0.0,
        energy_kwh=central(statement, "energy_kwh"),
        energy_site_kwh=central(statement, "site_energy_kwh"),
        co2e_kg=central(statement, "co2e_kg"),
        curve=[(t, y) for t, y in curve if math.isfinite(y) and t > 0],
        detail=_detail(runs[point.directory]),
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
    heads = [*found.axes, "state", "step", "loss", "held-out loss", "tokens", "Wh (site)", "g CO2e"]
    groups = equals(found.points)
    lines = [APART] if len(groups) > 1 else []
    for name, same in groups.items():
        lines += ["", f"{name}:", ""] if name else []
        lines += [" | ".join(["", *heads, ""]).strip(), " | ".join(["", *("---" for _ in heads), ""]).strip()]
        for p in same:
            cells = [
                *(p.values[a] for a in found.axes),
                p.state,
                f"{p.step:,}",
                f"{p.loss:.4f}" if p.loss is not None else "",
                f"{p.held_out_loss:.4f}" if p.held_out_loss is not None else "",
                f"{p.tokens:,}",
                _thousandths(p.energy_site_kwh),
                _thousandths(p.co2e_kg),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    energy, carbon = central(found.total, "site_energy_kwh"), central(found.total, "co2e_kg")
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
        central(found.total, "site_energy_kwh"),
        central(found.total, "co2e_kg"),
        f"halving saved {found.steps_saved_share:.0%} of all steps" if found.steps_saved_share else "",
    )
    temporary = output.with_name(f".{output.name}.new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(output)
    return output
