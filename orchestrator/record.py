"""What a run writes down: step records and events, append-only JSONL, one writer a file, torn tails dropped."""

import contextlib
import errno
import json
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar


def utc(time_s: float) -> str:
    """Seconds since 1970 as they stand in every record: ISO 8601, UTC, milliseconds."""
    return datetime.fromtimestamp(time_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def utc_now() -> str:
    return utc(time.time())


def unix_s(time_utc: str) -> float:
    """The time of a record in seconds since 1970."""
    return datetime.fromisoformat(time_utc).timestamp()


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimizer step, as rank 0 saw it."""

    time_utc: str
    attempt: int  # the start of the run (first, requeue 1, ...) that trained it
    step: int  # steps done, this one included: the first step is 1
    tokens: int  # trained in all, this step included
    loss: float  # mean over the batch's tokens, nats
    grad_norm: float  # global, before clipping
    lr: float
    step_s: float
    tokens_per_s: float  # over all ranks
    mfu: float | None  # share of the hardware's peak bf16 FLOP/s
    data_batch: int | None = None  # index of the data batch trained on: `step - 1` until a batch is skipped
    data_s: float | None = None  # of step_s, waiting for data
    memory_bytes: int | None = None  # peak of rank 0
    clipped: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened to the run. `kind`: started prepared saved save_failed resumed evaluated sampled spike
    rewound skipped requeued restarted hung straggler stopped finished failed ... ; `data` holds its numbers, units in the
    keys."""

    time_utc: str
    kind: str
    step: int
    detail: str  # one line for a person
    attempt: int | None = None
    data: dict[str, Any] = field(default_factory=dict)


_R = TypeVar("_R", StepRecord, Event)


class JsonlWriter:
    """Appends records to one file. The one writer of that file; a torn tail left by a killed predecessor is ended
    with a newline first, so that no line ever joins two.

    A full disk, or one that answers with an error, must not end a training run: what cannot be written is kept, at most
    KEPT_BYTES of it (then the oldest lines go), and written with the next record that can be.
    """

    KEPT_BYTES = 16 << 20

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._lock = threading.Lock()  # checkpoints tell of themselves from a thread of their own
        self._file = path.open("ab", buffering=0)
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._told = False
        self._whole_bytes = self._file.tell()  # what follows is half a line, after a write that failed
        if self._whole_bytes:
            with path.open("rb") as existing:
                existing.seek(-1, os.SEEK_END)
                if existing.read(1) != b"\n":
                    self._keep(b"\n")

    def write(self, record: StepRecord | Event, durable: bool = False) -> None:
        """Appends one line and hands it to the system; `durable` also waits for the disk."""
        with self._lock:
            self._keep(json.dumps(asdict(record), separators=(",", ":")).encode() + b"\n")
            try:
                self._append()
                if durable:
                    os.fsync(self._file.fileno())
            except OSError as error:
                if not self._told:
                    self._told = True
                    say(f"{self.path.name} cannot be written, and is kept in memory until it can: {error}")

    def _keep(self, line: bytes) -> None:
        self._waiting.append(line)
        self._waiting_bytes += len(line)
        while self._waiting_bytes > self.KEPT_BYTES:
            self._waiting_bytes -= len(self._waiting.popleft())

    def _append(self) -> None:
        while self._waiting:
            line = self._waiting[0]
            try:
                if (written := self._file.write(line)) != len(line):
                    raise OSError(errno.ENOSPC, f"{written} of {len(line)} bytes were written")
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file.fileno(), self._whole_bytes)
                raise
            self._whole_bytes += len(line)
            self._waiting_bytes -= len(line)
            self._waiting.popleft()
        if self._told:
            self._told = False
            say(f"{self.path.name} can be written again")

    def close(self) -> None:
        """What still waits is tried once more."""
        with self._lock, self._file:
            try:
                self._append()
            except OSError as error:
                say(f"{self.path.name}: {len(self._waiting)} lines could not be written: {error}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def say(line: str) -> None:
    """Prints a line with the time; a log on a full disk is no reason to end."""
    with contextlib.suppress(OSError):
        print(f"{utc_now()} {line}", flush=True)


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Every whole line of a file; lines torn by a kill are dropped."""
    if not path.exists():
        return
    with path.open("r", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if not line.endswith("\n"):
                return
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict):
                yield value


def _known(kind: type[_R], value: dict[str, Any]) -> _R:
    names = {f.name for f in fields(kind)}
    return kind(**{k: v for k, v in value.items() if k in names})


def read_all_steps(folder: Path) -> list[StepRecord]:
    """Every step ever trained, the undone ones too, in the order in which they were written."""
    return [_known(StepRecord, v) for path in sorted(folder.glob("*.jsonl")) for v in read_jsonl(path)]


class _Stepped(Protocol):
    @property
    def step(self) -> int: ...


_S = TypeVar("_S", bound=_Stepped)


def kept_steps(records: Sequence[_S]) -> list[_S]:
    """The steps that made the model: a record written later undoes every earlier one of its step or above.

    `records` are in the order in which they were written.
    """
    kept: list[_S] = []
    for record in records:
        while kept and kept[-1].step >= record.step:
            kept.pop()
        kept.append(record)
    return kept


def read_last(path: Path) -> StepRecord | None:
    """The last whole step record of one file, without reading the rest of it."""
    with path.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - 8192))
        lines = file.read().split(b"\n")
    for line in reversed(lines[:-1]):  # what follows the last newline is torn, or nothing
        with contextlib.suppress(ValueError, TypeError):
            return _known(StepRecord, json.loads(line))
    return None


def read_events(folder: Path, name: str = "*.jsonl") -> list[Event]:
    """All events of a run, by time; or those of one file."""
    events = [_known(Event, v) for path in sorted(folder.glob(name)) for v in read_jsonl(path)]
    return sorted(events, key=lambda e: e.time_utc)
