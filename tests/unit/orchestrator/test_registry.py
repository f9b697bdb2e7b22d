"""The table of runs, and the lines of logs that look like errors."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator import registry
from orchestrator.logs import log_errors
from orchestrator.record import Event, JsonlWriter, utc, utc_now
from orchestrator.registry import RunRow
from orchestrator.run_dir import RunDir
from slurm import queue

ROW = RunRow(
    name="a", run_dir="runs/a", state="running", why="step 7", job_id="12", step=7, steps=3000, loss_nats=2.5,
    tokens_per_s=1234.5, attempts=2, lineage=["crash", "timeout", "crash"],
)  # fmt: skip
NEW = RunRow(
    name="b", run_dir="runs/a/b", state="new", why="", job_id=None, step=None, steps=None, loss_nats=None,
    tokens_per_s=None, attempts=0, lineage=[],
)  # fmt: skip


def test_columns_stand_under_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert registry.show([ROW, NEW], as_json=False, details=False) == 0
    assert capsys.readouterr().out.splitlines() == [
        "run       state    job     step   loss  tokens/s  starts  went on after      why",
        "runs/a    running  12   7/3,000  2.500     1,234       2  crash x2, timeout  step 7",
        "runs/a/b  new      -          -      -         -       0  -",
    ]


def test_runs_of_one_name_are_shown_as_other_commands_take_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for sweep in ("one", "two"):
        RunDir(Path("runs") / sweep / "lr=0.001").spec.parent.mkdir(parents=True)
        RunDir(Path("runs") / sweep / "lr=0.001").spec.write_text("steps: 9\n")
    registry.show(registry.rows([Path("runs")]), as_json=False, details=False)
    told = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert told == ["runs/one/lr=0.001", "runs/two/lr=0.001"]
    assert all(RunDir.existing(Path(path)) for path in told)


def test_a_long_reason_is_cut_in_the_table_and_whole_in_json_and_details(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(tmp_path / "run")
    run.spec.parent.mkdir()
    run.spec.write_text("steps: 9\n")
    why = "damaged\n" * 50 + "the end"
    with JsonlWriter(run.attempt_file(run.events, 1)) as events:
        events.write(Event(time_utc=utc_now(), kind="failed", step=9, detail=why))
    found = registry.rows([tmp_path])
    assert registry.show(found, as_json=False, details=False) == 0
    assert registry.show([*found, ROW], as_json=False, details=True) == 0  # not of one alone
    told = capsys.readouterr().out
    assert all(" ..." in line for line in told.splitlines() if "failed" in line)
    assert "the end" not in told
    assert max(map(len, told.splitlines())) < len(str(run.root)) + 220
    assert registry.show(found, as_json=False, details=True) == 1
    assert "the end" in capsys.readouterr().out
    registry.show(found, as_json=True, details=False)
    assert json.loads(capsys.readouterr().out)[0]["why"] == why


def test_a_terminal_wraps_the_last_column_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    registry.show([replace(ROW, why="word " * 20 + "\nof two lines")], as_json=False, details=False)
    head, *lines = capsys.readouterr().out.splitlines()
    at = head.index("why")
    assert len(lines) > 1
    assert all(len(line) <= 100 for line in lines)
    assert " ".join(line[at:] for line in lines) == ("word " * 20 + "of two lines")
    assert not any(line[:at].strip() for line in lines[1:])


def test_no_run_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    registry.show([], as_json=False, details=False)
    registry.show([ROW], as_json=True, details=False)
    first, _, rest = capsys.readouterr().out.partition("\n")
    assert first == "no runs"
    assert json.loads(rest)[0]["tokens_per_s"] == 1234.5


def test_errors_are_found_once_with_their_lines(tmp_path: Path) -> None:
    (tmp_path / "1_0_log.out").write_text("fine\n\x1b[31mRuntimeError: x\x1b[0m\nRuntimeError: x\nNCCL WARN y\nno\n")
    assert [(e.file, e.line, e.text) for e in log_errors(tmp_path)] == [
        ("1_0_log.out", 3, "RuntimeError: x"),
        ("1_0_log.out", 4, "NCCL WARN y"),
    ]


def test_an_attempt_that_gave_way_to_another_does_not_tell_how_the_run_is(tmp_path: Path) -> None:
    """Of two launches at the same moment the first to have its number may be the one that goes on."""
    run = RunDir(tmp_path / "run")
    run.spec.parent.mkdir()
    run.spec.write_text("steps: 9\n")
    for attempt, kind, fenced in ((2, "failed", True), (1, "finished", False)):
        with JsonlWriter(run.attempt_file(run.events, attempt)) as events:
            events.write(Event(time_utc=utc_now(), kind=kind, step=9, detail=kind, data={"fenced": fenced}))
        (row,) = registry.rows([run.root])  # alone, it is all there is to tell
        assert (row.state, row.attempts) == (kind, 3 - attempt)
        time.sleep(0.002)  # the events' times are of milliseconds


def test_a_cancelled_job_that_saved_afterwards_is_cancelled_until_another_goes_on(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.spec.parent.mkdir()
    run.spec.write_text("steps: 9\n")
    run.submission.write_text(json.dumps({"job_id": "12", "token": "t"}))
    with JsonlWriter(run.events / "supervise.jsonl") as told:
        told.write(
            Event(
                time_utc=utc(time.time() - 1),
                kind="cancelled",
                step=4,
                detail="user: scancel",
                data={"cause": "user", "job_id": "12"},
            )
        )
    with JsonlWriter(run.attempt_file(run.events, 1)) as events:
        events.write(Event(time_utc=utc_now(), kind="stopped", step=5, detail="saved at step 5 of 9"))
    (row,) = registry.rows([tmp_path])
    assert (row.state, row.why) == ("cancelled", "user: scancel; saved at step 5 of 9")
    run.submission.write_text(json.dumps({"job_id": "13", "token": "u"}))
    (row,) = registry.rows([tmp_path])
    assert row.state == "stopped"


def test_a_local_run_that_crashed_once_and_stopped_later_is_stopped(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.spec.parent.mkdir()
    run.spec.write_text("steps: 9\n")
    with JsonlWriter(run.events / "supervise.jsonl") as told:
        told.write(Event(time_utc=utc(time.time() - 2), kind="failed", step=4, detail="rank 1 ended by signal 9"))
    (row,) = registry.rows([tmp_path])
    assert (row.state, row.why) == ("failed", "rank 1 ended by signal 9")
    with JsonlWriter(run.attempt_file(run.events, 2)) as events:
        events.write(Event(time_utc=utc_now(), kind="stopped", step=5, detail="saved at step 5 of 9"))
    (row,) = registry.rows([tmp_path])
    assert (row.state, row.why) == ("stopped", "saved at step 5 of 9")


def test_a_job_of_the_same_number_on_another_cluster_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's own cluster is gone: the accounting knows another run's job of that number, by its name or its comment."""
    run = RunDir(tmp_path / "runs" / "mine")
    run.spec.parent.mkdir(parents=True)
    run.spec.write_text("steps: 9\n")
    run.submission.write_text(json.dumps({"job_id": "7", "token": "t"}))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "squeue").write_text("#!/bin/sh\n")
    for name, comment, its in (
        ("mine", "arriero:t", True), ("group/mine", "", True), ("runs", "", True), ("mine", "of the site", True),
        ("other", "", False), ("mine", "arriero:u", False),
    ):  # fmt: skip
        (tmp_path / "sacct").write_text(f"#!/bin/sh\necho '7|FAILED|00:00:01|1|{name}|{comment}'\n")
        for command in ("squeue", "sacct"):
            (tmp_path / command).chmod(0o755)
        (row,) = registry.rows([run.root])
        told = ("interrupted", "Slurm says FAILED", "7") if its else ("new", "not started yet", None)
        assert (row.state, row.why, row.job_id) == told, (name, comment)


