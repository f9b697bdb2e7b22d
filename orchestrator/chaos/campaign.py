"""Runs the scenes, some beside each other, and prints their rows."""

import contextlib
import json
import shutil
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from orchestrator.chaos import judge
from orchestrator.chaos.judge import Losses, Row
from orchestrator.chaos.plan import PLAN, Planned
from orchestrator.chaos.scenes import SCENES, Scene, Skipped
from orchestrator.chaos.slurm_scenes import SLURM_SCENES, Cluster
from orchestrator.chaos.stage import TWO_RANKS, DidNotHold, Stage, ending_all, make_workplace
from orchestrator.console import plain_console
from orchestrator.errors import UserError
from slurm.virtual import VirtualCluster


def chosen(names: Sequence[str]) -> list[Planned]:
    """The planned faults of these names, or all. Raises UserError."""
    known = {p.name: p for p in PLAN}
    if unknown := [n for n in names if n not in known]:
        raise UserError(f"{unknown[0]} is no fault of the campaign: choose from {', '.join(known)}")
    return [p for p in PLAN if not names or p.name in names]


def campaign(names: Sequence[str], seed: int, parallel: int, folder: Path | None, as_json: bool) -> int:
    """0 where every fault that was done has passed, else 1. The runs are kept in `folder`, or where one failed."""
    planned = chosen(names)
    if parallel < 1:
        raise UserError(f"--parallel {parallel} must be at least 1")
    if folder is not None and folder.exists() and any(folder.iterdir()):
        raise UserError(f"--directory {folder} holds something already: choose an empty one")
    root = folder or Path(tempfile.mkdtemp(prefix="arriero-chaos-"))
    console = plain_console(quiet=as_json)
    started = time.monotonic()
    found = run(planned, root.resolve(), seed, parallel, console)
    passed = all(row.passed is not False for row in found)
    if as_json:
        seconds = round(time.monotonic() - started, 1)
        print(
            json.dumps(
                {"passed": passed, "seed": seed, "campaign_s": seconds, "rows": [asdict(r) for r in found]}, indent=2
            )
        )
    else:
        Console(highlight=False, markup=False, width=max(console.width, 130)).print(table(found))
        told(console, found)
        console.print(f"{len(found)} faults in {time.monotonic() - started:.0f} s, seed {seed}")
    if passed and folder is None:
        shutil.rmtree(root, ignore_errors=True)
    else:
        console.print(f"the runs are in {root}")
    return 0 if passed else 1


def run(
    planned: Sequence[Planned],
    root: Path,
    seed: int,
    parallel: int,
    console: Console,
    cluster: VirtualCluster | None = None,
) -> list[Row]:
    """The rows, in the plan's order. Scenes under Slurm wait most of the time: they run beside the others, all at once, on
    `cluster` or on one of their own."""
    scenes = list(dict.fromkeys(p.scene for p in planned))
    with (
        Cluster(root / "cluster", cluster) as slurms,
        ThreadPoolExecutor(parallel) as pool,
        ThreadPoolExecutor(len(SLURM_SCENES)) as waiting,
        ending_all(),
    ):
        control = pool.submit(_control, make_workplace(root / "control"))
        futures = [
            (waiting if name in SLURM_SCENES else pool).submit(
                _scene, name, planned, root, seed, slurms, control, console
            )
            for name in scenes
        ]
        return [row for future in futures for row in future.result()]


def _control(workplace: Path) -> Losses:
    stage = Stage(workplace, "control", TWO_RANKS)
    try:
        stage.finish(launches=1)
        return judge.losses(stage.records())
    finally:
        stage.end()


_printing = threading.Lock()


def _scene(
    name: str,
    planned: Sequence[Planned],
    root: Path,
    seed: int,
    slurms: Cluster,
    control: "Future[Losses]",
    console: Console,
) -> list[Row]:
    mine = [p for p in planned if p.scene == name]
    with contextlib.ExitStack() as on_end:
        scene = Scene(make_workplace(root / name), mine, seed, slurms, on_end)
        problem = ""
        try:
            (SCENES | SLURM_SCENES)[name](scene)
        except Skipped as skipped:
            found = [Row(fault=p.name, scene=name, injected=p.injected, passed=None, why=str(skipped)) for p in mine]
            problem = "skipped"
        except DidNotHold as error:
            problem = str(error)
        except Exception as error:  # a fault of the campaign's own: told in the row, the other scenes go on
            traceback.print_exc()
            problem = f"{type(error).__name__}: {error}"
        if problem != "skipped":
            try:
                found = judge.rows(scene.stages[-1], mine, control.result(), problem)
            except Exception as error:
                traceback.print_exc()
                found = [Row(fault=p.name, scene=name, injected=p.injected, why=problem or repr(error)) for p in mine]
    with _printing:
        for row in found:
            console.print(f"  {_word(row)} {row.fault}" + (f": {row.why}" if row.why else ""))
    return found


def _word(row: Row) -> str:
    return {True: "passed ", False: "FAILED ", None: "skipped"}[row.passed]


def table(rows: Sequence[Row]) -> Table:
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for column in (
        "",
        "fault",
        "detected by",
        "launches",
        "recovery s",
        "tokens repeated",
        "skipped",
        "loss to control",
    ):
        shown.add_column(column, justify="right" if column[:2] in ("la", "re", "to", "sk") else "left", no_wrap=True)
    for row in rows:
        shown.add_row(
            _word(row).strip(),
            row.fault,
            row.detected.split(":")[0],
            str(row.launches or ""),
            "" if row.recovery_s is None else f"{row.recovery_s:.1f}",
            "" if row.tokens_repeated is None else f"{row.tokens_repeated:,}",
            "" if row.tokens_skipped is None else f"{row.tokens_skipped:,}",
            row.loss,
        )
    return shown


def told(console: Console, rows: Sequence[Row]) -> None:
    for row in rows:
        if row.passed is not True:
            console.print(f"{_word(row).strip()}: {row.fault}: {row.injected}: {row.why}")
