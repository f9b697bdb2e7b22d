"""What was consumed, by which device, when: the energy ledger.

1. A sampler appends one checksummed line per tick to `<run_dir>/energy/<attempt>-<node>.jsonl`: the cumulative joules
   of every physical device it sees. Cumulative, so that a lost line costs resolution and no energy.
2. Reading drops what is torn or does not match its checksum, and counts it.
3. `consumption` makes time intervals out of any set of such lines. It is a pure function of that set: order and
   repetition change nothing, each device counts once however many samplers or jobs saw it, and what was not measured is
   estimated from what was, and says so.
"""

import json
import os
import zlib
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from orchestrator.record import unix_s, utc

# How a figure was got, the best first. `counter`: the hardware's own energy counter. `sampled`: power over time.
# `modelled`: computed from load or size (no meter). `estimated`: nobody looked; filled in from the device's mean power.
SOURCES = ("counter", "sampled", "modelled", "estimated")

# Two samplers of one device may be off by this much in time, and then an older value can seem to follow a newer one.
CLOCK_SKEW_S = 1.0
CLOCK_SKEW_J = 2000.0  # no device below draws more than 2 kW


@dataclass(frozen=True, slots=True)
class EnergyReading:
    """The cumulative energy of one physical device at one time."""

    device: str  # GPU UUID, "node003/cpu0", "node003/ram"
    joules: float  # since an origin that a reset or another sampler changes
    source: str  # one of SOURCES
    share: float = 1.0  # of the device that is this job's: MIG slices, or CPUs of a shared node
    wraps_at_j: float | None = None  # the counter starts again at 0 there (RAPL)


@dataclass(frozen=True, slots=True)
class Tick:
    """One line of the ledger: all devices of a node, read at once."""

    time_s: float  # Unix, UTC
    node: str  # as Slurm names it: one sampler and one file each. (Devices are named by the machine they are in.)
    boot: str  # changes when the machine restarts, and its counters with it
    sampler: str  # one process of the sampler
    attempt: int
    job: str  # Slurm's job id, or ""
    readings: tuple[EnergyReading, ...]
    run: str = ""  # whose ledger it was read from; not in the file


@dataclass(frozen=True, slots=True)
class Interval:
    """What a run consumed of one device between two times."""

    run: str
    device: str
    start_s: float
    end_s: float
    joules: float
    source: str
    share: float  # below 1: apportioned


@dataclass(frozen=True)
class Consumption:
    intervals: list[Interval]
    node_s: dict[tuple[str, int, str], float]  # how long each (run, attempt, node) was held
    unmeasured_device_s: dict[str, float]  # by run: without any measurement to estimate from, counted as 0 J


def kind_of(device: str) -> str:
    """gpu, cpu or ram."""
    tail = device.rpartition("/")[2]
    return "cpu" if tail.startswith("cpu") else "ram" if tail == "ram" else "gpu"


# ---------------------------------------------------------------------------------------------------- lines and files


def encode(tick: Tick) -> str:
    """One line, ended by a newline; the CRC-32 is over everything before it."""
    body = json.dumps(
        {
            "time_utc": utc(tick.time_s),
            "node": tick.node,
            "boot": tick.boot,
            "sampler": tick.sampler,
            "attempt": tick.attempt,
            "job": tick.job,
            "joules": {
                r.device: [round(r.joules, 3), r.source, round(r.share, 6)] + ([r.wraps_at_j] if r.wraps_at_j else [])
                for r in tick.readings
            },
        },
        separators=(",", ":"),
    )
    return f'{body[:-1]},"crc32":"{zlib.crc32(body.encode()):08x}"}}\n'


def decode(line: str, run: str = "") -> Tick | None:
    """A line's tick, or None where the line is torn or altered."""
    head, _, tail = line.rstrip("\n").rpartition(',"crc32":"')
    if tail[8:] != '"}' or f"{zlib.crc32((head + '}').encode()):08x}" != tail[:8]:
        return None
    v = json.loads(head + "}")
    return Tick(
        time_s=unix_s(v["time_utc"]),
        node=v["node"],
        boot=v["boot"],
        sampler=v["sampler"],
        attempt=v["attempt"],
        job=v["job"],
        readings=tuple(EnergyReading(device, *values) for device, values in v["joules"].items()),
        run=run,
    )


