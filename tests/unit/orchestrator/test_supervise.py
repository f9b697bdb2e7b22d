"""What becomes of a job whose ranks have ended: the pure policy."""

import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator import spec as specs
from orchestrator.incidents import crashes_so_far
from orchestrator.record import Event, read_events
from orchestrator.run_dir import RunDir
from orchestrator.supervise import _of_this_start, _Supervisor, decide, rejections_so_far
from slurm.lead import Incident
from slurm.queue import JobDetails


def event(kind: str, step: int = 0, **data: object) -> Event:
    return Event(time_utc="2026-01-01T00:00:00.000Z", kind=kind, step=step, detail=f"{kind} at {step}", data=data)


def job(state: str = "RUNNING", left_s: float | None = 50_000.0, preempted: bool = False) -> JobDetails:
    return JobDetails(state=state, time_left_s=left_s, preempted=preempted)


@pytest.mark.parametrize(
    ("last", "exit_code", "details", "cancelled", "crashes", "expected"),
    [
        ("finished", 0, job(), False, 0, ("end", "finished")),
        ("finished", 0, None, False, 0, ("end", "finished")),
        ("stopped", 0, job(), True, 0, ("end", "user")),
        ("stopped", 0, job("CANCELLED"), False, 0, ("end", "user")),
        ("failed", 0, job(), False, 0, ("end", "person")),
        ("stopped", 0, job(left_s=100), False, 0, ("requeue", "timeout")),
        ("stopped", 0, job(), False, 0, ("requeue", "signalled")),
        ("stopped", 0, job(preempted=True), False, 0, ("requeue", "preempted")),
        ("stopped", 0, None, False, 0, ("requeue", "unknown")),
        ("stopped", 0, job("PENDING"), False, 0, ("release", "requeued")),
        (None, 137, job("PENDING"), False, 9, ("release", "requeued")),
        (None, 137, job("TIMEOUT"), False, 9, ("requeue", "timeout")),
        (None, 137, job("NODE_FAIL"), False, 9, ("requeue", "node_failure")),
        (None, 140, job(left_s=60), False, 9, ("requeue", "timeout")),  # USR2 before the ranks were up
        (None, 137, job(), False, 2, ("requeue", "crash")),
        (None, 137, job(), False, 3, ("end", "crash")),
        (None, 1, None, False, 3, ("end", "crash")),
    ],
)
def test_causes_are_told_apart(
    last: str | None,
    exit_code: int,
    details: JobDetails | None,
    cancelled: bool,
    crashes: int,
    expected: tuple[str, str],
) -> None:
    said = decide(event(last) if last else None, exit_code, details, cancelled, crashes, 3, 180.0)
    assert (said.act, said.cause) == expected


def test_a_run_that_halving_has_paused_waits_for_the_sweep_and_not_in_the_queue() -> None:
    said = decide(event("stopped", 10, paused=True), 0, job(), False, 0, 3, 180.0)
    assert (said.act, said.cause) == ("end", "paused")


def test_a_new_checkpoint_forgives_crashes_and_other_causes_never_count() -> None:
    crash, timeout = event("requeued", cause="crash"), event("requeued", cause="timeout")
    assert crashes_so_far([event("saved", 10), crash, timeout, crash]) == 2
    assert crashes_so_far([event("saved", 10), crash, event("saved", 20), crash]) == 1
    assert crashes_so_far([event("saved", 20), crash, event("saved", 10), crash]) == 2  # saved again, got no further
    assert crashes_so_far([crash, crash, event("resumed_by_hand")]) == 0
    inside = [event("restarted", cause=cause) for cause in ("crash", "hung", "node_failure", "unfit_node")]
    assert crashes_so_far([crash, *inside]) == 3


