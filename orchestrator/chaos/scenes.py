"""The scenes on this machine: each does its faults to one run (or to a copy of it) and sees it to its end.

A gate (`Stage.gates`) holds rank 0 before a step, so that what is done from outside meets the run where it should.
"""

import contextlib
import os
import pickle
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.chaos.plan import Planned
from orchestrator.chaos.stage import TWO_RANKS, DidNotHold, Stage
from orchestrator.faults import Fault
from orchestrator.record import kept_steps, unix_s

_SHIFT_SEEN_S = 1.5
# Under libfaketime 0.9.10 each time.sleep fails at once with EINVAL (it takes the faked start from the monotonic end that
# Python gives it), so every loop that sleeps would burn a core: a select, which libfaketime leaves alone, waits instead
_SLEEP = """import select, time
time.sleep = lambda seconds: select.select([], [], [], seconds) and None
"""


class Skipped(Exception):
    """This machine lacks what the scene needs; the text says what."""


@dataclass
class Scene:
    """What a scene gets: a workplace, and which of its faults are wanted. It puts the runs that are to be judged into
    `stages`; all faults are judged on the last but for those that it names."""

    workplace: Path
    planned: Sequence[Planned]
    seed: int
    cluster: Any  # slurm_scenes.Cluster
    on_end: contextlib.ExitStack
    stages: list[Stage] = field(default_factory=list)

    def stage(self, *overrides: str, name: str = "", **more: object) -> Stage:
        stage = Stage(self.workplace, name or self.planned[0].scene, overrides, **more)  # type: ignore[arg-type]
        self.on_end.callback(stage.end)
        self.stages.append(stage)
        return stage

    def wants(self, name: str) -> bool:
        return any(p.name == name for p in self.planned)


def inside(scene: Scene) -> None:
    """Whatever strikes inside the ranks, one after the other."""
    hangs = ["cluster.hang_timeout_s=4"] if scene.planned[0].scene == "hangs" else []
    stage = scene.stage(*TWO_RANKS, *hangs)
    stage.plan(scene.planned, scene.seed)
    stage.finish(launches=3 * len(scene.planned) + 2)


# ------------------------------------------------------------------------------------------------------- checkpoints


def _stopped_at_43(scene: Scene) -> Stage:
    stage = scene.stage(*TWO_RANKS, "checkpoint.keep_last=99")
    stage.faults = [Fault(kind="usr2", step=43)]
    stage.gates()
    if stage.ended(stage.launch()) != 0:
        raise DidNotHold(f"the warned run did not end well: {stage.last_words()}")
    return stage


class _Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (str(self.canary), "w")  # as anything else could be: makes a file


