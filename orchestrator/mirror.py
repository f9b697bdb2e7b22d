"""Follows a run directory into W&B: as a process beside the training (`wandb-mirror`), or at once (`arriero dashboard sync`).

1. It reads what the ranks have written to disk, and nothing else: the training neither knows of it nor waits for it.
2. W&B's step is the run's step. A step goes up once the next one is on disk, with the evaluations that came after it.
3. `wandb.json` says which W&B run it is and how far it is. After a kill the server's own word on how far it is goes first.
4. Where a rewind or a resume undid steps that are up already, W&B's run is rewound; a server that can't leaves them as they are,
   which is told, and the steps after them follow. No step is ever there twice.
"""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from dashboards.carbon import figures
from dashboards.wandb_run import About, CannotRewind, WandbRun, event_metrics, step_metrics
from orchestrator import spec as specs
from orchestrator.carbon_report import accounted
from orchestrator.columns import StepReader
from orchestrator.energy.report import account
from orchestrator.errors import Failure, UserError
from orchestrator.record import Event, read_events
from orchestrator.run_dir import RunDir

LOOK_S = 2.0  # W&B's own servers take two messages a second for each run
RETRY_S = 60.0


@dataclass
class Progress:
    """What `wandb.json` holds."""

    id: str
    records: int = 0  # read from disk when `step` was the last that was handed over
    step: int = 0  # the last that was handed over
    events: int = 0  # told as alerts
    confirmed: bool = True  # the client has said that the server has all of it
    url: str = ""

    @classmethod
    def load(cls, path: Path) -> "Progress":
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            return cls(id=uuid.uuid4().hex[:12])

    def save(self, path: Path) -> None:
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(asdict(self), indent=1) + "\n")
        temporary.replace(path)


class Mirror:
    """One run directory's way into W&B."""

    def __init__(self, root: Path, host_metrics: bool) -> None:
        self.paths = RunDir(root)
        self.spec = specs.load(self.paths.spec)
        self.host_metrics = host_metrics
        self.progress = Progress.load(self.paths.wandb)
        self.progress.save(self.paths.wandb)
        self.metrics = step_metrics()
        self._steps = StepReader(self.paths.records)
        self._run: WandbRun | None = None
        self._not_before = 0  # steps below it are with the server already

    def round(self, last: bool) -> int:
        """Hands over what is new: how many steps. `last`: nothing more comes, so the newest step goes too."""
        columns, events = self._steps.read(), read_events(self.paths.events)
        fresh = columns["step"][self.progress.records :]
        undone_from = int(fresh.min()) if len(fresh) else None
        kept = columns.where(columns.kept())
        if not last:
            kept = kept.where(np.arange(len(kept)) < len(kept) - 1)
        rewind = undone_from is not None and undone_from <= self.progress.step
        new = kept.where(kept["step"] > (undone_from - 1 if rewind and undone_from else self.progress.step))
        if not len(new) and len(events) == self.progress.events and (self.progress.confirmed or not last):
            return 0
        self._open(undone_from if rewind else None)
        assert self._run is not None
        new = kept.where(kept["step"] >= self._not_before)
        at_step = _by_step(events)
        # The last kept step that was held back is read again: everything but it counts as read.
        self.progress.confirmed = False
        self.progress.records = len(columns) - (0 if last or not len(columns) else 1)
        self.progress.save(self.paths.wandb)
        values = {name: new[field] * scale for name, field, scale in self.metrics}
        for i, step in enumerate(new["step"].astype(int).tolist()):
            row = {name: float(v[i]) for name, v in values.items() if np.isfinite(v[i])}
            for event in at_step.get(step, ()):
                row |= event_metrics(event.kind, event.data)
            self._run.log(step, row)
            self.progress.step = step
        self._not_before = max(self._not_before, self.progress.step + 1)
        for event in events[self.progress.events :]:
            self._run.alert(event.kind, event.step, event.detail, event.data)
        self.progress.events = len(events)
        self.progress.save(self.paths.wandb)
        return len(new)

    def finish(self) -> None:
        """Waits until the server has everything, and says so on disk."""
        if self._run is None:
            return
        with contextlib.suppress(Exception):  # a summary is a courtesy
            statement = account([accounted(self.paths.root)], ask_slurm=False)[0]
            self._run.summarize({f"energy/{f.key}": f.value for f in figures(statement)})
        self._run.finish()
        self._run = None
        self.progress.confirmed = True
        self.progress.save(self.paths.wandb)

    def abandon(self) -> None:
        """Lets go of a W&B run that failed. What it may have sent the next one asks the server."""
        if self._run is not None:
            self._run.abandon()
            self._run = None

    def _open(self, undone_from: int | None) -> None:
        """The W&B run, rewound to before step `undone_from` where that is asked for."""
        if self._run is not None and undone_from is None:
            return
        if self._run is not None:
            self._run.finish()
            self._run = None
        about = About(
            id=self.progress.id,
            name=self.paths.root.name,
            project=self.spec.dashboard.project,
            entity=self.spec.dashboard.entity,
            config={**specs.as_dict(self.spec), "code_commit": self._commit()},
            commit=self._commit(),
            host_metrics=self.host_metrics,
        )
        if undone_from is not None:
            try:
                self._run = WandbRun(about, rewind_to=undone_from - 1)
                self._not_before = undone_from
            except CannotRewind as why:
                self._run = WandbRun(about)
                self._not_before = self._first_lacking(self._run)
                if self._not_before > undone_from:
                    print(
                        f"W&B keeps steps {undone_from} to {self._not_before - 1} as they were before they were undone: "
                        f"this server can't rewind a run ({why}). The run's page shows the steps that made the model.",
                        flush=True,
                    )
        else:
            self._run = WandbRun(about)
            self._not_before = self._first_lacking(self._run)
        self.progress.url = self._run.url

    def _first_lacking(self, run: WandbRun) -> int:
        """The first step to hand over: the server's word, else our own."""
        if run.next_step is not None:
            return run.next_step
        return self.progress.step + 1 if self.progress.confirmed else 0

    def _commit(self) -> str:
        with contextlib.suppress(OSError):
            return (self.paths.code / "commit.txt").read_text().strip()
        return ""


