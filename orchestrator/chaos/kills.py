"""Random kills, as many as asked for: of a random process of a run, at a random time, in a random way; run after run.

Each run is killed until it has had its share, then left alone; it must come to its end with the records of the control, bit by
bit. Runs are long, so that most kills cost a start of what was killed and not of a whole run. What a seed draws is the same each
time; when it strikes is not, for processes take their own time.
"""

import contextlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from orchestrator import faults
from orchestrator.chaos import judge
from orchestrator.chaos.stage import TWO_RANKS, DidNotHold, Ended, Stage, ending_all, make_workplace
from orchestrator.console import plain_console
from orchestrator.errors import Failure, UserError
from orchestrator.faults import Fault
from orchestrator.launch import last_record
from orchestrator.record import kept_steps, unix_s

_PER_RUN = 40  # kills of one run, those inside the ranks included
_PAUSE_S = (0.1, 4.0)  # before a kill from outside
_IN_START = 0.25  # of these kills do not wait until the ranks train again
_STEPS, _STEPS_A_KILL = 40, 40  # of a run: what it would train meanwhile, and then alone
_ON_RANKS = 0.5  # of the kills from outside; the rest meets what started and leads them
_INSIDE = ("kill_in_commit", "kill_in_resume")
_OUTSIDE = {
    "SIGKILL": signal.SIGKILL,
    "SIGSEGV": signal.SIGSEGV,
    "SIGTERM": signal.SIGTERM,
    "SIGSTOP": signal.SIGSTOP,  # of a rank alone: nobody watches over those that watch
}
_WATCHFUL = ["cluster.hang_timeout_s=5", "cluster.hang_timeout_slow_s=120", "eval_every_steps=50"]


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
    console = plain_console(quiet=as_json)
    root = (folder or Path(tempfile.mkdtemp(prefix="arriero-kills-"))).resolve()
    lives: list[Life] = []
    in_work: dict[int, int] = {}  # seed -> its share of kills
    lock = threading.Lock()
    seeds = iter(range(seed * 1_000_000, (seed + 1) * 1_000_000))
    per_run = min(_PER_RUN, math.ceil(number / parallel))
    steps = _STEPS + _STEPS_A_KILL * per_run
    started = time.monotonic()

    def kills() -> int:
        return sum(sum(life.kills.values()) for life in lives)

    def work() -> None:
        while True:
            with lock:
                share = min(per_run, number - kills() - sum(in_work.values()))
                if share <= 0:
                    return
                own = next(seeds)
                in_work[own] = share
            life = _live(root, own, share, steps, control)
            with lock:
                del in_work[own]
                lives.append(life)
                done, passed_s = kills(), time.monotonic() - killing
                left = _duration(passed_s / max(1, done) * max(0, number - done))
                said = f"FAILED: {life.problem}" if life.problem else "as the control"
                console.print(f"  seed {own}: {dict(life.kills)}, {life.restarts} restarts: {said}")
                rest = f", about {left} left" if done < number else ""
                console.print(f"  {done:,} of {number:,} kills, {passed_s / max(1, done):.1f} s each{rest}")
                if life.problem and not life.kills:  # no launch works here, and the next would fail alike
                    return

    with ThreadPoolExecutor(parallel) as pool, ending_all():  # in this order: the pool waits for what this ends
        control, start_s = _control(root, steps)
        # of a rank's death only the ranks start anew, of another's everything
        kill_s = sum(_PAUSE_S) / 2 + (1 - _ON_RANKS + _ON_RANKS / 4) * start_s
        console.print(
            f"{number:,} kills, {per_run} of each run of {steps:,} steps, {parallel} runs at a time: about "
            f"{_duration(number * kill_s / parallel)} (a start takes {start_s:.0f} s here)"
        )
        killing = time.monotonic()
        for future in [pool.submit(work) for _ in range(parallel)]:
            future.result()
    failed = [life for life in lives if life.problem]
    account = {
        "passed": not failed,
        "seed": seed,
        "kills": kills(),
        "kills_by_kind": dict(sum((life.kills for life in lives), Counter())),
        "runs": len(lives),
        "runs_equal_to_control": len(lives) - len(failed),
        "launches": sum(life.launches for life in lives),
        "restarts": sum(life.restarts for life in lives),
        "steps_trained": len(lives) * steps + sum(life.steps_repeated for life in lives),
        "steps_repeated": sum(life.steps_repeated for life in lives),
        "seconds": round(time.monotonic() - started, 1),
        "seconds_a_kill": round((time.monotonic() - killing) / max(1, kills()), 2),
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


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds > 5400 else f"{max(1, round(seconds / 60))} min"


def _overrides(steps: int) -> list[str]:
    return [*TWO_RANKS, *_WATCHFUL, f"steps={steps}"]


def _control(root: Path, steps: int) -> tuple[judge.Losses, float]:
    """Its losses, and the seconds from the command to the first step."""
    stage = Stage(make_workplace(root / "control"), "control", _overrides(steps))
    launch = stage.launch()
    if stage.ended(launch) != 0:
        raise Failure(f"the run that nobody kills did not end well: {stage.last_words()}")
    records = stage.records()
    return judge.losses(records), unix_s(records[0].time_utc) - launch.began_s


def _live(root: Path, seed: int, share: int, steps: int, control: judge.Losses) -> Life:
    """One run, killed up to `share` times."""
    draw = random.Random(seed)
    workplace = make_workplace(root / f"seed-{seed}")
    stage = Stage(workplace, "killed", _overrides(steps))
    life = Life(seed=seed, directory=str(workplace))
    inside = [
        Fault(kind=draw.choice(_INSIDE), rank=draw.randrange(2), step=draw.randrange(steps))
        for _ in range(draw.randrange(share // 2 + 1))
    ]
    faults.write(stage.run.faults, inside)
    try:
        _kill_often(stage, draw, share - len(inside), life)
        _judge(stage, control, steps, life)
    except Ended:
        raise
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
    until = time.monotonic() + 600 + 60 * share
    launch = stage.launch()
    attempt = 0  # that trained when the last kill came
    while not stage.finished() or launch.process.poll() is None:
        if time.monotonic() > until:
            raise DidNotHold(f"not finished after {len(stage.launches)} launches; {stage.last_words()}")
        if (code := launch.process.poll()) is not None:
            if code == 2 and "at work already" not in launch.text():
                raise DidNotHold(f"refused: {stage.last_words()}")
            time.sleep(2.0 if code == 2 else 0.0)  # what the last kill has orphaned still trains
            launch = stage.launch()
        if sum(life.kills.values()) >= share:
            with contextlib.suppress(subprocess.TimeoutExpired):
                launch.process.wait(10)
            continue
        kind, on_ranks, pause_s = draw.choice(sorted(_OUTSIDE)), draw.random() < _ON_RANKS, draw.uniform(*_PAUSE_S)
        if draw.random() >= _IN_START or kind == "SIGSTOP":  # which is seen late in a rank that starts
            while _training(stage) <= attempt and launch.process.poll() is None and time.monotonic() < until:
                time.sleep(0.1)
        with contextlib.suppress(subprocess.TimeoutExpired):
            launch.process.wait(pause_s)
        if launch.process.poll() is None and not stage.finished():
            attempt = _training(stage)
            if victims := _victims(stage, launch.process.pid, on_ranks or kind == "SIGSTOP"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(draw.choice(victims), _OUTSIDE[kind])
                    life.kills[kind] += 1


def _training(stage: Stage) -> int:
    """The newest attempt that has trained a step; 0 where none has."""
    newest = last_record(stage.run)
    return newest.attempt if newest else 0


def _victims(stage: Stage, launch: int, on_ranks: bool) -> list[int]:
    """What a random kill may meet. A rank is a fork of its keeper: both were started with the same words."""
    words: dict[int, bytes] = {}
    parents: dict[int, int] = {}
    for pid in stage.processes():
        with contextlib.suppress(OSError):
            words[pid] = Path(f"/proc/{pid}/cmdline").read_bytes()
            parents[pid] = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    ranks = [p for p in parents if b"slurm.rank" in words[p] and words.get(parents[p]) == words[p]]
    return sorted(ranks if on_ranks else set(parents) - {launch, *ranks})


def _judge(stage: Stage, control: judge.Losses, steps: int, life: Life) -> None:
    records = stage.records()
    kept = kept_steps(records)
    life.restarts = len(stage.events("started")) - 1
    life.steps_repeated = len(records) - len(kept)
    found = judge.losses(records)
    if found != control:
        differing = sorted(s for s in {*found, *control} if found.get(s) != control.get(s))
        life.problem = f"{len(differing)} steps differ from the control, the first of them {differing[0]}"
    elif [r.data_batch for r in kept] != list(range(steps)):
        life.problem = "data were skipped or trained twice"
