"""Which job this process is of, as Slurm's commands take it."""

from slurm.rendezvous import job_id_of


def test_a_task_of_an_array_never_speaks_for_the_whole_array() -> None:
    """The last task's SLURM_JOB_ID is the array's: `scontrol requeue` of it would requeue every task."""
    last = {"SLURM_JOB_ID": "207", "SLURM_ARRAY_JOB_ID": "207", "SLURM_ARRAY_TASK_ID": "3"}
    assert job_id_of(last) == "207_3"
    assert job_id_of({"SLURM_JOB_ID": "207"}) == "207"
    assert job_id_of({}) == ""
