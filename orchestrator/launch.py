"""`arriero launch`: a configuration becomes a run directory and a job; run again, the same command goes on."""

import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from importlib import metadata
from pathlib import Path, PurePath
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from dashboards.curve import loss_curve_svg
from dashboards.wandb_run import has_key
from model.checkpoint.policy import RUN, of_another_run
from model.checkpoint.storage import Storage
from model.data.prepare import OtherTokens, PreparedData, prepare, reopen
from orchestrator import spec as specs
from orchestrator.carbon_report import carbon_sentence
from orchestrator.console import plain_console
from orchestrator.energy.carbon import Start, start_of
from orchestrator.errors import Failure, StoppedUnsaved, UserError
from orchestrator.plan import forecast
from orchestrator.record import Event, JsonlWriter, StepRecord, kept_steps, read_all_steps, read_events, utc_now
from orchestrator.run_dir import SWEEP, RunDir
from orchestrator.show import write_page
from orchestrator.snapshot import snapshot
from orchestrator.spec import RunSpec
from orchestrator.spikes.watch import stopped_for_a_person
from slurm.lemons import excluded
from slurm.request import CannotSubmit, JobRequest, Refused
from slurm.submit import Job, find, forget, sbatch_script, submit, submit_once

WORKER = "orchestrator.worker:main"
_STRIPE = 0.25  # seconds between two looks at a run that is followed

_SHOWN = set(
    "evaluated resumed withheld recomputed spike rewound recovered budget faults save_failed passed_over stopped"  # noqa: SIM905
    " hung restarted straggler save_interval profiled time_limit".split()
)

# What may change between two starts of one run.
_MAY_CHANGE = {*specs.WHERE_AND_HOW, "eval_every_steps"}


def launch(spec: RunSpec, overrides: Sequence[str], dry_run: bool = False) -> int:
    """Makes or finds the run directory, prepares the data, submits; on this machine also follows the run to its end."""
    console = plain_console()
    asked, spec = spec.layout, forecast.resolved(spec)
    run_dir, now_s = RunDir(spec.run_dir.resolve()), time.time()
    if (run_dir.root / SWEEP).exists() and not run_dir.spec.exists():
        raise UserError(f"{_short(run_dir.root)} is the directory of a sweep: give this run another name (name=...)")
    for above in PurePath(spec.name).parents[:-1] if not run_dir.spec.exists() else ():
        if RunDir(Path(spec.run_root) / above).spec.exists():
            raise UserError(
                f"name={spec.name} lies in the directory of the run {above}: give it another name (name=...)"
            )
    _refuse_changed(run_dir, spec)
    if dry_run:
        return _dry_run(spec, run_dir, greenest(spec, forecast_of(spec, now_s), now_s))
    if is_finished(run_dir):
        console.print(f"{spec.name} is finished: all {spec.steps:,} steps are trained.")
        _print_summary(console, spec, run_dir)
        return 0
    if why := stopped_for_a_person(read_events(run_dir.events), spec.spikes):
        raise UserError(
            f"{_short(run_dir.root)} was stopped for a person to look at it.\n{why}\n"
            "To go on from its newest checkpoint, change what spikes.* allows, or choose spikes=watch."
        )
    if job_id := _live_job(console, spec, run_dir):
        if spec.cluster.kind != "slurm":
            raise UserError(
                f"{_short(run_dir.root)} is in the queue of Slurm already, or runs: job {job_id}. `arriero cancel "
                f"{_short(run_dir.root)}` first, or launch another run with name=..."
            )
        console.print(f"{spec.name} is in the queue already, or runs: job {job_id}")
        for line in _differences(run_dir, spec).values():
            console.print(f"  not for that job: {line}; cancel it and launch again")
        _print_what_next(console, run_dir)
        return 0
    if run_dir.is_at_work():
        raise UserError(
            f"{_short(run_dir.root)} is at work already: see it with `arriero watch {_short(run_dir.root)}`, or launch "
            f"another run with name=..."
        )
    if asked != spec.layout:
        console.print(f"layout chosen      {forecast.layout_sentence(spec.layout)}")
    expected = forecast_of(spec, now_s)
    start = greenest(spec, expected, now_s)
    _ask_store(spec, run_dir)
    _ask_gpus(spec)
    if cpus := on_cpus(spec):
        console.print(cpus)
    if spec.dashboard.wandb == "online" and not has_key():
        console.print(
            "not mirrored       W&B has no key here (WANDB_API_KEY, wandb login); `arriero dashboard sync` can upload it later"
        )
    if expected is None:
        console.print(f"no forecast        {forecast.why_no_forecast(spec)} (docs/plan.md)")
    else:
        console.print(forecast.sentence(expected))
        for text in expected.assumed:
            console.print(f"assumed            {text}")
    prepared = prepared_for(console, spec, run_dir)
    _print_mix(console, spec, prepared)
    is_new = not run_dir.root.exists()
    write_run_dir(spec, run_dir, overrides, prepared)  # last: what was refused until here leaves the name free
    write_plan(run_dir, expected)
    run_dir.cancelled.unlink(missing_ok=True)
    if spec.cluster.kind == "slurm":
        try:
            return _submit(console, spec, run_dir, start)
        except Refused:
            if is_new:
                forget(run_dir.submission, run_dir.root)
            raise
    before = len(read_events(run_dir.events))
    job = submit(JobRequest(name=spec.name, entry=WORKER, run_dir=str(run_dir.root), cluster=spec.cluster))
    console.print(f"job {job.id} on {spec.cluster.name}, {spec.cluster.gpus} rank(s); logs in {_short(run_dir.logs)}")
    _follow(console, spec, run_dir, job, before)
    if failure := job.failure():
        _tell_failed(run_dir, job.id, failure)
        _write_page(console, run_dir)
        raise Failure(f"the run failed; its logs are in {_short(run_dir.logs)}\n{failure}")
    if (last := _newest(_of_job(read_events(run_dir.events), job.id), "failed")) is not None:
        raise Failure(f"the run failed: {last.detail}")
    if not is_finished(run_dir):
        stopped = _newest(_of_job(read_events(run_dir.events), job.id), "stopped")
        _write_page(console, run_dir)
        if stopped is None:
            raise StoppedUnsaved(f"the ranks ended without a last word; their logs are in {_short(run_dir.logs)}")
        if (saved_step := stopped.data.get("saved_step")) != stopped.step:
            newest = "none" if saved_step is None else f"of step {saved_step:,}"
            raise StoppedUnsaved(
                f"stopped at step {stopped.step:,} of {spec.steps:,}, and not saved: the newest checkpoint is {newest}. Mend "
                f"what the save_failed events in {_short(run_dir.events)} tell; the same command goes on from there"
            )
        why = stopped.data.get("why") or "SIGTERM"
        way_on = "To go on, run the same command again" if why.startswith("SIG") else why
        console.print(f"\nStopped and saved at step {stopped.step:,} of {spec.steps:,}. {way_on}.")
        return 0
    _print_summary(console, spec, run_dir)
    return 0


