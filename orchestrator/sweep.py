"""`arriero launch -m`: one command, many runs. Which points there are, where each lives, and how they are run.

A sweep is a directory with a journal, `sweep.json`, and a run directory a point. A point is known by the content of its
overrides, whatever their order and whatever else is swept: the same command finds it again, finished or not. The journal
is written before anything is launched, and says only which points there are; how far each is stands in its run directory.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import create_config_search_path
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from orchestrator import launch as launching
from orchestrator import spec as specs
from orchestrator.columns import read_columns
from orchestrator.errors import Failure, StoppedUnsaved, UserError
from orchestrator.plan import forecast
from orchestrator.record import Event, JsonlWriter, read_events, utc_now
from orchestrator.run_dir import SWEEP as JOURNAL
from orchestrator.run_dir import RunDir
from orchestrator.spec import RunSpec
from orchestrator.sweep_optuna import Search, optimise, search_of
from orchestrator.sweep_slurm import submit_points, wait_for

# Where and how a point runs, not what it computes: another cluster or a finer log makes no other point (unless it is swept).
_NOT_CONTENT = {*specs.WHERE_AND_HOW, "run_root", "name"}


@dataclass(frozen=True, kw_only=True)
class Point:
    id: str  # hash of its overrides' content
    directory: str  # its run directory's name in the sweep's directory
    overrides: list[str]  # without name and run_root, which the sweep gives


@dataclass(frozen=True, kw_only=True)
class Journal:
    points: list[Point]

    @staticmethod
    def read(root: Path) -> "Journal":
        """Raises UserError where there is none."""
        try:
            value = json.loads((root / JOURNAL).read_text(encoding="utf-8"))
            return Journal(points=[Point(**point) for point in value["points"]])
        except FileNotFoundError:
            raise UserError(f"{root} is no sweep: it has no {JOURNAL}. `arriero launch -m` makes one") from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{root / JOURNAL} cannot be read: {error}") from None

    def write(self, root: Path) -> None:
        """All or nothing, on the disk when it returns."""
        temporary = root / f".{JOURNAL}.{os.getpid()}"
        with temporary.open("w", encoding="utf-8") as file:
            json.dump({"format": 1, "points": [asdict(p) for p in self.points]}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(root / JOURNAL)


def expand(overrides: Sequence[str], config_dir: Path | None = None) -> tuple[str, list[Point]]:
    """The sweep's name and its points, of overrides in Hydra's grammar. Raises UserError."""
    parsed = _parse(overrides, config_dir)
    try:
        lines = BasicSweeper.split_arguments(parsed, None)[0]
    except HydraException as error:
        raise UserError(f"{str(error).splitlines()[0]} ({' '.join(overrides)})") from None
    swept = {o.get_key_element() for o in parsed if o.is_sweep_override()}
    points = {point.id: point for point in (_point(line, swept) for line in lines)}
    return _sweep_name(parsed, swept), list(points.values())


def _parse(overrides: Sequence[str], config_dir: Path | None) -> list[Override]:
    search = create_config_search_path("pkg://hydra_conf")
    if config_dir:
        search.append("user", f"file://{config_dir.resolve()}")
    try:
        loader = ConfigLoaderImpl(search)  # glob(*) looks there
        parsed = OverridesParser.create(loader).parse_overrides(list(overrides))
    except HydraException as error:
        raise UserError(f"{str(error).splitlines()[0]} ({' '.join(overrides)})") from None
    swept = {o.get_key_element() for o in parsed if o.is_sweep_override()}
    if clash := swept & {"name", "run_root"}:
        raise UserError(f"{', '.join(sorted(clash))} cannot be swept: each point gets its own directory in the sweep's")
    return parsed


def _point(line: Sequence[str], swept: set[str]) -> Point:
    """`line`: overrides of one value each."""
    values = dict(part.split("=", 1) for part in line if "=" in part)
    content = sorted(p for p in line if p.split("=")[0] in swept or _top(p) not in _NOT_CONTENT)
    readable = ",".join(f"{key.rsplit('.', 1)[-1]}={values[key]}" for key in sorted(swept))
    readable = re.sub(r"[^A-Za-z0-9.,=+-]+", "_", readable)[:80] or "point"
    return Point(
        id=(name := _hash(content)),
        directory=f"{readable}-{name}",
        overrides=[p for p in line if p.split("=")[0] not in ("name", "run_root")],
    )


def _top(override: str) -> str:
    return re.split(r"[.@=]", override.lstrip("+~"), maxsplit=1)[0]


def _hash(content: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(content).encode()).hexdigest()[:10]


def _sweep_name(parsed: Sequence[Override], swept: set[str]) -> str:
    """`name=...` where it is given; else what is swept and a hash of what is fixed, so that more values extend the sweep."""
    for override in parsed:
        if override.get_key_element() == "name":
            return str(override.get_value_element_as_str()).strip("'\"")
    fixed = [
        f"{o.get_key_element()}={'' if o.is_delete() else o.get_value_element_as_str()}"
        for o in parsed
        if not o.is_sweep_override()
    ]
    content = sorted(f for f in fixed if _top(f) not in _NOT_CONTENT)
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", f"sweep-{'+'.join(sorted(swept))}")[:80] + f"-{_hash(content)}"


def launch_sweep(
    overrides: Sequence[str],
    config_dir: Path | None = None,
    limit_parallel: int | None = None,
    wait: bool = False,
    halving: int | None = None,
) -> int:
    """Runs what is missing or failed of the sweep that `overrides` describe. 0 when none of it failed, or a point was stopped
    and saved; else 1.

    On Slurm it comes back when all is queued, or with `wait` when all has ended. With `hydra/sweeper=optuna` the points are
    Optuna's choice, and it waits for each batch.

    `halving`: successive halving (arXiv 1502.07943) from that step on: every point trains so far, the better half goes on to
    twice as many steps, and so on.
    """
    try:
        return _launch_sweep(overrides, config_dir, limit_parallel, wait, halving)
    except _Stopped as stopped:  # by Ctrl-C, which the point has heard itself
        print(f"{stopped}. To go on, run the same command again.")
        return 0 if stopped.well else 1


def _launch_sweep(
    overrides: Sequence[str], config_dir: Path | None, limit_parallel: int | None, wait: bool, halving: int | None
) -> int:
    of_hydra = [o for o in overrides if o.startswith(("hydra.", "hydra/"))]
    search = search_of({key: value for key, _, value in (o.partition("=") for o in of_hydra)})
    ours = [o for o in overrides if o not in of_hydra]
    if search is not None:
        if halving is not None:
            raise UserError(
                "--halving is of a grid of points; Optuna's are chosen by their last loss: give one of both"
            )
        return _launch_search(search, ours, config_dir, limit_parallel, wait)
    name, points = expand(ours, config_dir)
    resolved = _composed(points, config_dir)
    first = resolved[0]
    kinds = {s.cluster.kind for s in resolved}
    if len(kinds) > 1:
        raise UserError(
            f"one sweep runs on Slurm or on this machine, and these points ask for {' and '.join(sorted(kinds))}"
        )
    _refuse_limit(limit_parallel, first)
    if halving is not None:
        _refuse_unequal(halving, resolved)
        _refuse_unwaited("--halving", first, wait)
    root = _root(first, name)
    with _alone(root):
        points = _entered(root, points)
        for point, spec in zip(points, resolved, strict=True):
            _place(spec, point, root)
        todo = [(p, s) for p, s in zip(points, resolved, strict=True) if not _finished(s)]
        shown = launching._short(root)
        print(f"sweep {shown}: {len(points)} points, {len(points) - len(todo)} finished, {len(todo)} to run")
        if first.cluster.kind == "slurm" and not wait:
            _pause_at(todo, None)
            submit_points(root, todo, limit_parallel)
            return 0
        with _stoppable(first):
            if halving is not None:
                ok = _halve(root, list(zip(points, resolved, strict=True)), halving, limit_parallel)
            else:
                ok = _train(root, todo, limit_parallel)
            print(
                f"{sum(_finished(s) for _, s in todo)} of {len(todo)} finished; "
                f"see them with `arriero sweep report {shown}`"
            )
            return 0 if ok else 1


def _launch_search(
    search: Search, overrides: Sequence[str], config_dir: Path | None, limit_parallel: int | None, wait: bool
) -> int:
    """The points that Optuna chooses, each a run like any other: one that is finished is not trained again."""
    parsed = _parse(overrides, config_dir)
    swept = [o for o in parsed if o.is_sweep_override()]
    keys = {o.get_key_element() for o in swept}
    if not swept:
        raise UserError("nothing is left to choose: give Optuna ranges, such as optim.lr=tag(log,interval(1e-4,1e-2))")
    if where := sorted(k for k in keys if _top(k) in _NOT_CONTENT):
        raise UserError(f"{', '.join(where)} says where and how a run runs, which changes no loss: choose one value")
    fixed = list(BasicSweeper.split_arguments([o for o in parsed if not o.is_sweep_override()], None)[0][0])
    first = specs.compose(fixed, config_dir)
    _refuse_limit(limit_parallel, first)
    _refuse_unwaited("hydra/sweeper=optuna", first, wait)
    root = _root(first, _sweep_name(parsed, keys))
    shown = launching._short(root)

    def run(lines: list[list[str]]) -> list[float | None]:
        chosen = [_point(line, keys) for line in lines]
        points = _entered(root, list({p.id: p for p in chosen}.values()))
        runs: dict[str, RunSpec] = {}
        for point, spec in zip(points, specs.compose_many([p.overrides for p in points], config_dir), strict=True):
            if isinstance(spec, str):
                print(f"{point.directory} cannot run: {spec}", flush=True)
                continue
            _place(spec, point, root)
            if _finished(spec):
                print(f"{point.directory} is finished already: its loss is taken", flush=True)
            else:
                try:
                    launching.forecast_of(forecast.resolved(spec), time.time())
                except UserError as error:
                    print(f"{point.directory} cannot run: {error}", flush=True)
                    continue
            runs[point.id] = spec
        _train(root, [(p, runs[p.id]) for p in points if p.id in runs and not _finished(runs[p.id])], limit_parallel)
        return [_last_loss(s) if (s := runs.get(p.id)) and _finished(s) else None for p in chosen]

    with _alone(root), _stoppable(first):
        print(
            f"sweep {shown}: {search.n_trials} trials, {search.n_jobs} at a time, chosen by Optuna ({search.sampler})"
        )
        content = sorted(f for f in fixed if _top(f) not in _NOT_CONTENT)
        ok = optimise(root, search, fixed, content, swept, run)
        print(f"see them with `arriero sweep report {shown}`")
        return 0 if ok else 1


def _place(spec: RunSpec, point: Point, root: Path) -> None:
    """A point's own directory, and its own place of checkpoints."""
    spec.name, spec.run_root = point.directory, str(root)
    if (begun := RunDir(spec.run_dir).spec).exists():  # also under another name of the sweep
        spec.checkpoint.url = specs.load(begun).checkpoint.url
    elif spec.checkpoint.url:
        spec.checkpoint.url = f"{spec.checkpoint.url.rstrip('/')}/{root.name}/{point.directory}"


