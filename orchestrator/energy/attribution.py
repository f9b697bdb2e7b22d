"""What each joule was for: kept steps, lost steps, start-up, checkpoints, evaluation, or idle.

Pure functions of the run's own records and of the ledger's intervals. Within an interval the power is taken as even, so
that an interval which a step's end cuts is split by time; the parts always add up to the whole.
"""

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter

import numpy as np

from orchestrator.energy.ledger import Interval
from orchestrator.record import Event, StepRecord, unix_s

# `lost`: steps that a rewind or a crash undid. `startup`: from a start, a resume or a rewind to the next step.
CLASSES = ("kept", "lost", "startup", "checkpoint", "evaluation", "idle")

FloatArray = np.ndarray[tuple[int], np.dtype[np.float64]]

_CLASS_OF_EVENT = {
    "saved": "checkpoint",
    "save_failed": "checkpoint",
    "save_refused": "checkpoint",
    "evaluated": "evaluation",
    "sampled": "evaluation",
    "finished": "evaluation",  # a run writes its sample between its last save and its end
}
_CLOCK_S = (
    0.002  # records' times are cut to milliseconds: an event just before a step may seem to be just after its start
)
_RESTARTS = ("started", "prepared", "resumed", "rewound")


@dataclass(frozen=True, slots=True)
class Span:
    """What the run did between two times (Unix seconds)."""

    start_s: float
    end_s: float
    kind: str  # one of CLASSES


def attempt_windows(records: Sequence[StepRecord], events: Sequence[Event]) -> dict[int, tuple[float, float]]:
    """From the first to the last sign of life of each attempt (Unix seconds)."""
    times: dict[int, list[float]] = defaultdict(list)
    for record in records:
        times[record.attempt] += [unix_s(record.time_utc), unix_s(record.time_utc) - record.step_s]
    for event in events:
        if event.attempt is not None:
            times[event.attempt].append(unix_s(event.time_utc))
    return {attempt: (min(seen), max(seen)) for attempt, seen in sorted(times.items())}


def timeline(records: Sequence[StepRecord], events: Sequence[Event]) -> list[Span]:
    """The run's life as spans that do not overlap; what lies between them is idle.

    A step is kept unless a later attempt, or a rewind, went back to it or below. Time between two steps belongs to the
    event that ended it: a save, an evaluation. The steps of a run that crashed and never came back stay kept until a
    resume undoes them, since until then its owner may still resume it.
    """
    kept = _kept(records, events)
    spans: list[Span] = []
    for attempt, (start_s, end_s) in attempt_windows(records, events).items():
        steps = sorted((r for r in records if r.attempt == attempt), key=lambda r: r.time_utc)
        marks = sorted(((unix_s(e.time_utc), e) for e in events if e.attempt == attempt), key=itemgetter(0))
        saved = {e.step for _, e in marks if _CLASS_OF_EVENT.get(e.kind) == "checkpoint"}
        now_s, done, otherwise = start_s, 0, "startup"
        for record in steps:
            step_end_s = unix_s(record.time_utc)
            step_start_s = max(now_s, step_end_s - record.step_s)
            spans += _between(now_s, step_start_s, marks, done, otherwise)
            spans.append(Span(step_start_s, step_end_s, "kept" if id(record) in kept else "lost"))
            # A save goes on beside the next steps, and its event comes late: what training waited for it is this gap.
            now_s, done = max(now_s, step_end_s), record.step
            otherwise = "checkpoint" if record.step in saved else "idle"
        spans += _between(now_s, end_s, marks, done, otherwise)
    return _disjoint(spans)


@dataclass(frozen=True)
class ClassSeconds:
    """How many seconds of each class a run had lived until each edge of its spans: piecewise linear in time."""

    edges_s: FloatArray  # Unix seconds since `origin_s`, growing
    until_s: dict[str, FloatArray]  # by class but idle, at each edge
    origin_s: float


def class_seconds(spans: Sequence[Span]) -> ClassSeconds:
    """`spans` as `timeline` makes them."""
    origin_s = spans[0].start_s if spans else 0.0
    edges_s = np.array([t - origin_s for span in spans for t in (span.start_s, span.end_s)] or [0.0])
    until_s = {}
    for kind in CLASSES[:-1]:
        lived = [s for span in spans for s in (0.0, (span.end_s - span.start_s) * (span.kind == kind))]
        until_s[kind] = np.cumsum(lived or [0.0])
    return ClassSeconds(edges_s, until_s, origin_s)


def attribute(intervals: Sequence[Interval], lived: ClassSeconds) -> dict[str, float]:
    """Joules of each class; together the joules of the intervals."""
    joules = np.array([i.joules for i in intervals], dtype=np.float64)
    start_s = np.array([i.start_s for i in intervals], dtype=np.float64) - lived.origin_s
    end_s = np.array([i.end_s for i in intervals], dtype=np.float64) - lived.origin_s
    of: dict[str, float] = {}
    for kind, until_s in lived.until_s.items():
        seconds = np.interp(end_s, lived.edges_s, until_s) - np.interp(start_s, lived.edges_s, until_s)
        of[kind] = float((joules * seconds / (end_s - start_s)).sum())
    of["idle"] = max(0.0, float(joules.sum()) - sum(of.values()))
    return of


def _kept(records: Sequence[StepRecord], events: Sequence[Event]) -> set[int]:
    """The ids of the records whose step made the model."""
    going: list[tuple[int, str, StepRecord | int]] = [(r.attempt, r.time_utc, r) for r in records]
    going += [
        (e.attempt, e.time_utc, int(e.data.get("to_step", e.step)))
        for e in events
        if e.attempt is not None and e.kind in ("resumed", "rewound")
    ]
    kept: list[StepRecord] = []
    for _, _, what in sorted(going, key=lambda g: g[:2]):
        last_kept = what if isinstance(what, int) else what.step - 1
        while kept and kept[-1].step > last_kept:
            kept.pop()
        if not isinstance(what, int):
            kept.append(what)
    return {id(record) for record in kept}


def _between(
    start_s: float, end_s: float, marks: Sequence[tuple[float, Event]], step: int, otherwise: str
) -> list[Span]:
    """The time after step `step`, by the events that ended its parts; what is left is `otherwise`."""
    first, last = (
        bisect_left(marks, start_s, key=itemgetter(0)),
        bisect_right(marks, end_s + _CLOCK_S, key=itemgetter(0)),
    )
    inside = marks[first:last]
    if any(event.kind in _RESTARTS for _, event in inside):
        otherwise = "startup"
    spans = []
    for time_s, event in inside:
        kind = _CLASS_OF_EVENT.get(event.kind)
        if kind is None or (kind == "checkpoint" and event.step != step):
            continue
        if kind == "checkpoint" and otherwise == "checkpoint":
            otherwise = "idle"  # this event is the save that the gap was put down to
        took_s = float(event.data.get("seconds", time_s - start_s))
        begun_s = min(time_s, max(start_s, time_s - took_s))
        spans += [Span(start_s, begun_s, otherwise), Span(begun_s, time_s, kind)]
        start_s = time_s
    return [*spans, Span(start_s, end_s, otherwise)]


def _disjoint(spans: list[Span]) -> list[Span]:
    """By time; where two attempts overlap (a lost node's zombie) the earlier start has it."""
    found: list[Span] = []
    now_s = float("-inf")
    for span in sorted(spans, key=lambda s: (s.start_s, s.end_s)):
        start_s = max(span.start_s, now_s)
        if span.end_s > start_s and span.kind != "idle":
            found.append(Span(start_s, span.end_s, span.kind))
            now_s = span.end_s
    return found
