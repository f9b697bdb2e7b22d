"""Signals set a flag; ranks agree at the step boundary. Nobody saves alone."""

import signal
from collections.abc import Iterable, Sequence
from types import FrameType

# USR2: Slurm's warning before the time limit (--signal) and submitit's; TERM: preemption, scancel, shutdown; INT: Ctrl-C.
# Of several, the first in this order is told: TERM follows at once on the warning before a preemption, and may overtake it.
STOP_SIGNALS = (signal.SIGUSR2, signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
PAUSE = "pause"  # the step at which a sweep looks at its runs: what a signal says goes before it
_RANK = {why: rank for rank, why in enumerate([*(number.name for number in STOP_SIGNALS), PAUSE])}

_early: list[str] = []


def note_early(came: Sequence[str] = ()) -> None:
    """Remembers a stop signal that comes before there is a StopFlag, and those that `came` already. Call it before anything
    slow is imported."""
    _early[:] = came
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, frame: _early.append(signal.Signals(number).name))


def first_told(reasons: Iterable[str | None]) -> str | None:
    """Of all reasons to stop, one rank's or those of many, the one to tell; None where there is none."""
    return min((why for why in reasons if why), key=lambda why: _RANK.get(why, -1), default=None)


class StopFlag:
    """Takes the place of whatever handlers stood there (submitit's too) and remembers the signal that came.

    Make it on the main thread, first thing. A Python handler waits until a blocking collective returns: the flag is seen
    at the next step boundary at the latest.
    """

    def __init__(self) -> None:
        self._came = _early  # also what came before
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)  # Slurm sends it before TERM: it must not stop anything

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._came.append(signal.Signals(number).name)

    def ask(self, why: str) -> None:
        """To stop for another reason than a signal: that is what is told."""
        self._came.append(why)

    @property
    def requested(self) -> str | None:
        """Why to stop; None while nobody asks."""
        return first_told(self._came)
