"""Random kills, as many as asked for: of a random process of a run, at a random time, in a random way; run after run.

Each run is killed until it has had its share, then left alone; it must come to its end with the records of the control, bit by
bit. What a seed draws is the same each time; when it strikes is not, for processes take their own time.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console

from orchestrator import faults
from orchestrator.chaos import judge
from orchestrator.chaos.plan import STEPS
from orchestrator.chaos.stage import TWO_RANKS, DidNotHold, Stage, ending_all, make_workplace
from orchestrator.errors import UserError
from orchestrator.faults import Fault
from orchestrator.record import kept_steps

_PER_RUN = 8  # kills of one run, those inside the ranks included
_PAUSE_S = (0.3, 8.0)  # between two kills from outside
_INSIDE = ("kill_in_commit", "kill_in_resume")
_OUTSIDE = {
    "SIGKILL": signal.SIGKILL,
    "SIGSEGV": signal.SIGSEGV,
    "SIGTERM": signal.SIGTERM,
    "SIGSTOP": signal.SIGSTOP,  # of a rank alone: nobody watches over those that watch
}
_WATCHFUL = ["cluster.hang_timeout_s=5", "cluster.hang_timeout_slow_s=30"]


@dataclass
class Life:
    """One run, and what was done to it."""

    seed: int
    directory: str
    kills: Counter[str] = field(default_factory=Counter)
    launches: int = 0
    restarts: int = 0  # of the ranks, whoever started them again
    steps_repeated: int = 0
    problem: str = ""


def random_kills(number: int, seed: int, parallel: int, folder: Path | None, as_json: bool) -> int:
    """0 where every run came out as the control. Prints the account; keeps the directories of runs that did not."""
    if number < 1 or parallel < 1:
        raise UserError(f"--random {number} and --parallel {parallel} must be at least 1")
    console = Console(highlight=False, soft_wrap=True, quiet=as_json)
    root = (folder or Path(tempfile.mkdtemp(prefix="arriero-kills-"))).resolve()
    lives: list[Life] = []
    lock = threading.Lock()
    seeds = iter(range(seed * 1_000_000, (seed + 1) * 1_000_000))
    started = time.monotonic()

    def work() -> None:
        while True:
            with lock:
                left = number - sum(sum(life.kills.values()) for life in lives)
                if left <= 0:
                    return
                own = next(seeds)
            life = _live(root, own, min(_PER_RUN, left), control)
            with lock:
                lives.append(life)
                done = sum(sum(each.kills.values()) for each in lives)
                said = f"FAILED: {life.problem}" if life.problem else "as the control"
                console.print(f"  {done:,} kills; seed {own}: {dict(life.kills)}, {life.restarts} restarts: {said}")

    with ending_all(), ThreadPoolExecutor(parallel) as pool:
        control = _control(root)
        for future in [pool.submit(work) for _ in range(parallel)]:
            future.result()
    failed = [life for life in lives if life.problem]
    account = {
        "passed": not failed,
        "seed": seed,
        "kills": sum(sum(life.kills.values()) for life in lives),
        "kills_by_kind": dict(sum((life.kills for life in lives), Counter())),
        "runs": len(lives),
        "runs_equal_to_control": len(lives) - len(failed),
        "launches": sum(life.launches for life in lives),
        "restarts": sum(life.restarts for life in lives),
        "steps_trained": len(lives) * STEPS + sum(life.steps_repeated for life in lives),
        "steps_repeated": sum(life.steps_repeated for life in lives),
        "seconds": round(time.monotonic() - started, 1),
        "failed": [asdict(life) for life in failed],
    }
    if as_json:
        print(json.dumps(account, indent=2))
    else:
        for key, value in account.items():
            if key != "failed":
                console.print(f"{key.replace('_', ' '):24}{value}")
        for life in failed:
            console.print(f"FAILED: seed {life.seed}: {life.problem}: {life.directory}")
    if not failed and folder is None:
        shutil.rmtree(root, ignore_errors=True)
    return 1 if failed else 0


def _control(root: Path) -> judge.Losses:
    stage = Stage(make_workplace(root / "control"), "control", TWO_RANKS)
    stage.finish(launches=1)
    return judge.losses(stage.records())


def _live(root: Path, seed: int, share: int, control: judge.Losses) -> Life:
    """One run, killed up to `share` times."""
    draw = random.Random(seed)
    workplace = make_workplace(root / f"seed-{seed}")
    stage = Stage(workplace, "killed", [*TWO_RANKS, *_WATCHFUL])
    life = Life(seed=seed, directory=str(workplace))
    inside = [
        Fault(kind=draw.choice(_INSIDE), rank=draw.randrange(2), step=draw.randrange(STEPS))
        for _ in range(draw.randrange(share // 2 + 1))
    ]
    faults.write(stage.run.faults, inside)
    try:
        _kill_often(stage, draw, share - len(inside), life)
        _judge(stage, control, life)
    except DidNotHold as error:
        life.problem = str(error)
    except Exception as error:  # a fault of this campaign's own
        life.problem = f"{type(error).__name__}: {error}"
    finally:
        stage.end()
    for number, fault in enumerate(inside):
        if (stage.run.faults.with_suffix("") / str(number)).exists():
            life.kills[fault.kind] += 1
    life.launches = len(stage.launches)
    if not life.problem:
        shutil.rmtree(workplace)
    return life


def _kill_often(stage: Stage, draw: random.Random, share: int, life: Life) -> None:
    until = time.monotonic() + 900
    launch = stage.launch()
    while not stage.finished() or launch.process.poll() is None:
        if time.monotonic() > until:
            raise DidNotHold(f"not finished after {len(stage.launches)} launches; {stage.last_words()}")
        if (code := launch.process.poll()) is not None:
            if code == 2 and "at work already" not in launch.text():
                raise DidNotHold(f"refused: {stage.last_words()}")
            launch = stage.launch()
        if sum(life.kills.values()) >= share:
            with contextlib.suppress(Exception):
                launch.process.wait(10)
            continue
        pause_s = draw.uniform(*_PAUSE_S)
        with contextlib.suppress(Exception):
            launch.process.wait(pause_s)
        if launch.process.poll() is None and not stage.finished():
            kind = draw.choice(sorted(_OUTSIDE))
            if victims := _victims(stage, launch.process.pid, only_ranks=kind == "SIGSTOP"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(draw.choice(victims), _OUTSIDE[kind])
                    life.kills[kind] += 1


def _victims(stage: Stage, launch: int, only_ranks: bool) -> list[int]:
    """What a random kill may meet. A rank is a fork of its keeper: both were started with the same words."""
    words: dict[int, bytes] = {}
    parents: dict[int, int] = {}
    for pid in stage.processes():
        with contextlib.suppress(OSError):
            words[pid] = Path(f"/proc/{pid}/cmdline").read_bytes()
            parents[pid] = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    ranks = [p for p in parents if b"slurm.rank" in words[p] and words.get(parents[p]) == words[p]]
    return sorted(ranks if only_ranks else set(parents) - {launch})


def _judge(stage: Stage, control: judge.Losses, life: Life) -> None:
    records = stage.records()
    kept = kept_steps(records)
    life.restarts = len(stage.events("started")) - 1
    life.steps_repeated = len(records) - len(kept)
    found = judge.losses(records)
    if found != control:
        differing = sorted(s for s in {*found, *control} if found.get(s) != control.get(s))
        life.problem = f"{len(differing)} steps differ from the control, the first of them {differing[0]}"
    elif [r.data_batch for r in kept] != list(range(STEPS)):
        life.problem = "data were skipped or trained twice"
