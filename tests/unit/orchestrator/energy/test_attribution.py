"""Kept and lost: every joule has one place, and all of them together are the whole."""

from datetime import UTC, datetime
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.energy.attribution import CLASSES, attempt_windows, attribute, class_seconds, timeline
from orchestrator.energy.ledger import Interval
from orchestrator.record import Event, StepRecord

T0 = 1_790_000_000.0


def iso(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).isoformat(timespec="milliseconds")


def step(number: int, end_s: float, attempt: int = 1, step_s: float = 10.0) -> StepRecord:
    return StepRecord(
        time_utc=iso(end_s), attempt=attempt, step=number, tokens=number, loss=1.0, grad_norm=1.0, lr=1.0,
        step_s=step_s, tokens_per_s=1.0, mfu=None,
    )  # fmt: skip


def event(kind: str, time_s: float, number: int = 0, attempt: int = 1, **data: float) -> Event:
    return Event(time_utc=iso(time_s), kind=kind, step=number, detail="", attempt=attempt, data=data)


def power(start_s: float, end_s: float, watts: float = 100.0) -> list[Interval]:
    return [Interval("r", "GPU-1", start_s, end_s, watts * (end_s - start_s), "counter", 1.0)]


def joules(records: list[StepRecord], events: list[Event], end_s: float) -> dict[str, float]:
    return {k: v for k, v in attribute(power(T0, T0 + end_s), class_seconds(timeline(records, events))).items() if v}


def test_each_part_of_a_run_has_its_class():
    events = [
        event("started", T0),
        event("evaluated", T0 + 55, 2, seconds=5.0),
        event("saved", T0 + 61, 2),
        event("saved", T0 + 82, 4),
        event("finished", T0 + 84, 4),
    ]
    records = [step(1, T0 + 40), step(2, T0 + 50), step(3, T0 + 71), step(4, T0 + 81)]
    assert joules(records, events, 90) == pytest.approx(
        {"startup": 3000, "kept": 4000, "evaluation": 700, "checkpoint": 700, "idle": 600}
    )


def test_a_save_that_goes_on_beside_the_next_steps_is_what_training_waited():
    """Its event comes during step 3, or in a later gap that is an evaluation's."""
    records = [step(1, T0 + 10), step(2, T0 + 22), step(3, T0 + 37)]
    assert joules(records, [event("saved", T0 + 15, 1)], 37) == pytest.approx(
        {"kept": 3000, "checkpoint": 200, "idle": 500}
    )
    late = [event("saved", T0 + 24, 1), event("evaluated", T0 + 27, 2, seconds=5.0)]
    assert joules(records, late, 37) == pytest.approx({"kept": 3000, "checkpoint": 200, "evaluation": 500})


def test_steps_that_a_crash_undid_are_lost():
    records = [step(n, T0 + 10 * n) for n in (1, 2, 3)] + [step(n, T0 + 30 + 10 * n, 2) for n in (2, 3)]
    events = [event("started", T0), event("started", T0 + 35, 1, 2), event("resumed", T0 + 40, 1, 2)]
    # 10 s of step 1 and of the second 2 and 3 are kept; 5 s between the attempts belong to nobody.
    assert joules(records, events, 60) == pytest.approx({"kept": 3000, "lost": 2000, "startup": 500, "idle": 500})


def test_a_resume_undoes_steps_before_it_has_trained_any():
    records = [step(n, T0 + 10 * n) for n in (1, 2, 3)]
    events = [event("started", T0), event("started", T0 + 35, 1, 2), event("resumed", T0 + 40, 1, 2)]
    assert joules(records, events, 40) == pytest.approx({"kept": 1000, "lost": 2000, "startup": 500, "idle": 500})


def test_steps_that_a_rewind_undid_are_lost_and_the_way_back_is_startup():
    records = [step(1, T0 + 10), step(2, T0 + 20), step(2, T0 + 45), step(3, T0 + 55)]
    events = [event("rewound", T0 + 21, 2, to_step=1)]
    assert joules(records, events, 55) == pytest.approx({"kept": 3000, "lost": 1000, "startup": 1500})


def test_a_rewind_undoes_steps_down_to_where_it_goes():
    records = [step(1, T0 + 10), step(2, T0 + 20), step(3, T0 + 30)]
    events = [event("rewound", T0 + 31, 3, to_step=1)]
    assert joules(records, events, 31) == pytest.approx({"kept": 1000, "lost": 2000, "startup": 100})


def test_an_attempt_lives_from_its_first_to_its_last_sign():
    assert attempt_windows([step(1, T0 + 30)], [event("started", T0), event("stopped", T0 + 40)]) == {1: (T0, T0 + 40)}


def test_without_records_all_is_idle():
    assert joules([], [], 10) == {"idle": 1000}


def life(kills: int, saved_every: int, steps: int = 200) -> tuple[list[StepRecord], list[Event], list[Interval]]:
    """A run of 10 s steps, killed `kills` times at even distances, with the power of each moment."""
    records: list[StepRecord] = []
    events: list[Event] = []
    intervals: list[Interval] = []
    now_s, done, attempt, trained = T0, 0, 1, 0
    while done < steps:
        events.append(event("started", now_s, 0, attempt))
        intervals += power(now_s, now_s + 30, 150.0)
        now_s += 30
        if attempt > 1:
            events.append(event("resumed", now_s, done, attempt))
        stop_at = steps if attempt > kills else min(steps, attempt * steps // (kills + 1) + 3)
        while done < stop_at:
            intervals += power(now_s, now_s + 10, 400.0)
            now_s, done, trained = now_s + 10, done + 1, trained + 1
            records.append(step(done, now_s, attempt))
        done = done if done >= steps else done // saved_every * saved_every
        attempt, now_s = attempt + 1, now_s + 200
    return records, events, intervals


def test_a_run_killed_ten_times_keeps_the_energy_of_one_never_killed():
    kept = {}
    for kills in (0, 10):
        records, events, intervals = life(kills, saved_every=5)
        kept[kills] = attribute(intervals, class_seconds(timeline(records, events)))
    assert kept[10]["kept"] == pytest.approx(kept[0]["kept"], rel=1e-6)
    assert kept[0]["lost"] == 0
    assert kept[10]["lost"] > 0


@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 4), st.floats(0, 300), st.floats(0.1, 40)), max_size=30),
    st.lists(st.tuples(st.sampled_from(["started", "saved", "evaluated", "resumed", "rewound", "finished", "spike"]),
                       st.floats(0, 300), st.integers(0, 6), st.integers(1, 4)), max_size=20),
    st.lists(st.tuples(st.floats(-50, 350), st.floats(0.01, 100), st.floats(0, 1e6)), min_size=1, max_size=20),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_whatever_happened_no_joule_is_made_or_lost(steps, events, used):
    records = [step(n, T0 + end, attempt, took) for n, attempt, end, took in steps]
    spans = timeline(records, [event(kind, T0 + at, n, attempt) for kind, at, n, attempt in events])
    assert all(a.end_s <= b.start_s for a, b in pairwise(spans))
    intervals = [Interval("r", "d", T0 + a, T0 + a + s, j, "counter", 1.0) for a, s, j in used]
    of = attribute(intervals, class_seconds(spans))
    assert set(of) == set(CLASSES)
    assert min(of.values()) >= -1e-6
    assert sum(of.values()) == pytest.approx(sum(j for *_, j in used), rel=1e-9, abs=1e-6)