def test_a_copy_says_whose_its_job_is(tmp_path: Path) -> None:
    for name in ("old", "new"):
        run = RunDir(tmp_path / name)
        run.spec.parent.mkdir()
        run.spec.write_text("steps: 9\n")
        run.submission.write_text(json.dumps({"job_id": "7", "token": "t", "run_dir": str(tmp_path / "old")}))
    (row,) = registry.rows([run.root])
    assert (row.state, row.job_id) == ("new", None)
    assert row.why == f"not started yet; job 7 in its submission.json is that of {tmp_path / 'old'}"


def test_a_local_run_that_reached_its_time_limit_says_so(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.spec.parent.mkdir()
    run.spec.write_text("steps: 9\n")
    for path, kind, detail in (
        (run.events / "supervise.jsonl", "time_limit", "cluster.time_limit_min=1 is over"),
        (run.attempt_file(run.events, 1), "stopped", "saved at step 5 of 9"),
    ):
        with JsonlWriter(path) as events:
            events.write(Event(time_utc=utc_now(), kind=kind, step=5, detail=detail, data={"attempts": 1}))
    (row,) = registry.rows([run.root])
    assert (row.state, row.why) == ("stopped", "cluster.time_limit_min=1 is over; saved at step 5 of 9")
    with JsonlWriter(run.attempt_file(run.events, 2)) as events:  # by hand
        events.write(Event(time_utc=utc_now(), kind="stopped", step=6, detail="saved at step 6 of 9"))
    (row,) = registry.rows([run.root])
    assert row.why == "saved at step 6 of 9"


def test_a_run_that_has_failed_is_failed_while_its_job_is_about_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path / "run")
    run.root.mkdir()
    run.spec.write_text("steps: 9\n")
    run.submission.write_text(json.dumps({"job_id": "12", "token": "t"}))
    running = queue.JobState(job_id="12", state="RUNNING", comment=queue.comment_of("t"))
    monkeypatch.setattr(queue, "queued", lambda: {"12": running})
    with JsonlWriter(run.events / "supervise.jsonl") as told:
        for job_id, state in (("11", "running"), ("12", "failed")):
            data = {"cause": "crash", "job_id": job_id}
            told.write(Event(time_utc=utc_now(), kind="failed", step=4, detail="crash: 2 crashes", data=data))
            (row,) = registry.rows([tmp_path])
            assert row.state == state
