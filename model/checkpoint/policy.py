"""When to save a checkpoint, which ones belong to this run's history, and which to keep. Pure: functions of plain data."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(kw_only=True)
class CheckpointConfig:
    name: str
    every_steps: int = 1000
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
        if self.every_steps < 1:
            found.append(f"checkpoint.every_steps={self.every_steps} must be at least 1")
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


def should_save(step: int, config: CheckpointConfig, last_step: int) -> bool:
    """Whether the step just done is followed by a save: every `every_steps`, and after the last one."""
    return step > 0 and (step % config.every_steps == 0 or step == last_step)


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
