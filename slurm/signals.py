"""Signals set a flag; ranks agree at the step boundary. Nobody saves alone."""

import signal
from collections.abc import Sequence
from types import FrameType

# USR2: Slurm's warning before the time limit (--signal) and submitit's; TERM: preemption, scancel, shutdown; INT: Ctrl-C.
STOP_SIGNALS = (signal.SIGUSR2, signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)

_early: list[str] = []


def note_early(came: Sequence[str] = ()) -> None:
    """Remembers a stop signal that comes before there is a StopFlag, and those that `came` already. Call it before anything
    slow is imported."""
    _early[:] = came
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, frame: _early.append(signal.Signals(number).name))


class StopFlag:
    """Takes the place of whatever handlers stood there (submitit's too) and remembers the first signal that came.

    Make it on the main thread, first thing. A Python handler waits until a blocking collective returns: the flag is seen
    at the next step boundary at the latest.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)
        if _early:
            self.requested = _early[0]
        signal.signal(signal.SIGCONT, signal.SIG_DFL)  # Slurm sends it before TERM: it must not stop anything

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested is None:
            self.requested = signal.Signals(number).name
