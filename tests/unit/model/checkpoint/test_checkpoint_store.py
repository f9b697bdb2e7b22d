"""One rank saves, loads, damages and rewinds real checkpoints on a real disk."""

import json
import os
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from model.checkpoint.lease import Fenced, Lease, acquire, read_epochs
from model.checkpoint.policy import CheckpointConfig
from model.checkpoint.storage import Storage, checksum
from model.checkpoint.store import CheckpointError, CheckpointStore

FILES = ["COMMITTED", "manifest.json", "index.json", "rank-00000.safetensors"]


class Events(list[tuple[str, int, str]]):
    def __call__(self, kind: str, step: int, detail: str) -> None:
        self.append((kind, step, detail))

    def kinds(self) -> list[str]:
        return [kind for kind, _, _ in self]

    def details(self, kind: str) -> list[str]:
        return [detail for k, _, detail in self if k == kind]


class Trainee:
    """A small model that learns, so that AdamW has a state."""

    def __init__(self, seed: int = 0, width: int = 16) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(8, width), nn.Linear(width, 4))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)

    def train(self, steps: int = 1) -> None:
        for _ in range(steps):
            self.model(torch.randn(3, 8)).square().sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def load(self, state: dict[str, Any]) -> None:
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def config(**values: Any) -> CheckpointConfig:
    return CheckpointConfig(name="test", **({"retries": 0, "keep_last": 9} | values))


def store(folder: Path, events: Events | None = None, read_only: bool = False, **values: Any) -> CheckpointStore:
    return CheckpointStore(
        str(folder), config(**values), on_event=Events() if events is None else events, read_only=read_only
    )


def saved(folder: Path, *steps: int) -> dict[int, Any]:
    """Checkpoints of a tensor that holds its step."""
    writer = store(folder)
    writer.load_latest(plain())
    for step in steps:
        writer.save(step, plain(step), {"step": step}, wait=True)
    return {info.step: folder / info.name for info in writer.steps()}


def plain(value: float = 0.0) -> dict[str, Any]:
    return {"model": {"w": torch.full((5, 3), float(value)), "b": torch.full((), value, dtype=torch.bfloat16)}}


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def test_a_resumed_run_trains_bitwise_as_one_never_stopped(tmp_path: Path) -> None:
    control = Trainee()
    torch.manual_seed(1)
    control.train(6)

    first = Trainee()
    torch.manual_seed(1)
    first.train(3)
    writer = store(tmp_path)
    assert writer.load_latest(first.state()) is None
    rng = torch.get_rng_state()
    writer.save(3, {**first.state(), "rng": rng}, {"tokens": 72, "skip": [[1, 2]], "mean": 0.1}, wait=True)

    second = Trainee(seed=7)
    state = {**second.state(), "rng": torch.zeros_like(rng)}
    loaded = store(tmp_path).load_latest(state)
    assert loaded
    assert (loaded.step, loaded.extra) == (3, {"tokens": 72, "skip": [[1, 2]], "mean": 0.1})
    second.load(state)
    torch.set_rng_state(state["rng"])
    second.train(3)
    assert all(torch.equal(a, b) for a, b in zip(control.model.parameters(), second.model.parameters(), strict=True))
    assert str(control.optimizer.state_dict()) == str(second.optimizer.state_dict())


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, empty, os.unlink], ids=lambda d: d.__name__)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_seen_and_the_one_before_wins(tmp_path: Path, name: str, damage: Any) -> None:
    paths = saved(tmp_path, 1, 2)
    damage(paths[2] / name)
    state, events = plain(), Events()
    loaded = store(tmp_path, events).load_latest(state)
    assert loaded
    assert loaded.step == loaded.extra["step"] == 1
    assert torch.equal(state["model"]["w"], torch.full((5, 3), 1.0))
    if (name, damage) != ("COMMITTED", os.unlink):  # without the marker it never was a checkpoint
        [reason] = events.details("passed_over")
        assert paths[2].name in reason
        assert name in reason