def _live_job(console: Console, spec: RunSpec, run_dir: RunDir) -> str | None:
    try:
        return find(run_dir.submission)
    except CannotSubmit:
        if spec.cluster.kind == "slurm" or shutil.which("squeue"):
            raise
    console.print("not asked          whether Slurm has a job of this run: this machine has no squeue")
    return None


def _tell_failed(run_dir: RunDir, job_id: str, failure: str) -> None:
    """What `status` and the page say of a run whose ranks could tell nothing themselves any more."""
    if _newest(_of_job(read_events(run_dir.events), job_id), "failed") is not None:
        return
    record, cause = last_record(run_dir), failure.strip().splitlines()[0]
    step = record.step if record else 0
    # A full disk hides no failure.
    with contextlib.suppress(OSError), JsonlWriter(run_dir.events / "supervise.jsonl") as told:
        told.write(Event(time_utc=utc_now(), kind="failed", step=step, detail=cause, data={"cause": "crash"}))


def _request(spec: RunSpec, run_dir: RunDir, start: Start | None, dry_run: bool = False) -> JobRequest:
    code = snapshot(run_dir.code, dry_run) if spec.cluster.kind == "slurm" else None
    return JobRequest(
        name=spec.name,
        entry=WORKER,
        run_dir=str(run_dir.root),
        cluster=spec.cluster,
        code=str(code) if code else None,
        begin=begin(start),
        exclude=tuple(excluded(run_dir.lemons)),
    )


def begin(start: Start | None) -> str | None:
    """As sbatch --begin takes it."""
    return f"now+{max(0, round(start.start_s - time.time()))}seconds" if start else None