def _root(spec: RunSpec, name: str) -> Path:
    """The sweep's directory, made. Raises UserError where the name is none, or a run's."""
    if wrong := specs.name_problems(name):
        raise UserError("\n".join(wrong))
    root = (Path(spec.run_root) / name).resolve()
    if RunDir(root).spec.exists() and not (root / JOURNAL).exists():
        raise UserError(f"{launching._short(root)} is the directory of a run: give this sweep another name (name=...)")
    root.mkdir(parents=True, exist_ok=True)
    return root


def _refuse_limit(limit_parallel: int | None, spec: RunSpec) -> None:
    if limit_parallel is not None and (limit_parallel < 1 or (limit_parallel > 1 and spec.cluster.kind == "local")):
        raise UserError(
            f"--limit-parallel {limit_parallel}: it must be at least 1, and on cluster=local, where each point takes the whole "
            f"machine, no more than 1"
        )


def _refuse_unwaited(what: str, spec: RunSpec, wait: bool) -> None:
    if spec.cluster.kind == "slurm" and not wait:
        raise UserError(
            f"{what} decides by what points have come to, so on Slurm this command must wait for them: add --wait (cut off, the "
            f"same command goes on)"
        )


@contextlib.contextmanager
def _stoppable(spec: RunSpec) -> Iterator[None]:
    """Says what Ctrl-C between two points, or while Slurm's are waited for, leaves."""
    try:
        yield
    except KeyboardInterrupt:
        queued = " What is queued or runs goes on by itself." if spec.cluster.kind == "slurm" else ""
        print(f"stopped.{queued} To go on, run the same command again.")
        raise


