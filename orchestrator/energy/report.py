"""From run directories to carbon statements: reads ledgers and records, counts every device once over all the runs, and
fills the statement that `dashboards.carbon` shows.
"""

import contextlib
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dashboards.carbon import CarbonStatement, Range
from orchestrator.columns import condensed, read_columns
from orchestrator.energy.attribution import CLASSES, ClassSeconds, attempt_windows, attribute, class_seconds, timeline
from orchestrator.energy.carbon import (
    J_PER_KWH,
    UNCERTAINTY_METHOD,
    Series,
    energy_range,
    intensity,
    place_problems,
    read_series,
)
from orchestrator.energy.config import CarbonConfig
from orchestrator.energy.ledger import SOURCES, Interval, Tick, consumption, decode, kind_of, read_ledger
from orchestrator.errors import UserError
from orchestrator.record import read_events
from orchestrator.run_dir import RunDir
from slurm.energy import consumed_energy_j

_PARALLEL_FROM = 8  # machines: below that, starting processes takes longer than it saves


@dataclass(frozen=True, kw_only=True)
class AccountedRun:
    """What the account must know of a run beside its ledger."""

    name: str
    root: Path
    carbon: CarbonConfig
    gpu: str
    gpu_watts: float
    gpus: int  # of an attempt whose `started` event does not say
    nodes: int


@dataclass(frozen=True)
class _Life:
    """What a run's own records say."""

    windows: dict[int, tuple[float, float]]  # attempt -> when it lived, Unix seconds
    sizes: dict[int, tuple[int, int]]  # attempt -> its nodes and GPUs: a run may go on with others
    lived: ClassSeconds
    series: Series | None


@dataclass
class _Sums:
    """One run's account, or the part of it that some ledger files hold."""

    by_source_j: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SOURCES, 0.0))
    by_class_j: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CLASSES, 0.0))
    by_kind_j: dict[str, float] = field(default_factory=dict)
    apportioned_j: float = 0.0
    grams_j_per_kwh: float = 0.0  # joules x g/kWh, with a series
    outside_series_s: float = 0.0
    nodes: frozenset[tuple[int, str]] = frozenset()  # attempt and node, of those that left a line
    node_s: float = 0.0
    jobs: frozenset[str] = frozenset()
    dropped: int = 0
    covered_s: float = 0.0  # device-seconds, measured or estimated from what was
    unmeasured_s: float = 0.0

    @property
    def joules(self) -> float:
        return sum(self.by_source_j.values())

    def add(self, other: "_Sums") -> None:
        for counted, more in (
            (self.by_source_j, other.by_source_j),
            (self.by_class_j, other.by_class_j),
            (self.by_kind_j, other.by_kind_j),
        ):
            for key, joules in more.items():
                counted[key] = counted.get(key, 0.0) + joules
        self.nodes |= other.nodes
        self.jobs |= other.jobs
        numbers = "apportioned_j grams_j_per_kwh outside_series_s node_s dropped covered_s unmeasured_s"
        for name in numbers.split():
            setattr(self, name, getattr(self, name) + getattr(other, name))


def account(runs: Sequence[AccountedRun], ask_slurm: bool = True) -> list[CarbonStatement]:
    """One statement a run and, for several, their total last. A run that is named twice counts once."""
    of = {str(run.root.resolve()): run for run in runs}
    lives = {key: _read_life(run) for key, run in of.items()}
    sums = {key: _Sums() for key in of}
    groups = list(_groups_by_machine(of))
    needed = [{key: lives[key] for key, _ in files} for files in groups]
    if len(groups) < _PARALLEL_FROM:
        parts = list(map(_account_group, groups, needed))
    else:
        with ProcessPoolExecutor(min(16, len(groups), os.cpu_count() or 1)) as pool:
            parts = list(pool.map(_account_group, groups, needed))
    for part in parts:
        for key, more in part.items():
            sums[key].add(more)
    for key, run in of.items():
        _add_unseen_nodes(sums[key], lives[key], run)
    statements = [_statement(run, sums[key], lives[key], ask_slurm) for key, run in of.items()]
    return statements if len(statements) == 1 else [*statements, _total(statements)]


