"""One run of the campaign: launched as a user would, watched, hurt, and launched again until it is finished."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator import faults
from orchestrator.chaos.plan import FIRST, SAVE_EVERY, SLOT, STEPS, Planned
from orchestrator.errors import Failure
from orchestrator.faults import Fault
from orchestrator.record import Event, StepRecord, read_all_steps, read_events
from orchestrator.run_dir import RunDir

WAIT_S = 300.0  # for anything
MARK = "ARRIERO_CHAOS"  # in the environment of every process of a run: which run
_ROWS, _LENGTH = 8, 32
BATCH_TOKENS = _ROWS * _LENGTH

SHAPE = [
    "model=nano",
    "model.dim=32",
    "model.n_layers=1",
    "model.n_heads=2",
    "model.ffn_dim=64",
    f"model.sequence_length={_LENGTH}",
    f"optim.batch_sequences={_ROWS}",
    "optim.warmup_steps=5",
    "data=words",
    f"steps={STEPS}",
    "eval_every_steps=10",
    "eval_rows_per_source=2",
    f"checkpoint.every_steps={SAVE_EVERY}",
    "carbon.measure=false",
    "layout=fsdp",
    "cluster.hang_timeout_s=600",  # a gate holds rank 0 for longer than a step may take
]
TWO_RANKS = ["cluster.gpus_per_node=2"]


class DidNotHold(Exception):
    """What was awaited did not come."""


class Ended(DidNotHold):
    """Nor will it: the campaign was ended."""


def make_workplace(folder: Path) -> Path:
    """Two small sources of text in `folder`, and a group that mixes them: what a run of seconds trains on."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(1)
    words = ["llama", "mountain", "pass", "train", "load", "water", "stone", "path", "night", "bell"]
    for source in ("a", "b"):
        lines = [" ".join(generator.choices(words, k=60)) + ".\n" for _ in range(300)]
        (folder / f"{source}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in lines))
    (folder / "conf" / "data").mkdir(parents=True)
    (folder / "conf" / "data" / "words.yaml").write_text(
        "name: words\nheld_out_share: 0.1\ntokenizer: {vocab_size: 512}\nsources:\n"
        "  a: {path: a.jsonl, proportion: 0.75}\n  b: {path: b.jsonl, proportion: 0.25}\n"
    )
    return folder


@dataclass
class Injection:
    """One fault that was done. What judge.py cannot see in the records stands here, where it is not None."""

    time_s: float
    seconds: float | None = None
    steps_repeated: int | None = None
    detected: str = ""
    problems: list[str] = field(default_factory=list)


@dataclass
class Launch:
    process: subprocess.Popen[bytes]
    output: Path
    began_s: float

    def text(self) -> str:
        return self.output.read_text(errors="replace")


_stages: list["Stage"] = []  # of this process
_ended = False


@contextlib.contextmanager
def ending_all() -> Iterator[None]:
    """Ctrl-C, TERM or a fault in here end every run of the campaign."""

    interrupted = False

    def interrupt(number: int, frame: object) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    is_main = threading.current_thread() is threading.main_thread()
    before = {n: signal.signal(n, interrupt) for n in (signal.SIGINT, signal.SIGTERM)} if is_main else {}
    try:
        yield
    except BaseException:
        global _ended
        _ended = True  # nothing is launched any more
        for stage in _stages:
            stage.end()
        if interrupted:
            raise Failure("interrupted: the campaign's runs were ended") from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Stage:
    """A run called `name` in a workplace. `seen_at` is where this process sees the folder of its runs."""

    def __init__(
        self,
        workplace: Path,
        name: str,
        overrides: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        wrapper: Sequence[str] = (),
        run_root: str = "runs",
        seen_at: Path | None = None,
    ) -> None:
        self.workplace, self.name = workplace, name
        self.overrides = [*SHAPE, *overrides, f"name={name}", f"run_root={run_root}"]
        self.run = RunDir((seen_at or workplace / run_root) / name)
        self.mark = f"{workplace}:{name}"
        self.env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {}), MARK: self.mark}
        self.wrapper = list(wrapper)
        self.follows = "cluster=slurm" not in overrides  # whether a launch lasts as long as its job
        self.launches: list[Launch] = []
        self.faults: list[Fault] = []
        self.planned_faults: dict[str, int] = {}  # the last fault of each planned one, by its number
        self.done: dict[str, Injection] = {}
        _stages.append(self)

    # -------------------------------------------------------------------------------------------------------- faults

    def plan(self, planned: Sequence[Planned], seed: int = 0) -> None:
        """Faults inside the ranks, each in a slot of its own."""
        generator = random.Random(seed)
        for slot, each in enumerate(planned):
            for fault in each.faults:
                rank = generator.randrange(2) if fault.rank < 0 else fault.rank
                step = FIRST + SLOT * slot + fault.step
                self.faults.append(Fault(kind=fault.kind, rank=rank, step=step, seconds=fault.seconds))
            self.planned_faults[each.name] = len(self.faults) - 1
        faults.write(self.run.faults, self.faults)

    def gates(self, *steps: int) -> list[int]:
        """Rank 0 waits before these steps: the numbers that `reached` and `go` take."""
        first = len(self.faults)
        self.faults += [Fault(kind="wait", step=step) for step in steps]
        faults.write(self.run.faults, self.faults)
        self._marks(first).parent.mkdir(exist_ok=True)  # `go` may be called before a rank is there
        return list(range(first, len(self.faults)))

    def _marks(self, number: int) -> Path:
        return self.run.faults.with_suffix("") / str(number)

    def reached(self, gate: int) -> None:
        self.wait(lambda: self._marks(gate).exists(), f"step {self.faults[gate].step}")

    def go(self, gate: int) -> None:
        self._marks(gate).with_suffix(".go").touch()

    def hurt(self, name: str) -> Injection:
        """Notes that the fault `name` is done now, from outside."""
        self.done[name] = Injection(time.time())
        return self.done[name]

    def note_struck(self) -> None:
        """Which of the faults inside the ranks have struck, and when."""
        for name, number in self.planned_faults.items():
            with contextlib.suppress(FileNotFoundError):
                self.done.setdefault(name, Injection(self._marks(number).stat().st_mtime))

    # ------------------------------------------------------------------------------------------------------ launches

    def launch(self, *more: str, env: Mapping[str, str] | None = None) -> Launch:
        if _ended:
            raise Ended("the campaign was ended")
        output = self.workplace / f"{self.name}.launch-{len(self.launches) + 1}.txt"
        words = [*self.wrapper, str(Path(sys.executable).with_name("arriero")), "launch", "--config-dir=conf"]
        with output.open("wb") as file:
            process = subprocess.Popen(
                [*words, *self.overrides, *more],
                cwd=self.workplace,
                env={**self.env, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.launches.append(Launch(process, output, time.time()))
        return self.launches[-1]

    def ended(self, launch: Launch) -> int:
        """The launch's exit code, once it has ended."""
        try:
            return launch.process.wait(WAIT_S)
        except subprocess.TimeoutExpired:
            raise DidNotHold(f"the launch has not ended for {WAIT_S:g} s") from None

    def finish(self, *more: str, launches: int = 8) -> None:
        """The same command until the run is finished: at most so often."""
        for _ in range(launches):
            code = self.ended(self.launch(*more))
            if self.finished():
                return
            if code == 2:
                break
        raise DidNotHold(f"not finished after {len(self.launches)} launches: {self.last_words()}")

    def finished(self) -> bool:
        return any(e.kind == "finished" for e in self.events())

    def last_words(self) -> str:
        lines = [line for line in self.launches[-1].text().splitlines() if line.strip()] if self.launches else []
        return " / ".join(lines[-3:])

    # -------------------------------------------------------------------------------------------------------- seeing

    def events(self, *kinds: str) -> list[Event]:
        return [e for e in read_events(self.run.events) if not kinds or e.kind in kinds]

    def records(self) -> list[StepRecord]:
        return read_all_steps(self.run.records)

    def wait(self, condition: Callable[[], bool], what: str, timeout_s: float = WAIT_S) -> None:
        until = time.monotonic() + timeout_s
        while not condition():
            if _ended or time.monotonic() > until:
                raise DidNotHold(f"waited {timeout_s:g} s for {what}; {self.last_words()}")
            if self.follows and all(launch.process.poll() is not None for launch in self.launches) and not condition():
                raise DidNotHold(f"the launch has ended without {what}: {self.last_words()}")
            time.sleep(0.05)

    def wait_event(self, kind: str, count: int = 1) -> None:
        self.wait(lambda: len(self.events(kind)) >= count, f"the event {kind}")

    def processes(self) -> Iterator[int]:
        """Every process of this run on this machine, the launches' too."""
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    if f"{MARK}={self.mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                        yield int(entry.name)

    def end(self) -> None:
        """Nothing of this run is left running."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for launch in self.launches:
            launch.process.wait()