def _train(
    root: Path, todo: Sequence[tuple[Point, RunSpec]], limit_parallel: int | None, at: int | None = None
) -> bool:
    """Each to its end, or to step `at`, where it pauses; whether all came there."""
    if not todo:
        return True
    if todo[0][1].cluster.kind == "local":
        head = f"step {at}: " if at else ""
        return all([_run(f"{head}{n}/{len(todo)}", p, s, at) for n, (p, s) in enumerate(todo, 1)])
    _pause_at(todo, at)
    submit_points(root, todo, limit_parallel)
    wait_for(root)
    there = True
    for point, spec in todo:
        if _finished(spec):
            loss = _last_loss(spec)
            print(f"  {point.directory}: finished" + (f", loss {loss:.4f}" if loss is not None else ""), flush=True)
        elif at is None or _steps_done(spec) < at:
            last = next(iter(read_events(RunDir(spec.run_dir).events)[-1:]), None)
            print(
                f"  {point.directory}: not finished: {last.detail.splitlines()[0] if last else 'it never began'}",
                flush=True,
            )
            there = False
    return there


def _pause_at(todo: Sequence[tuple[Point, RunSpec]], step: int | None) -> None:
    for _, spec in todo:
        run_dir = RunDir(spec.run_dir)
        if step is None:
            run_dir.pause.unlink(missing_ok=True)
        else:
            run_dir.root.mkdir(parents=True, exist_ok=True)
            run_dir.pause.write_text(f"{step}\n")


