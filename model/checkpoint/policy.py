"""When to save a checkpoint, which ones belong to this run's history, and which to keep. Pure: functions of plain data."""

import math
import re
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

AUTO = "auto"
FIRST_SAVE_STEPS = 10  # of every_steps=auto: soon it is known what a save costs, and that the store takes it
WRITE_MARGIN = 1.2  # between two saves, of the time that one takes to be written
SETTLED = 1.25  # an interval so many times longer or shorter than the best stays: it costs less than 3% more

RUN = "run.txt"  # beside the checkpoints: the run_id of the run whose they are


def of_another_run(root: str, owner: str, run_id: str) -> str:
    """What is said where a run comes to the checkpoints of another."""
    return (
        f"{root} holds the checkpoints of another run, {owner}, and this one is {run_id}: give each a place of its own "
        f"(checkpoint.url); if they are this run's, as after its directory was lost, delete {root}/{RUN}"
    )


@dataclass(kw_only=True)
class CheckpointConfig:
    name: str
    # A number (Any: OmegaConf merges no unions), or auto: from measured steps and saves, and the plan's rate of failures.
    every_steps: Any = 1000
    auto_min_s: float = 60.0  # of every_steps=auto: what a shorter interval would save is less than a restart takes
    auto_max_s: float = 3600.0
    keep_last: int = 3
    keep_every_steps: int = 0  # 0: none kept for good
    keep_vetted: int = 2  # the newest so many of those that the spike policy (or a person) found healthy
    url: str | None = None  # any fsspec URL; null: checkpoints/ in the run directory
    asynchronous: bool = True  # write in the background from a copy; false: training waits for the disk
    retries: int = 4  # of one read or write that fails, waiting retry_wait_s, then twice as long each time
    retry_wait_s: float = 0.5
    retry_save_s: float = 30.0  # after a save failed, the next is tried this much later (or at its turn)
    write_timeout_s: float = 1800.0  # after which a rank that is still writing makes the save fail

    def problems(self) -> list[str]:
        found = []
        if self.every_steps != AUTO and (type(self.every_steps) is not int or self.every_steps < 1):
            found.append(f"checkpoint.every_steps={self.every_steps} must be a whole number of at least 1, or {AUTO}")
        if not 0 <= self.auto_min_s <= self.auto_max_s:
            found.append(
                f"checkpoint.auto_min_s={self.auto_min_s:g} must be 0 or more and at most "
                f"checkpoint.auto_max_s={self.auto_max_s:g}"
            )
        if self.keep_last < 1:
            found.append(
                f"checkpoint.keep_last={self.keep_last} must be at least 1: a run resumes from its newest checkpoint"
            )
        if self.keep_every_steps < 0:
            found.append(f"checkpoint.keep_every_steps={self.keep_every_steps} must be 0 (none kept for good) or more")
        if self.keep_vetted < 0:
            found.append(f"checkpoint.keep_vetted={self.keep_vetted} must be 0 (none kept for this) or more")
        if self.retries < 0:
            found.append(f"checkpoint.retries={self.retries} must be 0 (one try) or more")
        for name in ("retry_wait_s", "retry_save_s"):
            if getattr(self, name) < 0:
                found.append(f"checkpoint.{name}={getattr(self, name):g} must be 0 or more")
        if self.write_timeout_s <= 0:
            found.append(f"checkpoint.write_timeout_s={self.write_timeout_s:g} must be more than 0")
        return found


_NAME = re.compile(r"step-(\d{9,})-e(\d{6,})(?:-(\d+))?")


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """One checkpoint directory, as its name and its files' names tell it. Nothing in it has been verified yet."""

    step: int
    epoch: int  # of the lease under which it was written
    attempt: int = 1  # the second try to save the same step is 2
    committed: bool = True
    vetted: bool = False

    @property
    def name(self) -> str:
        again = f"-{self.attempt}" if self.attempt > 1 else ""
        return f"step-{self.step:09d}-e{self.epoch:06d}{again}"

    @property
    def order(self) -> tuple[int, int, int]:
        """Larger is newer."""
        return (self.step, self.epoch, self.attempt)


def parse(name: str, files: Iterable[str]) -> CheckpointInfo | None:
    """The checkpoint that a directory of this name with these files is; None if it is something else."""
    match = _NAME.fullmatch(name)
    if not match:
        return None
    have = set(files)
    return CheckpointInfo(
        step=int(match[1]),
        epoch=int(match[2]),
        attempt=int(match[3] or 1),
        committed="COMMITTED" in have,
        vetted="VETTED" in have,
    )


