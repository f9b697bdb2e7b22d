"""Go on with a run, stop it, read its logs: what a person does to a run directory."""

import contextlib
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from orchestrator import spec as specs
from orchestrator.errors import Failure, UserError
from orchestrator.record import Event, JsonlWriter, read_events, utc_now
from orchestrator.run_dir import RunDir
from slurm import queue
from slurm.submit import find

_NOT_STARTED = ("PENDING", "COMPLETING", "REQUEUED", "REQUEUE_HOLD")  # COMPLETING: it ends, or goes back into the queue
_RANK = re.compile(r"^\d+(?:_\d+)?_(\d+)_log\.(?:out|err)$")


def resume(root: Path) -> int:
    """As the run's own spec.yaml says, from the folder that it was launched from."""
    from orchestrator.launch import launch

    run = _run(root)
    spec = specs.load(run.spec)
    spec.run_root, spec.name = str(run.root.parent), run.root.name
    if spec.cluster.kind == "slurm" and (job_id := find(run.submission)):
        job = (queue.queued() or {}).get(job_id)
        if job is not None and job.state == "PENDING" and job.reason == "BeginTime" and read_events(run.events):
            # where the first node has died nobody could take away the two minutes for which Slurm holds a requeued job
            queue.call("scontrol", "update", f"jobid={job_id}", "StartTime=now")
            print(f"job {job_id} was held by Slurm until its begin time: it may start now")
            return 0
    overrides = run.overrides.read_text().splitlines()
    launched_from = Path(str(json.loads(run.environment.read_text()).get("directory", ".")))
    if launched_from.is_dir():
        os.chdir(launched_from)  # relative paths in the spec start there
    return launch(spec, overrides)


def cancel(root: Path) -> int:
    """Asks all ranks to save and end, and keeps the job out of the queue afterwards."""
    run = _run(root)
    if specs.load(run.spec).cluster.kind == "slurm":
        job_id = find(run.submission)
        if job_id is None:
            print(f"{run.root.name} is not in the queue")
            return 0
        run.cancelled.touch()
        job = (queue.queued() or {}).get(job_id)
        if job is not None and job.state in _NOT_STARTED:  # nothing is to be saved, and nobody else will tell
            with JsonlWriter(run.events / "supervise.jsonl") as events:
                events.write(Event(time_utc=utc_now(), kind="cancelled", step=0, detail="user: cancelled in the queue",
                                   data={"cause": "user", "job_id": job_id}))  # fmt: skip
            words, said = ["scancel", job_id], "is taken out of the queue"
        else:  # the warning comes first, so that it saves; `supervise` sees the mark and ends it
            words, said = ["scancel", "--signal=USR2", job_id], "is asked to save and end"
        code, _, error = queue.call(*words)
        if code:
            raise Failure(f"{' '.join(words)}: {error}")
        print(f"job {job_id} {said}; `arriero resume {root}` goes on with it")
        return 0
    pid = run.worker_pid()
    if pid is None:
        print(f"{run.root.name} does not run on this machine")
        return 0
    os.kill(pid, signal.SIGTERM)
    print(f"{run.root.name} is asked to save and end; `arriero resume {root}` goes on with it")
    return 0


def logs(root: Path, rank: int | None, everyone: bool, lines: int, follow: bool, as_json: bool) -> int:
    """Errors first, then the last lines of rank 0's log, of `rank`'s, or of `everyone`'s. All starts append to one file."""
    from orchestrator.page_data import log_errors

    run = _run(root)
    every = sorted(run.logs.glob("*_log.out"), key=lambda p: (p.stat().st_mtime, p.name))
    newest = {_rank(p): p for p in every}  # of each rank the log of the last job
    if rank is not None and rank not in newest:
        raise UserError(f"no log of rank {rank} in {run.logs}: there are those of {_ranges(sorted(newest)) or 'none'}")
    shown = [newest[r] for r in sorted(newest) if everyone or r == (rank or 0)]
    errors = [e for e in log_errors(run.logs) if rank is None or e.file in {p.name for p in shown}]
    tails = {p: _tail(p, lines) for p in shown}
    if as_json:
        logs_ = [{"file": str(p), "rank": _rank(p), "lines": tail} for p, tail in tails.items()]
        print(json.dumps({"errors": [asdict(e) for e in errors], "logs": logs_}, indent=2))
        return 0
    for error in errors:
        print(f"{error.file}:{error.line}: {error.text}")
    if errors:
        print()
    for path, tail in tails.items():
        if len(tails) > 1:
            print(f"==> rank {_rank(path)}")
        print("\n".join(tail))
    if not any(tails.values()):
        print(f"nothing in {run.logs} yet")
    if follow:
        with contextlib.suppress(KeyboardInterrupt):
            for path, line in _growing(run.logs, None if everyone else rank or 0, set(every)):
                print(f"{_rank(path)}: {line}" if everyone else line, end="", flush=True)
    return 0


def _tail(path: Path, lines: int) -> list[str]:
    """The last lines, without reading what lies before them."""
    with path.open("rb") as file:
        begin = file.seek(0, os.SEEK_END)
        tail = b""
        while begin > 0 and tail.count(b"\n") <= lines:
            size = min(65536, begin)
            begin -= size
            file.seek(begin)
            tail = file.read(size) + tail
    return tail.decode(errors="replace").splitlines()[-lines:] if lines else []


def _growing(folder: Path, rank: int | None, seen: set[Path]) -> Iterator[tuple[Path, str]]:
    """What is written to the logs of a rank, or of all, from now on; a later job's file from its beginning."""
    with contextlib.ExitStack() as stack:
        files: dict[Path, TextIO] = {}
        while True:
            for path in sorted(folder.glob("*_log.out")):
                if path not in files and rank in (None, _rank(path)):
                    files[path] = stack.enter_context(path.open(errors="replace"))
                    if path in seen:
                        files[path].seek(0, os.SEEK_END)
            came = [(path, line) for path, file in files.items() for line in file]
            yield from came
            if not came:
                time.sleep(0.3)


def _rank(path: Path) -> int:
    match = _RANK.match(path.name)
    return int(match[1]) if match else -1


def _ranges(numbers: list[int]) -> str:
    return f"{numbers[0]} to {numbers[-1]}" if numbers else ""


def _run(root: Path) -> RunDir:
    run = RunDir(root.resolve())
    if not run.spec.exists():
        raise UserError(f"{root} is no run directory: it has no spec.yaml")
    return run
