"""A rank's pulse: what it does right now, in a few words of memory that its keeper sees too. No call, no lock, no thread.

The keeper reads it from outside, so that a rank which is stopped, or whose interpreter is held in C code, is seen as well.
"""

from collections import deque
from mmap import mmap
from typing import NamedTuple

# Within a step in the order of progress: of ranks at one step, who is in the earlier phase is behind.
PHASES = ("start", "load", "data", "compute", "collective", "update", "evaluate", "save", "end")
IN_STEP = frozenset(("data", "compute", "collective", "update"))
SIZE_BYTES = 64
FLOOR_S = 120.0  # the least that cluster.hang_timeout_s=null allows
STEPS_ALLOWED = 5.0  # and that many median steps


class Beat(NamedTuple):
    beats: int  # so far
    phase: str
    step: int  # about to be done, or done last
    steps: int  # done by this process
    own_s: float  # of these, what it computed by itself, waiting for no other rank

    @property
    def progress(self) -> tuple[int, int]:
        return self.step, PHASES.index(self.phase)


class Pulse:
    """Written by the rank, read by its keeper. Without a keeper it is written to memory that nobody reads."""

    def __init__(self) -> None:
        self._words = memoryview(bytearray(SIZE_BYTES)).cast("q")

    def attach(self, memory: mmap) -> None:
        """From now on in this memory."""
        self._words = memoryview(memory)[:SIZE_BYTES].cast("q")

    def __call__(self, phase: str, step: int) -> None:
        """A phase begins."""
        words = self._words
        words[1], words[2] = PHASES.index(phase), step
        words[0] += 1

    def stepped(self, own_s: float) -> None:
        """A step is done, of which `own_s` seconds depended on this rank alone."""
        self._words[4] += int(own_s * 1e6)
        self._words[3] += 1

    def read(self) -> Beat:
        beats, phase, step, steps, own_us = self._words[:5]
        return Beat(beats, PHASES[phase], step, steps, own_us / 1e6)


pulse = Pulse()


class Watch:
    """Notices that a rank has stood in one phase for longer than it may. Pure: told the time, and what it sees.

    Time in which nobody looked (a suspended job, a crowded machine) does not count against the rank.
    """

    def __init__(self, hang_s: float | None, slow_s: float) -> None:
        self._hang_s, self._slow_s = hang_s, slow_s
        # How often to look: often enough for the deadline, and no more, as thousands may share a machine in a rehearsal.
        self.every_s = min(2.0, max(0.25, (hang_s or FLOOR_S) / 20))
        self._beats, self._steps, self._last_s = -1, 0, -1.0
        self._idle_s = self._since_step_s = 0.0
        self._step_s: deque[float] = deque(maxlen=32)

    def look(self, now_s: float, beat: Beat) -> float | None:
        """For how many seconds the rank has shown no sign of progress, where that is too long."""
        gap_s = min(max(now_s - self._last_s, 0.0), 2 * self.every_s) if self._last_s >= 0 else 0.0
        self._last_s = now_s
        self._since_step_s += gap_s
        if beat.steps > self._steps:
            self._step_s.append(self._since_step_s / (beat.steps - self._steps))
            self._steps, self._since_step_s = beat.steps, 0.0
        if beat.beats != self._beats:
            self._beats, self._idle_s = beat.beats, 0.0
            return None
        self._idle_s += gap_s
        return self._idle_s if self._idle_s > self.allowed_s(beat) else None

    def allowed_s(self, beat: Beat) -> float:
        """What this phase may take. The first step of a process may have to compile."""
        if beat.phase not in IN_STEP or beat.steps == 0:
            return max(self._slow_s, self._hang_s or 0.0)
        if self._hang_s is not None:
            return self._hang_s
        return (
            max(FLOOR_S, STEPS_ALLOWED * sorted(self._step_s)[len(self._step_s) // 2]) if self._step_s else self._slow_s
        )
