"""Never two jobs for one run, whatever Slurm answers; and which code a job runs."""

import json
import os
import shutil
from pathlib import Path

import pytest

from slurm.request import CannotSubmit, ClusterConfig, JobRequest, Refused
from slurm.submit import _write_journal, find, sbatch_script


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


@pytest.mark.parametrize("moved", [False, True], ids=["copied", "moved"])
def test_a_directory_that_was_copied_or_moved_is_not_given_the_old_ones_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: bool
) -> None:
    answers(
        tmp_path / "bin", monkeypatch, squeue="echo '7|RUNNING|None|1:00|9:00|1|node1|arriero:t'", scontrol="exit 1"
    )
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    _write_journal(old / "submission.json", "t", "7", None)
    (tmp_path / "link").symlink_to(old)
    assert find(old / "submission.json") == find(tmp_path / "link" / "submission.json") == "7"
    shutil.copytree(old, new)
    if moved:
        shutil.rmtree(old)
        with pytest.raises(CannotSubmit, match=r"submitted for .*/old, which is not there.*scancel 7"):
            find(new / "submission.json")  # that job may train there still
    else:
        assert find(new / "submission.json") is None


def test_true_is_a_flag_of_sbatch_and_false_is_none(tmp_path: Path) -> None:
    cluster = ClusterConfig(
        name="c", kind="slurm", sbatch={"contiguous": "True", "spread-job": "false", "mail-type": "END"}
    )
    script = sbatch_script(JobRequest(name="r", entry="m:f", run_dir=str(tmp_path), cluster=cluster, token="t"))
    assert "#SBATCH --contiguous\n" in script
    assert "#SBATCH --mail-type=END\n" in script
    assert "spread-job" not in script


def test_a_path_in_which_slurm_reads_words_of_its_own_is_refused(tmp_path: Path) -> None:
    cluster = ClusterConfig(name="c", kind="slurm")
    with pytest.raises(Refused, match=r"x%jy: Slurm reads %"):
        sbatch_script(JobRequest(name="x%jy", entry="m:f", run_dir=str(tmp_path / "x%jy"), cluster=cluster))
