"""The points of a sweep on Slurm: one job array (split where the site's MaxArraySize asks for it), each point supervised and
requeued like any run.

A submission is a file `submissions/<token>.json` in the sweep's directory, on disk before sbatch is called; the token goes into
the array's comment. A command that was killed in between finds its array again, and a point that is queued or runs is never
submitted a second time.
"""

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from model.data.prepare import PreparedData
from model.layout import Layout
from orchestrator import launch as launching
from orchestrator.console import plain_console
from orchestrator.energy.carbon import Start
from orchestrator.errors import UserError
from orchestrator.plan import forecast
from orchestrator.plan.forecast import Plan
from orchestrator.record import Event, JsonlWriter, read_events, utc_now
from orchestrator.run_dir import RunDir
from orchestrator.snapshot import snapshot
from orchestrator.spec import RunSpec
from orchestrator.spikes.watch import stopped_for_a_person
from slurm import queue
from slurm.lemons import excluded
from slurm.request import ArrayRequest, CannotSubmit, JobRequest
from slurm.submit import array_of, find, only_one, sbatch_settled, submit_array

_LOOK_S = 2.0  # between two looks at the queue, waiting


class _Point(Protocol):
    @property
    def directory(self) -> str: ...

    @property
    def overrides(self) -> list[str]: ...


