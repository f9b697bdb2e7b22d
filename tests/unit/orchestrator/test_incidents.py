"""What a run's own failures teach it."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from model.heap import WITHOUT_THREAD_CACHES
from orchestrator import spec as specs
from orchestrator.incidents import Incidents, failures_so_far
from orchestrator.plan.forecast import learnt_mttf_s
from orchestrator.record import Event, JsonlWriter
from orchestrator.run_dir import RunDir
from slurm.lead import Incident


def event(kind: str, minute: int, attempt: int | None) -> Event:
    return Event(time_utc=f"2026-01-01T00:{minute:02d}:00.000Z", kind=kind, step=0, detail="", attempt=attempt)


def test_starts_that_ended_without_a_word_are_failures_and_all_their_time_counts() -> None:
    events = [
        event("prepared", 0, None), event("started", 1, 1), event("saved", 11, 1),  # killed
        event("requeued", 12, None), event("started", 13, 2), event("stopped", 20, 2),
        event("started", 21, 3), event("saved", 24, 3), event("restarted", 25, None), event("started", 26, 4),
        event("failed", 30, 4),
    ]  # fmt: skip
    assert failures_so_far(events) == (2, 60.0 * (10 + 7 + 3 + 4))
    assert failures_so_far([]) == (0, 0.0)


def test_the_plans_rate_gives_way_to_what_the_run_has_seen() -> None:
    day = 86400.0
    assert learnt_mttf_s(day, 0, 0.0) == day
    assert learnt_mttf_s(day, 2, 2 * day) == day
    assert learnt_mttf_s(day, 20, 2 * day) == pytest.approx(2 / 11 * day)
    assert learnt_mttf_s(day, 0, 20 * day) == 11 * day
    assert learnt_mttf_s(math.inf, 0, day) == math.inf
    assert learnt_mttf_s(math.inf, 4, day) == day / 4


def test_ranks_that_have_given_way_to_another_start_are_not_started_again(tmp_path: Path) -> None:
    """A start of the same job before it, whose node was lost and lives on, and the one that took over."""
    directory = RunDir(tmp_path)
    with JsonlWriter(directory.events / "attempt-0001.jsonl") as events:
        for attempt in (1, 2):
            started = event("started", attempt, attempt)
            events.write(replace(started, data={"job_id": "7", "restart": attempt - 1}))
        events.write(event("fenced", 3, 1))
    spec, crash = specs.compose([]), Incident(cause="crash", rank=0, node="", detail="")
    for restarts, may in ((0, False), (1, True), (2, True)):
        incidents = Incidents(directory, spec, lambda *_, **__: None, lambda *_: None, "7", restarts)
        assert incidents.may_restart(crash) is may


@pytest.mark.parametrize(
    ("gpu", "users", "told"),
    [("cpu", None, WITHOUT_THREAD_CACHES), ("cpu", "glibc.malloc.perturb=1", {}), ("a100_80gb", None, {})],
)
def test_ranks_on_cpus_are_started_with_a_heap_for_large_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: str, users: str | None, told: dict[str, str]
) -> None:
    (name,) = WITHOUT_THREAD_CACHES
    monkeypatch.setenv(name, users) if users else monkeypatch.delenv(name, raising=False)
    spec = specs.compose([f"gpu={gpu}"])
    lead = Incidents(RunDir(tmp_path), spec, lambda *_, **__: None, lambda *_: None, "7", 0).lead(1, "127.0.0.1")
    assert {k: v for k, v in lead.environment.items() if k == name} == told