def _read_life(run: AccountedRun) -> _Life:
    paths = RunDir(run.root)
    events = read_events(paths.events)
    records = condensed(read_columns(paths.records), {e.step for e in events})  # a million steps in seconds
    windows = attempt_windows(records, events)
    sizes = dict.fromkeys(windows, (run.nodes, run.gpus))
    for event in events:
        if event.kind == "started" and event.attempt is not None:
            sizes[event.attempt] = (event.data.get("nodes", run.nodes), event.data.get("gpus", run.gpus))
    carbon = run.carbon
    series = None
    if carbon.series and carbon.intensity_g_per_kwh is None:
        with contextlib.suppress(UserError):  # `_grid` tells why
            series = read_series(carbon.series)
    return _Life(windows, sizes, class_seconds(timeline(records, events)), series)


def _account_group(files: Sequence[tuple[str, Path]], lives: Mapping[str, _Life]) -> dict[str, _Sums]:
    """What the ledger files of one machine say of each run."""
    sums = {key: _Sums() for key in lives}
    ticks: list[Tick] = []
    for key, path in files:
        read, dropped = read_ledger(path, run=key)
        ticks += read
        sums[key].dropped += dropped
        sums[key].jobs |= {tick.job for tick in read if tick.job}
    windows = {(key, attempt): window for key, life in lives.items() for attempt, window in life.windows.items()}
    consumed = consumption(ticks, windows)
    for (key, attempt, node), seconds in consumed.node_s.items():
        sums[key].nodes |= {(attempt, node)}
        sums[key].node_s += seconds
    by_run: dict[str, list[Interval]] = defaultdict(list)
    for interval in consumed.intervals:
        by_run[interval.run].append(interval)
    for key, intervals in by_run.items():
        sums[key].add(_of_intervals(intervals, lives[key]))
    for key, seconds in consumed.unmeasured_device_s.items():
        sums[key].unmeasured_s = seconds
    return sums


def _groups_by_machine(of: dict[str, AccountedRun]) -> Iterator[list[tuple[str, Path]]]:
    """Ledger files that may speak of the same devices, together: those of one node, or of one boot of a machine.

    One group is in memory at a time, since a run of 256 nodes leaves more lines than fit.
    """
    files = sorted((key, path) for key, run in of.items() for path in RunDir(run.root).energy.glob("*.jsonl"))
    group_of: dict[str, list[tuple[str, Path]]] = {}  # by node or boot
    for key, path in files:
        names = {f"node {path.stem.partition('-')[2]}", *_boots(path)}
        joined = [(key, path)]
        for group in {id(g): g for n in names if (g := group_of.get(n)) is not None}.values():
            joined += group
            names |= {n for n, g in group_of.items() if g is group}
        group_of |= dict.fromkeys(names, joined)
    yield from {id(group): sorted(group) for group in group_of.values()}.values()