class LedgerWriter:
    """Appends ticks, each durable before the next. A torn tail of a killed predecessor is ended first."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        size = os.fstat(self._fd).st_size
        if size and os.pread(self._fd, 1, size - 1) != b"\n":
            os.write(self._fd, b"\n")

    def append(self, tick: Tick) -> None:
        """One write for one line, so that two writers never mix theirs; raises OSError (disk full, node fenced)."""
        line = encode(tick).encode()
        if os.write(self._fd, line) < len(line):
            os.write(self._fd, b"\n")  # cut short by a full disk: the checksum drops it
        os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


def read_ledger(path: Path, run: str = "") -> tuple[list[Tick], int]:
    """The whole lines of one file, and how many were dropped."""
    ticks: list[Tick] = []
    dropped = 0
    with path.open("r", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line == "\n":
                continue
            tick = decode(line, run)
            if tick is None:
                dropped += 1
            else:
                ticks.append(tick)
    return ticks, dropped


# ------------------------------------------------------------------------------------------------ ticks to consumption

_Holder = tuple[str, int, str]  # run, attempt, node


@dataclass(frozen=True, slots=True)
class _Claim:
    """A run's share of a device for a time."""

    start_s: float
    end_s: float
    run: str
    share: float


@dataclass(frozen=True, slots=True)
class _Piece:
    """Energy of a whole device between two readings of one counter."""

    start_s: float
    end_s: float
    joules: float
    source: str

    @property
    def rank(self) -> tuple[int, float, float, float]:
        """The lowest is the one to believe: the best source, then the finest."""
        return (SOURCES.index(self.source), self.end_s - self.start_s, self.start_s, self.joules)


def consumption(
    ticks: Iterable[Tick], windows: Mapping[tuple[str, int], tuple[float, float]] | None = None
) -> Consumption:
    """What each run consumed. A pure function of the set of ticks, and of (run, attempt)'s windows.

    A run holds the devices that its samplers saw on a node from its attempt's start (its window's, or its first tick)
    to the attempt's end: within that, what no counter covers is estimated; outside, nothing is counted.
    """
    windows = windows or {}
    by_device: dict[str, set[tuple[str, float, EnergyReading]]] = defaultdict(set)  # era, time, reading
    held_s: dict[_Holder, tuple[float, float]] = {}  # from its first to its last tick
    shares: dict[str, dict[_Holder, float]] = defaultdict(dict)  # of each device
    for tick in ticks:
        holder = (tick.run, tick.attempt, tick.node)
        first, last = held_s.get(holder, (tick.time_s, tick.time_s))
        held_s[holder] = (min(first, tick.time_s), max(last, tick.time_s))
        for reading in tick.readings:
            # A hardware counter is the same for all who read it since boot; other sums are their sampler's own.
            era = tick.boot if reading.source == "counter" else f"{tick.sampler} {reading.source}"
            by_device[reading.device].add((era, tick.time_s, reading))
            shares[reading.device][holder] = max(shares[reading.device].get(holder, 0.0), reading.share)
    for holder, (first, last) in held_s.items():
        if window := windows.get(holder[:2]):
            held_s[holder] = (min(first, window[0]), max(last, window[1]))

    pieces = {device: _pieces(readings) for device, readings in sorted(by_device.items())}
    power_of_kind: dict[str, list[_Piece]] = defaultdict(list)
    for device, measured in pieces.items():
        power_of_kind[kind_of(device)] += measured
    kind_power_w = {kind: _mean_power_w(measured) for kind, measured in power_of_kind.items()}

    intervals: list[Interval] = []
    unmeasured_s: dict[str, float] = defaultdict(float)
    for device, measured in pieces.items():
        claims = [_Claim(*held_s[holder], holder[0], share) for holder, share in sorted(shares[device].items())]
        device_power_w = _mean_power_w(measured)
        starts = [p.start_s for p in measured]
        for start_s, end_s in _union([(c.start_s, c.end_s) for c in claims]):
            inside = [
                p for p in measured[bisect_left(starts, start_s) : bisect_right(starts, end_s)] if p.end_s <= end_s
            ]
            powers_w = (_mean_power_w(inside), device_power_w, kind_power_w[kind_of(device)])
            power_w = next((p for p in powers_w if p is not None), None)
            if power_w is None:
                for run in {c.run for c in claims}:
                    held = [(c.start_s, c.end_s) for c in claims if c.run == run and start_s <= c.start_s <= end_s]
                    unmeasured_s[run] += sum(until_s - since_s for since_s, until_s in _union(held))
                continue
            edges = {t for c in claims for t in (c.start_s, c.end_s) if start_s <= t <= end_s}
            for since_s, until_s in pairwise(sorted(edges)):  # between two edges the holders are the same
                held_by = _shares(since_s, until_s, claims)
                for piece in _believed(inside, since_s, until_s, power_w):
                    for run, share in held_by.items():
                        joules = piece.joules * share
                        intervals.append(Interval(run, device, piece.start_s, piece.end_s, joules, piece.source, share))
    node_s = {holder: end_s - start_s for holder, (start_s, end_s) in sorted(held_s.items())}
    return Consumption(intervals, node_s, dict(unmeasured_s))


