"""Faults on purpose, for `arriero chaos` and the tests: a run directory that holds faults.json trains under them.

Nothing of this touches a run without that file. A fault strikes once in a run's life, however often it is started: it is
marked in faults/ before it strikes. Poisoned data are poisoned for good, as on a disk.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

# kind -> what strikes; `step` is the step that is about to be trained, or being saved, evaluated or left by a rewind
KINDS = {
    "kill": "SIGKILL before the step",
    "segv": "SIGSEGV before the step",
    "freeze": "SIGSTOP before the step",
    "term": "SIGTERM before the step",
    "raise": "raises an exception before the step",
    "usr2": "SIGUSR2 before the step, as Slurm's warning",
    "gil": "holds the interpreter's lock before the step, in C code that never returns",
    "slow": "sleeps `seconds` before each step from there on",
    "wait": "waits before the step until faults/<its number>.go is there, or it is asked to stop",
    "nan": "the rank's last layer returns NaN, in one computation",
    "nan_grad": "the gradient of the rank's last layer becomes NaN, in one computation",
    "stuck_grad": "a bit of the exponent is stuck at 1 in the gradient of the rank's last layer: finite, and far off",
    "poison": "`batches` of the data are random tokens",
    "kill_in_commit": "SIGKILL when all is written and before the checkpoint is committed",
    "kill_in_rewind": "SIGKILL after the verdict is on disk and before the checkpoint is loaded",
    "kill_in_resume": "SIGKILL while a later start loads its checkpoint",
    "term_in_save": "SIGTERM while a checkpoint is being written",
    "term_in_evaluation": "SIGTERM while the model is evaluated",
}


@dataclass(kw_only=True)
class Fault:
    kind: str
    rank: int = 0
    step: int = 0
    seconds: float = 0.0
    batches: list[int] = field(default_factory=list)


def write(path: Path, faults: Sequence[Fault]) -> None:
    """Raises ValueError for a kind that is none."""
    if unknown := [f.kind for f in faults if f.kind not in KINDS]:
        raise ValueError(f"{unknown[0]} is no kind of fault: choose from {', '.join(KINDS)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(f) for f in faults], indent=1) + "\n")


def read(path: Path) -> list[Fault]:
    return [Fault(**values) for values in json.loads(path.read_text())]