def test_an_error_of_every_rank_at_the_first_start_ends_the_run_with_it() -> None:
    incident = Incident(cause="crash", rank=0, node="n1", detail="rank 0 on n1: ValueError: lr", at_start=True)
    first = decide(None, 1, job(), False, 0, 3, 180.0, incident=incident)
    assert (first.act, first.cause) == ("end", "error")
    assert "ValueError: lr" in first.reason
    later = decide(None, 1, job(), False, 0, 3, 180.0, restarts=1, incident=incident)
    assert (later.act, later.cause) == ("requeue", "crash")
    assert decide(None, 1, job(), False, 9, 3, 180.0, lost=["n1"], incident=incident).cause == "node_failure"


def test_a_lost_node_is_no_crash_even_where_the_ranks_say_it_first() -> None:
    decision = decide(None, 1, job(), False, crashes=9, crash_budget=3, warn_s=180, lost=["node003"])
    assert (decision.act, decision.cause) == ("requeue", "node_failure")
    assert "node003" in decision.reason


def details(state: str, **more: object) -> JobDetails:
    return JobDetails(state=state, **{"time_left_s": 50_000.0, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (details("COMPLETING", reason="TimeLimit", restarts=0), ("requeue", "timeout")),
        (details("COMPLETING", time_left_s=-20.0, restarts=0), ("requeue", "timeout")),
        (details("COMPLETING", restarts=1), ("release", "requeued")),
        (
            details("COMPLETING", reason="TimeLimit", restarts=1),
            ("release", "requeued"),
        ),  # our own requeue, already made
        (details("COMPLETING", restarts=0), ("end", "user")),  # scancel
    ],
)
def test_what_completing_means(said: JobDetails, expected: tuple[str, str]) -> None:
    decision = decide(None, 137, said, False, 9, 3, 180.0)
    assert (decision.act, decision.cause) == expected


@pytest.fixture
def supervisor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Supervisor]:
    """Of job 7. Its scontrol answers with the files job.1, job.2, ... in turn (an empty one: it does not answer) and node.*."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        f"""#!/bin/sh
cd {tmp_path}; echo "$*" >> calls
case "$1 $2" in
  "show config") echo "SlurmdTimeout = 300 sec"; exit 0;;
  "show job"|"show node") ;;
  "requeue 7") [ "$(grep -c ^requeue calls)" -gt "$(cat refusals || echo 0)" ] && exit 0; echo refused >&2; exit 1;;
  *) exit 0;;
