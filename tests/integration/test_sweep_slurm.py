"""A sweep on a real Slurm: one array, points cancelled, the command again, a submission that was cut off."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.record import read_all_steps, read_events
from orchestrator.run_dir import RunDir
from slurm.virtual import VirtualCluster
from tests.integration.words_run import arriero, launch, make_workplace

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(600)]

COMMAND = ["-m", "steps=12", "optim.lr=1e-3,2e-3,3e-3,4e-3,5e-3,6e-3", "cluster=slurm", "cluster.gpus_per_node=1"]
COMMAND += ["cluster.cpus_per_gpu=4", "cluster.memory_gb_per_node=1", "--limit-parallel=2"]


def until(condition: Callable[[], bool], timeout_s: float = 240) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "too late"
        time.sleep(0.3)


def test_cancelled_points_alone_are_submitted_again_and_none_runs_twice(
    slurm_cluster: VirtualCluster, tmp_path: Path
) -> None:
    workplace = make_workplace(tmp_path)
    root = workplace / "runs" / "rates"

    first = launch(workplace, "rates", *COMMAND, **slurm_cluster.env)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "6 points on slurm, 2 at a time" in first.stdout
    (journal,) = (root / "submissions").glob("*.json")
    array = json.loads(journal.read_text())["job_id"]

    again = launch(workplace, "rates", *COMMAND, **slurm_cluster.env)
    assert "6 queued or running already" in again.stdout, again.stdout + again.stderr

    # As if the command had been killed before it could note the array's number.
    journal.write_text(json.dumps({**json.loads(journal.read_text()), "job_id": None}))
    for run in root.glob("lr=*"):
        RunDir(run).submission.unlink()
    slurm_cluster.command("scancel", f"{array}_4", f"{array}_5")
    third = launch(workplace, "rates", *COMMAND, "--wait", **slurm_cluster.env)
    assert third.returncode == 0, third.stdout + third.stderr
    assert "2 to submit" in third.stdout
    assert json.loads(journal.read_text())["job_id"] == array

    runs = sorted(root.glob("lr=*"))
    assert len(runs) == 6
    for run in runs:
        events = read_events(RunDir(run).events)
        assert [e.kind for e in events].count("started") == 1, run.name
        assert events[-1].kind == "finished"
        assert [r.step for r in read_all_steps(RunDir(run).records)] == list(range(1, 13))
        assert list(RunDir(run).logs.glob("*_0_log.out"))
    told = json.loads(arriero(workplace, "sweep", "status", "runs/rates", "--json", **slurm_cluster.env).stdout)
    assert [r["state"] for r in told] == ["finished"] * 6
