"""What a crash or a hang of a rank means for the run: told, written down, restarted within the crash budget or not."""

import os
import signal
from collections.abc import Callable, Iterable, Sequence

from model.heap import WITHOUT_THREAD_CACHES
from orchestrator import spec as specs
from orchestrator.record import Event, read_events, say, unix_s
from orchestrator.run_dir import RunDir
from slurm.lead import Incident, Lead, Slow

Tell = Callable[..., object]  # (kind, step, detail, **data): an event, durable before it returns
Lemon = Callable[[str, str], object]  # (node, why): to the ledger of nodes that let jobs down


def crashes_so_far(events: Sequence[Event], cause: str = "crash") -> int:
    """Requeues for this cause since the run last got on: since its newest checkpoint was saved for the first time. Restarts
    inside the allocation after a crash or a hang count as crashes."""
    furthest, crashes = -1, 0
    for event in events:
        if event.kind == "saved" and event.step > furthest:
            furthest, crashes = event.step, 0
        elif (event.kind == "requeued" and event.data.get("cause") == cause) or (
            event.kind == "restarted" and cause == "crash" and event.data.get("cause") in ("crash", "hung")
        ):
            crashes += 1
        elif event.kind == "resumed_by_hand":
            crashes = 0
    return crashes


def failures_so_far(events: Iterable[Event]) -> tuple[int, float]:
    """The starts that ended without a word (a crash, a hang, a lost node), and the seconds that all starts were at work: from
    "started" to their last event."""
    begun_s: dict[int, float] = {}
    last_s: dict[int, float] = {}
    told: set[int] = set()  # how they ended
    for event in events:
        if event.attempt is None:
            continue
        time_s = unix_s(event.time_utc)
        if event.kind == "started":
            begun_s[event.attempt] = time_s
        last_s[event.attempt] = max(time_s, last_s.get(event.attempt, time_s))
        if event.kind in ("stopped", "finished", "failed"):
            told.add(event.attempt)
    worked_s = sum(last_s[a] - begun_s[a] for a in begun_s)
    return len(begun_s.keys() - told), max(0.0, worked_s)


def step_on_disk(events: Sequence[Event]) -> int:
    """The furthest step that a start can go on from, as the events tell; 0 where none is saved."""
    return max((e.step for e in events if e.kind in ("saved", "resumed")), default=0)


class Incidents:
    """What the lead of a run's ranks tells and asks (slurm.lead.Run)."""

    def __init__(
        self, directory: RunDir, spec: specs.RunSpec, tell: Tell, lemon: Lemon, job_id: str, restarts: int
    ) -> None:
        self._directory, self._config, self._tell, self._lemon = directory, spec.cluster, tell, lemon
        self._on_cpu = spec.gpu.device == "cpu"
        self._job_id, self._restarts = job_id, restarts

    def lead(self, ranks: int, host: str, bind: str = "") -> Lead:
        config = self._config
        lead = Lead(ranks, host, self, config.hang_timeout_s, config.hang_timeout_slow_s, config.straggler_ratio, bind)
        if self._on_cpu and not WITHOUT_THREAD_CACHES.keys() & os.environ:  # what the user set stays
            lead.environment |= WITHOUT_THREAD_CACHES
        return lead

    def may_restart(self, incident: Incident) -> bool:
        """Within the crash budget. An error that every rank of a first start raises before its first step comes again."""
        say(f"{incident.cause}: {incident.detail}")
        if incident.cause == "hung":
            self._tell_hung(incident)
        events = read_events(self._directory.events)
        comes_again = incident.at_start and self._restarts == 0
        if comes_again or any(e.kind == "finished" for e in events) or self._is_overtaken(events):
            return False
        return crashes_so_far(events) < self._config.crash_budget and not self._directory.cancelled.exists()

    def _is_overtaken(self, events: Sequence[Event]) -> bool:
        """Whether this job's newest ranks have given way to another start of the run: theirs again would take it back."""
        of_mine = {"job_id": self._job_id, "restart": self._restarts}
        mine = [e.attempt for e in events if e.kind == "started" and of_mine.items() <= e.data.items()]
        return any(e.kind == "fenced" and e.attempt in mine[-1:] for e in events)

    def restarted(self, incident: Incident, generation: int, seconds: float) -> None:
        self._tell(
            "restarted",
            step_on_disk(read_events(self._directory.events)),
            f"inside the allocation, {incident.cause}: {incident.detail}; ranks ended and started again in {seconds:.1f} s",
            cause=incident.cause, rank=incident.rank, node=incident.node, seconds=round(seconds, 3), generation=generation,
            signal=_signal_name(incident.exit_code), job_id=self._job_id, restart=self._restarts,
        )  # fmt: skip

    def straggles(self, slow: Slow) -> None:
        self._tell(
            "straggler",
            slow.step,
            f"rank {slow.rank} on {slow.node} computes {slow.ratio:.1f} times as long as the median rank "
            f"({1000 * slow.own_s:.0f} ms a step of its own, median {1000 * slow.median_s:.0f} ms)",
            rank=slow.rank, node=slow.node, ratio=round(slow.ratio, 2), own_s=slow.own_s, median_s=slow.median_s,
        )  # fmt: skip

    def _tell_hung(self, incident: Incident) -> None:
        """The stacks are on disk before the event that names their file."""
        number = sum(e.kind == "hung" for e in read_events(self._directory.events)) + 1
        file = self._directory.logs / f"hung-{number:04d}-stacks.txt"
        try:
            file.write_text(f"{incident.detail}\n\n{incident.stacks}", encoding="utf-8")
        except OSError as error:
            say(f"the stacks could not be written to {file}: {error}\n{incident.stacks}")
        self._tell(
            "hung",
            incident.step,
            f"{incident.detail}; stacks in logs/{file.name}",
            rank=incident.rank, node=incident.node, phase=incident.phase, stacks=f"logs/{file.name}", job_id=self._job_id,
        )  # fmt: skip
        hangs = [
            e for e in read_events(self._directory.events) if e.kind == "hung" and e.data.get("node") == incident.node
        ]
        if incident.node and len(hangs) >= 2:
            self._lemon(incident.node, f"hung {len(hangs)} times")


def _signal_name(exit_code: int) -> str | None:
    """Of a rank that a signal has ended; None of another."""
    try:
        return signal.Signals(exit_code - 128).name if exit_code > 128 else None
    except ValueError:
        return f"signal {exit_code - 128}"