esac
n=$(grep -c "^$1 $2" calls)
while [ ! -e "$2.$n" ]; do n=$((n-1)); done
[ -s "$2.$n" ] || {{ echo "Unable to contact slurm controller" >&2; exit 1; }}
cat "$2.$n"
"""
    )
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    before = signal.getsignal(signal.SIGTERM)
    yield _Supervisor(RunDir(tmp_path), [])
    signal.signal(signal.SIGTERM, before)


ENDED = "JobId=7 JobState=COMPLETING Restarts=1"
OVER = "JobId=7 JobState=COMPLETING Restarts=0 Reason=TimeLimit"
SCANCELLED = "JobId=7 JobState=COMPLETING Restarts=0"
RUNS = "JobId=7 JobState=RUNNING Restarts=0"
SILENT, DOWN = "State=IDLE", "State=DOWN*"


@pytest.mark.parametrize(
    ("jobs", "nodes", "told", "requeued"),
    [
        ([RUNS, RUNS, ENDED], [SILENT], "requeued", False),
        ([RUNS, "", "", ENDED], [SILENT, "", "", SILENT], "requeued", False),  # slurmctld does not answer for a while
        ([RUNS, RUNS, OVER], [SILENT], "requeued", True),  # or the job would end with its time limit
        ([RUNS, SCANCELLED], [SILENT], "cancelled", False),
        ([RUNS], [SILENT, DOWN], "requeued", True),  # with --no-kill the job goes on without the node
        ([RUNS, RUNS, ENDED], [DOWN], "requeued", True),
    ],
)  # fmt: skip
def test_a_lost_node_is_waited_for_before_the_job_goes_back(
    supervisor: _Supervisor, tmp_path: Path, jobs: list[str], nodes: list[str], told: str, requeued: bool
) -> None:
    with socket.socket() as nobody:  # bound, and it does not listen
        nobody.bind(("127.0.0.1", 0))
        for number, text in enumerate(jobs, 1):
            (tmp_path / f"job.{number}").write_text(text)
        for number, text in enumerate(nodes, 1):
            line = f"NodeName=n2 NodeAddr=127.0.0.1 Port={nobody.getsockname()[1]} {text}" if text else ""
            (tmp_path / f"node.{number}").write_text(line)
        assert supervisor._requeue([], "node_failure", "lost n2", ["n2"]) == (None if told == "requeued" else 0)
    assert [e.kind for e in read_events(supervisor.directory.events)] == ["node_lost", told]
    assert ("requeue 7" in (tmp_path / "calls").read_text().splitlines()) == requeued


def test_a_cancel_is_heard_while_a_lost_node_is_waited_for(supervisor: _Supervisor, tmp_path: Path) -> None:
    (tmp_path / "job.1").write_text(RUNS)
    (tmp_path / "node.1").write_text("NodeName=n2 NodeAddr=127.0.0.1 Port=1 State=IDLE")
    supervisor.directory.cancelled.touch()
    assert supervisor._requeue([], "node_failure", "lost n2", ["n2"]) == 0
    assert [e.kind for e in read_events(supervisor.directory.events)] == ["node_lost", "cancelled"]


@pytest.mark.parametrize(
    ("jobs", "refusals", "exit_code", "told", "asked"),
    [
        ([RUNS], 2, None, ["requeued"], 3),
        (["", "", "", "", RUNS], 1, None, ["requeued"], 2),  # slurmctld does not answer for a while
        ([ENDED], 9, None, ["requeued"], 1),  # Slurm has done it itself
        ([RUNS], 9, 1, ["requeued", "failed"], 3),
        ([""], 9, 1, ["requeued", "failed"], 1),  # slurmctld does not answer until it is given up
    ],
)
def test_a_job_that_slurm_does_not_put_back_is_no_success(
    supervisor: _Supervisor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    jobs: list[str], refusals: int, exit_code: int | None, told: list[str], asked: int,
) -> None:  # fmt: skip
    monkeypatch.setattr("orchestrator.supervise._REFUSALS", 2)
    monkeypatch.setattr("orchestrator.supervise._MUTE_S", 4)
    (tmp_path / "refusals").write_text(str(refusals))
    for number, text in enumerate(jobs, 1):
        (tmp_path / f"job.{number}").write_text(text)
    assert supervisor._requeue([], "preempted", "asked to stop") == exit_code
    assert [e.kind for e in read_events(supervisor.directory.events)] == told
    assert (tmp_path / "calls").read_text().count("requeue 7") == asked


def test_while_slurmctld_is_mute_it_is_asked_again(supervisor: _Supervisor, tmp_path: Path) -> None:
    """Else a requeue in which the ranks have saved would be told as a preemption."""
    for number, text in enumerate(["", "", "", ENDED], 1):
        (tmp_path / f"job.{number}").write_text(text)
    assert supervisor._details(lambda: False) is None  # the run is finished: it does not matter
    decision = decide(event("stopped"), 0, supervisor._details(lambda: True), False, 0, 3, 180.0)
    assert (decision.act, decision.cause) == ("release", "requeued")


def test_a_start_that_dies_early_does_not_take_the_last_word_of_the_one_before() -> None:
    def told(kind: str, attempt: int, **data: object) -> Event:
        return Event(
            time_utc=f"2026-01-01T00:00:0{attempt}.000Z", kind=kind, step=0, detail="", attempt=attempt, data=data
        )

    events = [told("started", 1, job_id="7", restart=0), told("stopped", 1), told("started", 2, job_id="7", restart=1)]
    assert [e.kind for e in _of_this_start(events, "7", 0)] == ["started", "stopped"]
    assert [e.attempt for e in _of_this_start(events, "7", 1)] == [2]
    assert _of_this_start(events, "7", 2) == []
    assert _of_this_start(events, "7", 0, frozenset({1})) == []


def test_a_lost_node_is_no_requeue_where_the_allocation_goes_on() -> None:
    assert decide(None, 1, job(), False, 9, 3, 180.0, lost=["node003"], elastic=True).act == "again"


def test_refused_starts_are_counted_in_a_row() -> None:
    refused = event("requeued", cause="unfit_node")
    assert rejections_so_far([refused, event("started"), refused, refused]) == 2
    assert rejections_so_far([refused, event("resumed_by_hand")]) == 0


def test_the_start_of_a_lost_node_leaves_the_job_alone_that_runs_elsewhere() -> None:
    elsewhere = details("RUNNING", restarts=1)
    assert decide(None, 1, elsewhere, False, 0, 3, 180, restarts=0).act == "release"
    assert decide(None, 1, elsewhere, False, 0, 3, 180, restarts=1).act == "requeue"


def test_a_slip_in_the_sites_own_check_fails_the_run_and_blames_no_node(
    supervisor: _Supervisor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm's srun is a script here, and runs the real check."""
    run = supervisor.directory
    spec = specs.compose(["cluster=slurm", "cluster.gpus_per_node=1", "cluster.preflight_command=nvidia-smii"])
    run.spec.write_text(specs.to_yaml(spec))
    srun = tmp_path / "srun"
    srun.write_text(
        f'#!/bin/sh\nfor last; do :; done\nSLURMD_NODENAME=node001 {sys.executable} -m slurm.preflight "$last"\n'
    )
    srun.chmod(0o755)
    (tmp_path / "job.1").write_text(f"{RUNS} NodeList=node001")
    (tmp_path / "node.1").write_text("")
    assert supervisor.run() == 1
    (failed,) = read_events(run.events)
    assert failed.kind == "failed"
    assert failed.detail.startswith("preflight: cluster.preflight_command cannot be run: exit code 127 bash: ")
    assert "nvidia-smii" in failed.detail
    assert not run.lemons.exists()
    # where another node can run it, this one is unfit
    said = {"node001": ["command: cluster.preflight_command cannot be run: exit code 127"], "node002": []}
    words = "import json, pathlib, sys; results = pathlib.Path(json.loads(sys.argv[-1])['results'])"
    srun.write_text(
        f"#!{sys.executable}\n{words}\nfor n, w in {said}.items(): (results / f'{{n}}.json').write_text(json.dumps(w))\n"
    )
    assert list(supervisor._preflight(spec, ["node001", "node002"])) == ["node001"]


@pytest.mark.parametrize(
    ("exit_code", "cancelled", "unfit", "tells"),
    [(140, False, [], True), (140, True, [], False), (1, False, ["node002"], False)],
)
def test_a_node_whose_preflight_the_warning_has_ended_is_not_unfit(
    supervisor: _Supervisor, tmp_path: Path, exit_code: int, cancelled: bool, unfit: list[str], tells: bool
) -> None:
    """Slurm's srun is a script: node001 answers, node002 does not."""
    srun = tmp_path / "srun"
    words = "import json, pathlib, sys; results = pathlib.Path(json.loads(sys.argv[-1])['results'])"
    srun.write_text(
        f"""#!{sys.executable}
{words}
(results / "node001.json").write_text("[]")
sys.exit({exit_code})
"""
    )
    srun.chmod(0o755)
    if cancelled:
        supervisor.directory.cancelled.touch()
    assert list(supervisor._preflight(specs.compose([]), ["node001", "node002"])) == unfit
    told = [e.detail for e in read_events(supervisor.directory.events) if e.kind == "preflight"]
    assert ["could not be made on 1 of 2 nodes" in detail for detail in told] == [True] * tells
