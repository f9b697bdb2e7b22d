"""Traces of a few steps by torch.profiler: what each kernel takes, and what waits for what."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from model.config import ProfileConfig


class StepProfiler:
    """Traces `config.steps` steps of this rank from `config.first_step` on, once in each start that comes to it.

    Writes `<folder>/attempt-0001-rank-0000-step-000000020.json.gz`, a trace that ui.perfetto.dev opens. `tell` hears what became
    of it; a trace that cannot be written leaves the training alone.
    """

    def __init__(
        self,
        config: ProfileConfig,
        folder: Path,
        attempt: int,
        rank: int,
        device: torch.device,
        tell: Callable[[str, int, str], None],
    ) -> None:
        first = config.first_step if rank in config.ranks else None
        self.steps = range(first, first + config.steps) if first is not None else range(0)  # still to be traced
        self._folder, self._name = folder, f"rank-{rank:04d}-step-{first or 0:09d}.json.gz"
        self._path, self._tell = folder / f"attempt-{attempt:04d}-{self._name}", tell
        self._activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        self._profile: profile | None = None
        self._step: AbstractContextManager[object] = nullcontext()  # its range, by which a reader finds a step
        self._last = 0

    def step_begins(self, step: int) -> None:
        """Before each step; what is trained again after a rewind is not traced again."""
        if not self.steps:
            return
        if self._profile is None and step >= self.steps.start:
            if step > self.steps.start:
                if not list(self._folder.glob(f"*{self._name}")):
                    self._tell(
                        "profiled", step, f"nothing: this start trains from step {step} on, after profile.first_step"
                    )
                self.steps = range(0)
                return
            self._profile = profile(activities=self._activities, record_shapes=True)
            self._profile.start()
        if self._profile is not None:
            self._step.__exit__(None, None, None)
            self._step = nullcontext()
            if step not in self.steps:
                self.end()
                return
            self._step, self._last = record_function(f"step {step}"), step
            self._step.__enter__()  # type: ignore[no-untyped-call]

    def end(self) -> None:
        """Writes what has been traced: also in a start that ends before all is."""
        if self._profile is None:
            return
        self._step.__exit__(None, None, None)
        traced, self._profile = self._profile, None
        first, self.steps = self.steps.start, range(0)
        traced.stop()
        try:
            self._folder.mkdir(exist_ok=True)
            traced.export_chrome_trace(str(self._path))
        except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeError
            self._tell("profiled", self._last, f"nothing: the trace could not be written: {error}")
            return
        said = f"steps {first} to {self._last}: {self._path} (opens in ui.perfetto.dev)"
        self._tell("profiled", self._last, said)