def submit_points(root: Path, todo: Sequence[tuple[_Point, RunSpec]], limit_parallel: int | None) -> None:
    """Queues what is not queued yet and does not run. Raises UserError, Failure or CannotSubmit."""
    if not todo:
        return
    console = plain_console()
    live = live_points(root)
    if live is None:
        raise CannotSubmit(
            "squeue does not answer, so nobody can tell which points are queued already: try again later"
        )
    fresh: list[tuple[_Point, RunSpec]] = []
    expected: dict[str, Plan | None] = {}  # by the run's name
    starts: dict[str, Start | None] = {}
    layouts: dict[str, Layout] = {}
    now_s = time.time()
    for point, spec in todo:
        run_dir = RunDir(spec.run_dir)
        if point.directory in live or _submitted_alone(run_dir.submission):
            continue
        try:
            alike = repr(
                (spec.model, spec.layout, spec.cluster, spec.gpu, spec.plan, spec.precision, spec.optim.batch_sequences)
            )
            if alike not in layouts:  # the search takes a while
                layouts[alike] = forecast.resolved(spec).layout
            spec = replace(spec, layout=layouts[alike])
            expected[spec.name] = launching.forecast_of(spec, now_s)
            starts[spec.name] = launching.greenest(spec, expected[spec.name], now_s)
        except UserError as error:
            raise UserError(f"{point.directory}: {error}") from None
        if why := stopped_for_a_person(read_events(run_dir.events), spec.spikes):
            print(f"{point.directory}: stopped for a person to look at it: {why.splitlines()[0]}; not submitted")
            continue
        fresh.append((point, spec))
    print(f"{len(todo) - len(fresh)} queued or running already (or stopped for a person), {len(fresh)} to submit")
    if fresh and (cpus := launching.on_cpus(fresh[0][1])):
        print(cpus)
    prepared: dict[str, PreparedData] = {}
    for _, spec in fresh:  # before any name is taken
        if (key := _tokens(spec)) not in prepared:
            prepared[key] = launching.prepared_for(console, spec, RunDir(spec.run_dir))
    for point, spec in fresh:
        run_dir, key = RunDir(spec.run_dir), _tokens(spec)
        launching.write_run_dir(spec, run_dir, point.overrides, prepared[key])
        launching.write_plan(run_dir, expected[spec.name])
        run_dir.cancelled.unlink(missing_ok=True)
        if any(e.kind == "failed" for e in read_events(run_dir.events)[-1:]):  # crashes are counted anew
            with JsonlWriter(run_dir.events / "launcher.jsonl") as events:
                events.write(Event(time_utc=utc_now(), kind="resumed_by_hand", step=0, detail="submitted again"))
    code = str(snapshot(root / "code"))
    largest = queue.max_array_size()
    arrays = [
        (runs[i : i + largest], start)
        for runs, start in _alike([spec for _, spec in fresh], starts)
        for i in range(0, len(runs), largest)
    ]
    limit = max(1, limit_parallel // len(arrays)) if limit_parallel and arrays else None
    for part, start in arrays:
        job_id = _submit(root, part, start, code, limit)
        at_once = f", {limit} at a time" if limit else ""
        print(f"job array {job_id}: {len(part)} points on {part[0].cluster.name}{at_once}")
        if start is not None:
            print(start.describe_share())


def _tokens(spec: RunSpec) -> str:
    """What tells a point's tokens from others': those that it has begun with, else its texts."""
    begun_with = RunDir(spec.run_dir).data
    return begun_with.read_text() if begun_with.exists() else str(spec.data)


def _submitted_alone(journal: Path) -> bool:
    """Whether a job of its own, as of `arriero resume`, is queued or runs. Those of arrays are in the sweep's own journals."""
    return journal.exists() and "." not in json.loads(journal.read_text())["token"] and find(journal) is not None


def _alike(runs: Sequence[RunSpec], starts: Mapping[str, Start | None]) -> list[tuple[list[RunSpec], Start | None]]:
    """An array's tasks all ask for the same, and begin together."""
    found: dict[str, tuple[list[RunSpec], Start | None]] = {}
    for run in runs:
        start = starts[run.name]
        found.setdefault(f"{run.cluster} {start and start.start_s}", ([], start))[0].append(run)
    return list(found.values())


def _submit(root: Path, runs: Sequence[RunSpec], start: Start | None, code: str, limit: int | None) -> str:
    """Of runs with one cluster."""
    token = uuid.uuid4().hex
    folder = root / "submissions"
    folder.mkdir(exist_ok=True)
    lines = folder / f"{token}.txt"
    lines.write_text("".join(f"{run.run_dir}\n" for run in runs))
    journal = {
        "points": [run.name for run in runs],
        "job_id": None,
        "time_s": time.time(),
        "run_dir": str(folder.resolve()),
    }
    request = JobRequest(
        name=root.name,
        entry=launching.WORKER,
        run_dir=str(root),
        cluster=runs[0].cluster,
        code=code,
        token=token,
        begin=launching.begin(start),
        exclude=tuple(excluded(RunDir(runs[0].run_dir).lemons)),
        array=ArrayRequest(run_dirs=str(lines), count=len(runs), limit_parallel=limit),
    )
    with only_one(folder / f"{token}.lock") as lock:
        launching._write(folder / f"{token}.json", json.dumps(journal))
        job_id = submit_array(request, lock)
    _submitted(root, folder / f"{token}.json", job_id)
    return job_id


def _submitted(root: Path, path: Path, job_id: str) -> None:
    """Into the journal, and into each point's own, so that `arriero status` and `cancel` know its job."""
    journal = json.loads(path.read_text())
    for task, name in enumerate(journal["points"]):
        point = RunDir((root / name).resolve())
        entry = {
            "token": f"{path.stem}.{task}",
            "job_id": f"{job_id}_{task}",
            "time_s": time.time(),
            "run_dir": str(point.root),
        }
        launching._write(point.submission, json.dumps(entry))
    launching._write(path, json.dumps({**journal, "job_id": job_id}))


def live_points(root: Path) -> dict[str, str] | None:
    """Slurm's word for each point that is queued or runs; None where Slurm does not answer. Mends journals that a kill left
    without their array."""
    paths = sorted((root / "submissions").glob("*.json"))
    if not paths:
        return {}
    found_there = ((path, json.loads(path.read_text())) for path in paths)
    journals = {path: journal for path, journal in found_there if not queue.written_for(path, journal)}  # no copies
    for path, journal in journals.items():
        if not journal["job_id"]:
            sbatch_settled(path.with_suffix(".lock"))
    jobs = queue.queued()
    if jobs is None:
        return None
    found: dict[str, str] = {}
    for path, journal in journals.items():
        job_id = journal["job_id"]
        if not job_id and (job_id := array_of(path.stem, jobs)):
            _submitted(root, path, job_id)
        for task, name in enumerate(journal["points"]):
            job = jobs.get(f"{job_id}_{task}")
            if job is not None and job.live:
                found[name] = job.state
    return found


def wait_for(root: Path) -> None:
    """Until no point is queued or runs any more."""
    while live_points(root) != {}:  # also where Slurm does not answer for a while
        time.sleep(_LOOK_S)
