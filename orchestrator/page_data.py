"""From a run directory to what the dashboards take: reads the disk, fills `dashboards.run_view.RunView`.

Every part that is missing (no ledger, no forecast, no prepared tokens) leaves its own field empty and the rest as it is.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dashboards.carbon import CarbonStatement
from dashboards.panels import step_fields
from dashboards.run_view import BUCKETS, Attempt, Curve, ForecastLine, Happening, MixLine, RunView, curve
from model.data.mixture import Mixture, SourceSize
from model.data.prepare import PreparedData
from orchestrator import spec as specs
from orchestrator.carbon_report import accounted
from orchestrator.columns import StepColumns, StepReader, condensed
from orchestrator.energy.attribution import CLASSES, Span, attempt_windows, timeline
from orchestrator.energy.ledger import consumption, kind_of, read_ledger
from orchestrator.energy.report import account
from orchestrator.logs import log_errors
from orchestrator.record import Event, read_events, unix_s
from orchestrator.run_dir import RunDir
from orchestrator.spec import RunSpec

SILENT_AFTER_S = 300.0  # without a record or event: a run that has not ended is "without a sign of life"
REQUEUED_WITHIN_S = 60.0  # after its ranks have stopped, a job that goes on is back in the queue
ENDED = ("finished", "failed", "stopped", "cancelled", "dropped")  # states in which nothing more comes by itself
POWER_BINS = 600
POWER_LEDGER_BYTES = 64 << 20  # of more than this, some nodes stand for all
SPANS = 6000  # of all attempts together


class RunFollower:
    """One run directory, read again at each call and then only what is new of the records."""

    def __init__(self, root: Path, buckets: int = BUCKETS) -> None:
        self.paths = RunDir(root)
        self.buckets = buckets
        self._steps = StepReader(self.paths.records)

    def fingerprint(self) -> str:
        """Changes with every byte that is appended to the run's records, events and ledger."""
        folders = (self.paths.records, self.paths.events, self.paths.energy, self.paths.logs)
        files = [p for folder in folders for p in sorted(folder.glob("*")) if p.is_file()]
        return " ".join(f"{p.name}:{p.stat().st_size}" for p in files)

    def view(self, now_s: float | None = None) -> RunView:
        """Raises UserError where this is no run directory."""
        spec = specs.load(self.paths.spec)
        columns, events = self._steps.read(), read_events(self.paths.events)
        return _view(self.paths, spec, columns, events, time.time() if now_s is None else now_s, self.buckets)


def run_view(root: Path, buckets: int = BUCKETS) -> RunView:
    return RunFollower(root, buckets).view()