def _dry_run(spec: RunSpec, run_dir: RunDir, start: Start | None) -> int:
    """Prints what would be submitted, and writes nothing."""
    if spec.cluster.kind != "slurm":
        raise UserError(
            f"--dry-run prints the sbatch script, and cluster={spec.cluster.name} is no Slurm: choose cluster=slurm"
        )
    if cpus := on_cpus(spec):
        print(cpus, file=sys.stderr)  # beside the script
    print(
        sbatch_script(replace(_request(spec, run_dir, start, dry_run=True), token="set-when-it-is-submitted")), end=""
    )
    return 0


def _ask_store(spec: RunSpec, run_dir: RunDir) -> None:
    """Before a start here, whether the place of its checkpoints takes a file, else all steps would be lost, and is no other
    run's. Under Slurm the ranks ask."""
    url = spec.checkpoint.url
    if spec.cluster.kind != "local" or not url:
        return
    try:
        storage, probe = Storage(url, retries=0), f".asked-{uuid.uuid4().hex}"
        storage.put(probe, b"")
        storage.remove_file(probe)
        owner = storage.read(RUN).decode().strip() if RUN in storage.list() else ""
    except Exception as error:  # whatever the store's client raises
        raise Failure(f"checkpoint.url={url} takes no file: {error}") from None
    mine = run_dir.identity() or f"{spec.name} (new)"
    if owner and owner != mine:
        raise UserError(of_another_run(url, owner, mine))


def _ask_gpus(spec: RunSpec) -> None:
    """Before ranks start on this machine's GPUs, whether torch finds one for each."""
    if spec.cluster.kind != "local" or spec.gpu.device != "cuda":
        return
    found, ranks = _gpus_here(), spec.cluster.gpus_per_node
    if found < ranks:
        raise UserError(
            f"gpu={spec.gpu.name} needs a GPU for each of cluster.gpus_per_node={ranks} rank(s), and torch finds {found} on this "
            "machine: choose gpu=cpu, fewer ranks, or cluster=slurm where the GPUs are"
        )


