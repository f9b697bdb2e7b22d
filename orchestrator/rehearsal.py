"""`arriero rehearse`: a run's own job on a virtual cluster, with a requeue, a preemption and a lost node.

The same sbatch script, as many nodes and ranks; each rank proves its place, and a stand-in takes the training step's part.
"""

import contextlib
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.table import Table

from orchestrator import spec as specs
from orchestrator.console import plain_console
from orchestrator.errors import UserError
from orchestrator.plan import forecast
from orchestrator.record import Event, read_events
from orchestrator.rehearse_rank import AXES, coordinates
from orchestrator.run_dir import RunDir
from orchestrator.snapshot import snapshot
from orchestrator.spec import RunSpec
from slurm.rendezvous import expand_hostlist
from slurm.request import JobRequest
from slurm.submit import submit_once
from slurm.virtual import VirtualCluster, in_environment

_ENTRY = "orchestrator.rehearse_rank:main"
_SPARE_NODES = 1  # that take the place of the lost one
_GRES = "gpu:{gpus_per_node}"
_WAIT_S = 300.0  # and a second more for every second rank
_SITES_OWN = ("account", "qos", "reservation", "constraint", "exclude", "nodelist", "wckey", "preflight_command")


@dataclass(frozen=True)
class Check:
    """One row of the table."""

    what: str
    held: bool
    detail: str
    seconds: float


class DidNotHold(Exception):
    pass


def rehearse(spec: RunSpec, as_json: bool) -> int:
    """Prints what held; 0 if all did, 1 if not. Raises UserError, ClusterError."""
    if spec.cluster.kind != "slurm":
        raise UserError(
            f"cluster={spec.cluster.name} is no Slurm: there is nothing to rehearse; choose cluster=slurm, for one"
        )
    if spec.cluster.nodes + _SPARE_NODES > 999:
        raise UserError(f"cluster.nodes={spec.cluster.nodes}: a rehearsal takes at most {999 - _SPARE_NODES}")
    spec = forecast.resolved(spec)
    console = plain_console(quiet=as_json)
    dropped = [f"cluster.{n}={v}" for n in _SITES_OWN if (v := getattr(spec.cluster, n))]
    dropped += [f"cluster.sbatch.{k}={v}" for k, v in spec.cluster.sbatch.items()]
    dropped += [f"cluster.setup ({len(spec.cluster.setup)} lines)"] if spec.cluster.setup else []
    if spec.cluster.partition not in (None, "normal"):
        dropped.append(f"cluster.partition={spec.cluster.partition}")
    if dropped:
        console.print(f"not rehearsed, for only your own cluster knows them: {', '.join(dropped)}")
    changed = [f"cluster.gres={spec.cluster.gres} becomes {_GRES}"] if spec.cluster.gres not in (None, _GRES) else []
    changed += ["cluster.spare_nodes and cluster.min_nodes are left out"] if spec.cluster.is_elastic else []
    changed += (
        ["nvidia-smi is not asked: the GPUs are files"] if spec.gpu.device == "cuda" and spec.cluster.preflight else []
    )
    if changed:
        console.print(f"otherwise than on your cluster: {'; '.join(changed)}")

    def end(number: int, frame: FrameType | None) -> None:  # what stands by then comes down, undisturbed
        for ending in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(ending, signal.SIG_IGN)
        sys.exit(128 + number)

    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, end)
    folder = Path(tempfile.mkdtemp(prefix="arriero-rehearsal-"))
    checks: list[Check] = []
    try:
        nodes, gpus = spec.cluster.nodes + _SPARE_NODES, spec.cluster.gpus_per_node
        console.print(f"a virtual cluster of {nodes} nodes of {gpus} GPUs, one of them spare ...")
        with VirtualCluster.up(
            nodes=nodes,
            gpus_per_node=gpus,
            directory=folder / "cluster",
            name="rehearsal",
            cpus_per_node=max(64, gpus * spec.cluster.cpus_per_gpu),
            memory_mb_per_node=max(1_000_000, 1024 * (spec.cluster.memory_gb_per_node or 0)),
        ) as cluster:
            checks.append(Check("cluster up", True, f"{nodes} nodes of {gpus} GPUs", cluster.up_s))
            with in_environment(cluster):
                _Rehearsal(spec, cluster, folder / spec.name, console, checks).run()
    finally:
        if all(c.held for c in checks):
            shutil.rmtree(folder, ignore_errors=True)
    held = all(c.held for c in checks)
    if as_json:
        print(json.dumps({"held": held, "checks": [asdict(c) for c in checks]}, indent=2))
        return 0 if held else 1
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("", "what", "seconds", "detail"):
        table.add_column(column, justify="right" if column == "seconds" else "left", no_wrap=column != "detail")
    for check in checks:
        table.add_row("held" if check.held else "NOT", check.what, f"{check.seconds:.1f}", check.detail)
    console.print(table)
    if not held:
        console.print(f"the rehearsal's run directory and logs are left in {folder}")
    return 0 if held else 1


