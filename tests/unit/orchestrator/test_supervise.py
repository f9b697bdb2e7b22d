"""What becomes of a job whose ranks have ended: the pure policy."""

import pytest

from orchestrator.record import Event
from orchestrator.supervise import crashes_so_far, decide
from slurm.queue import JobDetails


def event(kind: str, step: int = 0, **data: object) -> Event:
    return Event(time_utc="2026-01-01T00:00:00.000Z", kind=kind, step=step, detail=f"{kind} at {step}", data=data)


def job(state: str = "RUNNING", left_s: float | None = 50_000.0) -> JobDetails:
    return JobDetails(state=state, time_left_s=left_s)


@pytest.mark.parametrize(
    ("last", "exit_code", "details", "cancelled", "crashes", "expected"),
    [
        ("finished", 0, job(), False, 0, ("end", "finished")),
        ("finished", 0, None, False, 0, ("end", "finished")),
        ("stopped", 0, job(), True, 0, ("end", "user")),
        ("stopped", 0, job("CANCELLED"), False, 0, ("end", "user")),
        ("failed", 0, job(), False, 0, ("end", "person")),
        ("stopped", 0, job(left_s=100), False, 0, ("requeue", "timeout")),
        ("stopped", 0, job(), False, 0, ("requeue", "preempted")),
        ("stopped", 0, None, False, 0, ("requeue", "preempted")),
        ("stopped", 0, job("PENDING"), False, 0, ("release", "requeued")),
        (None, 137, job("PENDING"), False, 9, ("release", "requeued")),
        (None, 137, job("TIMEOUT"), False, 9, ("requeue", "timeout")),
        (None, 137, job("NODE_FAIL"), False, 9, ("requeue", "node_failure")),
        (None, 140, job(left_s=60), False, 9, ("requeue", "timeout")),  # USR2 before the ranks were up
        (None, 137, job(), False, 2, ("requeue", "crash")),
        (None, 137, job(), False, 3, ("end", "crash")),
        (None, 1, None, False, 3, ("end", "crash")),
    ],
)
def test_causes_are_told_apart(
    last: str | None,
    exit_code: int,
    details: JobDetails | None,
    cancelled: bool,
    crashes: int,
    expected: tuple[str, str],
) -> None:
    said = decide(event(last) if last else None, exit_code, details, cancelled, crashes, 3, 180.0)
    assert (said.act, said.cause) == expected


def test_a_new_checkpoint_forgives_crashes_and_other_causes_never_count() -> None:
    crash, timeout = event("requeued", cause="crash"), event("requeued", cause="timeout")
    assert crashes_so_far([event("saved", 10), crash, timeout, crash]) == 2
    assert crashes_so_far([event("saved", 10), crash, event("saved", 20), crash]) == 1
    assert crashes_so_far([event("saved", 20), crash, event("saved", 10), crash]) == 2  # saved again, got no further
    assert crashes_so_far([crash, crash, event("resumed_by_hand")]) == 0


def test_a_lost_node_is_no_crash_even_where_the_ranks_say_it_first() -> None:
    decision = decide(None, 1, job(), False, crashes=9, crash_budget=3, warn_s=180, nodes_down=["node003"])
    assert (decision.act, decision.cause) == ("requeue", "node_failure")
    assert "node003" in decision.reason
