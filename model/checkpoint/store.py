"""Saves a run's state in the background, and loads the newest checkpoint that proves to be whole.

A save:
 1. The ranks agree that none is still writing the save before, and copy their parts into buffers that are kept.
    Training goes on after this one copy; all that follows runs in a thread, with a process group of its own.
 2. Each rank looks for non-finite values in its copy and writes its file, checksummed while it is written.
 3. Rank 0 writes index.json and manifest.json (each file's bytes and checksum), asks the lease whether it still is the
    one writer, and puts COMMITTED (the manifest's checksum) last. What fails on any rank fails the save, not the run.
 4. Rank 0 removes what retention leaves over.

A load takes the next epoch of the lease, then tries the checkpoints of the run's history from the newest on: marker,
manifest and index, then every file's size and checksum, shared out over the ranks. All ranks take the same one.
"""

import collections
import contextlib
import json
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

from model.checkpoint import policy, store_format
from model.checkpoint.lease import Fenced, Lease, acquire, read_epochs
from model.checkpoint.policy import RUN, CheckpointConfig, CheckpointInfo, of_another_run
from model.checkpoint.storage import BLOCK_BYTES, Storage, checksum

FORMAT = 1
LEASE_CHECK_S = 10.0  # how often rank 0 looks for a newer writer: one listing
COMMITTED, VETTED, MANIFEST, INDEX = "COMMITTED", "VETTED", "manifest.json", "index.json"

OnEvent = Callable[[str, int, str], None]


class CheckpointError(RuntimeError):
    """There are checkpoints and none can be loaded, or they are another run's: a person must look. Starting over would throw them
    away."""


@dataclass(frozen=True, kw_only=True)
class LoadedCheckpoint:
    step: int
    epoch: int
    name: str
    extra: dict[str, Any]


@dataclass
class _Job:
    """One save in flight."""

    info: CheckpointInfo
    extra: str  # JSON
    vetted: bool
    values: dict[str, Any]  # of this rank, what is no tensor
    lease: Lease | None  # rank 0's
    stall_s: float
    started: float


def _print(kind: str, step: int, detail: str) -> None:
    print(f"checkpoint: {kind}: {detail}", file=sys.stderr, flush=True)