@cache  # the points of a sweep share it
def _gpus_here() -> int:
    """As torch counts them, which stays out of this process."""
    words = [sys.executable, "-P", "-c", "import torch; print(torch.cuda.device_count())"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failure(f"torch could not be asked for GPUs: {done.stderr[-2000:].strip()}")
    return int(done.stdout.split()[-1])


def on_cpus(spec: RunSpec) -> str:
    """Said where the job asks Slurm for GPUs and its ranks compute on CPUs, as on a virtual cluster they should; else empty."""
    asks = spec.cluster.kind == "slurm" and "gpu" in f"{spec.cluster.gres} {spec.cluster.sbatch}"
    if spec.gpu.device != "cpu" or not asks:
        return ""
    return (
        f"computes on        CPUs (gpu={spec.gpu.name}), though {spec.cluster.gpus_per_node} GPUs a node are asked for: "
        "for GPUs choose gpu=h100, or what your cluster has"
    )


def forecast_of(spec: RunSpec, now_s: float) -> forecast.Plan | None:
    """None where there is none. Raises UserError where the run cannot fit or never ends."""
    if not forecast.why_no_forecast(spec):
        return forecast.plan(spec, now_s)
    if forecast.is_calibrated(spec):
        forecast.fitting_layout(spec)
    return None


def write_plan(run_dir: RunDir, expected: forecast.Plan | None) -> None:
    """A run is graded by what was expected at its first start."""
    if run_dir.plan.exists() and any(e.kind == "started" for e in read_events(run_dir.events)):
        return
    run_dir.plan.unlink(missing_ok=True)
    if expected is not None:
        _write(run_dir.plan, json.dumps(forecast.figures_json(expected), indent=1) + "\n")


def greenest(spec: RunSpec, expected: forecast.Plan | None, now_s: float) -> Start | None:
    """When a run with carbon.start=greenest begins; None for one that begins at once. Raises UserError."""
    config = spec.carbon
    if config.start != "greenest":
        return None
    if spec.cluster.kind != "slurm":
        raise UserError(
            f"carbon.start=greenest lets Slurm begin the job later, and cluster={spec.cluster.name} begins at once: "
            "choose a Slurm cluster, or carbon.start=now"
        )
    hours = expected.figures["hours"].central if expected else config.duration_h
    if hours is None:
        raise UserError(
            f"carbon.start=greenest must know how long the run takes, and {forecast.why_no_forecast(spec)} for a forecast: "
            "set carbon.duration_h"
        )
    return start_of(config, hours, now_s)


def _submit(console: Console, spec: RunSpec, run_dir: RunDir, start: Start | None) -> int:
    if any(
        e.kind == "failed" for e in read_events(run_dir.events)[-1:]
    ):  # a person has looked: crashes are counted anew
        with JsonlWriter(run_dir.events / "supervise.jsonl") as events:
            events.write(Event(time_utc=utc_now(), kind="resumed_by_hand", step=0, detail="launched again by hand"))
    request = _request(spec, run_dir, start)
    if request.exclude:
        console.print(
            f"left out           {', '.join(request.exclude)}: let jobs down lately ({_short(run_dir.lemons)})"
        )
    if start is not None:
        kwh = json.loads(run_dir.plan.read_text())["site_energy_kwh"]["central"] if run_dir.plan.exists() else None
        console.print(start.describe(kwh) if kwh else start.describe_share())
    job_id, new = submit_once(request, run_dir.submission)
    nodes = f"{spec.cluster.nodes} node(s) of {spec.cluster.gpus_per_node} GPUs on {spec.cluster.name}"
    console.print(
        f"job {job_id} {'is queued' if new else 'was queued already'}: {nodes}; it goes on by itself until the run is finished"
    )
    _print_what_next(console, run_dir)
    return 0


def _print_what_next(console: Console, run_dir: RunDir) -> None:
    for word in ("status", "logs", "watch", "cancel"):
        console.print(f"  arriero {word} {_short(run_dir.root)}")


def is_finished(run_dir: RunDir) -> bool:
    return any(e.kind == "finished" for e in read_events(run_dir.events))


def write_run_dir(spec: RunSpec, run_dir: RunDir, overrides: Sequence[str], prepared: PreparedData) -> None:
    """The run directory of a first start, or the check that this start continues the run that is there."""
    run_dir.root.mkdir(parents=True, exist_ok=True)
    _write(run_dir.spec, specs.to_yaml(spec), first=True)
    _refuse_changed(run_dir, spec)  # also where another launch of this name was faster
    _write(run_dir.spec, specs.to_yaml(spec))
    identity = run_dir.identity() or f"{spec.name}-{uuid.uuid4().hex[:12]}"  # a copy is a run of its own from here on
    _write(run_dir.run_id, f"{identity}\n{run_dir.root}\n", first=not run_dir.run_id.exists())
    _write(run_dir.data, f"{prepared.root.resolve()}\n")
    shutil.copyfile(prepared.root / "tokenizer.json", run_dir.tokenizer)
    _write(run_dir.overrides, "".join(f"{o}\n" for o in overrides))
    _write(run_dir.environment, json.dumps(_environment(), indent=1) + "\n")
    run_dir.code.mkdir(exist_ok=True)
    commit, diff = _code_version()
    _write(run_dir.code / "commit.txt", commit + "\n")
    _write(run_dir.code / "diff.patch", diff)


def _refuse_changed(run_dir: RunDir, spec: RunSpec) -> None:
    if changed := _changed(run_dir, spec):
        more = [f"... and {len(changed) - 12} more"] if len(changed) > 12 else []
        raise UserError(
            f"{run_dir.root} holds a run of the same name with another configuration:\n"
            + "\n".join(f"  - {line}" for line in [*changed[:12], *more])
            + "\nTo start another run, choose another name (name=...); to go on with this one, leave these as they were."
        )


def _changed(run_dir: RunDir, spec: RunSpec) -> list[str]:
    """What differs from the run that is there, among what may not; nothing where there is none."""
    return [line for key, line in _differences(run_dir, spec).items() if key.split(".")[0] not in _MAY_CHANGE]


def _differences(run_dir: RunDir, spec: RunSpec) -> dict[str, str]:
    """What differs from the run that is there, by key, but for where it lies; nothing where there is none."""
    if not run_dir.spec.exists() or run_dir.spec.read_text(encoding="utf-8") == specs.to_yaml(spec):
        return {}  # the same text needs no parsing, which takes a tenth of a second of each point of a sweep
    before, now = _flat(specs.as_dict(specs.load(run_dir.spec))), _flat(specs.as_dict(spec))
    return {
        key: f"{key} was {before.get(key)}, now {now.get(key)}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key not in ("name", "run_root")  # a directory may be moved, and renamed
    }


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{prefix}.{key}" if prefix else key).items()}


def _write(path: Path, text: str, first: bool = False) -> None:
    """All or nothing: a reader never sees half a file. `first`: what is there already stays."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    if not first:
        temporary.replace(path)
        return
    try:
        os.link(temporary, path)
    except OSError:  # it is there, or this file system has no links
        with contextlib.suppress(FileExistsError), path.open("x", encoding="utf-8") as file:
            file.write(text)
    temporary.unlink()


@cache  # the launches of a sweep share it
def _code_version() -> tuple[str, str]:
    """The commit of the code that runs and what differs from it; the package's version where it is no checkout."""
    root = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str | None:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False)
        return done.stdout if done.returncode == 0 else None

    if (root / ".git").exists() and shutil.which("git") and (commit := git("rev-parse", "HEAD")):
        return commit.strip(), git("diff", "HEAD") or ""
    return f"arriero {metadata.version('arriero')} (no git, or no checkout)", ""


