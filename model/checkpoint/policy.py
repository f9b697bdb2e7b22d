"""When to save a checkpoint and which to keep. Pure: functions of plain data."""

from dataclasses import dataclass


@dataclass(kw_only=True)
class CheckpointConfig:
    name: str
    every_steps: int = 1000
    keep_last: int = 3
    keep_every_steps: int = 0  # 0: none kept for good
    url: str | None = None  # any fsspec URL; null: checkpoints/ in the run directory

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
        return found
