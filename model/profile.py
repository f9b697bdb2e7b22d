"""Traces of a few steps by torch.profiler: what each kernel takes, and what waits for what."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from model.config import ProfileConfig


class StepProfiler:
    """Traces `config.steps` steps of the ranks `config.ranks` from `config.first_step` on, once in each start that comes to it.

    Writes `<folder>/attempt-0001-rank-0000-step-000000020.json.gz`, a trace that ui.perfetto.dev opens. `tell(kind, step,
    detail)` hears what became of it; a trace that cannot be written leaves the training alone. Every rank has one: they wait for
    those that write, under `writing(step)`, which says to whoever watches the ranks that this is no step.
    """

    def __init__(
        self,
        config: ProfileConfig,
        folder: Path,
        attempt: int,
        rank: int,
        device: torch.device,
        tell: Callable[[str, int, str], None],
        writing: Callable[[int], None],
    ) -> None:
        first = config.first_step
        self.steps = range(first, first + config.steps) if first is not None else range(0)  # still to be traced
        self._folder, self._name = folder, f"rank-{rank:04d}-step-{first or 0:09d}.json.gz"
        self._path, self._tell, self._writing = folder / f"attempt-{attempt:04d}-{self._name}", tell, writing
        self._activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        self._traces = rank in config.ranks
        self._profile: profile | None = None
        self._step: AbstractContextManager[object] = nullcontext()  # its range, by which a reader finds a step
        self._last = 0  # step traced

    def step_begins(self, step: int) -> None:
        """Before each step; what is trained again after a rewind is not traced again."""
        if not self.steps or (not self._last and step < self.steps.start):
            return
        if not self._last and step > self.steps.start:
            if self._traces and not list(self._folder.glob(f"*{self._name}")):
                self._tell(
                    "profiled", step, f"nothing: this start trains from step {step} on, after profile.first_step"
                )
            self.steps = range(0)
        elif step not in self.steps:
            self.end()
        else:
            if not self._last and self._traces:
                self._profile = profile(activities=self._activities, record_shapes=True)
                self._profile.start()
            self._last = step
            if self._profile is not None:
                self._step.__exit__(None, None, None)
                self._step = record_function(f"step {step}")
                self._step.__enter__()  # type: ignore[no-untyped-call]

    def end(self) -> None:
        """Writes what has been traced: also in a start that ends before all is. For all ranks together."""
        if not self.steps or not self._last:
            return
        first, self.steps = self.steps.start, range(0)
        self._writing(self._last)
        if self._profile is not None:
            self._step.__exit__(None, None, None)
            self._profile.stop()
            self._write(self._profile, first)
            self._profile = None
        if dist.is_initialized():
            dist.barrier()

    def _write(self, traced: profile, first: int) -> None:
        try:
            self._folder.mkdir(exist_ok=True)
            traced.export_chrome_trace(str(self._path))
        except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeError
            self._tell("profiled", self._last, f"nothing: the trace could not be written: {error}")
            return
        said = f"steps {first} to {self._last}: {self._path} (opens in ui.perfetto.dev)"
        self._tell("profiled", self._last, said)