class CheckpointStore:
    """The checkpoints of one run, at any fsspec URL. All ranks make it, together, and together call `load_latest`,
    `save` and `finish`; without a process group there is one rank.

    `on_event(kind, step, detail)` is called on rank 0, also from the writing thread. Kinds: saved, save_failed,
    save_skipped, save_refused, passed_over, loaded, removed, fenced.
    `writer` is a label for the lease (default: host, process, Slurm job). `read_only` takes no lease: for those who only load.
    `run_id`: the place is that run's from its first start on, and no other's.
    """

    def __init__(
        self,
        url: str,
        config: CheckpointConfig,
        writer: str | None = None,
        on_event: OnEvent = _print,
        read_only: bool = False,
        run_id: str | None = None,
    ) -> None:
        self.config = config
        self.storage = Storage(url, config.retries, config.retry_wait_s)
        self.writer = writer
        self.read_only = read_only
        self.run_id = run_id
        together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.rank = dist.get_rank() if together else 0
        self.world = dist.get_world_size() if together else 1
        self._on_event = on_event
        # Of the checkpoint committed or loaded last; the same on all ranks after finish().
        self.saved_step: int | None = None
        self._group = self._new_group()  # for the caller's thread
        self._write_group = self._new_group()  # for the writing thread
        self._group_broken = False
        self._writes_s: collections.deque[float] = collections.deque(maxlen=3)  # of the last saves committed
        self._failed_at: float | None = None  # monotonic; the last save failed
        self._overtaken: str | None = None  # by a newer writer, as this rank alone has seen
        self._overtaken_lock = threading.Lock()
        self._fenced = False  # all ranks know of it
        self._lease: Lease | None = None
        self._lease_lock = threading.Lock()  # held while it changes: nobody takes our own next epoch for another's
        self._epoch = 0
        self._names: set[str] = set()
        self._thread: threading.Thread | None = None
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._idle = threading.Event()  # no save is in flight
        self._idle.set()
        self._writing: _Job | None = None
        self._signature: list[Any] | None = None
        self._slots: list[store_format.Slot] = []
        self._value_items: list[WriteItem] = []
        self._index = b""
        self._header = b""
        self._data = torch.empty(0, dtype=torch.uint8)
        self._views: list[Tensor] = []
        self._copiers: ThreadPoolExecutor | None = None

    # ---------------------------------------------------------------------------------------------------- reading

    def steps(self) -> list[CheckpointInfo]:
        """Every checkpoint directory, oldest first: debris and what was left behind too. Any rank, by itself."""
        found = []
        for name, size in self.storage.list().items():
            if size < 0 and policy.parse(name, ()):
                info = policy.parse(name, self.storage.list(name))
                assert info is not None
                found.append(info)
        return sorted(found, key=lambda c: c.order)

    def history_steps(self) -> list[int]:
        """The steps of the committed checkpoints that this run's history goes through, newest first: the same on all ranks."""
        found: list[int] = self._from_rank_0(
            lambda: [c.step for c in policy.history(self.steps(), read_epochs(self.storage))]
        )
        return found

    def has_committed(self) -> bool:
        """Whether any checkpoint lies here, also one that was left behind: the same on all ranks."""
        found: bool = self._from_rank_0(lambda: any(c.committed for c in self.steps()))
        return found

    def load_latest(self, state: dict[str, Any], max_step: int | None = None) -> LoadedCheckpoint | None:
        """Fills `state` in place from the newest valid checkpoint (of step <= max_step) and becomes the one writer,
        whose history goes on from there: checkpoints of later steps are left behind.

        `state`: nested dicts and lists of tensors, DTensors and JSON values. None if there is nothing to load.
        Raises CheckpointError if there are checkpoints and none is valid, or the place is another run's; Fenced if a newer writer
        exists.
        """
        self._join()  # whether a newer writer exists, rank 0 asks for all
        self._epoch, candidates = self._from_rank_0(lambda: self._candidates(max_step))
        self._failed_at = None
        passed_over = []
        for info in candidates:
            loaded, reason = self._load(info, state)
            if loaded:
                self._go_on_from(info.step)
                self.saved_step = info.step
                self._event("loaded", info.step, f"{info.name} verified and loaded")
                self._prepare(state)
                return loaded
            passed_over.append(f"{info.name}: {reason}")
            self._event("passed_over", info.step, f"{info.name} passed over: {reason}")
        if passed_over:
            raise CheckpointError(
                f"none of the {len(passed_over)} checkpoints in {self.storage.root} can be loaded:\n  "
                + "\n  ".join(passed_over)
                + "\nMend one; to start from the first step, launch under another name."
            )
        if max_step is None:
            self._go_on_from(0)
        self._prepare(state)
        return None

    def _candidates(self, max_step: int | None) -> tuple[int, list[CheckpointInfo]]:
        if not self.read_only:
            self._claim()
            self._take_epoch()
        lived = policy.history(self.steps(), read_epochs(self.storage))
        epoch = self._lease.epoch if self._lease else 0
        return epoch, [c for c in lived if max_step is None or c.step <= max_step]

    def _go_on_from(self, step: int) -> None:
        self._from_rank_0(lambda: self._lease.went_on_from(step) if self._lease else None)

    def _load(self, info: CheckpointInfo, state: dict[str, Any]) -> tuple[LoadedCheckpoint | None, str]:
        """The checkpoint, or why it is not valid: the same on all ranks."""
        try:
            manifest_json, index_json = self._from_rank_0(lambda: self._open(info))
        except Exception as error:
            return None, _why(error)
        manifest, index = json.loads(manifest_json), json.loads(index_json)
        shards = _Shards(self.storage, info.name, manifest["files"])
        asked: set[str] = set()
        reason = self._agreed(lambda: shards.verify(range(self.rank, manifest["world_size"], self.world)))
        if not reason:
            reason = self._agreed(
                lambda: asked.update(store_format.fill(state, index, manifest["values"], shards.read))
            )
        if not reason:
            reason = self._unasked({*index["tensors"], *manifest["values"]}, asked, state)
        if reason:
            return None, reason
        return LoadedCheckpoint(step=info.step, epoch=info.epoch, name=info.name, extra=manifest["extra"]), ""

    def _open(self, info: CheckpointInfo) -> tuple[bytes, bytes]:
        """Marker, manifest and index, each proved by the one before, and the sizes of all files."""
        marker = self.storage.read(f"{info.name}/{COMMITTED}")
        manifest_json = self.storage.read(f"{info.name}/{MANIFEST}")
        if marker != _marker(info, checksum(manifest_json)):
            raise ValueError(f"{COMMITTED} and {MANIFEST} do not belong together: one is damaged")
        manifest = json.loads(manifest_json)
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']}, and this version reads {FORMAT}")
        if (manifest["step"], manifest["epoch"]) != (info.step, info.epoch):
            raise ValueError(f"its directory says step {info.step}, its manifest step {manifest['step']}")
        sizes = self.storage.list(info.name)
        for name, file in manifest["files"].items():
            if name not in sizes:
                raise ValueError(f"{name} is missing")
            if sizes[name] != file["bytes"]:
                raise ValueError(f"{name} has {sizes[name]} bytes, not {file['bytes']}")
        index_json = self.storage.read(f"{info.name}/{INDEX}")
        if manifest["files"][INDEX]["xxh3_128"] != checksum(index_json):
            raise ValueError(f"{INDEX} is damaged: its checksum differs")
        return manifest_json, index_json

    def _unasked(self, saved: set[str], asked: set[str], state: dict[str, Any]) -> str:
        """Half a model must not load as if it were a whole one: all that was saved of the same kinds was asked for
        by some rank."""
        kinds = {key.split(".", 1)[0] for key in state}  # such as "model", "optim"
        names = sorted(n for n in saved if n.split(".", 1)[0] in kinds)
        mask = torch.tensor([n in asked for n in names], dtype=torch.uint8)
        if self.world > 1 and names:
            dist.all_reduce(mask, op=dist.ReduceOp.MAX, group=self._group)
        missing = [n for n, wanted in zip(names, mask.tolist(), strict=True) if not wanted]
        return (
            f"it holds {len(missing)} values that the model has no place for, such as {missing[0]}" if missing else ""
        )

    # ---------------------------------------------------------------------------------------------------- writing

    def save(
        self, step: int, state: dict[str, Any], extra: dict[str, Any], *, vetted: bool = False, wait: bool = False
    ) -> bool:
        """Copies `state` and writes it in the background (`wait`, or checkpoint.asynchronous=false: before returning).

        `extra` is JSON, the same on all ranks (rank 0's is written). While an earlier save is still being written this
        one is skipped (with `wait`, the earlier is awaited): False, on all ranks. A failed save is an event and `save_due`, no
        exception. Raises Fenced once a newer writer has taken over.
        """
        assert not self.read_only, "this store only reads"
        started = time.perf_counter()
        extra_json = json.dumps(extra)
        if wait:
            self._join()
        planner = DefaultSavePlanner()
        planner.set_up_planner(state, is_coordinator=self.rank == 0)
        if not self._ready(planner):
            job = self._writing
            seconds = f", for {time.perf_counter() - job.started:.1f} s" if job else " on another rank"
            before = f"step {job.info.step}" if job else "the save before"
            self._event("save_skipped", step, f"step {step} not saved: {before} is still being written{seconds}")
            return False
        self._failed_at = None
        values = {i.index.fqn: planner.lookup_object(i.index) for i in self._value_items}
        self._stage(planner)
        name = self._new_name(step)
        job = _Job(name, extra_json, vetted, values, self._lease, time.perf_counter() - started, started)
        self._writing = job
        self._idle.clear()
        self._jobs.put(job)
        if wait or not self.config.asynchronous:
            self.finish()
        return True

    @property
    def write_s(self) -> float:
        """From its copy to its marker, the longest of the last three saves; the one in flight counts with its time so far."""
        job = self._writing
        return max([*self._writes_s, time.perf_counter() - job.started if job else 0.0])

    def finish(self) -> None:
        """Waits for a save in flight, at most checkpoint.write_timeout_s. Raises Fenced if a newer writer exists."""
        self._join()
        if self._fenced:
            raise Fenced(self._overtaken)

    def is_idle(self, within_s: float) -> bool:
        """Whether no save is in flight, for which it waits so long."""
        return self._idle.wait(within_s)

    @property
    def save_due(self) -> bool:
        """Whether to save at the next step, out of turn: a save failed a while (checkpoint.retry_save_s) ago and none has
        begun since, or there is a newer writer, of which `save` tells all ranks. Ranks learn of either at different
        times, and saving is for all together: agree on it, as on a signal."""
        if self._overtaken:
            return self._idle.is_set()  # before, `save` would only say that it is busy
        return self._failed_at is not None and time.monotonic() - self._failed_at >= self.config.retry_save_s

    def vet(self, step: int) -> bool:
        """Marks the newest checkpoint of this step as healthy, so that retention keeps it. Rank 0 acts, alone.

        One that is still being written is marked with it. False if there is none (any more)."""
        if self.rank:
            return False
        if (job := self._writing) and job.info.step == step:
            job.vetted = True
            return True
        for info in policy.history(self.steps(), read_epochs(self.storage)):
            if info.step == step:
                self._mark_vetted(info)
                return True
        return False

    def _mark_vetted(self, info: CheckpointInfo) -> None:
        self.storage.put(f"{info.name}/{VETTED}", b"")

    def _watch_lease(self) -> None:
        """Rank 0's thread: who is overtaken is told soon, not at the next save, which may be half an hour away."""
        while not self._overtaken:
            time.sleep(LEASE_CHECK_S)
            self.is_overtaken()

    def is_overtaken(self) -> bool:
        """Whether a newer writer exists, as rank 0 sees it, alone: one listing. `save` will tell all ranks."""
        with contextlib.suppress(Exception):  # of the storage: the next look will tell, or the next commit
            newest = max(read_epochs(self.storage), default=0)
            with self._lease_lock:
                lease = self._lease
            if lease and newest > lease.epoch:
                try:
                    lease.check()
                except Fenced as fenced:
                    self._note_overtaken(str(fenced))
        return self._overtaken is not None

    def _ready(self, planner: DefaultSavePlanner) -> bool:
        """Whether to stage now, agreed by all ranks; makes plan, buffers and groups as needed."""
        busy = not self._idle.is_set()
        changed = not busy and store_format.signature(planner.state_dict) != self._signature
        flags = torch.tensor([busy, changed, self._overtaken is not None, self._group_broken, self._epoch == 0])
        if self.world > 1:
            flags = flags.to(torch.uint8)
            dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._group)
        busy, changed, overtaken, broken, new = map(bool, flags.tolist())
        if busy and not (overtaken and broken):  # else the writing threads still talk to each other
            return False
        if overtaken:
            raise Fenced(self._overtaken or "a newer writer has taken over: rank 0 knows which")
        if broken:
            self._write_group = self._new_group()
            self._group_broken = False
        if new:
            self._epoch = self._from_rank_0(self._take_epoch)
        if changed:
            self._plan(planner)
        return True

    def _claim(self) -> None:
        """Before a lease is taken, which would fence the other run."""
        if self.run_id is None:
            return
        self.storage.create(RUN, self.run_id.encode())
        owner = self.storage.read(RUN).decode().strip()  # read back: not every store knows who was first
        if not owner:  # its writer was killed
            self.storage.put(RUN, self.run_id.encode())
        elif owner != self.run_id:
            raise CheckpointError(of_another_run(self.storage.root, owner, self.run_id))

    def _take_epoch(self) -> int:
        with self._lease_lock:
            first = self._lease is None
            try:
                self._lease = acquire(self.storage, self.writer, self._lease)
            except Fenced as fenced:
                self._note_overtaken(str(fenced))
                raise
        if first:
            threading.Thread(target=self._watch_lease, name="lease-watch", daemon=True).start()
        return self._lease.epoch

    def _prepare(self, state: dict[str, Any]) -> None:
        """Plans, and makes the buffers, before training starts: then the first save costs no more than the others."""
        if self.read_only:
            return
        planner = DefaultSavePlanner()
        planner.set_up_planner(state, is_coordinator=self.rank == 0)
        self._ready(planner)

    def _plan(self, planner: DefaultSavePlanner) -> None:
        """Who writes what: DCP's planner removes duplicates over all ranks and balances what is left."""
        mine = replace(planner.create_local_plan(), planner_data={})
        plans: list[Any] = [mine] * self.world
        if self.world > 1:
            dist.gather_object(mine, plans if self.rank == 0 else None, dst=0, group=self._group)
        planned: list[Any] = []

        def plan_all() -> None:
            planned.extend(planner.create_global_plan(plans)[0])
            self._index = store_format.index(planned)

        if problem := self._agreed(plan_all if self.rank == 0 else lambda: None):
            raise ValueError(f"this state cannot be saved: {problem}")
        if self.world > 1:
            result: list[Any] = [None]
            dist.scatter_object_list(result, planned if self.rank == 0 else None, src=0, group=self._group)
            planned = result
        plan = planner.finish_plan(planned[0])
        self._value_items = [i for i in plan.items if i.type == WriteItemType.BYTE_IO]
        json.dumps([planner.lookup_object(i.index) for i in self._value_items])  # TypeError: what is no tensor is JSON
        self._slots, size = store_format.lay_out(plan.items)
        self._header = store_format.header(self._slots)
        on_gpu = any(isinstance(v, Tensor) and v.is_cuda for v in planner.state_dict.values())
        self._data = torch.zeros(size, dtype=torch.uint8, pin_memory=on_gpu)  # zeros: touched once, here
        self._data.fill_(1)
        self._views = [slot.view(self._data) for slot in self._slots]
        if self._copiers is None and torch.get_num_threads() > 1 and not on_gpu:
            self._copiers = ThreadPoolExecutor(torch.get_num_threads() - 1, "checkpoint-copier")
        self._signature = store_format.signature(planner.state_dict)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="checkpoint-writer", daemon=True)
            self._thread.start()

    @torch.no_grad()
    def _stage(self, planner: DefaultSavePlanner) -> None:
        """Copies this rank's parts into the buffer. Training waits for this.

        On a CPU, threads share out whole tensors: copy_ splits each tensor over its threads and waits for all of them
        each time, which costs a third more over hundreds of tensors.
        """
        pieces: collections.deque[tuple[Any, Any]] = collections.deque()
        for slot, view in zip(self._slots, self._views, strict=True):
            part = planner.resolve_data(slot.item)
            assert isinstance(part, Tensor)
            if self._copiers and part.is_contiguous() and part.device.type == "cpu":
                target, source = (t.detach().reshape(-1).view(torch.uint8).numpy() for t in (view, part))
                pieces.extend(
                    (target[at : at + BLOCK_BYTES], source[at : at + BLOCK_BYTES])
                    for at in range(0, len(target), BLOCK_BYTES)
                )
            else:
                view.copy_(part, non_blocking=True)

        def copy_some() -> None:
            with contextlib.suppress(IndexError):  # none is left
                while True:
                    np.copyto(*pieces.popleft())

        if self._copiers:
            helpers = [self._copiers.submit(copy_some) for _ in range(torch.get_num_threads() - 1)]
            copy_some()
            for helper in helpers:
                helper.result()
        if self._data.is_pinned():
            torch.cuda.synchronize()

    def _new_name(self, step: int) -> CheckpointInfo:
        """A name never used before in this epoch, the same on all ranks."""
        attempt = 1
        while (info := CheckpointInfo(step=step, epoch=self._epoch, attempt=attempt)).name in self._names:
            attempt += 1
        self._names.add(info.name)
        return info

    def _run(self) -> None:
        """The writing thread. One for all saves, as starting one costs the trainer milliseconds; a daemon, as a write
        that hangs must not keep the process from ending."""
        while True:
            job = self._jobs.get()
            try:
                self._write(job)
            finally:
                self._writing = None
                self._idle.set()

    def _write(self, job: _Job) -> None:
        """Writes, concludes with all ranks, reports."""
        report: dict[str, Any] = {"values": job.values, "error": "", "refused": False}
        try:
            if bad := store_format.first_non_finite(self._slots, self._data):
                report |= {"error": f"{bad} holds non-finite values", "refused": True}
            else:
                name = store_format.file_name(self.rank)
                written = self.storage.write(f"{job.info.name}/{name}", self._blocks)
                self.storage.sync(job.info.name)
                report["file"] = {"name": name, "data_start": len(self._header), **asdict(written)}
        except Exception as error:
            report["error"] = _why(error)
        try:
            outcome = self._conclude(job, report)
        except Exception as error:  # a rank is gone, or has been writing for longer than write_timeout_s
            self._group_broken = True
            outcome = {"kind": "save_failed", "detail": f"the ranks lost each other: {_why(error)}"}
        self._failed_at = time.monotonic() if outcome["kind"] == "save_failed" else None
        if outcome["kind"] == "saved":
            self.saved_step = job.info.step
            self._writes_s.append(time.perf_counter() - job.started)
        if outcome["kind"] == "fenced":
            self._note_overtaken(outcome["detail"])
            self._fenced = True
        else:
            self._event(outcome["kind"], job.info.step, f"step {job.info.step}: {outcome['detail']}")
        if self.rank == 0 and outcome["kind"] == "saved":
            try:
                self._tidy(job)
            except Exception as error:
                self._event("remove_failed", job.info.step, f"old checkpoints not removed: {_why(error)}")

    def _blocks(self) -> Any:
        yield self._header
        data = _bytes_of(self._data)
        for start in range(0, len(data), BLOCK_BYTES):
            yield data[start : start + BLOCK_BYTES]

    def _conclude(self, job: _Job, report: dict[str, Any]) -> dict[str, str]:
        """Rank 0 gathers all reports, commits or removes, and tells all ranks what came of it."""
        reports = [report]
        if self.world > 1:
            reports = [report] * self.world
            dist.gather_object(report, reports if self.rank == 0 else None, dst=0, group=self._write_group)
        outcome = [self._commit_or_remove(job, reports) if self.rank == 0 else {}]
        if self.world > 1:
            dist.broadcast_object_list(outcome, src=0, group=self._write_group)
        return outcome[0]

    def _commit_or_remove(self, job: _Job, reports: list[dict[str, Any]]) -> dict[str, str]:
        try:
            failed = [(r, report) for r, report in enumerate(reports) if report["error"]]
            if not failed:
                size = self._commit(job, reports)
                if gap := self._overtaken_in_the_gap(job):
                    return gap
                seconds = time.perf_counter() - job.started
                detail = f"{size / 1e6:.1f} MB in {seconds:.2f} s, training waited {job.stall_s * 1e3:.0f} ms"
                return {"kind": "saved", "detail": detail}
            refused = any(report["refused"] for _, report in failed)
            kind = "save_refused" if refused else "save_failed"
            detail = "; ".join(f"rank {r}: {report['error']}" for r, report in failed[:4])
            detail += f" (and {len(failed) - 4} more ranks)" if len(failed) > 4 else ""
        except Fenced as fenced:
            kind, detail = self._kind_of(job), str(fenced)
        except Exception as error:
            kind, detail = "save_failed", _why(error)
        try:
            self._remove(job.info)
        except Exception as error:
            detail += f"; what was written could not be removed yet ({_why(error)})"
        return {"kind": kind, "detail": detail}

    def _kind_of(self, job: _Job) -> str:
        """Of a save that was overtaken: by another writer, or, where it hung over a rewind, by its own run."""
        with self._lease_lock:
            return "fenced" if job.lease is self._lease else "save_failed"

    def _overtaken_in_the_gap(self, job: _Job) -> dict[str, str]:
        """Between the last look at the lease and the marker, after both: empty if not. What is committed stays, as the newer
        writer may have gone on from it."""
        assert job.lease is not None
        try:
            job.lease.check()
        except Fenced as fenced:
            return {"kind": self._kind_of(job), "detail": str(fenced)}
        except Exception as error:
            detail = f"committed, but whether a newer writer exists could not be asked: {_why(error)}"
            return {"kind": "save_failed", "detail": detail}
        return {}

    def _commit(self, job: _Job, reports: list[dict[str, Any]]) -> int:
        """Manifest, then the lease, then the marker. Returns the checkpoint's bytes."""
        assert job.lease is not None
        folder = job.info.name
        values: dict[str, Any] = {}
        files = {INDEX: asdict(self.storage.put(f"{folder}/{INDEX}", self._index))}
        for report in reports:
            file = report["file"]
            files[file.pop("name")] = file
            values |= report["values"]
        manifest = {
            "format": FORMAT,
            "step": job.info.step,
            "epoch": job.info.epoch,
            "world_size": self.world,
            "time_utc": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "files": files,
            "values": values,
            "extra": json.loads(job.extra),
        }
        written = self.storage.put(f"{folder}/{MANIFEST}", json.dumps(manifest, indent=1).encode())
        if job.vetted:
            self._mark_vetted(job.info)
        self.storage.sync(folder)
        self.storage.sync()
        job.lease.check()
        self.storage.put(f"{folder}/{COMMITTED}", _marker(job.info, written.xxh3_128))
        return sum(f["bytes"] for f in files.values())

    def _tidy(self, job: _Job) -> None:
        told = job.vetted  # perhaps only since the marker is on its way
        if told:
            self._mark_vetted(job.info)
        for info in policy.removable(self.steps(), self.config, read_epochs(self.storage), job.info.epoch):
            self._remove(info)
            self._event("removed", info.step, f"{info.name} removed" + ("" if info.committed else " (never committed)"))
        if job.vetted and not told:  # removing can take longer than a few steps
            self._mark_vetted(job.info)

    def _remove(self, info: CheckpointInfo) -> None:
        """The marker first: a removal that is killed leaves debris, never half a checkpoint."""
        self.storage.remove_file(f"{info.name}/{COMMITTED}")
        self.storage.remove(info.name)

    # --------------------------------------------------------------------------------------------------- together

    def _join(self) -> None:
        if not self.is_idle(self.config.write_timeout_s):
            self._event("save_failed", 0, f"still writing after {self.config.write_timeout_s:g} s: waiting no longer")

    def _note_overtaken(self, detail: str) -> None:
        with (
            self._overtaken_lock
        ):  # a commit and the watch can both see it: it is told once, and before anybody acts on it
            if not self._overtaken:
                self._event("fenced", 0, detail)
                self._overtaken = detail

    def _event(self, kind: str, step: int, detail: str) -> None:
        if self.rank == 0:
            self._on_event(kind, step, detail)

    def _new_group(self) -> Any:
        if self.world == 1:
            return None
        return dist.new_group(backend="gloo", timeout=timedelta(seconds=self.config.write_timeout_s))

    def _from_rank_0(self, action: Callable[[], Any]) -> Any:
        """What rank 0 finds, on all ranks; what it raises, too."""
        result: list[Any] = [None, None]
        if self.rank == 0:
            try:
                result[0] = action()
            except Exception as error:
                result[1] = error
        if self.world > 1:
            if isinstance(result[1], Exception) and not isinstance(result[1], Fenced):
                result[1] = CheckpointError(_why(result[1]))  # travels whatever it was
            dist.broadcast_object_list(result, src=0, group=self._group)
        if result[1] is not None:
            raise result[1]
        return result[0]

    def _agreed(self, action: Callable[[], Any]) -> str:
        """Runs `action` on every rank. Empty if it went well on all; else the first rank's reason, on all."""
        reason = ""
        try:
            action()
        except Exception as error:
            reason = _why(error)
        if self.world == 1:
            return reason
        reasons = [""] * self.world
        dist.all_gather_object(reasons, reason, group=self._group)
        return next((f"rank {r}: {reason}" for r, reason in enumerate(reasons) if reason), "")