def test_the_newest_two_damaged_and_the_third_wins(tmp_path: Path) -> None:
    paths = saved(tmp_path, 1, 2, 3)
    flip_a_bit(paths[3] / "rank-00000.safetensors")
    truncate(paths[2] / "index.json")
    events = Events()
    loaded = store(tmp_path, events).load_latest(plain())
    assert loaded
    assert loaded.step == 1
    assert events.kinds() == ["passed_over", "passed_over", "loaded"]


def test_checkpoints_of_which_none_is_valid_stop_the_run_with_every_reason(tmp_path: Path) -> None:
    for path in saved(tmp_path, 1, 2).values():
        flip_a_bit(path / "rank-00000.safetensors")
    with pytest.raises(CheckpointError, match=r"(?s)none of the 2 .*step-000000002.*damaged.*step-000000001.*damaged"):
        store(tmp_path).load_latest(plain())
    assert len(store(tmp_path).steps()) == 2  # and nothing was removed


class Bomb:
    def __reduce__(self) -> Any:
        return (os.mkdir, (os.environ["BOMB"],))


@pytest.mark.parametrize("name", [*FILES, ".metadata", "VETTED"])
def test_a_malicious_pickle_in_any_file_is_never_executed(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    crater = tmp_path / "crater"
    monkeypatch.setenv("BOMB", str(crater))
    paths = saved(tmp_path, 1, 2)
    bomb = pickle.dumps(Bomb())
    (paths[2] / name).write_bytes(bomb)
    if name == "rank-00000.safetensors":  # an attacker who also forges every checksum on the way up
        manifest = json.loads((paths[2] / "manifest.json").read_text())
        manifest["files"][name] |= {"bytes": len(bomb), "xxh3_128": checksum(bomb)}
        (paths[2] / "manifest.json").write_text(json.dumps(manifest))
        digest = checksum((paths[2] / "manifest.json").read_bytes())
        (paths[2] / "COMMITTED").write_text(json.dumps({"step": 2, "epoch": 1, "manifest_xxh3_128": digest}))
    loaded = store(tmp_path).load_latest(plain())
    assert loaded
    assert loaded.step == (2 if name in (".metadata", "VETTED") else 1)
    assert not crater.exists()
    pickle.loads(bomb)  # noqa: S301 - the bomb is real
    assert crater.exists()


def test_training_on_after_save_returned_changes_nothing_of_what_is_saved(tmp_path: Path) -> None:
    writer = store(tmp_path)
    state = plain(1)
    writer.save(1, state, {})
    state["model"]["w"].fill_(99)
    writer.finish()
    loaded = plain()
    store(tmp_path).load_latest(loaded)
    assert torch.equal(loaded["model"]["w"], torch.full((5, 3), 1.0))


def test_a_non_finite_state_is_never_saved(tmp_path: Path) -> None:
    events = Events()
    writer = store(tmp_path, events)
    writer.save(1, plain(1), {}, wait=True)
    for step, bad in ((2, float("nan")), (3, float("inf")), (4, float("-inf"))):
        state = plain(step)
        state["model"]["w"][4, 2] = bad
        writer.save(step, state, {}, wait=True)
    assert events.kinds() == ["saved", *["save_refused"] * 3]
    assert "model.w" in events.details("save_refused")[0]
    assert [c.step for c in writer.steps()] == [1]
    assert not writer.save_due  # the same state would be refused again


def test_a_save_while_one_is_being_written_is_skipped_and_no_memory_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events, gate, reached = Events(), threading.Event(), threading.Event()
    writer = store(tmp_path, events)
    writer.load_latest(plain())
    buffer = writer._data.data_ptr()
    real_write = writer.storage.write

    def slow_write(*args: Any) -> Any:
        reached.set()
        gate.wait()
        return real_write(*args)

    monkeypatch.setattr(writer.storage, "write", slow_write)
    writer.save(1, plain(1), {})
    reached.wait()
    writer.save(2, plain(2), {})
    writer.save(3, plain(3), {})
    assert events.kinds() == ["save_skipped", "save_skipped"]
    assert "step 1 is still being written" in events.details("save_skipped")[0]
    gate.set()
    writer.finish()
    writer.save(4, plain(4), {}, wait=True)
    assert [c.step for c in writer.steps()] == [1, 4]
    assert writer._data.data_ptr() == buffer


def test_a_writer_that_hangs_does_not_hold_the_run_at_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events, gate = Events(), threading.Event()
    writer = store(tmp_path, events, write_timeout_s=0.05)
    monkeypatch.setattr(writer.storage, "write", lambda *_: gate.wait())
    writer.save(1, plain(1), {})
    writer.finish()
    assert events.kinds() == ["save_failed"]
    gate.set()


def test_a_rewind_leaves_the_later_checkpoints_behind(tmp_path: Path) -> None:
    events = Events()
    writer = store(tmp_path, events)
    writer.load_latest(plain())
    for step in (10, 20, 30):
        writer.save(step, plain(step), {}, wait=True)
    state = plain()
    loaded = writer.load_latest(state, max_step=25)
    assert loaded
    assert loaded.step == 20
    # Killed here: the next start must not go back to the branch with the spike.
    resumed = store(tmp_path).load_latest(plain())
    assert resumed
    assert resumed.step == 20


def test_after_a_rewind_the_same_step_is_saved_anew_and_wins(tmp_path: Path) -> None:
    writer = store(tmp_path)
    writer.load_latest(plain())
    for step in (10, 20):
        writer.save(step, plain(step), {"branch": 1}, wait=True)
    writer.load_latest(plain(), max_step=10)
    writer.save(20, plain(99), {"branch": 2}, wait=True)
    loaded = store(tmp_path).load_latest(plain())
    assert loaded
    assert (loaded.step, loaded.extra) == (20, {"branch": 2})
    assert [c.step for c in writer.steps()] == [10, 20]  # the branch left behind was removed


def test_a_rewind_to_before_every_checkpoint_finds_none_and_loses_none(tmp_path: Path) -> None:
    writer = store(tmp_path)
    writer.load_latest(plain())
    writer.save(10, plain(10), {}, wait=True)
    assert writer.load_latest(plain(), max_step=5) is None
    loaded = store(tmp_path).load_latest(plain())
    assert loaded
    assert loaded.step == 10


def test_a_writer_that_saves_nothing_is_told_once_that_it_is_overtaken_and_a_rewind_overtakes_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.checkpoint.store.LEASE_CHECK_S", 0.001)
    looked = threading.Semaphore(0)

    def acquire_slowly(*words: Any) -> Lease:
        """Returns once the watch has seen the new epoch, which the store does not yet know for its own."""
        lease = acquire(*words)
        while looked.acquire(blocking=False):
            pass
        for _ in range(2):
            assert looked.acquire(timeout=30)
        return lease

    def listed(storage: Storage) -> dict[int, int | None]:
        if threading.current_thread().name == "lease-watch":
            looked.release()
            if not failed:
                failed.append(True)
                raise OSError("the storage is not to be reached")
        return read_epochs(storage)

    failed: list[bool] = []
    monkeypatch.setattr("model.checkpoint.store.read_epochs", listed)
    told, events = threading.Event(), Events()

    def hear(kind: str, step: int, detail: str) -> None:
        events(kind, step, detail)
        if kind == "fenced":
            told.set()

    first = CheckpointStore(str(tmp_path), config(), on_event=hear)
    first.load_latest(plain())
    monkeypatch.setattr("model.checkpoint.store.acquire", acquire_slowly)
    for _ in range(3):  # each takes the next epoch, of the same writer
        first.load_latest(plain())
    assert not first.save_due
    monkeypatch.setattr("model.checkpoint.store.acquire", acquire)
    second = store(tmp_path)
    second.load_latest(plain())
    assert told.wait(30)
    with pytest.raises(Fenced, match="taken over by epoch 5"):
        first.save(1, plain(1), {})
    with pytest.raises(Fenced):
        first.load_latest(plain())
    assert failed
    assert events.kinds() == ["fenced"]
    assert not second.save_due


def test_a_rewind_that_another_start_comes_before_takes_no_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = store(tmp_path), store(tmp_path)
    first.load_latest(plain())

    def another_first(storage: Storage, *words: Any) -> Lease:
        monkeypatch.setattr("model.checkpoint.store.acquire", acquire)
        second.load_latest(plain())
        return acquire(storage, *words)

    monkeypatch.setattr("model.checkpoint.store.acquire", another_first)
    with pytest.raises(Fenced, match="epoch 1 has been taken over by epoch 2"):
        first.load_latest(plain(), max_step=0)
    assert not second.is_overtaken()


def test_a_place_is_of_the_run_that_first_started_there(tmp_path: Path) -> None:
    def started(run_id: str) -> CheckpointStore:
        found = CheckpointStore(str(tmp_path), config(), on_event=Events(), run_id=run_id)
        found.load_latest(plain())
        return found

    started("mine").save(1, plain(1.0), {}, wait=True)
    epochs = read_epochs(Storage(str(tmp_path)))
    with pytest.raises(CheckpointError, match=r"holds the checkpoints of another run, mine, and this one is other"):
        started("other")
    assert read_epochs(Storage(str(tmp_path))) == epochs  # the other has fenced nobody
    (tmp_path / "run.txt").write_text("mine\n")  # as by an editor
    assert started("mine").saved_step == 1
    (tmp_path / "run.txt").write_text("")  # as after a kill
    started("mine")
    assert (tmp_path / "run.txt").read_text() == "mine"


def test_the_same_run_started_twice_fences_the_first(tmp_path: Path) -> None:
    events = Events()
    first = store(tmp_path, events)
    first.load_latest(plain())
    first.save(1, plain(1), {}, wait=True)
    second = CheckpointStore(str(tmp_path), config(), writer="the second one", on_event=Events())
    loaded = second.load_latest(plain())
    assert loaded
    assert loaded.step == 1
    with pytest.raises(Fenced, match="epoch 1 has been taken over by epoch 2 \\(the second one\\)"):
        first.save(2, plain(2), {}, wait=True)
    with pytest.raises(Fenced):
        first.load_latest(plain())
    second.save(2, plain(2), {}, wait=True)
    assert [(c.step, c.epoch) for c in second.steps()] == [(1, 1), (2, 2)]


def test_a_writer_fenced_while_it_writes_commits_nothing_and_says_so(tmp_path: Path) -> None:
    events = Events()
    zombie = store(tmp_path, events)
    zombie.load_latest(plain())
    real_put = zombie.storage.put

    def put(path: str, data: bytes) -> Any:
        if path.endswith("manifest.json"):
            store(tmp_path).load_latest(plain())
        return real_put(path, data)

    zombie.storage.put = put  # type: ignore[method-assign]
    zombie.save(5, plain(5), {})
    with pytest.raises(Fenced):
        zombie.finish()
    assert events.kinds() == ["fenced"]
    assert zombie.steps() == []


def test_a_zombie_that_commits_in_the_last_gap_is_ignored(tmp_path: Path) -> None:
    """The newer writer begins between the zombie's look at the lease and its marker."""
    zombie = store(tmp_path)
    zombie.load_latest(plain())
    zombie.save(4, plain(4), {}, wait=True)
    newer = store(tmp_path)
    real_put = zombie.storage.put

    def put(path: str, data: bytes) -> Any:
        if path.endswith("COMMITTED"):
            loaded = newer.load_latest(plain())
            assert loaded
            assert loaded.step == 4
        return real_put(path, data)

    zombie.storage.put = put  # type: ignore[method-assign]
    with pytest.raises(Fenced):
        zombie.save(5, plain(5), {}, wait=True)
    assert [c.step for c in newer.steps() if c.committed] == [4, 5]
    third = store(tmp_path).load_latest(plain())
    assert third
    assert third.step == 4


def test_retention_and_debris(tmp_path: Path) -> None:
    debris = tmp_path / "step-000000003-e000000"
    debris.mkdir()
    (debris / "rank-00000.safetensors").write_bytes(b"half")
    (tmp_path / "notes").mkdir()  # a person's folder is nobody's debris
    events = Events()
    writer = store(tmp_path, events, keep_last=2, keep_every_steps=10)
    writer.load_latest(plain())
    for step in range(9, 16):
        writer.save(step, plain(step), {}, vetted=step == 11, wait=True)
        if step == 13:
            assert writer.vet(12)
    assert [c.step for c in writer.steps()] == [10, 11, 12, 14, 15]
    assert any("never committed" in d for d in events.details("removed"))
    assert (tmp_path / "notes").is_dir()
    assert not writer.vet(9)


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"model": {"w": torch.zeros(5, 4), "b": torch.zeros(())}}, "Size mismatch"),
        ({"model": {"w": torch.zeros(5, 3), "b": torch.zeros(()), "new": torch.zeros(1)}}, "Missing key.*model.new"),
        ({"model.w": torch.zeros(5, 3)}, "1 values that the model has no place for, such as model.b"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, state: dict[str, Any], reason: str) -> None:
    saved(tmp_path, 1)
    with pytest.raises(CheckpointError, match=reason):
        store(tmp_path).load_latest(state)


