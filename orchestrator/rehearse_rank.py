"""A rank's stand-in in a rehearsal: takes its place, proves it, and waits where the real one would compute. No torch.

Rank 0 counts steps, saves on a warning and resumes, through the same records and events as the trainer, so that what supervises
a job finds what it would find. 2,048 of these fit on one small machine: all but rank 0 import little, and sleep until something
happens.
"""

import json
import os
import signal

from slurm.pulse import pulse
from slurm.rendezvous import place
from slurm.signals import STOP_SIGNALS, StopFlag

STEP_S = 0.5
_LOOK_S = 5.0  # between two looks for the end, which thousands of ranks on two cores should take seldom
AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")  # ranks are numbered pp-major, tp-minor (model/layout.py)


def coordinates(rank: int, sizes: dict[str, int]) -> dict[str, int]:
    """A rank's place in the mesh."""
    found = {}
    for axis in reversed(AXES):
        rank, found[axis] = divmod(rank, sizes[axis])
    return {axis: found[axis] for axis in AXES}


def main(run_dir: str) -> None:
    stop = StopFlag()
    here = place()
    with open(f"{run_dir}/rehearsal.json") as file:
        sizes = json.load(file)
    line = {"rank": here.rank, "world_size": here.world_size, "node": here.node, "local_rank": here.local_rank,
            "master": [here.master_addr, here.master_port], "mesh": coordinates(here.rank, sizes)}  # fmt: skip
    places = os.open(f"{run_dir}/places-{here.restart_count}.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(places, (json.dumps(line) + "\n").encode())  # one short write: lines of many ranks never mix
    os.close(places)
    if here.rank:
        _wait(stop, run_dir)
    else:
        _lead(stop, run_dir, here.job_id, here.restart_count)


def _wait(stop: StopFlag, run_dir: str) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # they end the wait instead
    while stop.requested is None and not os.path.exists(f"{run_dir}/finish"):
        pulse("compute", 0)
        if signal.sigtimedwait(STOP_SIGNALS, _LOOK_S):
            return


def _lead(stop: StopFlag, run_dir: str, job_id: str, restart: int) -> None:
    import time
    from pathlib import Path
    from typing import Any

    from orchestrator.record import Event, JsonlWriter, StepRecord, utc_now
    from orchestrator.run_dir import RunDir

    root = Path(run_dir)
    directory = RunDir(root)
    attempt = directory.take_attempt()
    checkpoint = root / "rehearsed_step"
    step = int(checkpoint.read_text()) if checkpoint.exists() else 0
    with (
        JsonlWriter(directory.attempt_file(directory.events, attempt)) as events,
        JsonlWriter(directory.attempt_file(directory.records, attempt)) as steps,
    ):

        def tell(kind: str, detail: str, **data: Any) -> None:
            event = Event(time_utc=utc_now(), kind=kind, step=step, detail=detail, attempt=attempt, data=data)
            events.write(event, durable=True)

        tell("started", f"attempt {attempt}, rehearsed", job_id=job_id, restart=restart)
        if step:
            tell("resumed", f"resumed from the checkpoint of step {step}")
        while stop.requested is None and not (root / "finish").exists():
            time.sleep(STEP_S)
            step += 1
            pulse("compute", step)
            steps.write(
                StepRecord(
                    time_utc=utc_now(),
                    attempt=attempt,
                    step=step,
                    tokens=step,
                    loss=1.0,
                    grad_norm=1.0,
                    lr=0.0,
                    step_s=STEP_S,
                    tokens_per_s=1 / STEP_S,
                    mfu=None,
                )
            )
        temporary = root / ".rehearsed_step"
        temporary.write_text(str(step))
        temporary.replace(checkpoint)
        tell("saved", f"step {step}")
        if stop.requested:
            tell("stopped", f"asked to stop ({stop.requested}): saved at step {step}")
        else:
            tell("finished", f"finished: {step} steps")
