"""Go on with a run, or stop it: what a person does to a run directory."""

import json
import os
import signal
import time
from pathlib import Path

from orchestrator import registry
from orchestrator import spec as specs
from orchestrator.errors import Failure
from orchestrator.record import Event, JsonlWriter, read_events, utc_now
from orchestrator.run_dir import SWEEP, RunDir
from slurm import queue
from slurm.request import CannotSubmit
from slurm.submit import find

_NOT_STARTED = ("PENDING", "COMPLETING", "REQUEUED", "REQUEUE_HOLD")  # COMPLETING: it ends, or goes back into the queue
_TRANSITION = 228  # scancel's exit code of ESLURM_TRANSITION_STATE_NO_UPDATE
_TRANSITION_S = 10.0  # how long such a state may last


def resume(root: Path) -> int:
    """As the run's own spec.yaml says, from the folder that it was launched from."""
    from orchestrator.launch import launch

    run = RunDir.existing(root)
    spec = specs.load(run.spec)
    spec.run_root, spec.name = str(run.root.parent), run.root.name
    if spec.cluster.kind == "slurm" and (job_id := find(run.submission)):
        job = (queue.queued() or {}).get(job_id)
        if job is not None and job.state == "PENDING" and job.reason == "BeginTime" and read_events(run.events):
            # where the first node has died nobody could take away the two minutes for which Slurm holds a requeued job
            queue.call("scontrol", "update", f"jobid={job_id}", "StartTime=now")
            print(f"job {job_id} was held by Slurm until its begin time: it may start now")
            return 0
    overrides = run.overrides.read_text().splitlines()
    launched_from = Path(str(json.loads(run.environment.read_text()).get("directory", ".")))
    if launched_from.is_dir():
        os.chdir(launched_from)  # relative paths in the spec start there
    return launch(spec, overrides)


def cancel(root: Path) -> int:
    """Asks all ranks to save and end, and keeps the job out of the queue afterwards; of a sweep, those of all its points."""
    if (root / SWEEP).exists() and not RunDir(root).spec.exists():
        return _cancel_points(root)
    run = RunDir.existing(root)
    pid, on_slurm = run.worker_pid(), specs.load(run.spec).cluster.kind == "slurm"
    try:
        job_id = find(run.submission)  # whatever spec.yaml says: a launch on this machine may have written it since
    except CannotSubmit as error:
        if on_slurm or pid is None:
            raise
        print(error)
        job_id = None
    if job_id is not None:
        print(f"job {job_id} {_cancel_job(run, job_id)}; `arriero resume {root}` goes on with it")
    elif pid is not None:
        os.kill(pid, signal.SIGTERM)
        print(f"{run.root.name} is asked to save and end; `arriero resume {root}` goes on with it")
    else:
        _, _, copied = registry.journal(run)
        where = "is not in the queue" if on_slurm else "does not run on this machine"
        print(f"{run.root.name} {where}" + (f": {copied}" if copied else ""))
    return 0


def _cancel_points(root: Path) -> int:
    """Those that wait first: else one begins where one has ended. What is to be done to one is not left out for another."""
    from orchestrator.sweep_slurm import live_points

    if live_points(root) is None:  # it also notes the job of each point where a kill has left that undone
        raise Failure(f"squeue does not answer, so nobody can tell which points of {root} are queued: try again later")
    found = [r for r in registry.rows([root]) if r.state in ("queued", "running", "unknown")]
    if not found:
        print(f"no point of {root} is in the queue or runs")
    failed = 0
    for row in sorted(found, key=lambda r: r.state != "queued"):
        try:
            cancel(Path(row.run_dir))
        except (Failure, CannotSubmit) as error:
            print(f"{row.run_dir}: {error}")
            failed = 1
    return failed


def _cancel_job(run: RunDir, job_id: str) -> str:
    """What the job is told, in words. Slurm takes no signal while a job is between two states: it is asked again."""
    run.cancelled.touch()
    until = time.monotonic() + _TRANSITION_S
    while True:
        job = (queue.queued() or {}).get(job_id)
        waits = job is not None and job.state in _NOT_STARTED  # nothing is to be saved, and nobody else will tell
        # else the warning comes first, so that it saves; `supervise` sees the mark and ends it
        words = ["scancel", job_id] if waits else ["scancel", "--signal=USR2", job_id]
        code, _, error = queue.call(*words)
        if not code:
            break
        if queue.is_known(job_id) is False:
            return "has ended meanwhile"
        if code != _TRANSITION or time.monotonic() > until:
            why = "the job is between two states" if code == _TRANSITION else error or f"exit code {code}"
            raise Failure(f"{' '.join(words)}: {why}. It is not put back into the queue, but may train on: try again")
        time.sleep(0.5)
    if waits:
        with JsonlWriter(run.events / "supervise.jsonl") as events:
            events.write(Event(time_utc=utc_now(), kind="cancelled", step=0, detail="user: cancelled in the queue",
                               data={"cause": "user", "job_id": job_id}))  # fmt: skip
    return "is taken out of the queue" if waits else "is asked to save and end"