def _by_step(events: list[Event]) -> dict[int, list[Event]]:
    found: dict[int, list[Event]] = {}
    for event in events:
        found.setdefault(event.step, []).append(event)
    return found


def sync(root: Path) -> tuple[int, str]:
    """Uploads what W&B lacks of a run: how many steps, and where they are."""
    with _alone(root) as alone:
        if not alone:
            raise UserError(f"{root} is being uploaded already, by its own mirror or by another sync: wait for it")
        mirror = Mirror(root, host_metrics=False)
        try:
            steps = mirror.round(last=True)
            mirror.finish()
        except Exception as error:
            if isinstance(error, OSError) or type(error).__module__.partition(".")[0] == "wandb":
                why = (str(error) or type(error).__name__).splitlines()[0]
                raise Failure(f"{root}: W&B did not take all of it ({why}). Nothing is lost: run it again.") from None
            raise
        return steps, mirror.progress.url


def mirror_until_gone(root: Path, watch_pid: int) -> int:
    """Follows a run into W&B until process `watch_pid` is gone or SIGTERM comes. Returns the exit code."""
    import psutil

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with contextlib.suppress(psutil.NoSuchProcess):
        watched = psutil.Process(watch_pid)
        with _alone(root, until=stop) as alone:
            if not alone:
                return 0
            mirror = Mirror(root, host_metrics=True)
            going = True
            while going:
                stop.wait(LOOK_S)
                going = not stop.is_set() and watched.is_running() and watched.status() != psutil.STATUS_ZOMBIE
                try:
                    mirror.round(last=not going)
                    if not going:
                        mirror.finish()
                except Exception as error:  # the network, the server, the account: the disk has it all
                    print(f"W&B: {type(error).__name__}: {error}", flush=True)
                    mirror.abandon()
                    mirror = Mirror(root, host_metrics=True)
                    if going:
                        stop.wait(RETRY_S)
    return 0


@contextlib.contextmanager
def mirroring(root: Path) -> Iterator[None]:
    """A run is mirrored while the block runs. A mirror that can't start, fails or hangs never stops a run."""
    process = None
    try:
        process = _start(root, os.getpid())
    except OSError as error:
        print(f"the run is not mirrored to W&B: {error}; later: arriero dashboard sync {root}", flush=True)
    try:
        yield
    finally:
        if process is not None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)  # for the last steps; it goes on by itself, and `sync` finds what it missed


def _start(root: Path, watch_pid: int) -> subprocess.Popen[bytes]:
    log = RunDir(root).logs / "wandb.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    main = "from orchestrator.cli import main; raise SystemExit(main())"
    command = [sys.executable, "-P", "-c", main, "wandb-mirror", str(root), "--watch", str(watch_pid)]
    with log.open("ab") as output:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)


@contextlib.contextmanager
def _alone(root: Path, until: threading.Event | None = None) -> Iterator[bool]:
    """True for the one process that uploads this run. `until`: wait for the turn until that is set."""
    with (root / ".wandb.lock").open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if until is not None and not until.wait(1.0):
                    continue
                yield False
                return
            yield True
            return