def young_interval_s(stall_s: float, mttf_s: float) -> float:
    """Of work between saves, what loses least: sqrt(2 w M) (Young, CACM 17(9), 1974; Daly's first order). `stall_s`: for
    so long training waits for one save; `mttf_s`: the job's mean time to failure."""
    return math.sqrt(2 * stall_s * mttf_s) if stall_s else 0.0


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Between two saves."""

    steps: int
    least_steps: int  # below which a write would meet the next save, or no checkpoint would live until it is vetted
    why: str


def best_interval(
    config: CheckpointConfig, vet_steps: int, *, step_s: float, stall_s: float, write_s: float, mttf_s: float
) -> Interval:
    """The interval of `checkpoint.every_steps=auto`: Young's, within auto_min_s and auto_max_s, and never below what a
    background write of `write_s` needs, nor so short that retention removes a checkpoint before it is `vet_steps` old.
    `arriero plan`, `arriero simulate` and the trainer all ask here.
    """
    young_s = young_interval_s(stall_s, mttf_s)
    wanted_s = min(max(young_s, config.auto_min_s), config.auto_max_s)
    costs = f"a save stalls {stall_s:.3g} s, a step takes {step_s:.3g} s, "
    costs += f"a failure comes every {mttf_s / 3600:,.3g} h" if mttf_s < math.inf else "failures never come"
    if young_s != wanted_s:
        costs += f" (checkpoint.{'auto_min_s' if young_s < wanted_s else 'auto_max_s'}={wanted_s:g})"
    bounds = [
        (max(1, round(wanted_s / step_s)), costs),
        (math.ceil(WRITE_MARGIN * write_s / step_s), f"a save takes {write_s:.3g} s to be written"),
        (math.ceil(vet_steps / max(1, config.keep_last - 1)), f"a rewind needs a checkpoint {vet_steps} steps old"),
    ]
    steps, why_this = max(bounds, key=lambda b: b[0])
    return Interval(steps=steps, least_steps=max(1, bounds[1][0], bounds[2][0]), why=why_this)


class SaveSchedule:
    """At which steps a run saves: the multiples of `every_steps`, or with `auto` so many steps after the last save.

    Every rank has one and tells it the same figures, so that all agree.
    """

    def __init__(self, config: CheckpointConfig, vet_steps: int, mttf_s: float) -> None:
        self.config, self.vet_steps, self.mttf_s = config, vet_steps, mttf_s
        self.is_auto = config.every_steps == AUTO
        self.every_steps: int = FIRST_SAVE_STEPS if self.is_auto else config.every_steps
        self.next_step = self.every_steps
        self.saved_steps: set[int] = set()  # of checkpoints that may still be vetted
        self._stalls_s: deque[float] = deque(maxlen=5)

    def stand_at(self, step: int, history: Iterable[int], every_steps: int | None = None) -> None:
        """A start, or a rewind: the run goes on from `step`, with these checkpoints; `every_steps`: as it was tuned before."""
        if self.is_auto and every_steps:
            self.every_steps = every_steps
        self.saved_steps = {s for s in history if s <= step}
        self.went_by(step)

    def went_by(self, step: int) -> None:
        """A save of this step was due, or came between (a stop, a retry)."""
        on = step if self.is_auto else step - step % self.every_steps
        self.next_step = on + self.every_steps

    def began(self, step: int, stall_s: float | None) -> None:
        """A save of this step is on its way. None: training waited for all of it, as at an end."""
        self.saved_steps = {s for s in self.saved_steps if s >= step - self.vet_steps} | {step}
        if stall_s is not None:
            self._stalls_s.append(stall_s)

    @property
    def stall_s(self) -> float | None:
        """Of the last few saves, the median."""
        return median(self._stalls_s) if self._stalls_s else None

    def tune(self, step_s: float, stall_s: float, write_s: float) -> Interval | None:
        """The interval from now on, where it is to change by enough to matter."""
        best = best_interval(
            self.config, self.vet_steps, step_s=step_s, stall_s=stall_s, write_s=write_s, mttf_s=self.mttf_s
        )
        near = best.steps / SETTLED <= self.every_steps <= best.steps * SETTLED
        if near and self.every_steps >= best.least_steps:
            return None
        self.every_steps = best.steps
        return best


def history(checkpoints: Iterable[CheckpointInfo], resumed: Mapping[int, int | None]) -> list[CheckpointInfo]:
    """The committed checkpoints that this run's history goes through, newest first.

    `resumed[e]` is the step from which the writer of epoch e went on (0: from the start; None: it has not said yet).
    What an older epoch holds beyond that step was left behind: the branch before a rewind, or the late commit of a
    zombie. So neither can ever shadow what the newer writer does.
    """
    newest_first = sorted((c for c in checkpoints if c.committed), key=lambda c: c.order, reverse=True)
    return [c for c in newest_first if not left_behind(c, resumed)]


def left_behind(checkpoint: CheckpointInfo, resumed: Mapping[int, int | None]) -> bool:
    """Whether a newer writer went on from an earlier step than this checkpoint's."""
    return any(e > checkpoint.epoch and s is not None and s < checkpoint.step for e, s in resumed.items())


def keep(
    checkpoints: Iterable[CheckpointInfo], config: CheckpointConfig, resumed: Mapping[int, int | None]
) -> set[CheckpointInfo]:
    """What retention leaves: the last `keep_last` of the history, each multiple of `keep_every_steps`, and the last
    `keep_vetted` vetted ones.

    The newest is always among them. Debris and what was left behind is not.
    """
    lived = history(checkpoints, resumed)
    kept = set(lived[: max(config.keep_last, 1)])
    if config.keep_every_steps:
        kept |= {c for c in lived if c.step % config.keep_every_steps == 0}
    kept |= set([c for c in lived if c.vetted][: config.keep_vetted])
    return kept


def removable(
    checkpoints: Iterable[CheckpointInfo],
    config: CheckpointConfig,
    resumed: Mapping[int, int | None],
    epoch: int,
    writing: str | None = None,
) -> list[CheckpointInfo]:
    """What the writer of `epoch` may remove now, oldest first.

    Never a directory of a newer epoch, nor the one that is being written, nor anything that `keep` names.
    """
    all_of_them = list(checkpoints)
    kept = keep(all_of_them, config, resumed)
    return sorted(
        (c for c in all_of_them if c not in kept and c.epoch <= epoch and c.name != writing), key=lambda c: c.order
    )
