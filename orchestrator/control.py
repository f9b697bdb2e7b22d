"""Go on with a run, or stop it: what a person does to a run directory."""

import json
import os
import signal
from pathlib import Path

from orchestrator import spec as specs
from orchestrator.errors import Failure
from orchestrator.record import Event, JsonlWriter, read_events, utc_now
from orchestrator.run_dir import RunDir
from slurm import queue
from slurm.submit import find

_NOT_STARTED = ("PENDING", "COMPLETING", "REQUEUED", "REQUEUE_HOLD")  # COMPLETING: it ends, or goes back into the queue


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
    """Asks all ranks to save and end, and keeps the job out of the queue afterwards."""
    run = RunDir.existing(root)
    if specs.load(run.spec).cluster.kind == "slurm":
        job_id = find(run.submission)
        if job_id is None:
            print(f"{run.root.name} is not in the queue")
            return 0
        run.cancelled.touch()
        job = (queue.queued() or {}).get(job_id)
        if job is not None and job.state in _NOT_STARTED:  # nothing is to be saved, and nobody else will tell
            with JsonlWriter(run.events / "supervise.jsonl") as events:
                events.write(Event(time_utc=utc_now(), kind="cancelled", step=0, detail="user: cancelled in the queue",
                                   data={"cause": "user", "job_id": job_id}))  # fmt: skip
            words, said = ["scancel", job_id], "is taken out of the queue"
        else:  # the warning comes first, so that it saves; `supervise` sees the mark and ends it
            words, said = ["scancel", "--signal=USR2", job_id], "is asked to save and end"
        code, _, error = queue.call(*words)
        if code:
            raise Failure(f"{' '.join(words)}: {error}")
        print(f"job {job_id} {said}; `arriero resume {root}` goes on with it")
        return 0
    pid = run.worker_pid()
    if pid is None:
        print(f"{run.root.name} does not run on this machine")
        return 0
    os.kill(pid, signal.SIGTERM)
    print(f"{run.root.name} is asked to save and end; `arriero resume {root}` goes on with it")
    return 0