def _view(
    paths: RunDir, spec: RunSpec, columns: StepColumns, events: list[Event], now_s: float, buckets: int
) -> RunView:
    is_kept = columns.kept()
    kept, undone = columns.where(is_kept), columns.where(~is_kept)
    short = condensed(columns, {e.step for e in events})
    windows = attempt_windows(short, events)
    spans = timeline(short, events)
    updated_s = max((end_s for _, end_s in windows.values()), default=paths.spec.stat().st_mtime)
    state = _state(paths, events, updated_s, now_s)
    seconds = _seconds(spans, windows)
    power_w, power_note = _power(paths, windows)
    statement = account([accounted(paths.root)], ask_slurm=False)[0]
    done = int(kept["step"][-1]) if len(kept) else 0
    config = specs.as_dict(spec)
    return RunView(
        name=paths.root.name,
        state=state,
        updated_s=updated_s,
        steps_planned=spec.steps,
        steps_done=done,
        headline=_headline(spec, kept, events, seconds, state),
        curve=curve(kept["step"], {name: kept[name] for name in step_fields() if name != "step"}, buckets),
        undone=_undone_curve(undone, max(50, buckets // 3)),
        events=[
            Happening(
                time_s=unix_s(e.time_utc),
                attempt=e.attempt,
                kind=e.kind,
                step=e.step,
                detail=e.detail.removeprefix(f"step {e.step}: "),  # it is shown beside its step
                data=e.data,
            )
            for e in events
        ],
        attempts=_attempts(columns, events, windows, spans, state),
        seconds=seconds,
        power_w=power_w,
        power_note=power_note,
        statement=statement,
        mix=_mix(paths, spec, kept),
        forecast=_forecast(paths, _measured(kept, seconds, statement)),
        log_errors=log_errors(paths.logs),
        config=config,
        code=_text(paths.code / "commit.txt").strip() or "unknown",
    )


def _undone_curve(undone: StepColumns, buckets: int) -> Curve:
    """The loss of the steps that were undone, with nothing between its stretches, so that no line joins two."""
    order = np.argsort(undone["step"], kind="stable")
    step, loss = undone["step"][order], undone["loss"][order]
    found = Curve([], {"loss": []}, {"loss": []}, {"loss": []})
    breaks = np.flatnonzero(np.diff(step) > 1) + 1
    for s, y in zip(np.split(step, breaks), np.split(loss, breaks), strict=True):
        if not len(s):
            continue
        part = curve(s, {"loss": y}, max(4, buckets * len(s) // len(step)))
        mean = part.mean["loss"]
        found.step.extend([*part.step, part.step[-1] + 1])
        found.mean["loss"] += [*mean, None]
        found.low["loss"] += [*part.low.get("loss", mean), None]
        found.high["loss"] += [*part.high.get("loss", mean), None]
    return found


def _state(paths: RunDir, events: Sequence[Event], updated_s: float, now_s: float) -> str:
    """As the run directory alone tells it."""
    if any(e.kind == "finished" for e in events):
        return "finished"
    if not events:
        return "cancelled" if paths.cancelled.exists() else "not started"
    last = events[-1]
    if last.kind in ("failed", "cancelled", "dropped"):
        return last.kind
    if last.kind == "requeued":
        return "queued"
    if last.kind != "stopped" and now_s - updated_s <= SILENT_AFTER_S:
        return "training"
    if paths.cancelled.exists():
        return "cancelled"
    if last.kind != "stopped":
        return "no sign of life"
    requeues = paths.submission.exists() and not last.data.get("paused")  # Slurm's side will say in a moment
    return "stopping" if requeues and now_s - unix_s(last.time_utc) < REQUEUED_WITHIN_S else "stopped"


def _headline(
    spec: RunSpec, kept: StepColumns, events: Sequence[Event], seconds: dict[str, float], state: str
) -> dict[str, float | None]:
    lived = sum(seconds.values())
    held_out = [e.data["loss"] for e in events if e.kind == "evaluated" and "loss" in e.data]
    headline: dict[str, float | None] = {
        "held_out_loss": held_out[-1] if held_out else None,
        "ettr": seconds["kept"] / lived if lived else None,
        "left_s": None,
    }
    recent = kept.since(max(0, len(kept) - 50))
    for name in ("loss", "tokens", "lr", "grad_norm", "memory_bytes"):
        headline[name] = _finite(recent[name][-1]) if len(recent) else None
    for name in ("tokens_per_s", "mfu", "step_s", "data_s"):
        headline[name] = _finite(np.nanmedian(recent[name])) if np.isfinite(recent[name]).any() else None
    if state == "training" and headline["step_s"] and len(kept):
        headline["left_s"] = (spec.steps - float(kept["step"][-1])) * headline["step_s"]
    return headline


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def _seconds(spans: Sequence[Span], windows: dict[int, tuple[float, float]]) -> dict[str, float]:
    """The run's time from its first start on, by what it was for."""
    seconds = dict.fromkeys([*CLASSES, "down"], 0.0)
    if not windows:
        return seconds
    for span in spans:
        seconds[span.kind] += span.end_s - span.start_s
    held_s, up_to_s = 0.0, float("-inf")
    for start_s, end_s in sorted(windows.values()):
        held_s += max(0.0, end_s - max(start_s, up_to_s))
        up_to_s = max(up_to_s, end_s)
    seconds["idle"] += max(0.0, held_s - sum(seconds.values()))
    seconds["down"] = max(0.0, up_to_s - min(s for s, _ in windows.values()) - held_s)
    return seconds


def _attempts(
    columns: StepColumns,
    events: Sequence[Event],
    windows: dict[int, tuple[float, float]],
    spans: Sequence[Span],
    state: str,
) -> list[Attempt]:
    found = []
    last = max(windows, default=0)
    of_attempt = columns["attempt"]
    for number, (start_s, end_s) in windows.items():
        steps = columns["step"][of_attempt == number]
        mine = [e for e in events if e.attempt == number]
        started = next((e for e in mine if e.kind == "started"), None)
        ended = next((e.kind for e in reversed(mine) if e.kind in ("finished", "stopped", "failed")), "without a word")
        if number == last and state == "training":
            ended = "going on"
        where = ""
        if started is not None:
            data = started.data
            parts = [
                str(data.get("host", "")),
                f"{data['ranks']} rank{'s' * (data['ranks'] != 1)}" if "ranks" in data else "",
            ]
            where = ", ".join(p for p in [*parts, str(data.get("device", ""))] if p)
        inside = [(s.start_s, s.end_s, s.kind) for s in spans if s.start_s < end_s and s.end_s > start_s]
        found.append(
            Attempt(
                number=number,
                start_s=start_s,
                end_s=end_s,
                first_step=int(steps[0]) if len(steps) else None,
                last_step=int(steps[-1]) if len(steps) else None,
                where=where,
                ended=ended,
                spans=_coarse(inside, (end_s - start_s) * len(windows) / SPANS),
            )
        )
    return found


def _coarse(spans: Sequence[tuple[float, float, str]], finest_s: float) -> list[tuple[float, float, str]]:
    """Neighbours of one kind joined, and what is too short to be seen given to its neighbour."""
    found: list[tuple[float, float, str]] = []
    for start_s, end_s, kind in spans:
        if found and start_s - found[-1][1] <= finest_s and (found[-1][2] == kind or end_s - start_s < finest_s):
            found[-1] = (found[-1][0], end_s, found[-1][2])
        else:
            found.append((start_s, end_s, kind))
    return found


def _power(
    paths: RunDir, windows: dict[int, tuple[float, float]]
) -> tuple[tuple[list[float], dict[str, list[float | None]]], str]:
    """Power by kind of device over time, in bins; and what to say of it."""
    files = sorted(paths.energy.glob("*.jsonl"))
    if not files or not windows:
        return ([], {}), "no energy was measured" if not files else ""
    nodes = sorted({p.stem.partition("-")[2] for p in files})
    total_bytes = sum(p.stat().st_size for p in files)
    taken = nodes
    if total_bytes > POWER_LEDGER_BYTES:
        count = max(1, int(len(nodes) * POWER_LEDGER_BYTES / total_bytes))
        taken = nodes[:: max(1, len(nodes) // count)]
    scale = len(nodes) / len(taken)
    begin_s = min(s for s, _ in windows.values())
    end_s = max(e for _, e in windows.values())
    edges = np.linspace(begin_s, max(end_s, begin_s + 1), POWER_BINS + 1)
    joules: dict[str, np.ndarray[tuple[int], np.dtype[np.float64]]] = {}
    of_run = {(str(paths.root), attempt): window for attempt, window in windows.items()}
    for node in taken:
        ticks = [t for p in files if p.stem.partition("-")[2] == node for t in read_ledger(p, run=str(paths.root))[0]]
        by_kind: dict[str, list[tuple[float, float, float]]] = {}
        for i in consumption(ticks, of_run).intervals:
            by_kind.setdefault(kind_of(i.device), []).append((i.start_s, i.end_s, i.joules))
        for kind, intervals in by_kind.items():
            joules[kind] = joules.get(kind, np.zeros(POWER_BINS)) + _binned(intervals, edges) * scale
    width_s = float(edges[1] - edges[0])
    power = {k: [float(f"{v:.4g}") if v else None for v in (j / width_s).tolist()] for k, j in joules.items()}
    note = "" if scale == 1 else f"{len(taken)} of {len(nodes)} nodes, scaled to all"
    return ((edges[:-1] + width_s / 2).round(3).tolist(), power), note


def _binned(intervals: list[tuple[float, float, float]], edges: Any) -> Any:
    """Joules in each bin; within an interval the power is even."""
    start_s, end_s, joules = (np.array(v) for v in zip(*intervals, strict=True))
    whole = np.zeros(len(edges))
    watts = joules / np.maximum(end_s - start_s, 1e-9)
    for t in range(0, len(watts), 4096):  # joules before each edge, some thousands of intervals at a time
        part = slice(t, t + 4096)
        lived = np.clip(edges[:, None], start_s[part], end_s[part]) - start_s[part]
        whole += (lived * watts[part]).sum(axis=1)
    return np.diff(whole)


def _mix(paths: RunDir, spec: RunSpec, kept: StepColumns) -> list[MixLine]:
    epochs: dict[str, float] = {}
    tokens: dict[str, int] = {}
    try:
        prepared = PreparedData.load(_text(paths.data).strip() or ".")
        tokens = {name: prepared.sources[name].train_tokens for name in spec.data.sources}
        sizes = [SourceSize(n, tokens[n], s.proportion) for n, s in spec.data.sources.items()]
        mixture = Mixture(sizes, spec.model.sequence_length, spec.seed)
        batches = 0
        if len(kept):
            batch = kept["data_batch"][-1]
            batches = int(batch if np.isfinite(batch) else kept["step"][-1] - 1) + 1
        epochs = mixture.epochs(batches * spec.optim.batch_sequences)
    except (ValueError, KeyError):
        pass  # the tokens lie elsewhere: the mix is shown without its epochs
    return [
        MixLine(
            source=name,
            stands_in_for=source.stands_in_for,
            proportion=source.proportion,
            tokens=tokens.get(name, source.tokens),
            epochs=epochs.get(name),
        )
        for name, source in spec.data.sources.items()
    ]


def _measured(
    kept: StepColumns, seconds: dict[str, float], statement: CarbonStatement | None
) -> dict[str, float | None]:
    """What the run measured, under the names that a forecast uses."""
    measured: dict[str, float | None] = {}
    steady = kept.since(min(10, len(kept) // 2))  # the first steps compile and fill caches
    for name in ("step_s", "tokens_per_s", "mfu", "data_s"):
        values = steady[name]
        measured[name] = float(np.nanmedian(values)) if np.isfinite(values).any() else None
    memory = kept["memory_bytes"]
    measured["memory_bytes"] = float(np.nanmax(memory)) if np.isfinite(memory).any() else None
    lived_s = sum(seconds.values())
    measured["hours"] = lived_s / 3600
    measured["ettr"] = seconds["kept"] / lived_s if lived_s else None
    if statement is not None:
        measured["gpu_hours"] = statement.gpu_hours
        measured["energy_kwh"] = statement.energy_kwh.central if statement.energy_kwh else None
        measured["site_energy_kwh"] = statement.site_energy_kwh.central if statement.site_energy_kwh else None
        measured["co2e_kg"] = statement.co2e_kg.central if statement.co2e_kg else None
    return measured


def _forecast(paths: RunDir, measured: dict[str, float | None]) -> list[ForecastLine] | None:
    """The figures of `plan.json` that the run measures under the same name; a figure is a number or low/central/high."""
    try:
        plan = json.loads(_text(paths.root / "plan.json") or "null")
    except ValueError:
        return None
    if not isinstance(plan, dict):
        return None
    found: dict[str, ForecastLine] = {}

    def visit(value: Any) -> None:
        if not isinstance(value, dict):
            return
        for key, inner in value.items():
            figure = inner if isinstance(inner, dict) else {"central": inner}
            central = figure.get("central", figure.get("value"))
            if key in measured and key not in found and isinstance(central, (int, float)):
                found[key] = ForecastLine(
                    figure=key,
                    forecast=float(central),
                    low=figure.get("low"),
                    high=figure.get("high"),
                    measured=measured[key],
                )
            else:
                visit(inner)

    visit(plan)
    return list(found.values())


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