def test_part_of_a_checkpoint_can_be_read_without_becoming_the_writer(tmp_path: Path) -> None:
    trainee = Trainee()
    trainee.train()
    writer = store(tmp_path)
    writer.save(1, trainee.state(), {}, wait=True)
    other = Trainee(seed=3)
    state = {"model": other.model.state_dict()}
    reader = store(tmp_path, read_only=True)
    assert reader.load_latest(state)
    assert torch.equal(state["model"]["0.weight"], trainee.model[0].weight)
    writer.save(2, trainee.state(), {}, wait=True)  # not fenced
    assert len(writer.steps()) == 2


def test_a_state_that_grows_is_planned_anew(tmp_path: Path) -> None:
    writer = store(tmp_path)
    writer.save(1, plain(1), {}, wait=True)
    grown = plain(2) | {"more": torch.arange(7)}
    writer.save(2, grown, {}, wait=True)
    state = plain() | {"more": torch.zeros(7, dtype=torch.int64)}
    store(tmp_path).load_latest(state)
    assert state["more"].tolist() == list(range(7))


def test_every_dtype_and_odd_shapes_come_back(tmp_path: Path) -> None:
    from model.checkpoint.store_format import DTYPES

    def make(fill: int) -> dict[str, Any]:
        tensors: dict[str, Any] = {n: torch.full((3, 5), fill).to(d) for n, d in DTYPES.items()}
        tensors |= {"empty": torch.zeros(0, 4), "strided": torch.full((6, 4), float(fill)).t()[1:3]}
        return {"t": tensors, "lr": 0.1 * fill, "betas": (0.9, fill), "names": ["a", fill], "none": None}

    writer = store(tmp_path)
    writer.save(1, make(1), {}, wait=True)
    state = make(0)
    assert store(tmp_path).load_latest(state)
    expected = make(1)
    for name, tensor in expected.pop("t").items():
        assert torch.equal(state["t"][name].double(), tensor.double()), name
    state.pop("t")
    assert state == expected


def test_what_is_neither_tensor_nor_json_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="not JSON"):
        store(tmp_path).save(1, {"bad": object()}, {})
    with pytest.raises(TypeError, match="not JSON"):
        store(tmp_path).save(1, {}, {"bad": object()})


def test_any_reader_of_safetensors_opens_a_ranks_file(tmp_path: Path) -> None:
    load_file = pytest.importorskip("safetensors.torch").load_file
    tensors = load_file(saved(tmp_path, 7)[7] / "rank-00000.safetensors")
    assert torch.equal(tensors["model.w@0,0"], torch.full((5, 3), 7.0))
    assert tensors["model.b@"].item() == 7


def test_without_background_writing_training_waits_for_the_disk(tmp_path: Path) -> None:
    writer = store(tmp_path, asynchronous=False)
    writer.save(1, plain(1), {})
    assert [c.committed for c in writer.steps()] == [True]