def _boots(path: Path) -> set[str]:
    """The boot that the first whole line of a file names; an attempt outlives no boot of its node."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if (tick := decode(line)) is not None:
                return {f"boot {tick.boot}"} if tick.boot else set()
    return set()


def _of_intervals(intervals: list[Interval], life: _Life) -> _Sums:
    s = _Sums(by_class_j=attribute(intervals, life.lived))
    for interval in intervals:
        s.covered_s += interval.end_s - interval.start_s
        kind = kind_of(interval.device)
        s.by_source_j[interval.source] += interval.joules
        s.by_kind_j[kind] = s.by_kind_j.get(kind, 0.0) + interval.joules
        if interval.share < 1:
            s.apportioned_j += interval.joules
    if life.series is not None:
        outside = [i for i in intervals if not life.series.covers(i.start_s, i.end_s)]
        s.outside_series_s += sum(i.end_s - i.start_s for i in outside)
        means = life.series.mean_g_per_kwh([i.start_s for i in intervals], [i.end_s for i in intervals])
        s.grams_j_per_kwh += float((np.array([i.joules for i in intervals]) * means).sum())
    return s


def _add_unseen_nodes(s: _Sums, life: _Life, run: AccountedRun) -> None:
    """Nodes that left no line (lost before the first, or without a sampler) count as the mean of those that did."""
    if not s.node_s:
        return
    node_power_w, mean_g_per_kwh = s.joules / s.node_s, s.grams_j_per_kwh / s.joules if s.joules else 0.0
    unseen: list[Interval] = []
    for attempt, (start_s, end_s) in life.windows.items():
        nodes = life.sizes[attempt][0] - sum(a == attempt for a, _ in s.nodes)
        if nodes > 0 and end_s > start_s:
            joules = nodes * (end_s - start_s) * node_power_w
            unseen.append(Interval(run.name, "unseen nodes", start_s, end_s, joules, "estimated", 1.0))
    total_j = sum(i.joules for i in unseen)
    if total_j:
        s.add(
            _Sums(
                by_source_j={"estimated": total_j},
                by_class_j=attribute(unseen, life.lived),
                by_kind_j={"unseen nodes": total_j},
                grams_j_per_kwh=total_j * mean_g_per_kwh,
            )
        )


def _statement(run: AccountedRun, s: _Sums, life: _Life, ask_slurm: bool) -> CarbonStatement:
    carbon = run.carbon
    energy_kwh = energy_range(s.by_source_j) if s.covered_s else None  # a line by itself measures nothing
    grid, said, location = _grid(carbon, s)
    gpu_s = sum(life.sizes[attempt][1] * (end_s - start_s) for attempt, (start_s, end_s) in life.windows.items())
    gpu_hours = (gpu_s or s.node_s * run.gpus / run.nodes) / 3600
    co2e_kg = None
    if grid is not None and energy_kwh is not None:
        site = energy_kwh * carbon.pue
        co2e_kg = Range(site.low * grid.low / 1000, site.central * grid.central / 1000, site.high * grid.high / 1000)
    slurm_j, slurm = consumed_energy_j(sorted(s.jobs)) if ask_slurm else (None, "not asked")
    notes = []
    if s.dropped:
        notes.append(f"{s.dropped} torn or altered line(s) of the ledger were dropped")
    if s.unmeasured_s:
        notes.append(f"{s.unmeasured_s:.0f} device-seconds have no measurement to estimate from, and count as 0")
    formula_kwh = gpu_hours * run.gpu_watts * carbon.pue / 1000
    embodied_kg = carbon.embodied_kg_per_gpu
    return CarbonStatement(
        name=run.name,
        energy_kwh=energy_kwh,
        by_source_kwh={k: v / J_PER_KWH for k, v in s.by_source_j.items()},
        by_class_kwh={k: v / J_PER_KWH for k, v in s.by_class_j.items()},
        by_kind_kwh={k: v / J_PER_KWH for k, v in sorted(s.by_kind_j.items())},
        apportioned_kwh=s.apportioned_j / J_PER_KWH,
        pue=carbon.pue,
        co2e_kg=co2e_kg,
        intensity=said,
        market_co2e_kg=None
        if carbon.market_g_per_kwh is None or energy_kwh is None
        else energy_kwh.central * carbon.pue * carbon.market_g_per_kwh / 1000,
        embodied_co2e_kg=None if embodied_kg is None else gpu_hours / carbon.gpu_lifetime_h * embodied_kg,
        gpu=run.gpu,
        gpu_watts=run.gpu_watts,
        gpu_hours=gpu_hours,
        formula_co2e_kg=None if grid is None else formula_kwh * grid.central / 1000,
        slurm_kwh=None if slurm_j is None else slurm_j / J_PER_KWH,
        slurm=slurm,
        method=UNCERTAINTY_METHOD,
        location=location,
        covered_share=s.covered_s / (s.covered_s + s.unmeasured_s) if s.covered_s else 0.0,
        notes=notes,
    )


def _grid(carbon: CarbonConfig, s: _Sums) -> tuple[Range | None, str, str | None]:
    """The intensity over this run's consumption (g/kWh), what to say of it, and the place."""
    if carbon.without_intensity:
        return None, "set carbon.zone (such as FRA), carbon.cloud, carbon.series or carbon.intensity_g_per_kwh", None
    if unknown := place_problems(carbon):  # a series that has been moved, say: the run's energy is told all the same
        return None, unknown[0], None
    if (found := intensity(carbon)) is not None:
        g = found.g_per_kwh
        place = None if carbon.intensity_g_per_kwh is not None else carbon.cloud or carbon.zone
        return g, f"{g.central:.4g} g/kWh, {found.source} ({found.year})", place
    if s.outside_series_s:
        return None, f"carbon.series={carbon.series} does not cover {s.outside_series_s:.0f} device-seconds of it", None
    if not s.joules:
        return None, f"nothing was measured to weigh carbon.series={carbon.series} by", None
    g_per_kwh = s.grams_j_per_kwh / s.joules
    said = f"{g_per_kwh:.4g} g/kWh, the mean of carbon.series={carbon.series} by this run's energy"
    return Range(g_per_kwh, g_per_kwh, g_per_kwh), said, carbon.zone