def damage(scene: Scene) -> None:
    """A stopped run; each fault damages its newest checkpoint that is still whole. Then it is launched again."""
    stage = _stopped_at_43(scene)
    canary = scene.workplace / "code-was-run"
    checkpoints = sorted(stage.run.checkpoints.glob("step-*"), reverse=True)
    for name, where in (
        ("bit_in_committed", 43),
        ("bit_in_manifest", 40),
        ("bit_in_index", 35),
        ("bit_in_shard", 30),
        ("truncated_shard", 25),
        ("deleted_shard", 20),
        ("malicious_pickle", 15),
    ):
        place = next(p for p in checkpoints if int(p.name.split("-")[1]) == where)
        if not scene.wants(name):
            shutil.rmtree(place)
            continue
        done = stage.hurt(name)
        older = checkpoints[checkpoints.index(place) + 1]
        done.steps_repeated = where - int(older.name.split("-")[1])
        match name:
            case "bit_in_committed":
                flip(place / "COMMITTED")
            case "bit_in_manifest":
                flip(place / "manifest.json")
            case "bit_in_index":
                flip(place / "index.json")
            case "bit_in_shard":
                flip(place / "rank-00001.safetensors")
            case "truncated_shard":
                shard = place / "rank-00000.safetensors"
                os.truncate(shard, shard.stat().st_size // 2)
            case "deleted_shard":
                (place / "rank-00001.safetensors").unlink()
            case "malicious_pickle":
                bomb = pickle.dumps(_Bomb(canary))
                (place / "rank-00000.safetensors").write_bytes(bomb)
                for kind in (".metadata", "__0_0.distcp", "model.pt", "rank-00002.safetensors"):
                    (older / kind).write_bytes(bomb)
    if scene.wants("torn_records"):
        done = stage.hurt("torn_records")
        done.steps_repeated = 0
        done.detected = "no event: a torn line is dropped when read, and ended before the next is written"
        for folder in (stage.run.records, stage.run.events):
            with max(folder.glob("attempt-*.jsonl")).open("a") as file:
                file.write('{"time_utc":"2026-01-01T00:00:00.000Z","step":9')
        if len(stage.records()) != 43:
            done.problems.append(f"{len(stage.records())} records are read of 43 and a torn one")
    at_s = max(done.time_s for done in stage.done.values())
    for done in stage.done.values():
        done.time_s = at_s  # all come true with the one start that follows
    stage.finish()
    if canary.exists():
        stage.done["malicious_pickle"].problems.append("the pickle was run")


def newest_two(scene: Scene) -> None:
    stage = _stopped_at_43(scene)
    stage.hurt("newest_two_corrupt")
    newest, second = sorted(stage.run.checkpoints.glob("step-*"), reverse=True)[:2]
    flip(newest / "rank-00000.safetensors")
    flip(second / "COMMITTED")
    stage.finish()
    if len(stage.events("passed_over")) != 2:
        stage.done["newest_two_corrupt"].problems.append(f"{len(stage.events('passed_over'))} were passed over")


def flip(path: Path) -> None:
    """One bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# -------------------------------------------------------------------------------------------------------------- disks


@contextlib.contextmanager
def _small_disk(at: Path, mb: int) -> Iterator[int]:
    """A tmpfs at `at`, in a mount namespace of its own that lasts as long as the process whose pid is yielded."""
    at.mkdir(parents=True)
    words = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    script = 'mount -t tmpfs -o size="$1m" tmpfs "$2" && echo mounted && exec sleep infinity'
    try:
        holder = subprocess.Popen(
            [*words, script, "sh", str(mb), str(at)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    except FileNotFoundError:
        raise Skipped("a small disk needs unshare (util-linux)") from None
    assert holder.stdout
    assert holder.stderr
    try:
        if holder.stdout.readline() != "mounted\n":
            raise Skipped(f"a small tmpfs cannot be mounted here: {holder.stderr.read().strip()}")
        yield holder.pid
    finally:
        holder.kill()
        holder.communicate()


def full_disk(scene: Scene) -> None:
    """All of a run directory on a small disk: records, events, logs and checkpoints meet its end."""
    at = scene.workplace / "disk"
    holder = scene.on_end.enter_context(_small_disk(at, 8))
    seen_at = Path(f"/proc/{holder}/root{at.resolve()}")
    stage = scene.stage(
        *TWO_RANKS,
        "checkpoint.keep_last=2",
        "checkpoint.retries=1",
        "checkpoint.retry_wait_s=0.05",
        "checkpoint.retry_save_s=3600",
        wrapper=[
            "nsenter",
            f"--target={holder}",
            "--user",
            "--preserve-credentials",
            "--mount",
            f"--wd={scene.workplace}",
        ],
        run_root="disk",
        seen_at=seen_at,
    )
    filled, emptied = stage.gates(13, 28)
    launch = stage.launch()
    stage.reached(filled)
    done = stage.hurt("enospc")
    ballast = seen_at / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    stage.go(filled)  # an empty file needs no room
    stage.reached(emptied)
    if (saved := {e.step for e in stage.events("saved")}) - {5, 10}:
        done.problems.append(f"the disk was not full: saved at {sorted(saved)}")
    done.seconds = None
    ballast.unlink()
    stage.go(emptied)
    stage.ended(launch)
    # what is judged afterwards must outlive the disk
    shutil.copytree(stage.run.root, scene.workplace / "runs" / stage.name, ignore=shutil.ignore_patterns("checkpoints"))
    steps = {e.step for e in stage.events("saved")}
    if not {30, 35, 60} <= steps:
        done.problems.append(f"saves did not go through again: {sorted(steps)}")
    stage.run = type(stage.run)(scene.workplace / "runs" / stage.name)


def writer(scene: Scene) -> None:
    """A file that cannot be written, and one that cannot even be opened for a while: the kernel's own doing, without a mount."""
    stage = scene.stage(
        *TWO_RANKS, "checkpoint.retries=1", "checkpoint.retry_wait_s=0.05", "checkpoint.retry_save_s=3600"
    )
    eio, stall, over = stage.gates(10, 20, 33)
    launch = stage.launch()
    stage.reached(eio)
    if scene.wants("eio"):
        stage.hurt("eio")
        _folder(stage, 10, 5).joinpath("rank-00001.safetensors").symlink_to("/proc/self/mem")
    stage.go(eio)
    stage.reached(stall)
    fifo = _folder(stage, 20, 15) / "rank-00000.safetensors"
    if scene.wants("stalled_writer"):
        done = stage.hurt("stalled_writer")
        os.mkfifo(fifo)
    stage.go(stall)
    stage.reached(over)
    if scene.wants("stalled_writer"):
        memory = {r.step: r.memory_bytes or 0 for r in stage.records()}
        grown_mb = (memory[32] - memory[19]) / 1e6
        if grown_mb > 16:
            done.problems.append(f"memory grew by {grown_mb:.0f} MB")
        reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        fifo.unlink()
        os.close(reader)  # the write fails, and its retry finds an ordinary disk
        _saved(stage, 20)
    stage.go(over)
    stage.ended(launch)
    saved = {e.step for e in stage.events("saved")}
    if scene.wants("eio") and 10 in saved:
        stage.done["eio"].problems.append("the save of step 10 went through")
    if not {5, 35, 60} <= saved:
        for done in stage.done.values():
            done.problems.append(f"saves did not go through again: {sorted(saved)}")


def _saved(stage: Stage, step: int) -> None:
    stage.wait(lambda: any(e.step == step for e in stage.events("saved")), f"the save of step {step}")


def _folder(stage: Stage, step: int, before: int) -> Path:
    """Where the first start will save this step. Made after the save `before` has cleared away what it took for debris."""
    stage.wait(
        lambda: any(e.step == before for e in stage.events("saved", "save_failed")), f"the save of step {before}"
    )
    folder = stage.run.checkpoints / f"step-{step:09d}-e000001"
    stayed = 0
    while stayed < 10:
        stayed = stayed + 1 if folder.exists() else 0
        folder.mkdir(exist_ok=True)
        time.sleep(0.05)
    return folder


# ------------------------------------------------------------------------------------------------------------ writers


def twice(scene: Scene) -> None:
    stage = scene.stage(*TWO_RANKS)
    (gate,) = stage.gates(12)
    first = stage.launch()
    stage.reached(gate)
    done = stage.hurt("launched_twice")
    refused = stage.launch()
    if stage.ended(refused) != 2 or "is at work already" not in refused.text():
        done.problems.append(f"the second launch was not refused: {stage.last_words()}")
    (stage.run.root / ".at_work").unlink()  # as seen from another host
    second = stage.launch()
    stage.wait_event("saved", 3)  # 5, 10, and the second's first
    stage.go(gate)
    code = stage.ended(first)
    if code != 1 or not stage.events("fenced"):
        done.problems.append(f"the first was not fenced: exit code {code}")
    if stage.ended(second) != 0:
        done.problems.append(f"the second did not finish: {stage.last_words()}")


def at_once(scene: Scene) -> None:
    """Neither sees the other at work: the lease decides, and neither loses a record of the other."""
    stage = scene.stage(*TWO_RANKS)
    # One stops at the first and the other, for whom that has struck, at the second: else the fenced one could be at its end
    # before a save of it, or a look, shows that it is.
    gates = stage.gates(12, 13)
    stage.hurt("launched_twice_at_once")
    pair = [stage.launch(), stage.launch()]
    stage.wait(
        lambda: bool(stage.events("fenced")) or any(p.process.poll() for p in pair), "one of the two to give way"
    )
    for gate in gates:
        stage.go(gate)
    codes = sorted(stage.ended(launch) for launch in pair)
    if codes[0] != 0:
        stage.done["launched_twice_at_once"].problems.append(f"neither finished: exit codes {codes}")
    elif codes[1] == 0:
        stage.done["launched_twice_at_once"].problems.append("both say that they have finished")


# ------------------------------------------------------------------------------------------------------ clock and world


def find_libfaketime() -> Path | None:
    return next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)


