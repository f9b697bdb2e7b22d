"""What a Slurm job does before and after its ranks: tells causes apart, goes on by itself or stops for a person.

The batch script calls `begin` and `end` around srun, on the job's first node. Torch-free. A warned run has saved, and a requeue
goes on from the newest checkpoint; a crash goes on too, until `cluster.crash_budget` crashes came without a new checkpoint in
between.
"""

import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from orchestrator import spec as specs
from orchestrator.record import Event, JsonlWriter, read_events, utc_now
from orchestrator.run_dir import RunDir
from slurm import lemons, queue
from slurm.rendezvous import expand_hostlist

Cause = Literal["timeout", "preempted", "requeued", "node_failure", "crash", "user", "finished", "person"]
_PREFLIGHT_S = 180.0
_BREATH_S = 8  # between the end of one start and the next
_ENDS = ("finished", "stopped", "failed")
_SLURMS_WORDS: dict[str, Cause] = {
    "PREEMPTED": "preempted",
    "NODE_FAIL": "node_failure",
    "BOOT_FAIL": "node_failure",
    "TIMEOUT": "timeout",
    "REQUEUED": "requeued",
    "CANCELLED": "user",
    "FAILED": "crash",
    "OUT_OF_MEMORY": "crash",
}


@dataclass(frozen=True)
class Decision:
    """`requeue`: back into the queue. `release`: Slurm has requeued it already, only its two minutes' hold is to go.
    `end`: nothing more is to be done."""

    act: Literal["requeue", "release", "end"]
    cause: Cause
    reason: str


def decide(
    last: Event | None,
    exit_code: int,
    job: queue.JobDetails | None,
    cancelled: bool,
    crashes: int,
    crash_budget: int,
    warn_s: float,
    nodes_down: Sequence[str] = (),
) -> Decision:
    """What becomes of a job whose ranks have ended. Pure.

    last: the attempt's own last word (finished, stopped, failed), if it had one. job: what slurmctld says; None where it does
    not answer. crashes: so far, without a new checkpoint since the first of them.
    """
    if last is not None and last.kind == "finished":
        return Decision("end", "finished", "the run is finished")
    if cancelled or (job is not None and job.state == "CANCELLED"):
        return Decision("end", "user", "cancelled")
    if last is not None and last.kind == "failed":
        return Decision("end", "person", last.detail)
    running = job is None or job.state in ("RUNNING", "UNKNOWN")
    if not running:  # slurmctld has requeued it: a preemption, an operator, a node that is gone
        if job and job.state == "TIMEOUT":
            return Decision("requeue", "timeout", "the time limit came before the ranks had saved")
        if job and job.state in ("FAILED", "NODE_FAIL", "BOOT_FAIL", "COMPLETED", "OUT_OF_MEMORY", "DEADLINE"):
            return Decision("requeue", "node_failure" if "NODE" in job.state else "crash", f"Slurm says {job.state}")
        return Decision("release", "requeued", "Slurm has put it back into the queue")
    # Slurm warns up to a minute early.
    near_end = job is not None and job.time_left_s is not None and job.time_left_s <= warn_s + 90
    if last is not None and last.kind == "stopped":
        return Decision("requeue", "timeout" if near_end else "preempted", last.detail)
    if exit_code in (128 + signal.SIGUSR2, 128 + signal.SIGUSR1) and near_end:
        return Decision("requeue", "timeout", "warned before the ranks were ready to save")
    if nodes_down:  # srun was told before slurmctld has ended the job
        return Decision("requeue", "node_failure", f"lost {', '.join(nodes_down)}")
    if crashes >= crash_budget:
        return Decision(
            "end",
            "crash",
            f"exit code {exit_code}; {crashes + 1} crashes without a new checkpoint in between, and cluster.crash_budget is "
            f"{crash_budget}: a person must look",
        )
    return Decision(
        "requeue",
        "crash",
        f"exit code {exit_code}, crash {crashes + 1} of at most {crash_budget} without a new checkpoint",
    )


def crashes_so_far(events: Sequence[Event]) -> int:
    """Crashes since the run last got on: since its newest checkpoint was saved for the first time."""
    furthest, crashes = -1, 0
    for event in events:
        if event.kind == "saved" and event.step > furthest:
            furthest, crashes = event.step, 0
        elif event.kind == "requeued" and event.data.get("cause") == "crash":
            crashes += 1
        elif event.kind == "resumed_by_hand":
            crashes = 0
    return crashes


def begin(directory: RunDir) -> int:
    """Before the ranks: says why the job is here again, where its last start could not say so itself."""
    events = read_events(directory.events)
    job_id, restarts = os.environ.get("SLURM_JOB_ID", ""), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    started = [e for e in events if e.kind == "started"]
    told = [
        e
        for e in events
        if e.kind == "requeued" and e.data.get("restart") == restarts and e.data.get("job_id") == job_id
    ]
    if restarts and started and not told:
        ends = queue.starts_of(job_id) or []
        before = ends[restarts - 1] if len(ends) >= restarts else ""
        cause = _SLURMS_WORDS.get(before, "requeued")
        said = f"Slurm says {before}" if before else "there is no accounting that would say why"
        _tell(
            directory,
            "requeued",
            _step(events),
            f"requeued: {cause}: {said}",
            cause=cause,
            job_id=job_id,
            restart=restarts,
        )
    return preflight(directory, job_id, restarts) if specs.load(directory.spec).cluster.preflight else 0


