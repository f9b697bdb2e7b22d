"""A whole Slurm on this machine, really started and really stopped."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from slurm.virtual import ClusterError, Process, VirtualCluster, default_directory
from tests.integration.conftest import require_slurm

pytestmark = [pytest.mark.slow, pytest.mark.slurm]

ROOT = Path(__file__).resolve().parents[2]


def arriero(*words: str) -> subprocess.CompletedProcess[str]:
    main = "import sys; from orchestrator.cli import main; sys.exit(main())"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", main, *words], env=environment, capture_output=True, text=True, check=False, timeout=120
    )


def wait_for_state(cluster: VirtualCluster, node: str, *states: str, timeout_s: float = 90) -> str:
    until = time.monotonic() + timeout_s
    while True:
        state = cluster.command(
            "sinfo", "--noheader", f"--nodes={node}", "--partition=normal", "--format=%T"
        ).stdout.strip()
        if state.rstrip("*") in states:
            return state
        assert time.monotonic() < until, f"{node} is {state}"
        time.sleep(0.3)


def test_two_stand_side_by_side_and_down_stops_exactly_its_own() -> None:
    require_slurm()
    first, second = f"first-{os.getpid()}", f"second-{os.getpid()}"
    up = arriero("cluster", "up", "--nodes=3", "--gpus-per-node=2", f"--name={first}", "--json")
    assert up.returncode == 0, up.stderr
    try:
        assert json.loads(up.stdout)["nodes_by_state"] == {"idle": 3}
        with (
            tempfile.TemporaryDirectory() as folder,
            VirtualCluster.up(
                nodes=2, gpus_per_node=0, name=second, accounting=False, directory=Path(folder).resolve()
            ) as other,
        ):
            one = VirtualCluster.load(default_directory(first))
            ran = one.command("srun", "-N3", "--ntasks-per-node=2", "--gres=gpu:2", "printenv", "SLURMD_NODENAME")
            assert sorted(ran.stdout.split()) == sorted(2 * ["node001", "node002", "node003"]), ran.stderr
            for option, value in (("--name", first), ("--directory", str(other.directory))):
                refused = arriero("cluster", "up", option, value).stderr
                assert f"already: use it, stop it with `arriero cluster down {option} {value}`" in " ".join(
                    refused.split()
                )
            everything = list(one.daemons.values())
            down = arriero("cluster", "down", f"--name={first}", "--json")
            assert json.loads(down.stdout) == {"name": first, "daemons_stopped": 4 + 3}
            assert not any(p.alive() for p in everything)
            assert not one.directory.exists()
            assert other.command("srun", "-N2", "hostname").returncode == 0
            assert other.status()["daemons_down"] == []
    finally:
        arriero("cluster", "down", f"--name={first}")
    gone = arriero("cluster", "status", f"--name={first}")
    assert gone.returncode == 2
    assert "arriero cluster up" in gone.stderr


def test_a_pid_that_was_taken_again_is_not_ours(slurm_cluster: VirtualCluster) -> None:
    munged = slurm_cluster.daemons["munged"]
    assert munged.alive()
    assert not Process(munged.pid, munged.start_ticks + 1).alive()


def test_a_killed_node_goes_down_with_its_job_and_comes_back(slurm_cluster: VirtualCluster) -> None:
    submitted = slurm_cluster.command(
        "sbatch", "--parsable", "--nodelist=node008", "--no-requeue", "--wrap", "sleep 600"
    )
    job = submitted.stdout.strip()
    wait_for_state(slurm_cluster, "node008", "mixed", "allocated")
    slurm_cluster.kill_node("node008")
    assert not slurm_cluster.processes_on("node008")
    wait_for_state(slurm_cluster, "node008", "down")
    slurm_cluster.start_node("node008")
    wait_for_state(slurm_cluster, "node008", "idle")
    state = slurm_cluster.command("sacct", "-X", "--noheader", "--parsable2", f"--jobs={job}", "--format=State").stdout
    assert "NODE_FAIL" in state


def test_a_job_outlives_slurmctld(slurm_cluster: VirtualCluster) -> None:
    job = slurm_cluster.command("sbatch", "--parsable", "--wrap", "sleep 600").stdout.strip()
    slurm_cluster.restart_controller()
    state = slurm_cluster.command("squeue", "--noheader", f"--jobs={job}", "--format=%T").stdout.strip()
    assert state in ("RUNNING", "PENDING", "CONFIGURING")
    slurm_cluster.command("scancel", job)


def test_what_cannot_be_is_told_before_anything_starts(tmp_path: Path) -> None:
    require_slurm()
    (tmp_path / "mine").write_text("something of the user's")
    with pytest.raises(ClusterError, match="holds something else"):
        VirtualCluster.up(nodes=1, directory=tmp_path, name="x")
    with pytest.raises(ClusterError, match="1 to 999"):
        VirtualCluster.up(nodes=5000, name="x")
    with pytest.raises(ClusterError, match="small letters"):
        VirtualCluster.up(name="A b")
    assert (tmp_path / "mine").read_text() == "something of the user's"