def faked_clock(library: Path, shift: Path, tools: Path) -> dict[str, str]:
    """The environment of processes whose clock, but not what they wait by, goes as the file `shift` says."""
    shift.write_text("+0\n")
    tools.mkdir()
    (tools / "sitecustomize.py").write_text(_SLEEP)
    return {
        "PYTHONPATH": os.pathsep.join([str(tools), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(shift),
        "FAKETIME_CACHE_DURATION": "1",  # seconds until a shift is seen
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "FAKETIME_FORCE_MONOTONIC_FIX": "0",  # else waits on monotonic conditions, as for the interpreter's lock, end at once
        "FAKETIME_DONT_RESET": "1",
    }


def clock(scene: Scene) -> None:
    library = find_libfaketime()
    if library is None:
        raise Skipped("the clock is shifted by libfaketime: apt-get install libfaketime")
    shift = scene.workplace / "shift"
    stage = scene.stage(*TWO_RANKS, env=faked_clock(library, shift, scene.workplace / "tools"))
    stage.faults = [Fault(kind="usr2", step=43)]
    ahead, back = stage.gates(12, 27)
    launch = stage.launch()
    stage.reached(ahead)
    done = stage.hurt("clock_shift")
    shift.write_text("+1d\n")
    time.sleep(_SHIFT_SEEN_S)
    began_s = time.time()
    stage.go(ahead)
    stage.reached(back)
    done.seconds = time.time() - began_s
    shift.write_text("-1d\n")
    time.sleep(_SHIFT_SEEN_S)
    stage.go(back)
    stage.ended(launch)
    stage.finish()
    times_s = [unix_s(e.time_utc) for e in stage.events("saved", "loaded", "finished")]
    span_h = (max(times_s) - min(times_s)) / 3600
    done.detected = f"no event: no decision compares clocks; the events of this run span {span_h:.0f} hours"
    if span_h < 40:
        done.problems.append(f"the clock did not move by two days: events span {span_h:.1f} hours")


def world(scene: Scene) -> None:
    stage = scene.stage()
    stage.faults = [Fault(kind="usr2", step=13), Fault(kind="usr2", step=28)]
    stage.gates()
    stage.ended(stage.launch("cluster.gpus_per_node=4"))
    stage.hurt("world_4_2_8")
    stage.ended(stage.launch("cluster.gpus_per_node=2"))
    stage.finish("cluster.gpus_per_node=8")
    ranks = [e.data["ranks"] for e in stage.events("started")]
    if ranks != [4, 2, 8]:
        stage.done["world_4_2_8"].problems.append(f"it ran on {ranks} ranks")


# ------------------------------------------------------------------------------------------------ object store, poison


def object_store(scene: Scene) -> None:
    try:
        from orchestrator.chaos.object_store import serving
    except ImportError as error:
        raise Skipped(f"the object store needs the extra dev (s3fs, moto): {error.name} is not installed") from None
    store = scene.on_end.enter_context(serving())
    stage = scene.stage(
        *TWO_RANKS,
        f"checkpoint.url=s3://{store.bucket}/chaos",
        "checkpoint.retries=3",
        "checkpoint.retry_wait_s=0.05",
        "checkpoint.retry_save_s=3600",
        env=store.env,
    )
    stage.faults = [Fault(kind="usr2", step=38)]
    passing, between, lasting, over = stage.gates(7, 12, 17, 23)
    launch = stage.launch()
    stage.reached(passing)
    _saved(stage, 5)  # else the next save is skipped
    done = stage.hurt("object_store")
    store.unavailable += [("PUT", "rank-00000"), ("PUT", "rank-00001"), ("PUT", "manifest.json"), ("PUT", "COMMITTED")]
    store.cut += [("PUT", "rank-00000"), ("PUT", "index.json")]
    stage.go(passing)
    stage.reached(between)
    _saved(stage, 10)
    stage.go(between)
    stage.reached(lasting)
    _saved(stage, 15)
    store.unavailable += [("PUT", "step-000000020")] * 100
    stage.go(lasting)
    stage.reached(over)
    stage.wait_event("save_failed")
    store.unavailable.clear()
    stage.go(over)
    stage.ended(launch)
    store.unavailable += [("GET", "rank-00000"), ("GET", "manifest.json"), ("GET", "index.json")]
    stage.finish()
    saved = {e.step for e in stage.events("saved")}
    done.detected = f"{len(store.struck)} requests failed: 6 and 3 retried unseen; " + next(
        (f"save_failed: {e.detail}" for e in stage.events("save_failed")), ""
    )
    if not {5, 10, 15, 25, 30} <= saved or 20 in saved or not stage.events("save_failed"):
        done.problems.append(f"saved at {sorted(saved)}")
    if store.unavailable or store.cut:
        done.problems.append("not every request that was to fail was made")


def poison(scene: Scene) -> None:
    watchful = ["spikes.patience=0", "spikes.vet_steps=5", "spikes.margin_steps=3"]
    stage = scene.stage(*TWO_RANKS, *watchful)
    bad = list(range(40, 45))
    stage.faults = [Fault(kind="poison", batches=bad, rank=rank) for rank in range(2)]
    stage.gates()
    done = stage.hurt("poison_batch")
    launch = stage.launch()
    stage.ended(launch)
    if trained := {r.data_batch for r in kept_steps(stage.records())} & set(bad):
        done.problems.append(f"batches {sorted(b for b in trained if b)} are part of the model")


SCENES: dict[str, Callable[[Scene], None]] = {
    "deaths": inside,
    "hangs": inside,
    "signals": inside,
    "damage": damage,
    "newest_two": newest_two,
    "full_disk": full_disk,
    "writer": writer,
    "twice": twice,
    "at_once": at_once,
    "clock": clock,
    "world": world,
    "object_store": object_store,
    "poison": poison,
}
