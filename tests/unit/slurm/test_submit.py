"""Never two jobs for one run, whatever Slurm answers; and which code a job runs."""

import json
import os
from pathlib import Path

import pytest

from slurm.request import CannotSubmit, ClusterConfig, JobRequest
from slurm.submit import find, sbatch_script


def answers(folder: Path, monkeypatch: pytest.MonkeyPatch, **commands: str) -> None:
    """Stands in for Slurm's commands: each is a line of sh."""
    folder.mkdir()
    for name, line in commands.items():
        (folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def journal(folder: Path) -> Path:
    path = folder / "submission.json"
    path.write_text(json.dumps({"token": "t", "job_id": "7", "time_s": 0.0}))
    return path


def test_a_job_that_squeue_lists_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers(
        tmp_path / "bin", monkeypatch, squeue="echo '7|RUNNING|None|1:00|9:00|1|node1|arriero:t'", scontrol="exit 1"
    )
    assert find(journal(tmp_path)) == "7"


@pytest.mark.parametrize(
    "scontrol",
    ["echo JobId=7 JobState=RUNNING", "echo 'Unable to contact slurm controller' >&2; exit 1"],
    ids=["another user's", "no answer"],
)
def test_an_empty_list_does_not_prove_that_a_job_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scontrol: str
) -> None:
    answers(tmp_path / "bin", monkeypatch, squeue="exit 0", scontrol=scontrol)
    with pytest.raises(CannotSubmit, match="job 7"):
        find(journal(tmp_path))


@pytest.mark.parametrize(
    "scontrol",
    [
        "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1",
        "echo JobId=7 JobState=COMPLETED",
        "echo Job 7 not found; exit 1",
    ],
    ids=["forgotten", "ended", "a task cancelled in the queue"],
)
def test_a_job_that_slurmctld_says_is_over_makes_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scontrol: str
) -> None:
    answers(tmp_path / "bin", monkeypatch, squeue="exit 0", scontrol=scontrol)
    assert find(journal(tmp_path)) is None


def test_python_in_the_job_does_not_look_into_the_folder_of_the_launch_first(tmp_path: Path) -> None:
    cluster = ClusterConfig(name="c", kind="slurm")
    script = sbatch_script(
        JobRequest(name="r", entry="m:f", run_dir=str(tmp_path), cluster=cluster, code="/snapshot", token="t")
    )
    assert script.index("export PYTHONSAFEPATH=1") < script.index("orchestrator.supervise")
    assert script.index("export PYTHONPATH=/snapshot") < script.index("orchestrator.supervise")