def _last_loss(spec: RunSpec) -> float | None:
    """Held-out, or where none was taken the mean of the last tenth of the training losses. inf where it diverged."""
    run_dir = RunDir(spec.run_dir)
    held_out = [
        float(e.data["loss"]) for e in read_events(run_dir.events) if e.kind == "evaluated" and "loss" in e.data
    ]
    if held_out:
        return held_out[-1]
    columns = read_columns(run_dir.records)
    kept = columns.where(columns.kept())
    loss = kept["loss"][kept["step"] > 0.9 * spec.steps]
    return float(loss.mean()) if len(loss) else None


def _finished(spec: RunSpec) -> bool:
    return launching.is_finished(RunDir(spec.run_dir))


def _refuse_unequal(halving: int, resolved: Sequence[RunSpec]) -> None:
    """Losses of one step tell who is ahead only where a step is the same for all."""
    if halving < 1:
        raise UserError(f"--halving {halving} must be at least 1: the step of the first comparison")
    for name, values in (
        ("steps", {s.steps for s in resolved}),
        ("tokens in a step", {s.batch_tokens for s in resolved}),
        ("model.vocab_size", {s.model.vocab_size for s in resolved}),
        ("data", {str(s.data) for s in resolved}),
    ):
        if len(values) > 1:
            told = "" if name == "data" else f" ({', '.join(str(v) for v in sorted(values))})"
            raise UserError(
                f"--halving compares points by their loss at one step, and these differ in {name}{told}: sweep without it"
            )


