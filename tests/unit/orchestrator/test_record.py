"""Records on disk: torn tails, rewinds and the newest line."""

import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from orchestrator.record import (
    Event,
    JsonlWriter,
    StepRecord,
    kept_steps,
    read_all_steps,
    read_events,
    read_last,
    utc_now,
)
from orchestrator.run_dir import RunDir


def record(step: int, attempt: int = 1, loss: float = 2.0) -> StepRecord:
    return StepRecord(
        time_utc=utc_now(),
        attempt=attempt,
        step=step,
        tokens=step * 10,
        loss=loss,
        grad_norm=1.0,
        lr=1e-3,
        step_s=0.1,
        tokens_per_s=100.0,
        mfu=0.4,
    )


def test_a_torn_tail_is_dropped_and_never_joins_the_next_line(tmp_path: Path) -> None:
    path = tmp_path / "attempt-0001.jsonl"
    with JsonlWriter(path) as writer:
        writer.write(record(1))
        writer.write(record(2))
    whole = path.read_bytes()
    for cut in range(len(whole) // 2 + 1, len(whole)):
        path.write_bytes(whole[:cut])
        assert [r.step for r in read_all_steps(tmp_path)] == [1]
        assert read_last(path) == read_all_steps(tmp_path)[-1]
        with JsonlWriter(path) as writer:
            writer.write(record(3))
        # The torn line lacks nothing but its newline in the last case: ended, it counts.
        assert [r.step for r in read_all_steps(tmp_path)] in ([1, 3], [1, 2, 3] if cut == len(whole) - 1 else [1, 3])


def test_a_step_trained_again_undoes_what_came_after_it(tmp_path: Path) -> None:
    for attempt, steps in ((1, [1, 2, 3, 4, 5]), (2, [4, 5, 6])):
        with JsonlWriter(tmp_path / f"attempt-{attempt:04d}.jsonl") as writer:
            for step in steps:
                writer.write(record(step, attempt))
    kept = kept_steps(read_all_steps(tmp_path))
    assert [(r.step, r.attempt) for r in kept] == [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2)]


def test_fields_of_a_newer_version_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "launcher.jsonl").write_text(
        '{"time_utc":"2026-01-01T00:00:00Z","kind":"saved","step":3,"detail":"x","of_tomorrow":1}\n'
    )
    assert read_events(tmp_path) == [Event(time_utc="2026-01-01T00:00:00Z", kind="saved", step=3, detail="x")]


def test_what_a_full_disk_does_not_take_is_written_when_it_does(tmp_path: Path) -> None:
    path = tmp_path / "attempt-0001.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with JsonlWriter(path) as writer:
        writer.write(record(1))
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, hard))  # the next line does not fit
        try:
            writer.write(record(2))
            writer.write(record(3), durable=True)
            assert [r.step for r in read_all_steps(tmp_path)] == [1]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        writer.write(record(4))
    assert [r.step for r in read_all_steps(tmp_path)] == [1, 2, 3, 4]
    assert path.read_bytes().count(b"\n") == 4


def test_two_starts_at_one_moment_have_files_of_their_own(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        taken = list(pool.map(lambda _: RunDir(tmp_path).take_attempt(), range(64)))
    assert sorted(taken) == list(range(1, 65))
