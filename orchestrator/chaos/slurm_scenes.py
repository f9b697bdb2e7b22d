"""The scenes under a real Slurm of this machine's own (slurm/virtual.py). All three share one cluster, and stay out of each
other's way: each has its own nodes, or takes what is idle."""

import contextlib
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path

from orchestrator.chaos.scenes import Scene, Skipped
from orchestrator.chaos.stage import DidNotHold, Stage
from slurm.rendezvous import expand_hostlist
from slurm.virtual import Process, VirtualCluster, missing_packages

_NODES, _RANKS = 8, 4  # of the cluster; of each node
_BELONGS = {"slurm": "node[001-004]", "slurm_timeout": "node[005-006]", "slurm_zombie": "node[007-008]"}
_ON_SLURM = ["cluster=slurm", "cluster.cpus_per_gpu=4", "layout.dp_shard=2"]
_TWO_NODES = [*_ON_SLURM, "cluster.nodes=2", "cluster.gpus_per_node=1"]
_ONE_NODE = [*_ON_SLURM, "cluster.nodes=1", "cluster.gpus_per_node=2"]


class Cluster:
    """A cluster that is started when the first scene asks for it, or one that is there already."""

    def __init__(self, directory: Path, running: VirtualCluster | None = None) -> None:
        self.directory, self._running = directory, running
        self._lock = threading.Lock()
        self._on_end = contextlib.ExitStack()

    def get(self) -> VirtualCluster:
        with self._lock:
            if self._running is None:
                if packages := missing_packages():
                    raise Skipped(f"no Slurm here: apt-get install --no-install-recommends {' '.join(packages)}")
                self._running = self._on_end.enter_context(
                    VirtualCluster.up(
                        nodes=_NODES, gpus_per_node=_RANKS, directory=self.directory, name=f"chaos-{id(self):x}"
                    )
                )
            return self._running

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_: object) -> None:
        self._on_end.close()


def _stage(scene: Scene, cluster: VirtualCluster, *overrides: str, **env: str) -> Stage:
    mine = set(expand_hostlist(_BELONGS[scene.planned[0].scene]))
    others = ",".join(n for n in cluster.node_names if n not in mine)
    stage = scene.stage(*overrides, f"cluster.exclude='{others}'", env={**cluster.env, **env})

    def cancel() -> None:
        cluster.command("scancel", f"--name={stage.name}")
        cluster.command("scancel", "--signal=KILL", f"--name={stage.name}")

    scene.on_end.callback(cancel)
    return stage


def _submit(stage: Stage) -> str:
    """The job's id."""
    launch = stage.launch()
    if stage.ended(launch) != 0:
        raise DidNotHold(f"not submitted: {stage.last_words()}")
    words = launch.text().split()
    return words[words.index("job") + 1]


def _nodes(stage: Stage) -> list[str]:
    """Of the newest start."""
    return expand_hostlist(str(stage.events("started")[-1].data["node_list"]))


def slurm(scene: Scene) -> None:
    """One job: preempted, requeued away from a drained node, and requeued while scontrol fails."""
    cluster = scene.cluster.get()
    tools = scene.workplace / "bin"
    tools.mkdir()
    broken, count = scene.workplace / "scontrol-fails", scene.workplace / "scontrol-failed"
    real = shutil.which("scontrol")
    (tools / "scontrol").write_text(
        "#!/bin/sh\n"
        f'if [ -s "{broken}" ]; then sed -i 1d "{broken}"; echo failed >> "{count}"\n'
        'echo "slurm_load_ctl_conf error: Unable to contact slurm controller" >&2; exit 1; fi\n'
        f'exec "{real}" "$@"\n'
    )
    (tools / "scontrol").chmod(0o755)
    path = {"PATH": f"{tools}:{os.environ['PATH']}"}
    stage = _stage(scene, cluster, *_TWO_NODES, **path)
    preempted, drained, mute = stage.gates(13, 28, 46)
    job = _submit(stage)
    starts = 1

    stage.reached(preempted)
    if scene.wants("preemption"):
        done = stage.hurt("preemption")
        urgent = ["--partition=urgent", f"--nodelist={','.join(_nodes(stage))}", "--nodes=2", "--exclusive"]
        cluster.command("sbatch", *urgent, "--output=/dev/null", "--wrap", "sleep 1")
        starts += 1
        stage.wait_event("resumed", starts - 1)
    stage.go(preempted)

    stage.reached(drained)
    if scene.wants("node_drained"):
        done = stage.hurt("node_drained")
        lost = _nodes(stage)[-1]
        cluster.command("scontrol", "update", f"nodename={lost}", "state=drain", "reason=chaos")
        cluster.command("scontrol", "requeue", job)
        starts += 1
        stage.wait_event("resumed", starts - 1)
        if lost in _nodes(stage):
            done.problems.append(f"it is on the drained {lost} again")
        cluster.command("scontrol", "update", f"nodename={lost}", "state=resume")
    stage.go(drained)

    stage.reached(mute)
    if scene.wants("scontrol_fails"):
        done = stage.hurt("scontrol_fails")
        broken.write_text("x\n" * 8)
        cluster.command("scontrol", "requeue", job)
        starts += 1
        stage.wait_event("resumed", starts - 1)
        if not count.exists():
            done.problems.append("no scontrol was needed")
    stage.go(mute)
    stage.wait(stage.finished, "the end of the run")


