"""A sweep on a real Slurm: one array, points cancelled, the command again, a submission that was cut off, halving."""

import json
import os
import shutil
from pathlib import Path

import pytest

from orchestrator.record import read_all_steps, read_events
from orchestrator.run_dir import RunDir
from slurm.virtual import VirtualCluster
from tests.integration.words_run import arriero, launch, make_workplace

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(600)]

ON_SLURM = ["-m", "cluster=slurm", "cluster.gpus_per_node=1", "cluster.cpus_per_gpu=4", "cluster.memory_gb_per_node=1"]
COMMAND = [*ON_SLURM, "steps=12", "optim.lr=1e-3,2e-3,3e-3,4e-3,5e-3,6e-3", "--limit-parallel=2"]


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


@pytest.mark.parametrize(
    ("points", "sbatch", "queued"),
    [
        # 200 points, killed after sbatch has queued them and before the number of the array is noted
        (200, 'REAL "$@" > /dev/null; kill -9 $PPID', 200),
        # killed before sbatch is there
        (2, "kill -9 $PPID; exit 1", 0),
        # killed while a slow sbatch is still on its way: the next command waits for it
        (2, 'kill -9 $PPID; sleep 3; exec REAL "$@"', 2),
    ],
    ids=("after", "before", "while"),
)
def test_a_command_that_is_killed_around_sbatch_leaves_one_array_of_all_points(
    points: int, sbatch: str, queued: int, slurm_cluster: VirtualCluster, tmp_path: Path
) -> None:
    workplace = make_workplace(tmp_path)
    killer = tmp_path / "bin" / "sbatch"
    killer.parent.mkdir()
    killer.write_text("#!/bin/sh\n" + sbatch.replace("REAL", str(shutil.which("sbatch"))))
    killer.chmod(0o755)
    words = [*ON_SLURM, f"seed=range({points})", "+cluster.sbatch.begin=now+1hour"]
    path = f"{killer.parent}:{os.environ['PATH']}"
    assert launch(workplace, "cut", *words, **{**slurm_cluster.env, "PATH": path}).returncode == -9

    again = launch(workplace, "cut", *words, **slurm_cluster.env)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"{queued} queued or running already" in again.stdout
    journals = [json.loads(p.read_text()) for p in (workplace / "runs" / "cut" / "submissions").glob("*.json")]
    (array,) = {j["job_id"] for j in journals if j["job_id"]}
    listed = slurm_cluster.command("squeue", "--noheader", "--array", "--format=%i %j").stdout.split("\n")
    assert sorted(line for line in listed if line.endswith(" cut")) == sorted(f"{array}_{n} cut" for n in range(points))
    slurm_cluster.command("scancel", array)


def test_halving_on_slurm_pauses_points_goes_on_with_the_best_and_drops_the_others(
    slurm_cluster: VirtualCluster, tmp_path: Path
) -> None:
    workplace = make_workplace(tmp_path)
    words = [*ON_SLURM, "optim.lr=1e-7,4e-3", "--halving=10"]
    refused = launch(workplace, "rates", *words, **slurm_cluster.env)
    assert refused.returncode == 2
    assert "add --wait" in refused.stderr
    done = launch(workplace, "rates", *words, "--wait", **slurm_cluster.env)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(arriero(workplace, "sweep", "status", "runs/rates", "--json", **slurm_cluster.env).stdout)
    assert [(r["state"], r["step"], r["attempts"]) for r in told] == [("dropped", 10, 1), ("finished", 30, 2)]
    assert "33% of all steps saved" in done.stdout
