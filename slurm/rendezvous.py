"""Where this rank stands among all, from the environment alone: srun's variables, submitit's local ones or torchrun's."""

import os
import re
import zlib
from collections.abc import Mapping
from typing import NamedTuple


class Place(
    NamedTuple
):  # no dataclass: thousands of ranks start at once, and its module takes as long as Python itself
    rank: int
    world_size: int
    local_rank: int  # on its node
    local_size: int
    node_rank: int
    node: str
    job_id: str
    restart_count: int  # how often Slurm has requeued the job
    master_addr: str
    master_port: int


def place(env: Mapping[str, str] = os.environ) -> Place:
    """This process's place. A process started by hand is rank 0 of 1."""
    if "SUBMITIT_LOCAL_GLOBALID" in env:
        return _local(env)
    if "SLURM_PROCID" in env and "SLURM_STEP_NODELIST" in env:
        return _slurm(env)
    if "RANK" in env and "MASTER_ADDR" in env:
        return _torchrun(env)
    return Place(
        rank=0,
        world_size=1,
        local_rank=0,
        local_size=1,
        node_rank=0,
        node=os.uname().nodename,
        job_id="none",
        restart_count=0,
        master_addr="127.0.0.1",
        master_port=_port("none", 0),
    )


def _local(env: Mapping[str, str]) -> Place:
    rank, size, job_id = (
        int(env["SUBMITIT_LOCAL_GLOBALID"]),
        int(env["SUBMITIT_LOCAL_NTASKS"]),
        env["SUBMITIT_LOCAL_JOB_ID"],
    )
    return Place(
        rank=rank,
        world_size=size,
        local_rank=rank,
        local_size=size,
        node_rank=0,
        node=os.uname().nodename,
        job_id=job_id,
        restart_count=0,
        master_addr="127.0.0.1",
        master_port=_port(job_id, 0),
    )


def job_id_of(env: Mapping[str, str]) -> str:
    """The job, as Slurm's commands take it; "" outside of one. For a task of an array that is ARRAY_TASK: the last task's plain
    number is the array's own, and a command that is given it speaks of all tasks."""
    array, task = env.get("SLURM_ARRAY_JOB_ID"), env.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else env.get("SLURM_JOB_ID", "")


def _slurm(env: Mapping[str, str]) -> Place:
    job_id, restarts = job_id_of(env), int(env.get("SLURM_RESTART_COUNT", "0"))
    nodes = expand_hostlist(env["SLURM_STEP_NODELIST"])
    world_size = int(env["SLURM_NTASKS"])
    return Place(
        rank=int(env["SLURM_PROCID"]),
        world_size=world_size,
        local_rank=int(env["SLURM_LOCALID"]),
        local_size=world_size // len(nodes),
        node_rank=int(env["SLURM_NODEID"]),
        node=env.get("SLURMD_NODENAME", nodes[int(env["SLURM_NODEID"])]),
        job_id=job_id,
        restart_count=restarts,
        # SLURM_LAUNCH_NODE_IPADDR would be the submitting node: the first node of the step is where rank 0 runs.
        master_addr=env.get("ARRIERO_MASTER_ADDR", nodes[0]),
        master_port=_port(job_id, restarts, env.get("SLURM_STEP_ID", "0")),
    )


def _torchrun(env: Mapping[str, str]) -> Place:
    return Place(
        rank=int(env["RANK"]),
        world_size=int(env["WORLD_SIZE"]),
        local_rank=int(env["LOCAL_RANK"]),
        local_size=int(env["LOCAL_WORLD_SIZE"]),
        node_rank=int(env.get("GROUP_RANK", "0")),
        node=os.uname().nodename,
        job_id=env.get("TORCHELASTIC_RUN_ID", "torchrun"),
        restart_count=int(env.get("TORCHELASTIC_RESTART_COUNT", "0")),
        master_addr=env["MASTER_ADDR"],
        master_port=int(env["MASTER_PORT"]),
    )


def _port(job_id: str, restart_count: int, step: str = "0") -> int:
    """The same on every rank; another one after each requeue and for each srun, so that stale sockets are not in
    the way.

    From 15000 to 30000: above the well-known services, below Linux's ephemeral range.
    """
    return int(
        os.environ.get("ARRIERO_MASTER_PORT", 15_000 + zlib.crc32(f"{job_id}/{restart_count}/{step}".encode()) % 15_000)
    )


def expand_hostlist(hostlist: str) -> list[str]:
    """Slurm's `node[001-003,7],login1` to single names, in order. Several brackets in one name are expanded too."""
    names: list[str] = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", hostlist):
        names += _expand_one(part)
    return names


def _expand_one(part: str) -> list[str]:
    match = re.match(r"([^\[]*)\[([^\]]*)\](.*)", part)
    if not match:
        return [part]
    head, ranges, tail = match.groups()
    names = []
    for item in ranges.split(","):
        first, _, last = item.partition("-")
        for number in range(int(first), int(last or first) + 1):
            names += [f"{head}{number:0{len(first)}d}{rest}" for rest in _expand_one(tail)]
    return names
