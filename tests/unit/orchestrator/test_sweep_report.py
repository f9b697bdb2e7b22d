"""A sweep's points are what `arriero status` says of them."""

import os
from pathlib import Path

import pytest

from orchestrator import registry, sweep, sweep_report
from orchestrator.record import Event, JsonlWriter, utc_now
from orchestrator.run_dir import RunDir
from orchestrator.sweep_slurm import _submitted


def test_a_point_is_what_its_run_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "runs" / "rates"
    names = ["refused", "cancelled", "queued", "dropped", "broken", "waiting"]
    points = [sweep.Point(id=n, directory=n, overrides=[]) for n in names]
    for name in names[:-1]:
        RunDir(root / name).spec.parent.mkdir(parents=True)
        RunDir(root / name).spec.write_text("steps: 9\n")
    (root / "submissions").mkdir()
    array = root / "submissions" / "t.json"
    array.write_text('{"points": ["refused", "cancelled", "queued"], "job_id": null, "time_s": 0}')
    _submitted(root, array, "7")
    commands = {
        "squeue": "echo '7_2|PENDING|Resources|0:00|9:00|1||arriero:t'",
        "sacct": "echo '7_0|FAILED|00:00:01|1|rates|'; echo '7_1|COMPLETED|00:00:01|1|rates|'",
    }
    for command, line in commands.items():
        (tmp_path / command).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / command).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name, file, kind in (
        ("cancelled", "attempt-0001.jsonl", "stopped"),
        ("cancelled", "supervise.jsonl", "cancelled"),
        ("dropped", "attempt-0001.jsonl", "stopped"),
        ("dropped", "launcher.jsonl", "dropped"),
        ("broken", "launcher.jsonl", "failed"),
    ):
        with JsonlWriter(RunDir(root / name).events / file) as events:
            events.write(Event(time_utc=utc_now(), kind=kind, step=4, detail=f"{kind}\nand more"))

    monkeypatch.setattr(sweep.Journal, "read", lambda root: sweep.Journal(points=points))
    told = {r["point"]: (r["state"], r["detail"]) for r in sweep_report.status(root)}
    assert told == {
        "refused": ("interrupted", "Slurm says FAILED"),
        "cancelled": ("cancelled", "cancelled"),
        "queued": ("queued", ""),
        "dropped": ("dropped", "dropped"),
        "broken": ("failed", "failed"),
        "waiting": ("waiting", ""),
    }
    said = {r.name: r.state for r in registry.rows([root])}
    assert said == {name: state for name, (state, _) in told.items() if name != "waiting"}