@cache
def _environment() -> dict[str, Any]:
    packages = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    return {
        "time_utc": utc_now(),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "host": platform.node(),
        "directory": str(Path.cwd()),  # that relative paths in spec.yaml start from
        "cpus": os.cpu_count(),
        "packages": dict(sorted(packages.items())),
    }


def prepared_for(console: Console, spec: RunSpec, run_dir: RunDir) -> PreparedData:
    """The tokens of the run's first start, whatever has become of the texts since; prepared where there was none."""
    if not run_dir.data.exists():
        return _prepare(console, spec)
    before = Path(run_dir.data.read_text().strip())
    for place in (
        before,
        Path(spec.data.cache) / before.name,
    ):  # moved with the run, and named from where this is launched
        if (place / "manifest.json").exists():
            try:
                return reopen(place)
            except ValueError as error:
                raise UserError(str(error)) from None
    return _prepare(console, spec, before)


def _prepare(console: Console, spec: RunSpec, before: Path | None = None) -> PreparedData:
    """`before`: the folder of tokens that the run has begun with. Others are refused, before any is made."""
    started = time.monotonic()
    said: list[str] = []

    def progress(what: str, documents: int, tokens: int) -> None:
        if what not in said:
            said.append(what)
            console.print(f"  {what} ...")

    try:
        prepared = prepare(spec.data, progress, expected=before.name if before else None)
    except OtherTokens as error:
        raise UserError(
            f"{spec.name} trains on the tokens of {before}, which is neither there nor in data.cache={spec.data.cache}, and its "
            f"texts would give others now ({error}): put that folder, or the texts as they were, back, or launch another run "
            "with name=..."
        ) from None
    except ValueError as error:
        raise UserError(str(error)) from None
    except OSError as error:  # a full disk names no file
        raise Failure(f"the data could not be prepared in data.cache={spec.data.cache}: {error}") from None
    if said:
        console.print(f"data prepared in {time.monotonic() - started:.0f} s: {_short(prepared.root)}")
    return prepared


def _print_mix(console: Console, spec: RunSpec, prepared: PreparedData) -> None:
    try:
        loader = spec.loader(prepared)
    except ValueError as error:
        raise UserError(str(error)) from None
    console.print(f"{spec.steps:,} steps of {spec.batch_tokens:,} tokens, from")
    for name, epochs in loader.epochs(spec.steps).items():
        tokens, share = prepared.sources[name].train_tokens, spec.data.sources[name].proportion
        console.print(f"  {name:28} {share:6.1%} of the rows, {tokens:>11,} tokens, {epochs:.2f} epochs")


