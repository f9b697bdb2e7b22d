"""Where everything of a run lies on disk. The format is described in docs/run_directory.md; keep both the same."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from orchestrator.errors import UserError

SWEEP = "sweep.json"  # in the directory of a sweep, below which its points' run directories lie


@dataclass(frozen=True)
class RunDir:
    """The paths of one run directory. Makes nothing by itself."""

    root: Path

    @classmethod
    def existing(cls, root: Path) -> Self:
        """Raises UserError for a folder that is none."""
        run = cls(root.resolve())
        if not run.spec.exists():
            raise UserError(f"{root} is no run directory: it has no spec.yaml")
        return run

    @property
    def spec(self) -> Path:
        """The resolved configuration (YAML): what `launch` composed, and all that a rank needs."""
        return self.root / "spec.yaml"

    @property
    def run_id(self) -> Path:
        """Made with the directory: a line that says who the run is, whatever its directory is called later, and one that says
        where it was made."""
        return self.root / "run_id.txt"

    def identity(self) -> str | None:
        """Who the run is; None where nobody has said so yet, and in a copy beside the run itself."""
        try:
            identity, made_at = self.run_id.read_text().splitlines()
        except (OSError, ValueError):
            return None
        origin = RunDir(Path(made_at)).run_id
        with contextlib.suppress(OSError):
            if not origin.samefile(self.run_id) and origin.read_text() == self.run_id.read_text():
                return None
        return identity

    @property
    def tokenizer(self) -> Path:
        """A copy of the tokenizer that the run trains with."""
        return self.root / "tokenizer.json"

    @property
    def overrides(self) -> Path:
        """The command line's overrides, one a line."""
        return self.root / "overrides.txt"

    @property
    def code(self) -> Path:
        """commit.txt, diff.patch and, under Slurm, the snapshot of the files that run."""
        return self.root / "code"

    @property
    def environment(self) -> Path:
        """Python, packages and machine (JSON)."""
        return self.root / "environment.json"

    @property
    def data(self) -> Path:
        """One line: the directory of the prepared tokens that the run trains on."""
        return self.root / "data.txt"

    @property
    def records(self) -> Path:
        """attempt-0001.jsonl ...: one StepRecord a line."""
        return self.root / "records"

    @property
    def events(self) -> Path:
        """attempt-0001.jsonl ... and launcher.jsonl: one Event a line."""
        return self.root / "events"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def logs(self) -> Path:
        """What submitit and the ranks print."""
        return self.root / "logs"

    @property
    def energy(self) -> Path:
        """One ledger file per attempt and node."""
        return self.root / "energy"

    @property
    def samples(self) -> Path:
        """Generated text."""
        return self.root / "samples"

    @property
    def profiles(self) -> Path:
        """Traces of steps, where profile.first_step asks for them."""
        return self.root / "profiles"

    @property
    def loss_curve(self) -> Path:
        """The loss as a picture, drawn when a launch sees the run finished."""
        return self.root / "loss.svg"

    @property
    def plan(self) -> Path:
        """The forecast at the first start (JSON): figures with low, central and high, or none where there is no forecast."""
        return self.root / "plan.json"

    @property
    def page(self) -> Path:
        """The run as one HTML file (`arriero dashboard page`)."""
        return self.root / "page.html"

    @property
    def wandb(self) -> Path:
        """Which W&B run mirrors this one, and how far (JSON)."""
        return self.root / "wandb.json"

    @property
    def submission(self) -> Path:
        """Which Slurm job is this run's: a journal, written before sbatch is called (JSON)."""
        return self.root / "submission.json"

    @property
    def lemons(self) -> Path:
        """Nodes that have let jobs down; shared by the runs beside this one."""
        return self.root.parent / ".lemons.jsonl"

    @property
    def cancelled(self) -> Path:
        """There while `arriero cancel` holds: the job ends and is not put back into the queue."""
        return self.root / "cancelled"

    @property
    def faults(self) -> Path:
        """Faults to be injected (orchestrator/faults.py); no run has this file but those of `arriero chaos` and the tests."""
        return self.root / "faults.json"

    @property
    def pause(self) -> Path:
        """One number: the step after which the run saves and ends for now, put there by a sweep's successive halving."""
        return self.root / "pause_at_step.txt"

    def pause_step(self) -> int | None:
        with contextlib.suppress(OSError, ValueError):
            return int(self.pause.read_text())
        return None

    def take_attempt(self) -> int:
        """The number of this start, 1 for the first. Its events' file is made here, exclusively: of two starts at one
        moment neither writes into the other's files."""
        return self._take(self.events, 1)

    def take_records(self, attempt: int) -> Path:
        """An attempt's file of step records, made here, after all that are there: its own number, but for two starts at one
        moment."""
        return self.attempt_file(self.records, self._take(self.records, attempt))

    def _take(self, folder: Path, number: int) -> int:
        folder.mkdir(parents=True, exist_ok=True)
        taken = [int(p.stem.removeprefix("attempt-")) for p in folder.glob("attempt-*.jsonl")]
        number = max([number, *(n + 1 for n in taken)])
        while True:
            with contextlib.suppress(FileExistsError):
                self.attempt_file(folder, number).touch(exist_ok=False)
                return number
            number += 1

    def attempt_file(self, folder: Path, attempt: int) -> Path:
        return folder / f"attempt-{attempt:04d}.jsonl"

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Rank 0 trains inside. The system ends this with the process, however it ends.

        A courtesy to whoever launches twice on one machine; between machines the checkpoints' lease keeps one writer.
        """
        with (self.root / ".at_work").open("a") as file:
            with contextlib.suppress(OSError):  # another is at work, or no locks on this file system: the lease decides
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                file.truncate(0)
                file.write(str(os.getpid()))
                file.flush()
            yield

    def worker_pid(self) -> int | None:
        """Rank 0's process on this machine; None where it does not train here now."""
        if not self.is_at_work():
            return None
        text = (self.root / ".at_work").read_text()
        return int(text) if text.isdigit() else None

    def is_at_work(self) -> bool:
        """Whether a rank 0 of this run trains on this machine now."""
        try:
            with (self.root / ".at_work").open("r") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # no run directory yet, or no locks here
            return False
        return False
