"""Is a node fit to train? Run once on every node of a job before its ranks start: `python -m slurm.preflight ASKED_JSON`.

Real checks, stdlib only. To add one: a function here that returns why the node is unfit (or None), and its name in CHECKS.
A site's own command goes into cluster.preflight_command.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FREE_BYTES = 1 << 30  # in the run directory and in the folder for temporary files
CLOCK_S = 5.0  # from the clock of the file system that all nodes share
GPU_USED_SHARE = 0.05  # of its memory before the job has begun: somebody else's, or a dead process's
PEER_S = 10.0
COMMAND_S = 120.0  # less than what all checks together have
CANNOT_RUN = "cluster.preflight_command cannot be run"  # bash's exit codes 126 and 127


def gpus(asked: dict[str, Any]) -> str | None:
    """As many GPUs as the job has asked for, and free."""
    wanted = int(asked["gpus_per_node"])
    if not asked["cuda"]:
        given = os.environ.get("SLURM_GPUS_ON_NODE")
        return f"Slurm gives {given} GPUs, asked for were {wanted}" if given and int(given) < wanted else None
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=index,uuid,memory.total,memory.used", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi: {error}"
    if done.returncode:
        return f"nvidia-smi: {(done.stderr or done.stdout).strip()[:200]}"
    cards = [[v.strip() for v in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    ours = _given()
    # On a shared node the others' GPUs are seen too; where cgroups hide them, all that is seen is ours.
    if ours and len(cards) > wanted:
        cards = [c for c in cards if c[0] in ours or c[1] in ours]
    if len(cards) < wanted:
        return f"{len(cards)} GPUs answer, asked for were {wanted}"
    used = [index for index, _, total, taken in cards if float(taken) > GPU_USED_SHARE * float(total)]
    return f"the memory of GPU {used[0]} is in use already" if used else None


def _given() -> set[str]:
    """The GPUs of this node that are this job's, by index or UUID; empty where nobody says."""
    names = ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS", "CUDA_VISIBLE_DEVICES")
    return set(next((os.environ[n] for n in names if os.environ.get(n)), "").split(",")) - {""}


def disk(asked: dict[str, Any]) -> str | None:
    """The run directory takes a file, and there is room in it and in the folder for temporary files."""
    for folder in (asked["run_dir"], tempfile.gettempdir()):
        try:
            with tempfile.NamedTemporaryFile(dir=folder, prefix=".preflight-") as file:
                file.write(b"\0" * 4096)
                file.flush()
                os.fsync(file.fileno())
            free = shutil.disk_usage(folder).free
        except OSError as error:
            return f"{folder}: {error}"
        if free < FREE_BYTES:
            return f"{folder} has {free >> 20} MiB left, {FREE_BYTES >> 20} are the least"
    return None


def clock(asked: dict[str, Any]) -> str | None:
    """The node's clock against that of the shared file system, which stamps a file written now."""
    before = time.time()
    with tempfile.NamedTemporaryFile(dir=asked["run_dir"], prefix=".preflight-") as file:
        file.write(b"\0")
        file.flush()
        stamped = os.stat(file.name).st_mtime
    off_s = max(before - stamped, stamped - time.time(), 0.0)
    return f"its clock is {off_s:.0f} s off the shared file system's" if off_s > CLOCK_S else None


def peers(asked: dict[str, Any]) -> str | None:
    """The node of rank 0 can be reached."""
    host, port = asked["head"]
    try:
        with socket.create_connection((host, int(port)), timeout=PEER_S):
            return None
    except OSError as error:
        return f"{host}:{port} can't be reached: {error}"


def command(asked: dict[str, Any]) -> str | None:
    """The site's own check: any exit code but 0 is a no."""
    if not asked["command"]:
        return None
    words = ["bash", "-c", asked["command"]]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=COMMAND_S, check=False)
    except subprocess.TimeoutExpired:
        return f"cluster.preflight_command has not ended after {COMMAND_S:g} s"
    said = (done.stderr or done.stdout).strip()[-200:]
    what = CANNOT_RUN if done.returncode in (126, 127) else "cluster.preflight_command"
    return f"{what}: exit code {done.returncode} {said}".rstrip() if done.returncode else None


CHECKS: tuple[Callable[[dict[str, Any]], str | None], ...] = (gpus, disk, clock, peers, command)


def unfit(asked: dict[str, Any]) -> list[str]:
    """Why this node must not train; empty where it may."""
    found = []
    for check in CHECKS:
        try:
            why = check(asked)
        except Exception as error:  # a check that can't be made is a no: the node is not as it should be
            why = f"{type(error).__name__}: {error}"
        if why:
            found.append(f"{check.__name__}: {why}")
    return found


def main() -> None:
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # `arriero cancel`, or the time limit: not this node's fault
    asked = json.loads(sys.argv[1])
    node = os.environ.get("SLURMD_NODENAME", os.uname().nodename)
    result = Path(asked["results"]) / f"{node}.json"
    temporary = result.with_name(f".{node}")
    temporary.write_text(json.dumps(unfit(asked)))
    temporary.replace(result)


if __name__ == "__main__":
    main()