def _follow(console: Console, spec: RunSpec, run_dir: RunDir, job: Job, events_before: int) -> None:
    """Shows the run until its job ends. The first Ctrl-C asks the ranks to save and end."""
    interrupted = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        if interrupted:
            raise KeyboardInterrupt
        interrupted = True
        console.print("\nsaving, then stopping (press Ctrl-C again to leave it to itself)")
        job.stop()

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    view = _View(console, spec, run_dir, events_before)
    try:
        with view.progress:
            while job.running():
                view.update()
                time.sleep(_STRIPE)
            view.update()
    except KeyboardInterrupt:
        console.print(f"left to itself: job {job.id} goes on saving; run the same command again later")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _View:
    """The progress bar and the lines above it. Where the output is no terminal, a line now and then instead of a bar."""

    def __init__(self, console: Console, spec: RunSpec, run_dir: RunDir, events_shown: int) -> None:
        self.console, self.spec, self.run_dir = console, spec, run_dir
        self.events_shown = events_shown
        self.progress = Progress(
            TextColumn("step {task.completed:,}/{task.total:,}"),
            BarColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task("training", total=spec.steps, loss="-", speed="starting")
        self.line_every = max(1, spec.steps // 20)
        self.line_due = 0

    def update(self) -> None:
        events = read_events(self.run_dir.events)
        for event in events[self.events_shown :]:
            if event.kind in _SHOWN:
                detail = event.detail.removeprefix(f"step {event.step}: ")
                self.console.print(f"  step {event.step:>6,}  {detail}")
        self.events_shown = len(events)
        newest = last_record(self.run_dir)
        if newest is None:
            return
        self.progress.update(
            self.task, completed=newest.step, loss=f"{newest.loss:.3f}", speed=f"{newest.tokens_per_s:,.0f} tokens/s"
        )
        if not self.console.is_terminal and newest.step >= self.line_due:
            left_s = (self.spec.steps - newest.step) * newest.step_s
            self.console.print(
                f"  step {newest.step:>6,}/{self.spec.steps:,}  loss {newest.loss:.3f}  "
                f"{newest.tokens_per_s:,.0f} tokens/s  {left_s:.0f} s left"
            )
            self.line_due = newest.step + self.line_every


def last_record(run_dir: RunDir) -> StepRecord | None:
    """The newest step on disk, from the end of the newest file: the same speed at a million steps."""
    from orchestrator.record import read_last

    for path in sorted(run_dir.records.glob("attempt-*.jsonl"), reverse=True):
        if record := read_last(path):
            return record
    return None


def _print_summary(console: Console, spec: RunSpec, run_dir: RunDir) -> None:
    """The last lines: what was reached, and where everything is."""
    steps = kept_steps(read_all_steps(run_dir.records))
    events = read_events(run_dir.events)
    evaluated = [e for e in events if e.kind == "evaluated" and "loss" in e.data]
    first, last = steps[0], steps[-1]
    unigram: float | None = None
    with contextlib.suppress(ValueError, OSError):  # tokens that are gone hide nothing else
        prepared = PreparedData.load(run_dir.data.read_text().strip())
        unigram = prepared.unigram_nats({n: s.proportion for n, s in spec.data.sources.items()})
    console.print()
    console.print(
        f"loss               {first.loss:.3f} at step {first.step}, {last.loss:.3f} at step {last.step:,} (nats per token)"
    )
    if evaluated:
        console.print(f"held-out loss      {evaluated[-1].data['loss']:.3f}")
    if unigram is not None:
        console.print(f"unigram level      {unigram:.3f}, what guessing by word frequency alone would give")
    console.print(f"tokens             {last.tokens:,} in {sum(s.step_s for s in steps):.0f} s of steps")
    if spec.carbon.measure:
        console.print(carbon_sentence(run_dir.root), soft_wrap=True)
    curve = [(e.step, float(e.data["loss"])) for e in evaluated]
    _write(
        run_dir.loss_curve, loss_curve_svg(spec.name, [s.step for s in steps], [s.loss for s in steps], curve, unigram)
    )
    sample = _newest(events, "finished")
    if sample and sample.data.get("sample"):
        console.print("\na held-out beginning, and how the model goes on after ⟶")
        console.print("  " + str(sample.data["sample"]).replace("\n", "\n  "))
    console.print(f"\nrun directory      {_short(run_dir.root)}   (what is what: docs/run_directory.md)")
    console.print(f"  loss curve       {_short(run_dir.loss_curve)}")
    console.print(f"  checkpoints      {spec.checkpoint.url or _short(run_dir.checkpoints)}")
    console.print(f"  records, events  {_short(run_dir.records)}, {_short(run_dir.events)}")
    console.print(f"  logs             {_short(run_dir.logs)}")
    _write_page(console, run_dir)


def _write_page(console: Console, run_dir: RunDir) -> None:
    """The run as one HTML file. It is made from the disk and can be made again, so its failure is told and no more."""
    try:
        page, _, _ = write_page([run_dir.root])
    except Exception as error:
        console.print(f"\nno page was made: {error}")
        return
    if specs.load(run_dir.spec).dashboard.wandb == "offline":
        console.print(f"\nto upload it to W&B: arriero dashboard sync {_short(run_dir.root)}")
    console.print(f"\npage               {_short(page)}   (opens in a browser, needs no network)")


def _newest(events: Sequence[Event], kind: str) -> Event | None:
    return next((e for e in reversed(events) if e.kind == kind), None)


def _of_job(events: Sequence[Event], job_id: str) -> list[Event]:
    """Of the attempts that this job has made: the same run may have been launched elsewhere, too."""
    mine = {e.attempt for e in events if e.kind == "started" and e.data.get("job_id") == job_id}
    return [e for e in events if e.attempt in mine]


def _short(path: Path) -> str:
    """As the user would type it from here."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