def preflight(directory: RunDir, job_id: str, restarts: int) -> int:
    """Checks every node of the job, all at once. Where one is unfit the job goes back into the queue without it; then 1."""
    spec = specs.load(directory.spec)
    results = directory.root / "preflight" / f"{job_id}-{restarts}"
    results.mkdir(parents=True, exist_ok=True)
    nodes = expand_hostlist(os.environ["SLURM_JOB_NODELIST"])
    with socket.create_server(("", 0), backlog=len(nodes) + 8) as head:
        asked = {
            "run_dir": str(directory.root),
            "results": str(results),
            "gpus_per_node": spec.cluster.gpus_per_node,
            "cuda": spec.gpu.device == "cuda",
            "head": [os.environ.get("ARRIERO_MASTER_ADDR", nodes[0]), head.getsockname()[1]],
            "command": spec.cluster.preflight_command,
        }
        words = ["srun", f"--nodes={len(nodes)}", f"--ntasks={len(nodes)}", "--ntasks-per-node=1", "--overlap"]
        check = [sys.executable, "-m", "slurm.preflight", json.dumps(asked)]
        code, _, error = queue.call(*words, *check, timeout_s=_PREFLIGHT_S)
    unfit: dict[str, list[str]] = {}
    for node in nodes:
        path = results / f"{node}.json"
        silent = [f"no answer in {_PREFLIGHT_S:g} s (exit code {code}) {error[-200:]}".rstrip()]
        if said := json.loads(path.read_text()) if path.exists() else silent:
            unfit[node] = said
    shutil.rmtree(results, ignore_errors=True)
    if len(unfit) == len(nodes) > 1:
        # Not one node is fit: the fault is the check's or the whole cluster's, and leaving all of them out would help nobody.
        _tell(directory, "preflight", 0, f"no node passed the preflight, so none is left out: {unfit[nodes[0]][0]}")
        return 0
    if not unfit:
        return 0
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for node, said in unfit.items():
        lemons.add(directory.lemons, node, "; ".join(said), job_id)
        _tell(directory, "unfit", 0, f"{node} is unfit: {'; '.join(said)}", node=node, job_id=job_id)
    detail = f"requeued: unfit_node: without {', '.join(sorted(unfit))}"
    _tell(directory, "requeued", 0, detail, cause="unfit_node", job_id=job_id, restart=restarts + 1)
    _until_it_works(["scontrol", "requeue", job_id])
    left_out = ",".join(
        sorted({*unfit, *lemons.excluded(directory.lemons), *expand_hostlist(spec.cluster.exclude or "")})
    )
    _until_it_works(["scontrol", "update", f"jobid={job_id}", f"ExcNodeList={left_out}"])
    _until_it_works(["scontrol", "update", f"jobid={job_id}", f"StartTime=now+{_BREATH_S}seconds"])
    return 1


def end(directory: RunDir, exit_code: int) -> int:
    """After the ranks: requeues or ends the job. Returns the job's exit code."""
    signal.signal(
        signal.SIGTERM, signal.SIG_IGN
    )  # it comes with a requeue: there are KillWait seconds for what follows
    job_id, restarts = os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    config = specs.load(directory.spec).cluster
    events = read_events(directory.events)
    attempt = max((e.attempt or 0 for e in events), default=0)
    mine = [e for e in events if e.attempt == attempt]
    last = next((e for e in reversed(mine) if e.kind in _ENDS), None)
    for event in mine:  # arithmetic that went wrong on a node, as the spike gate has found
        if event.kind == "recomputed" and event.data.get("cause") == "hardware":
            for node in event.data.get("nodes", []):
                lemons.add(directory.lemons, str(node), event.detail, job_id)
    decision = decide(
        last,
        exit_code,
        queue.details(job_id),
        directory.cancelled.exists(),
        crashes_so_far(events),
        config.crash_budget,
        config.warn_s,
        queue.down_among(os.environ.get("SLURM_JOB_NODELIST", "")),
    )
    print(f"{utc_now()} supervise: {decision.cause}: {decision.reason}: {decision.act}", flush=True)
    if decision.act == "end":
        if decision.cause in ("finished", "user"):
            return 0
        if decision.cause != "person":
            _tell(
                directory,
                "failed",
                _step(events),
                f"{decision.cause}: {decision.reason}",
                cause=decision.cause,
                job_id=job_id,
            )
        return 1
    if decision.act == "requeue":  # else `begin` tells: by then the accounting knows who did it
        detail = f"requeued: {decision.cause}: {decision.reason}"
        _tell(directory, "requeued", _step(events), detail, cause=decision.cause, job_id=job_id, restart=restarts + 1)
        _until_it_works(["scontrol", "requeue", job_id])
    # When the last of this start is gone, slurmctld holds the job for two minutes more, but only where its begin time has
    # passed by then: so it gets one that has not.
    _until_it_works(["scontrol", "update", f"jobid={job_id}", f"StartTime=now+{_BREATH_S}seconds"])
    return 0


def _until_it_works(words: list[str], seconds: float = 60.0) -> None:
    """slurmctld may be restarting, or the job not yet be where it takes the command."""
    until = time.monotonic() + seconds
    while True:
        code, _, error = queue.call(*words)
        if code == 0:
            return
        if time.monotonic() > until:
            print(f"supervise: {' '.join(words)}: {error}", file=sys.stderr, flush=True)
            return
        time.sleep(0.3)


def _step(events: Sequence[Event]) -> int:
    return max((e.step for e in events if e.kind in ("saved", "resumed")), default=0)


def _tell(directory: RunDir, kind: str, step: int, detail: str, **data: object) -> None:
    with JsonlWriter(directory.events / "supervise.jsonl") as events:
        events.write(Event(time_utc=utc_now(), kind=kind, step=step, detail=detail, data=data), durable=True)


def main() -> int:
    what, run_dir, *rest = sys.argv[1:]
    directory = RunDir(Path(run_dir))
    return begin(directory) if what == "begin" else end(directory, int(rest[0]))


if __name__ == "__main__":
    sys.exit(main())
