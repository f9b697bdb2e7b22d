"""`arriero rehearse`, whole: a real Slurm comes up, the job lives through its three misfortunes, all goes down again."""

import json
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.integration.conftest import require_slurm
from tests.integration.words_run import COMMAND, arriero, environment, make_workplace

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(600)]


def test_a_job_is_rehearsed_with_requeue_preemption_and_a_lost_node(tmp_path: Path) -> None:
    require_slurm()
    workplace = make_workplace(tmp_path)
    job = ["cluster=slurm", "cluster.nodes=2", "cluster.gpus_per_node=2", "layout=auto"]
    only_theirs = ["cluster.account=theirs", "cluster.partition=theirs"]
    with tempfile.TemporaryDirectory(prefix="r") as short:  # Unix sockets want short paths
        done = arriero(workplace, "rehearse", "model=nano", *job, *only_theirs, "--json", TMPDIR=short)
        assert not list(Path(short).glob("arriero-rehearsal-*"))
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout)
    assert said["held"]
    assert [c["what"] for c in said["checks"]] == [
        "cluster up",
        "submitted",
        "every rank in its place",
        "scontrol requeue",
        "preemption",
        "a node lost",
        "to the end",
    ]
    assert "4 ranks on 2 nodes, mesh dp_shard 4" in said["checks"][2]["detail"]


def test_what_is_no_slurm_cannot_be_rehearsed(tmp_path: Path) -> None:
    refused = arriero(tmp_path, "rehearse", "model=nano")
    assert refused.returncode == 2
    assert "choose cluster=slurm" in refused.stderr


def test_a_rehearsal_that_is_ended_takes_its_cluster_down(tmp_path: Path) -> None:
    require_slurm()
    job = ["cluster=slurm", "cluster.nodes=2", "cluster.gpus_per_node=2", "layout=fsdp", "layout.dp_shard=4"]
    with tempfile.TemporaryDirectory(prefix="r") as short:
        rehearsal = subprocess.Popen(
            [*COMMAND[:-1], "rehearse", "model=nano", *job], cwd=tmp_path, env={**environment(), "TMPDIR": short},
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert rehearsal.stdout is not None
        said = next(line for line in rehearsal.stdout if "submitted" in line)
        assert "held" in said
        (conf,) = Path(short).glob("arriero-rehearsal-*/cluster/slurm.conf")
        its = f"SLURM_CONF={conf}".encode()  # in the environment of each of its daemons, steps and ranks
        assert [p for p in Path("/proc").glob("[0-9]*/environ") if its in _read(p)]
        rehearsal.terminate()
        assert rehearsal.wait(60) == 128 + signal.SIGTERM
        assert not conf.exists()
        assert not [p for p in Path("/proc").glob("[0-9]*/environ") if its in _read(p)]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
