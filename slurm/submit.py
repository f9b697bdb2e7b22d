"""Submission through submitit: on this machine, or to Slurm. What is pickled is a name and a folder; all state is on disk."""

import importlib
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit

from slurm.request import JobRequest


@dataclass(frozen=True)
class Entry:
    """What a rank is told to run: "module:function", called with the run directory."""

    entry: str
    run_dir: str

    def __call__(self) -> Any:
        module, _, function = self.entry.partition(":")
        return getattr(importlib.import_module(module), function)(self.run_dir)


class Job:
    """A submitted job."""

    def __init__(self, job: Any) -> None:
        self._job = job
        self.id = str(job.job_id)

    def running(self) -> bool:
        return not self._job.done()

    def stop(self) -> None:
        """Asks all ranks to save and end."""
        process = self._job._process
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGTERM)  # submitit's controller passes it on to every rank

    def failure(self) -> str | None:
        """The first rank's error with its traceback where one failed, once the job has ended; None when all went well."""
        for rank in self._ranks():
            try:
                error = rank.exception()
            except submitit.core.utils.UncompletedJobError as uncompleted:  # ended without a result: killed
                return str(uncompleted)
            if error is not None:
                return str(error)
        return None

    def _ranks(self) -> list[Any]:
        return self._job._sub_jobs or [self._job]


def submit(request: JobRequest) -> Job:
    """Starts the job on this machine. The ranks write to `<run_dir>/logs/`."""
    cluster = request.cluster
    executor = submitit.LocalExecutor(Path(request.run_dir) / "logs")
    executor.update_parameters(
        nodes=1,
        tasks_per_node=cluster.gpus_per_node,
        gpus_per_node=0,
        timeout_min=cluster.time_limit_min,
        stderr_to_stdout=True,
    )
    with _ignored(signal.SIGINT, signal.SIGHUP):
        return Job(executor.submit(Entry(request.entry, request.run_dir)))


@contextmanager
def _ignored(*signals: signal.Signals) -> Iterator[None]:
    """Children started inside begin with these signals ignored: Ctrl-C or a closed terminal must not kill submitit's
    controller, which would kill the ranks before they have saved. The ranks themselves handle Ctrl-C (signals.StopFlag)."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
