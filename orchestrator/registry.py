"""Where runs stand, without a database: the run directories, one call of squeue and one of sacct for all of them together.

Read from the ends of files, so that a thousand runs of a million steps answer at once.
"""

import json
import re
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from orchestrator.errors import UserError
from orchestrator.record import Event, read_events, read_last
from orchestrator.run_dir import RunDir
from slurm import queue

_WHY = 120  # characters of it in a table: the events of one run, and JSON, tell it whole
_STEPS = re.compile(r"^steps: (\d+)$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class RunRow:
    """One run. `state`: new, queued, running, finished, failed, dropped (by a sweep's halving), stopped, cancelled, interrupted,
    or unknown where Slurm does not answer. What a run has not told yet is None."""

    name: str
    run_dir: str
    state: str
    why: str  # in one line: Slurm's reason, or the run's last word
    job_id: str | None
    step: int | None
    steps: int | None
    loss_nats: float | None
    tokens_per_s: float | None
    attempts: int
    lineage: list[str]  # why each start after the first came: timeout, preempted, signalled, node_failure, crash ...


def rows(folders: Sequence[Path]) -> list[RunRow]:
    """The runs in and below these folders. Raises UserError for a folder that is not there."""
    found: list[RunDir] = []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder: name a run directory, or a folder of them")
        found += [RunDir(folder)] if (folder / "spec.yaml").exists() else _below(folder)
    return rows_of(found)


def rows_of(found: Sequence[RunDir]) -> list[RunRow]:
    """Of each, also of one that has no spec yet."""
    journals = {run.root: journal(run) for run in found}
    jobs = {root: job_id for root, (job_id, _, _) in journals.items()}
    asked = sorted({job for job in jobs.values() if job})
    live = queue.queued() if asked else {}
    gone = [job for job in asked if live is None or job not in live]
    ended = queue.accounted(gone) if gone else {}
    answers = {**(ended or {}), **(live or {})}
    # Numbers come again, on another cluster: a job whose comment or name is another run's is not this run's.
    others = {
        root
        for root, (job_id, token, _) in journals.items()
        if job_id in answers and not _is_of(root, answers[job_id], token)
    }
    return [
        _row(run, None if run.root in others else jobs[run.root], live, ended, journals[run.root][2]) for run in found
    ]


def _is_of(root: Path, job: queue.JobState, token: str) -> bool:
    """An ended job has its run's name or its sweep's; the comment is kept where the site does so."""
    named = not job.name or job.name.rpartition("/")[2] in (root.name, root.parent.name)
    return named and queue.is_of(job, job.job_id, token)


def _below(folder: Path) -> list[RunDir]:
    """Run directories at most two folders down (a sweep's points), without walking into them."""
    found = []
    for path in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
        if (path / "spec.yaml").exists():
            found.append(RunDir(path))
        else:
            found += [RunDir(p.parent) for p in sorted(path.glob("*/spec.yaml"))]
    return found


def journal(run: RunDir) -> tuple[str | None, str, str]:
    """The job's id, where it is known and this run's; its token; and whose it is, in words, where it is another's."""
    try:
        entry = json.loads(run.submission.read_text())
        job_id, token = str(entry["job_id"] or "") or None, str(entry.get("token", ""))
    except (OSError, ValueError, KeyError):
        return None, "", ""
    if other := queue.written_for(run.submission, entry):
        gone = "" if (other / run.submission.name).exists() else ", which is not there any more"
        return None, "", f"job {job_id} in its submission.json is that of {other}{gone}"
    return job_id, token, ""


def steps_of(run: RunDir) -> int | None:
    """As the spec plans them, without parsing all of it: a table has many runs."""
    found = _STEPS.search(run.spec.read_text(encoding="utf-8")) if run.spec.exists() else None
    return int(found[1]) if found else None


def _row(
    run: RunDir,
    job_id: str | None,
    live: dict[str, queue.JobState] | None,
    ended: dict[str, queue.JobState] | None,
    copied: str,
) -> RunRow:
    attempts = sorted(run.events.glob("attempt-*.jsonl"))
    last = _last_event(attempts[-1]) if attempts else None
    if last and last.data.get("fenced"):
        # It has given way to another, which tells how the run is, if it has spoken since.
        others = [e for e in map(_last_event, attempts[:-1]) if e and e.time_utc > last.time_utc]
        last = max(others, key=lambda e: e.time_utc, default=last)
    supervised = read_events(run.events, "supervise.jsonl")
    launched = [e for e in read_events(run.events, "launcher.jsonl") if e.kind in ("failed", "dropped")]  # of a sweep
    verdicts = [*supervised[-1:], *launched[-1:]]
    records = sorted(run.records.glob("attempt-*.jsonl"), reverse=True)
    record = next((r for r in map(read_last, records) if r is not None), None)
    verdict = max(verdicts, key=lambda e: e.time_utc, default=None)
    state, why = _state(run, job_id, live, ended, last, verdict)
    if state == "stopped" and verdict and verdict.kind == "time_limit" and verdict.data["attempts"] == len(attempts):
        why = f"{verdict.detail}; {why}"
    if copied and state in ("new", "interrupted"):
        why = f"{why}; {copied}"
    return RunRow(
        name=run.root.name,
        run_dir=str(run.root),
        state=state,
        why=why,
        job_id=job_id,
        step=record.step if record else None,
        steps=steps_of(run),
        loss_nats=record.loss if record else None,
        tokens_per_s=record.tokens_per_s if record else None,
        attempts=len(attempts),
        lineage=[str(e.data.get("cause", "")) for e in supervised if e.kind in ("requeued", "restarted")],
    )


def _state(
    run: RunDir,
    job_id: str | None,
    live: dict[str, queue.JobState] | None,
    ended: dict[str, queue.JobState] | None,
    last: Event | None,
    supervised: Event | None,
) -> tuple[str, str]:
    if last and last.kind == "finished":
        return "finished", last.detail
    if supervised and supervised.kind in ("failed", "cancelled", "dropped"):
        if last is None or last.time_utc <= supervised.time_utc:
            last = supervised
        elif (
            last.kind == "stopped" and job_id and supervised.data.get("job_id") == job_id
        ):  # what was ended has saved since
            return supervised.kind, f"{supervised.detail}; {last.detail}"
    job = (live or {}).get(job_id or "") or (ended or {}).get(job_id or "")
    if job and job.live:
        cancelled = "; being cancelled" if run.cancelled.exists() else ""
        if job.state == "PENDING":
            return "queued", job.reason + cancelled
        if last and last is supervised and last.kind == "failed" and last.data.get("job_id") == job_id:
            return "failed", last.detail  # the job is about to end
        return "running", (
            f"{job.state.lower()} for {job.elapsed}" + (f" on {job.node_list}" if job.node_list else "")
        ) + cancelled
    if run.cancelled.exists():
        return "cancelled", "go on with `arriero resume`"
    if run.is_at_work():
        return "running", "on this machine"
    if last and last.kind in ("failed", "stopped", "cancelled", "dropped"):
        return last.kind, last.detail
    if job:
        return "interrupted", f"Slurm says {job.state}"
    if job_id and live is None:
        return "unknown", "squeue does not answer"
    if job_id and ended is None and last is None:
        return "unknown", "squeue has forgotten the job, and there is no accounting to ask"
    return ("interrupted", f"after {last.kind} at step {last.step}") if last else ("new", "not started yet")


def _last_event(path: Path) -> Event | None:
    """The last of the events that say where a run stands; from the end of the file."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 32768))
        lines = file.read().split(b"\n")
    for line in reversed(lines[:-1]):
        try:
            values = json.loads(line)
            return Event(
                time_utc=values["time_utc"],
                kind=values["kind"],
                step=int(values["step"]),
                detail=str(values["detail"]),
                data=values.get("data") or {},
            )
        except (ValueError, KeyError, TypeError):
            continue
    return None


def show(found: Sequence[RunRow], as_json: bool, details: bool) -> int:
    """Prints the rows; `details` of one alone also what happened to it, with exit code 1 where it has failed."""
    details = details and len(found) == 1
    told = _told(RunDir(Path(found[0].run_dir))) if details else []
    if as_json:
        events = {"events": [asdict(e) for e in told]} if details else {}
        print(json.dumps([asdict(r) | events for r in found], indent=2))
    elif not found:
        print("no runs")
    else:
        _print_table(
            ("run", "state", "job", ">step", ">loss", ">tokens/s", ">starts", "went on after", "why"),
            [
                (
                    r.run_dir,
                    r.state,
                    r.job_id or "-",
                    "-" if r.step is None else f"{r.step:,}/{r.steps:,}" if r.steps else f"{r.step:,}",
                    "-" if r.loss_nats is None else f"{r.loss_nats:.3f}",
                    "-" if r.tokens_per_s is None else f"{r.tokens_per_s:,.0f}",
                    str(r.attempts),
                    ", ".join(f"{cause} x{n}" if n > 1 else cause for cause, n in Counter(r.lineage).items()) or "-",
                    r.why if len(r.why) <= _WHY else r.why[: _WHY - 4] + " ...",
                )
                for r in found
            ],
        )
        for event in told:
            print(f"  {event.time_utc[:19]}Z  {event.kind:12} {event.detail}")
    return 1 if details and found[0].state == "failed" else 0


def _print_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Columns under each other, those with `>` to the right; in a terminal the last is wrapped. (Rich takes three quarters of a
    second for a thousand rows.)"""
    cells = [[" ".join(cell.split()) for cell in line] for line in ([h.removeprefix(">") for h in header], *lines)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    indent = sum(widths[:-1]) + 2 * len(widths[:-1])
    most = max(shutil.get_terminal_size().columns - indent, 20) if sys.stdout.isatty() else widths[-1]
    for line in cells:
        parts = [
            cell.rjust(width) if head.startswith(">") else cell.ljust(width)
            for cell, width, head in zip(line, widths, header, strict=True)
        ]
        first, *more = textwrap.wrap(line[-1], most) or [""]
        print("  ".join([*parts[:-1], first]).rstrip())
        print("".join(f"{' ' * indent}{rest}\n" for rest in more), end="")


def _told(run: RunDir) -> list[Event]:
    """The last that happened to a run: the starts, and every verdict that changed it."""
    dull = ("saved", "removed", "evaluated", "loaded", "faults")
    return [e for e in read_events(run.events) if e.kind not in dull][-20:]
