"""What Slurm knows of energy and of a shared node."""

import os
import re
import subprocess
from collections.abc import Sequence


def job_share_of_node() -> float:
    """The part of this node's CPUs that is this job's: 1 outside Slurm, and where Slurm does not tell."""
    node, cpus = os.environ.get("SLURMD_NODENAME"), os.environ.get("SLURM_CPUS_ON_NODE", "")
    if not node or not cpus.isdigit():
        return 1.0
    shown = _output(["scontrol", "show", "node", node, "--oneliner"])
    total = re.search(r"\bCPUTot=(\d+)", shown or "")
    return min(1.0, int(cpus) / int(total[1])) if total and int(total[1]) else 1.0


def consumed_energy_j(jobs: Sequence[str]) -> tuple[float | None, str]:
    """Joules that the cluster's accounting holds for these jobs, over every requeue; None, with the reason, without any.

    Slurm's figure is of whole nodes: it holds for exclusive allocations only.
    """
    if not jobs:
        return None, "the run was not under Slurm"
    # -D: every requeue, where the default is the last. -X: no steps, whose rows repeat the job's total.
    fields = ["sacct", "-D", "-X", "--noheader", "--parsable2", "--format=JobIDRaw,Start,ConsumedEnergyRaw"]
    text = _output([*fields, "--jobs=" + ",".join(jobs)])
    if text is None:
        return None, "sacct is not there, or has no accounting"
    joules = parse_consumed_energy_j(text)
    return joules, "sacct -D -X ConsumedEnergyRaw" if joules is not None else "this cluster counts no energy"


def parse_consumed_energy_j(sacct: str) -> float | None:
    """Rows `JobIDRaw|Start|ConsumedEnergyRaw`: the sum over the starts of each job; None where no row has a figure."""
    rows: dict[tuple[str, str], float] = {}
    for line in sacct.splitlines():
        job, start, joules = [*line.split("|"), "", ""][:3]
        # 2^64 - 2 is Slurm's NO_VAL64: a plugin that failed, not a consumption.
        if joules.isdigit() and 0 < int(joules) < 2**64 - 2:
            rows[job, start] = max(rows.get((job, start), 0.0), float(joules))
    return sum(rows.values()) if rows else None


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