def _total(statements: Sequence[CarbonStatement]) -> CarbonStatement:
    """All runs together. A figure that one of them lacks is left out, since a sum would hide it."""

    def ranges(values: list[Range | None]) -> Range | None:
        known = [v for v in values if v is not None]
        return sum(known[1:], start=known[0]) if known and len(known) == len(values) else None

    def numbers(values: list[float | None]) -> float | None:
        known = [v for v in values if v is not None]
        return sum(known) if len(known) == len(values) else None

    def parts(each: list[dict[str, float]]) -> dict[str, float]:
        return {key: sum(d.get(key, 0.0) for d in each) for key in dict.fromkeys(k for d in each for k in d)}

    measured = [s for s in statements if s.energy_kwh is not None]
    kwh = sum(s.energy_kwh.central for s in measured if s.energy_kwh)
    site_kwh = sum(s.energy_kwh.central * s.pue for s in measured if s.energy_kwh)
    gpu_hours = sum(s.gpu_hours for s in statements)
    watt_hours = sum(s.gpu_hours * s.gpu_watts for s in statements)
    site_watt_hours = sum(s.gpu_hours * s.gpu_watts * s.pue for s in statements)
    pue = site_kwh / kwh if kwh else site_watt_hours / watt_hours if watt_hours else statements[0].pue
    said = sorted({s.intensity for s in statements})
    notes = sorted({f"{s.name}: {note}" for s in statements for note in s.notes})
    unmeasured = [s.name for s in statements if s.energy_kwh is None]
    if unmeasured:
        notes.append(f"measured energy leaves out {', '.join(unmeasured)}: nothing was measured there")
    return CarbonStatement(
        name=f"total of {len(statements)} runs",
        energy_kwh=ranges([s.energy_kwh for s in measured]),
        by_source_kwh=parts([s.by_source_kwh for s in statements]),
        by_class_kwh=parts([s.by_class_kwh for s in statements]),
        by_kind_kwh=parts([s.by_kind_kwh for s in statements]),
        apportioned_kwh=sum(s.apportioned_kwh for s in statements),
        pue=pue,
        co2e_kg=ranges([s.co2e_kg for s in measured]),
        intensity=said[0] if len(said) == 1 else "each run's own: " + "; ".join(said),
        market_co2e_kg=numbers([s.market_co2e_kg for s in measured]) if measured else None,
        embodied_co2e_kg=numbers([s.embodied_co2e_kg for s in statements]),
        gpu=" + ".join(sorted({s.gpu for s in statements})),
        gpu_watts=watt_hours / gpu_hours if gpu_hours else statements[0].gpu_watts,
        gpu_hours=gpu_hours,
        formula_co2e_kg=numbers([s.formula_co2e_kg for s in statements]),
        slurm_kwh=numbers([s.slurm_kwh for s in statements]),
        slurm=statements[0].slurm if len({s.slurm for s in statements}) == 1 else "not every run has it",
        method=statements[0].method,
        location=statements[0].location if len({s.location for s in statements}) == 1 else None,
        covered_share=sum(s.covered_share * s.gpu_hours for s in statements) / gpu_hours if gpu_hours else 0.0,
        notes=notes,
    )
