"""Whom `arriero cancel` reaches: whatever job the journal holds, and nobody else's. Slurm's commands are scripts."""

import json
import os
from pathlib import Path

import pytest

from orchestrator import control
from orchestrator import spec as specs
from orchestrator.errors import Failure
from orchestrator.record import read_events
from orchestrator.run_dir import SWEEP, RunDir

RUNNING = "7|RUNNING|None|1:00|9:00|1|node1|arriero:t"


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder: squeue prints its `queue`; scancel notes its words in `calls`, takes a line off `codes`, fails with it; the
    jobs that scontrol knows are those of the queue."""
    for name, line in {
        "squeue": "cat queue",
        "sacct": "exit 0",
        "scontrol": 'case "$2" in config) echo "ClusterName = c";; '
        '*) grep -q "^$3|" queue && echo JobState=RUNNING || { echo "Invalid job id" >&2; exit 1; };; esac',
        "scancel": 'echo "$*" >> calls; code=$(head -n 1 codes); sed -i 1d codes; exit ${code:-0}',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\ncd {tmp_path}\n{line}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "queue").write_text(f"{RUNNING}\n")
    (tmp_path / "codes").touch()
    (tmp_path / "calls").touch()
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


def a_run(root: Path, *overrides: str, job_id: str = "7", token: str = "t") -> RunDir:
    run = RunDir(root)
    run.root.mkdir(parents=True)
    run.spec.write_text(specs.to_yaml(specs.compose([*overrides, "cluster.gpus_per_node=1"])))
    entry = {"token": token, "job_id": job_id, "time_s": 0.0, "cluster": "c", "run_dir": str(root)}
    run.submission.write_text(json.dumps(entry))
    return run


def calls(slurm: Path) -> list[str]:
    return (slurm / "calls").read_text().splitlines()


def test_the_journals_job_is_cancelled_whatever_the_spec_says_of_the_cluster(slurm: Path) -> None:
    run = a_run(slurm / "runs" / "a", "cluster=local")  # launched here since, under the same name
    assert control.cancel(run.root) == 0
    assert calls(slurm) == ["--signal=USR2 7"]
    assert run.cancelled.exists()


def test_a_run_of_this_machine_needs_no_slurm_to_be_cancelled(
    slurm: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = a_run(slurm / "runs" / "a", "cluster=local")
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: told.append((pid, number)))
    (slurm / "squeue").write_text("#!/bin/sh\nexit 1\n")
    with run.at_work():
        assert control.cancel(run.root) == 0
    assert told == [(os.getpid(), 15)]
    assert "squeue does not answer" in capsys.readouterr().out


def test_a_copy_is_not_bound_to_the_job_of_what_it_was_copied_from(
    slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = a_run(slurm / "runs" / "a", "cluster=slurm")
    copy = a_run(slurm / "runs" / "b", "cluster=slurm")
    copy.submission.write_text(run.submission.read_text())
    assert control.cancel(copy.root) == 0
    assert calls(slurm) == []
    assert not copy.cancelled.exists()
    assert capsys.readouterr().out == (f"b is not in the queue: job 7 in its submission.json is that of {run.root}\n")


def test_a_job_between_two_states_is_asked_again(slurm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = a_run(slurm / "runs" / "a", "cluster=slurm")
    (slurm / "codes").write_text("228\n0\n")
    assert control.cancel(run.root) == 0
    assert calls(slurm) == ["--signal=USR2 7"] * 2
    assert "is asked to save and end" in capsys.readouterr().out


def test_scancel_that_fails_without_a_word_is_told_in_words(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_run(slurm / "runs" / "a", "cluster=slurm")
    monkeypatch.setattr(control, "_TRANSITION_S", 0.0)
    for code, words in ((228, "between two states"), (1, "exit code 1")):
        (slurm / "codes").write_text(f"{code}\n")
        with pytest.raises(Failure, match=words):
            control.cancel(run.root)
    # one that has ended meanwhile is no failure
    (slurm / "scancel").write_text(f"#!/bin/sh\n: > {slurm}/queue\nexit 1\n")
    assert control.cancel(run.root) == 0


def test_a_sweep_is_cancelled_with_all_its_points_that_live_those_that_wait_first(
    slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = slurm / "runs" / "lrs"
    points = [a_run(root / name, "cluster=slurm", job_id=f"9_{i}", token=f"u.{i}") for i, name in enumerate("abc")]
    (root / SWEEP).write_text("{}")
    assert control.cancel(root) == 0
    assert "no point of" in capsys.readouterr().out
    (slurm / "queue").write_text(
        "9_0|RUNNING|None|1:00|9:00|1|node1|arriero:u\n9_2|PENDING|JobArrayTaskLimit|0:00|9:00|1||arriero:u\n"
    )
    (slurm / "codes").write_text("1\n")
    assert control.cancel(root) == 1  # one could not be, the other is
    assert calls(slurm) == ["9_2", "--signal=USR2 9_0"]
    (slurm / "calls").write_text("")
    assert control.cancel(root) == 0
    assert calls(slurm) == ["9_2", "--signal=USR2 9_0"]
    assert [e.kind for e in read_events(points[2].events)] == ["cancelled"]
    assert not points[1].cancelled.exists()