def _halve(root: Path, points: list[tuple[Point, RunSpec]], first_step: int, limit_parallel: int | None) -> bool:
    """Whether none failed. Each comparison is of all who came so far, so that a command that was cut off decides alike again."""
    steps = points[0][1].steps
    alive, rung, ok = points, first_step, True
    while alive:
        at = min(rung, steps) if len(alive) > 1 else steps
        todo = [(p, s) for p, s in alive if not _finished(s) and _steps_done(s) < at]
        ok &= _train(root, todo, limit_parallel, at if at < steps else None)
        if at == steps:
            break
        losses = {p.id: loss for p, s in alive if (loss := _loss_at(s, at)) is not None}
        ranked = sorted(((losses[p.id], p.id, s) for p, s in alive if p.id in losses), key=lambda r: r[:2])
        keep = {name for _, name, _ in ranked[: (len(ranked) + 1) // 2]}
        for rank, (loss, name, spec) in enumerate(ranked, 1):
            if name not in keep and not _finished(spec) and not _dropped(spec):
                _tell(spec, "dropped", at, f"{rank} of {len(ranked)} at step {at}, with loss {loss:.4f}")
        alive = [(p, s) for p, s in alive if p.id in keep]
        print(f"at step {at} the better {len(keep)} of {len(ranked)} go on", flush=True)
        rung *= 2
    dropped = [s for _, s in points if not _finished(s) and _dropped(s)]
    saved = sum(steps - _steps_done(s) for s in dropped)
    print(
        f"halving: {len(dropped)} of {len(points)} points dropped, {saved / (steps * len(points)):.0%} of all steps saved"
    )
    return ok


def _dropped(spec: RunSpec) -> bool:
    events = read_events(RunDir(spec.run_dir).events)
    return bool(events) and events[-1].kind == "dropped"


def _steps_done(spec: RunSpec) -> int:
    newest = launching.last_record(RunDir(spec.run_dir))
    return newest.step if newest else 0


def _loss_at(spec: RunSpec, step: int) -> float | None:
    """Mean training loss of the tenth of the steps before `step`; None where it was not reached, or diverged."""
    columns = read_columns(RunDir(spec.run_dir).records)
    kept = columns.where(columns.kept())
    loss = kept["loss"][(kept["step"] > 0.9 * step) & (kept["step"] <= step)]
    reached = len(kept) and kept["step"][-1] >= step
    return float(loss.mean()) if reached and np.isfinite(loss).all() else None


def _tell(spec: RunSpec, kind: str, step: int, detail: str) -> None:
    with JsonlWriter(RunDir(spec.run_dir).events / "launcher.jsonl") as events:
        events.write(Event(time_utc=utc_now(), kind=kind, step=step, detail=detail), durable=True)


class _Stopped(Exception):
    def __init__(self, words: str, well: bool) -> None:
        super().__init__(words)
        self.well = well  # by hand, and saved


def _composed(points: Sequence[Point], config_dir: Path | None) -> list[RunSpec]:
    """Every point, checked before any is launched."""
    tried = specs.compose_many([p.overrides for p in points], config_dir)
    found = [t for t in tried if isinstance(t, RunSpec)]
    wrong = [f"{p.directory}: {t}" for p, t in zip(points, tried, strict=True) if isinstance(t, str)]
    if wrong:
        more = f"\n... and {len(wrong) - 5} more points" if len(wrong) > 5 else ""
        raise UserError(
            f"{len(wrong)} of {len(points)} points cannot run; nothing was launched.\n" + "\n".join(wrong[:5]) + more
        )
    return found


def _entered(root: Path, points: Sequence[Point]) -> list[Point]:
    """The points as the journal has them, those that are new added to it."""
    known = {p.id: p for p in Journal.read(root).points} if (root / JOURNAL).exists() else {}
    journal = Journal(points=[*known.values(), *(p for p in points if p.id not in known)])
    if len(journal.points) > len(known):
        journal.write(root)
    # A point keeps its directory, and takes what this command says of where and how it runs.
    return [Point(id=p.id, directory=known.get(p.id, p).directory, overrides=p.overrides) for p in points]


def _run(head: str, point: Point, spec: RunSpec, pause_step: int | None = None) -> bool:
    """One point to its end, or to `pause_step`; False where it failed. What its launch prints goes to logs/launch.txt; its
    failure is recorded and takes no other down."""
    run_dir = RunDir(spec.run_dir)
    if run_dir.is_at_work():
        print(f"{head}  {point.directory}: is at work already", flush=True)
        return False
    print(f"{head}  {point.directory} ...", flush=True)
    started = time.monotonic()
    run_dir.logs.mkdir(parents=True, exist_ok=True)
    _pause_at([(point, spec)], pause_step)
    failure = ""
    try:
        with (run_dir.logs / "launch.txt").open("a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
            launching.launch(spec, point.overrides)
    except StoppedUnsaved as error:
        raise _Stopped(f"stopped in {point.directory}: {error}", well=False) from None
    except (UserError, Failure) as error:
        failure = str(error)
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
    finally:
        run_dir.pause.unlink(missing_ok=True)
    took = f"{time.monotonic() - started:.0f} s"
    if failure:
        _tell(spec, "failed", 0, failure)
        print(f"  failed after {took}: {failure.splitlines()[0]}", flush=True)
        return False
    if not _finished(spec):
        if pause_step and _steps_done(spec) >= pause_step:
            return True
        stopped = launching._newest(read_events(run_dir.events), "stopped")
        why = stopped.data.get("why") if stopped else None
        by_hand = why in (None, "SIGINT", "SIGTERM")  # not by a budget or a time limit, which the others would meet too
        raise _Stopped(f"stopped in {point.directory}, saved" + ("" if by_hand else f": {why}"), well=by_hand)
    loss = _last_loss(spec)
    print(f"  finished in {took}" + (f", loss {loss:.4f}" if loss is not None else ""), flush=True)
    return True


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    """One command leads a sweep at a time; the system ends this with the process."""
    with (root / ".at_work").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{root} is led by another `arriero launch -m` already: see `arriero sweep status`"
            ) from None
        except OSError:  # no locks on this file system: each run's own lease still keeps one writer
            print(f"{root}: no locks here, so two commands could lead this sweep at once")
        yield