def _pieces(readings: Iterable[tuple[str, float, EnergyReading]]) -> list[_Piece]:
    """Differences between consecutive readings of each counter of one device; none over a reset."""
    found: list[_Piece] = []
    previous: tuple[str, float, EnergyReading] | None = None
    wrapping: list[tuple[_Piece, float]] = []
    for era, time_s, reading in sorted(readings, key=lambda r: (r[0], r[1], r[2].joules)):
        if previous and previous[0] == era:
            _, previous_s, before = previous
            joules, seconds = reading.joules - before.joules, time_s - previous_s
            if seconds <= 0 or (seconds <= CLOCK_SKEW_S and -CLOCK_SKEW_J <= joules < 0):
                continue  # the same moment seen twice, or by two clocks
            if joules < 0 and reading.wraps_at_j:
                joules += reading.wraps_at_j
            if joules >= 0:  # else the driver was reset: what was consumed is unknown, and estimated as a gap is
                found.append(_Piece(previous_s, time_s, joules, reading.source))
                if reading.wraps_at_j:
                    wrapping.append((found[-1], reading.wraps_at_j))
        previous = (era, time_s, reading)
    if wrapping:
        found = _unwrapped(found, dict(wrapping))
    return sorted(found, key=lambda p: (p.start_s, p.end_s, p.rank))


def _unwrapped(pieces: list[_Piece], wraps_at_j: Mapping[_Piece, float]) -> list[_Piece]:
    """Where a counter may have wrapped more than once between readings: the count nearest to the mean power."""
    typical_s = sorted(p.end_s - p.start_s for p in pieces)[len(pieces) // 2]
    power_w = _mean_power_w([p for p in pieces if p.end_s - p.start_s <= 3 * typical_s]) or 0.0
    found = []
    for piece in pieces:
        wrap_j, expected_j = wraps_at_j.get(piece, 0.0), power_w * (piece.end_s - piece.start_s)
        if wrap_j and expected_j > wrap_j / 2:
            times = max(0, round((expected_j - piece.joules) / wrap_j))
            piece = _Piece(piece.start_s, piece.end_s, piece.joules + times * wrap_j, "estimated")
        found.append(piece)
    return found


def _believed(pieces: Sequence[_Piece], since_s: float, until_s: float, power_w: float) -> Iterable[_Piece]:
    """One piece for every stretch of a time: of those that cover it the best, or an estimate where none does.

    `pieces` are in the order of their starts.
    """
    if pieces and (pieces[0].start_s < since_s or max(p.end_s for p in pieces) > until_s):
        pieces = [_cut(p, since_s, until_s) for p in pieces if p.end_s > since_s and p.start_s < until_s]
    if any(a.end_s > b.start_s for a, b in pairwise(pieces)):
        pieces = _best_of(pieces)
    now_s = since_s
    for piece in pieces:
        if piece.start_s > now_s:
            yield _Piece(now_s, piece.start_s, power_w * (piece.start_s - now_s), "estimated")
        yield piece
        now_s = piece.end_s
    if until_s > now_s:
        yield _Piece(now_s, until_s, power_w * (until_s - now_s), "estimated")


def _best_of(pieces: Sequence[_Piece]) -> list[_Piece]:
    """Pieces that overlap, as pieces that do not: the best of those that cover each stretch."""
    found: list[_Piece] = []
    active: list[_Piece] = []
    coming = 0
    for start_s, end_s in pairwise(sorted({t for p in pieces for t in (p.start_s, p.end_s)})):
        active = [p for p in active if p.end_s > start_s]
        while coming < len(pieces) and pieces[coming].start_s <= start_s:
            active.append(pieces[coming])
            coming += 1
        if active:
            found.append(_cut(min(active, key=lambda p: p.rank), start_s, end_s))
    return found


def _cut(piece: _Piece, since_s: float, until_s: float) -> _Piece:
    """The part of a piece within a time, at even power."""
    start_s, end_s = max(piece.start_s, since_s), min(piece.end_s, until_s)
    part = (end_s - start_s) / (piece.end_s - piece.start_s)
    return _Piece(start_s, end_s, piece.joules * part, piece.source)


def _shares(since_s: float, until_s: float, claims: Sequence[_Claim]) -> dict[str, float]:
    """Each run's share of a device over a time; together at most 1."""
    shares: dict[str, float] = defaultdict(float)
    for claim in claims:
        if claim.start_s <= since_s and until_s <= claim.end_s:
            shares[claim.run] += claim.share
    total = max(1.0, sum(shares.values()))
    return {run: share / total for run, share in shares.items()}


def _mean_power_w(pieces: Sequence[_Piece]) -> float | None:
    seconds = sum(p.end_s - p.start_s for p in pieces)
    return sum(p.joules for p in pieces) / seconds if seconds > 0 else None


def _union(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The spans joined where they touch."""
    joined: list[tuple[float, float]] = []
    for start_s, end_s in sorted(spans):
        if joined and start_s <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end_s))
        else:
            joined.append((start_s, end_s))
    return joined