class _Rehearsal:
    def __init__(
        self, spec: RunSpec, cluster: VirtualCluster, root: Path, console: Console, checks: list[Check]
    ) -> None:
        plain = replace(
            spec.cluster, partition="normal", setup=[], sbatch={}, gres=_GRES if spec.cluster.gres else None
        )
        for name in _SITES_OWN:
            setattr(plain, name, None)
        # A lost node is rehearsed as a requeue: on the place of a spare or on fewer nodes the ranks would only be fewer.
        plain = replace(plain, spare_nodes=0, min_nodes=None)
        self.spec = replace(spec, cluster=plain, gpu=replace(spec.gpu, device="cpu"))
        self.cluster, self.run_dir, self.console, self.checks = cluster, RunDir(root), console, checks
        self.sizes = {axis: getattr(spec.layout, axis) for axis in AXES}
        self.job_id, self.asked_requeues = "", 0

    def run(self) -> None:
        self.run_dir.root.mkdir(parents=True)
        self.run_dir.code.mkdir()
        self.run_dir.spec.write_text(specs.to_yaml(self.spec))
        (self.run_dir.root / "rehearsal.json").write_text(json.dumps(self.sizes))
        steps: list[tuple[str, Callable[[], str]]] = [
            ("submitted", self._submit),
            ("every rank in its place", lambda: self._placed(0)),
            ("scontrol requeue", self._requeue),
            ("preemption", self._preempt),
            ("a node lost", self._lose_a_node),
            ("to the end", self._finish),
        ]
        for what, action in steps:
            started = time.monotonic()
            try:
                held, detail = True, action()
            except DidNotHold as error:
                held, detail = False, str(error)
            self.checks.append(Check(what, held, detail, time.monotonic() - started))
            self.console.print(f"  {what}: {'held' if held else 'did NOT hold'}: {detail}")
            if not held:
                return

    def _submit(self) -> str:
        request = JobRequest(
            name=self.spec.name,
            entry=_ENTRY,
            run_dir=str(self.run_dir.root),
            cluster=self.spec.cluster,
            code=str(snapshot(self.run_dir.code)),
        )
        self.job_id, _ = submit_once(request, self.run_dir.submission)
        again, new = submit_once(request, self.run_dir.submission)
        if new or again != self.job_id:
            raise DidNotHold(f"submitted twice: jobs {self.job_id} and {again}")
        return f"job {self.job_id}; asked again, no second one"

    def _placed(self, restart: int, without: str = "") -> str:
        """Every rank of a start has written its place, each once, as mesh and nodes have it."""
        path, world = self.run_dir.root / f"places-{restart}.jsonl", self.spec.cluster.gpus
        self._wait(lambda: path.exists() and path.read_bytes().count(b"\n") >= world, f"{world} ranks in their places")
        places = sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda p: p["rank"])
        if [p["rank"] for p in places] != list(range(world)):
            raise DidNotHold(f"{len(places)} places were taken, not one by each of {world} ranks")
        per_node = self.spec.cluster.gpus_per_node
        for p in places:
            same_node = places[p["rank"] - p["rank"] % per_node]["node"]
            if p["local_rank"] != p["rank"] % per_node or p["node"] != same_node or p["world_size"] != world:
                raise DidNotHold(f"rank {p['rank']} stands at {p['node']}, local rank {p['local_rank']}")
            if p["mesh"] != coordinates(p["rank"], self.sizes):
                raise DidNotHold(f"rank {p['rank']} takes itself for {p['mesh']}")
        if len({json.dumps(p["mesh"]) for p in places}) != world:
            raise DidNotHold("two ranks have the same mesh coordinates")
        if len({json.dumps(p["master"]) for p in places}) != 1:
            raise DidNotHold("ranks would look for rank 0 at different addresses")
        nodes = {p["node"] for p in places}
        if without in nodes:
            raise DidNotHold(f"{without}, which is lost, was used again")
        shape = " x ".join(f"{axis} {n}" for axis, n in self.sizes.items() if n > 1) or "1"
        return f"{world} ranks on {len(nodes)} nodes, mesh {shape}"

    def _requeue(self) -> str:
        self._go_on()
        self.cluster.command("scontrol", "requeue", self.job_id)
        return self._resumed(1, {"requeued"})

    def _preempt(self) -> str:
        self._go_on()
        nodes = self.cluster.nodes
        self.cluster.command("sbatch", "--partition=urgent", f"--nodes={nodes}", "--exclusive", "--wrap", "sleep 1")
        return self._resumed(2, {"preempted"})

    def _lose_a_node(self) -> str:
        self._go_on()
        listed = self.cluster.command("squeue", "--noheader", f"--jobs={self.job_id}", "--format=%N").stdout.strip()
        lost = expand_hostlist(listed)[-1]
        self.cluster.kill_node(lost)
        return f"{lost}; " + self._resumed(3, {"node_failure"}, without=lost, warned=False)

    def _finish(self) -> str:
        (self.run_dir.root / "finish").touch()
        self._wait(lambda: any(e.kind == "finished" for e in self._events()), "the end of the run")
        state = ["squeue", "--noheader", "--states=all", f"--jobs={self.job_id}", "--format=%T"]
        self._wait(lambda: self.cluster.command(*state).stdout.strip() == "COMPLETED", "the end of the job")
        return "the run is finished and its job COMPLETED"

    def _resumed(self, restart: int, causes: set[str], without: str = "", warned: bool = True) -> str:
        self.asked_requeues = restart
        placed = self._placed(restart, without)
        resumed_in = {"kind": "resumed", "attempt": restart + 1}
        self._wait(
            lambda: any({"kind": e.kind, "attempt": e.attempt} == resumed_in for e in self._events()), "a resume"
        )
        events = self._events()
        told = [e for e in events if e.kind == "requeued"]
        if len(told) != restart or told[-1].data.get("cause") not in causes:
            raise DidNotHold(f"told as {[e.data.get('cause') for e in told]}, expected {' or '.join(causes)} last")
        lost = ""
        if warned:
            stopped = [e for e in events if e.kind == "stopped"]
            if len(stopped) < restart:
                raise DidNotHold("the ranks had no time to save")
            resumed = [e for e in events if e.kind == "resumed"][-1]
            if resumed.step != stopped[-1].step:
                raise DidNotHold(f"saved at step {stopped[-1].step}, resumed at {resumed.step}")
            lost = f"; saved and resumed at step {resumed.step}, none lost"
        return f"told as {told[-1].data['cause']}; {placed}{lost}"

    def _go_on(self) -> None:
        """Until the present start has trained a step."""

        def has_trained() -> bool:
            attempts = len([e for e in self._events() if e.kind == "started"])
            path = self.run_dir.attempt_file(self.run_dir.records, attempts)
            return path.exists() and path.stat().st_size > 0

        self._wait(has_trained, "a step")

    def _events(self) -> list[Event]:
        return read_events(self.run_dir.events)

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        wait_s = _WAIT_S + self.spec.cluster.gpus / 2
        until = time.monotonic() + wait_s
        while not condition():
            events = self._events()
            # The preflight may be the first to see the lost node, which has no slurmd.
            bad = [e.detail for e in events if e.kind == "failed" or (e.kind == "unfit" and "slurmd" not in e.detail)]
            requeues = [e.detail for e in events if e.kind == "requeued"]
            bad += [f"a requeue that nobody asked for: {detail}" for detail in requeues[self.asked_requeues :]]
            if not bad and time.monotonic() > until:
                bad = [f"waited {wait_s:g} s for {what}"]
            if bad:
                raise DidNotHold(f"{bad[0]}; {self._last_log()}")
            time.sleep(0.3)

    def _last_log(self) -> str:
        with contextlib.suppress(OSError, ValueError):
            log = max(self.run_dir.logs.glob("*_0_log.out"), key=lambda p: p.stat().st_mtime)
            return "its log ends: " + " / ".join(log.read_text(errors="replace").splitlines()[-3:])
        return "there is no log"
