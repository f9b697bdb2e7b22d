"""Slurm's words, parsed."""

from slurm.queue import parse_details, parse_squeue

SQUEUE = """17|RUNNING|None|1-02:03:04|20:00|256|node[001-256]|arriero:abc
18|PENDING|Resources|0:00|1:00|2||(null)
19_3|COMPLETED|None|5:00|1:00|1|node001|a|b
garbage
"""


def test_squeue() -> None:
    jobs = parse_squeue(SQUEUE)
    assert list(jobs) == ["17", "18", "19_3"]
    assert (jobs["17"].state, jobs["17"].nodes, jobs["17"].comment, jobs["17"].reason) == (
        "RUNNING",
        256,
        "arriero:abc",
        "",
    )
    assert jobs["17"].live
    assert jobs["18"].live
    assert not jobs["19_3"].live
    assert jobs["19_3"].comment == "a|b"


def test_scontrol_show_job() -> None:
    details = parse_details(
        "JobId=1 JobName=x JobState=RUNNING Reason=None RunTime=00:00:40 TimeLimit=1-00:01:00 Comment=a=b"
    )
    assert (details.state, details.time_left_s) == ("RUNNING", 86_420.0)
    assert parse_details("JobState=RUNNING RunTime=00:00:40 TimeLimit=UNLIMITED").time_left_s is None
    assert not details.preempted
    assert not parse_details("JobState=RUNNING PreemptTime=None").preempted
    assert parse_details("JobState=RUNNING PreemptTime=2026-11-30T18:21:40").preempted