class _Shards:
    """The ranks' files of one checkpoint. Keeps the file verified last, as that usually is the one to be read."""

    def __init__(self, storage: Storage, folder: str, files: dict[str, Any]) -> None:
        self.storage, self.folder, self.files = storage, folder, files
        self._held_rank: int | None = None
        self._held = torch.empty(0, dtype=torch.uint8)

    def verify(self, ranks: Iterable[int]) -> None:
        """Reads whole files. Raises ValueError if one is not what was written."""
        for rank in ranks:
            name = store_format.file_name(rank)
            self._held_rank = None
            self._held = self._bytes(rank, 0, self.files[name]["bytes"])
            if checksum(_bytes_of(self._held)) != self.files[name]["xxh3_128"]:
                raise ValueError(f"{name} is damaged: its checksum differs")
            self._held_rank = rank

    def read(self, rank: int, start: int, end: int) -> Tensor:
        shift = self.files[store_format.file_name(rank)]["data_start"]
        if rank == self._held_rank:
            return self._held[shift + start : shift + end]
        return self._bytes(rank, shift + start, shift + end)

    def _bytes(self, rank: int, start: int, end: int) -> Tensor:
        data = torch.empty(end - start, dtype=torch.uint8)
        target = _bytes_of(data)
        path = f"{self.folder}/{store_format.file_name(rank)}"
        for at in range(start, end, BLOCK_BYTES):
            block = self.storage.read(path, at, min(at + BLOCK_BYTES, end))
            target[at - start : at - start + len(block)] = block
        return data


def _bytes_of(data: Tensor) -> memoryview:
    buffer: Any = data.numpy()
    return memoryview(buffer)


def _why(error: Exception) -> str:
    """One line for a person."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError | CheckpointError) and text else f"{type(error).__name__}: {text}"


def _marker(info: CheckpointInfo, manifest_xxh3_128: str) -> bytes:
    return json.dumps({"step": info.step, "epoch": info.epoch, "manifest_xxh3_128": manifest_xxh3_128}).encode()
