"""Kills, full disks and I/O errors: training never stops, the last good checkpoint stays, and what is left is cleared."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_faults import Events, FaultyFileSystem, eio, kill, make_store, run_ranks

from model.checkpoint.lease import Fenced, acquire, read_epochs
from model.checkpoint.storage import Storage


@pytest.fixture(autouse=True)
def no_faults_are_left() -> Iterator[None]:
    yield
    FaultyFileSystem.faults.clear()


def state(value: float = 0, size: int = 100) -> dict[str, Any]:
    return {"model": {"w": torch.full((size,), float(value))}}


def save_and_be_killed(rank: int, folder: str, operation: str, where: str) -> None:
    store = make_store(f"faulty://{folder}", keep_last=1)
    store.load_latest(state())
    store.save(1, state(1), {}, wait=True)
    FaultyFileSystem.faults[operation, where] = kill
    store.save(2, state(2), {}, wait=True)


@pytest.mark.parametrize(
    ("operation", "where", "left"),
    [
        ("write", "000002-e000001/rank-00000", 1),  # nothing but an empty file
        ("close", "000002-e000001/rank-00000", 1),  # data, no index
        ("open", "000002-e000001/manifest", 1),  # data and index
        ("open", "000002-e000001/COMMITTED", 1),  # all but the marker
        ("close", "000002-e000001/COMMITTED", 1),  # the marker written aside
        ("rm", "000001-e000001", 2),  # while the one before is being removed
    ],
)
def test_killed_anywhere_in_a_save_the_newest_whole_checkpoint_is_resumed(
    tmp_path: Path, operation: str, where: str, left: int
) -> None:
    folder = tmp_path / "checkpoints"
    assert run_ranks(save_and_be_killed, 1, tmp_path, str(folder), operation, where) == [-signal.SIGKILL]
    events, found = Events(), state()
    store = make_store(str(folder), events, keep_last=1)
    loaded = store.load_latest(found)
    assert loaded
    assert loaded.step == left
    assert torch.equal(found["model"]["w"], state(left)["model"]["w"])
    assert events.kinds() == ["loaded"]
    store.save(3, state(3), {}, wait=True)
    assert [(c.step, c.committed) for c in store.steps()] == [(3, True)]  # no debris


def start_and_be_killed(rank: int, folder: str, where: str) -> None:
    FaultyFileSystem.faults["close", where] = kill
    make_store(f"faulty://{folder}").load_latest(state())


@pytest.mark.parametrize("where", ["epochs/epoch-000002", "epochs/epoch-000002.from"])
def test_killed_while_it_resumes_the_next_start_finds_the_same(tmp_path: Path, where: str) -> None:
    folder = tmp_path / "checkpoints"
    first = make_store(str(folder))
    first.load_latest(state())
    first.save(1, state(1), {}, wait=True)
    assert run_ranks(start_and_be_killed, 1, tmp_path, str(folder), where) == [-signal.SIGKILL]
    loaded = make_store(str(folder)).load_latest(state())
    assert loaded
    assert loaded.step == 1
    with pytest.raises(Fenced):
        first.save(2, state(2), {}, wait=True)


@pytest.mark.parametrize("where", ["manifest", "COMMITTED"])
def test_a_save_that_hangs_over_a_rewind_fences_nobody(tmp_path: Path, where: str) -> None:
    events, hangs, goes_on = Events(), threading.Event(), threading.Event()
    store = make_store(f"faulty://{tmp_path}", events, write_timeout_s=0.2)
    store.load_latest(state())

    def hang() -> None:
        hangs.set()
        goes_on.wait(30)

    FaultyFileSystem.faults["close", where] = hang
    store.save(1, state(1), {})
    assert hangs.wait(30)
    store.load_latest(state(), max_step=0)  # under the next epoch
    FaultyFileSystem.faults.clear()
    goes_on.set()
    assert store.is_idle(30)
    assert store.save(2, state(2), {}, wait=True)
    assert store.saved_step == 2
    assert "fenced" not in events.kinds()


def test_an_error_that_passes_is_retried_unseen(tmp_path: Path) -> None:
    events = Events()
    store = make_store(f"faulty://{tmp_path}", events, retries=2)
    store.load_latest(state())
    FaultyFileSystem.faults["write", "rank-00000"] = eio(times=1)
    FaultyFileSystem.faults["open", "manifest"] = eio(times=2)
    store.save(1, state(1), {}, wait=True)
    FaultyFileSystem.faults["read", "index.json"] = eio(times=2)
    FaultyFileSystem.faults["read", "rank-00000"] = eio(times=1)
    found = state()
    assert store.load_latest(found)
    assert found["model"]["w"][0] == 1
    assert events.kinds() == ["saved", "loaded"]


@pytest.mark.parametrize("where", ["rank-00000", "index.json", "manifest.json", "COMMITTED"])
def test_a_save_that_fails_is_told_and_cleared_and_the_next_goes_through(tmp_path: Path, where: str) -> None:
    events = Events()
    store = make_store(f"faulty://{tmp_path}", events, retries=1)
    store.load_latest(state())
    FaultyFileSystem.faults["write", where] = eio()
    store.save(1, state(1), {}, wait=True)
    assert events.kinds() == ["save_failed"]
    assert "Input/output error" in events.detail("save_failed")
    assert store.save_due
    assert store.steps() == []
    FaultyFileSystem.faults.clear()
    store.save(1, state(1), {}, wait=True)  # the same step again, in a new directory
    assert store.saved_step == 1
    assert not store.save_due
    assert [c.committed for c in store.steps()] == [True]


def test_a_checkpoint_that_cannot_be_read_is_passed_over(tmp_path: Path) -> None:
    store = make_store(f"faulty://{tmp_path}")
    store.load_latest(state())
    for step in (1, 2):
        store.save(step, state(step), {}, wait=True)
    FaultyFileSystem.faults["read", "000002-e000001/rank"] = eio()
    events = Events()
    loaded = make_store(f"faulty://{tmp_path}", events).load_latest(state())
    assert loaded
    assert loaded.step == 1
    assert "Input/output error" in events.detail("passed_over")


def test_old_checkpoints_that_cannot_be_removed_fail_no_save(tmp_path: Path) -> None:
    events = Events()
    store = make_store(f"faulty://{tmp_path}", events, keep_last=1)
    store.load_latest(state())
    store.save(1, state(1), {}, wait=True)
    FaultyFileSystem.faults["rm", "000001-e000001"] = eio()
    store.save(2, state(2), {}, wait=True)
    assert events.kinds() == ["saved", "saved", "remove_failed"]
    FaultyFileSystem.faults.clear()
    store.save(3, state(3), {}, wait=True)
    assert [c.step for c in store.steps()] == [3]


def test_a_full_disk_stops_no_training_and_costs_no_checkpoint(small_disk: Path) -> None:
    events = Events()
    store = make_store(str(small_disk / "checkpoints"), events)
    megabyte = 200_000  # values, and room for the files around them
    store.load_latest(state(size=megabyte))
    ballast = small_disk / "ballast"
    store.save(1, state(1, megabyte), {}, wait=True)
    ballast.write_bytes(bytes(700_000))
    store.save(2, state(2, megabyte), {}, wait=True)
    assert events.kinds() == ["saved", "save_failed"]
    assert "No space left" in events.detail("save_failed")
    assert [c.step for c in store.steps()] == [1]  # what was written of the second is gone
    ballast.unlink()
    assert store.save_due
    store.save(3, state(3, megabyte), {}, wait=True)
    loaded = store.load_latest(state(size=megabyte))
    assert loaded
    assert loaded.step == 3


def test_a_full_disk_has_no_next_writer_and_keeps_no_trace_of_one(small_disk: Path) -> None:
    storage = Storage(str(small_disk / "checkpoints"), retries=1, retry_wait_s=0.01)
    first = acquire(storage)
    ballast = small_disk / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    with pytest.raises(OSError, match="No space left"):
        acquire(storage)
    assert list(read_epochs(storage)) == [first.epoch]
    first.check()
    ballast.unlink()
    assert acquire(storage).epoch == first.epoch + 1


def test_a_stalled_write_goes_on_in_the_background_and_memory_stays_bounded(tmp_path: Path) -> None:
    events, gate, reached = Events(), threading.Event(), threading.Event()
    store = make_store(f"faulty://{tmp_path}", events)
    store.load_latest(state())

    def stall() -> None:
        reached.set()
        gate.wait()

    FaultyFileSystem.faults["write", "rank-00000"] = stall
    store.save(1, state(1), {})
    reached.wait()
    for step in range(2, 6):
        store.save(step, state(step), {})
    assert events.kinds() == ["save_skipped"] * 4
    assert sum(t.name == "checkpoint-writer" and t is store._thread for t in threading.enumerate()) == 1
    gate.set()
    store.finish()
    assert [c.step for c in store.steps()] == [1]