def slurm_timeout(scene: Scene) -> None:
    """Rank 0 waits at a step until it is warned: the job's time limit is lowered while it runs."""
    cluster = scene.cluster.get()
    stage = _stage(scene, cluster, *_TWO_NODES, "cluster.time_limit_min=30", "cluster.warn_s=50")
    (gate,) = stage.gates(23)
    job = _submit(stage)
    stage.reached(gate)
    stage.hurt("timeout_signal")
    cluster.command("scontrol", "update", f"jobid={job}", "TimeLimit=1")
    stage.wait_event("requeued")
    cluster.command("scontrol", "update", f"jobid={job}", "TimeLimit=30")
    stage.wait(stage.finished, "the end of the run")


def slurm_zombie(scene: Scene) -> None:
    """The whole run is on a node that is cut off: slurmd is dead, all else stands still. Slurm starts the run elsewhere; then the
    zombie wakes, before a step, with a save ahead of it: its ranks first, so that they find out before Slurm ends them."""
    cluster = scene.cluster.get()
    stage = _stage(scene, cluster, *_ONE_NODE)
    (gate,) = stage.gates(15)
    _submit(stage)
    stage.reached(gate)
    done = stage.hurt("slurmd_killed")
    (node,) = _nodes(stage)
    zombies = cluster.processes_on(node)
    for process in zombies:
        process.signal(signal.SIGSTOP)
    try:
        cluster.kill_node(node, steps=False)
        stage.wait_event("resumed")
        stage.wait(lambda: any(e.attempt == 2 for e in stage.events("saved")), "a save of the second start")
        if node in _nodes(stage):
            done.problems.append(f"it is on {node} again")
        if not all(process.alive() for process in zombies):
            done.problems.append("the ranks on the lost node were gone already: no zombie was tried")
        stage.go(gate)
        for process in filter(_is_rank, zombies):
            process.signal(signal.SIGCONT)
        stage.wait(lambda: any(e.attempt == 1 for e in stage.events("fenced")), "the zombie's word that it is fenced")
    finally:
        for process in zombies:
            process.signal(signal.SIGCONT)
    stage.wait(lambda: not any(process.alive() for process in zombies), "the end of the zombie")
    stage.wait(stage.finished, "the end of the run")
    requeued, fenced = stage.events("requeued")[0], stage.events("fenced")[0]
    done.detected = f"{requeued.kind}: {requeued.detail}; the zombie: fenced: {fenced.detail}"
    if any(e.attempt == 1 and e.step > 10 for e in stage.events("saved")):
        done.problems.append("the zombie committed a checkpoint")
    cluster.start_node(node)


def _is_rank(process: Process) -> bool:
    """A rank or its keeper."""
    with contextlib.suppress(OSError):
        return b"slurm.rank" in Path(f"/proc/{process.pid}/cmdline").read_bytes()
    return False


SLURM_SCENES: dict[str, Callable[[Scene], None]] = {
    "slurm": slurm,
    "slurm_timeout": slurm_timeout,
    "slurm_zombie": slurm_zombie,
}
