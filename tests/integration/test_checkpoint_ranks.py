"""Real gloo ranks save together, load into other worlds and layouts, and decide everything together."""

import os
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoint_faults import Events, FaultyFileSystem, eio, kill, make_store, run_ranks
from rank_trainer import make_trainer
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from model.checkpoint import store as store_module
from model.checkpoint.lease import Fenced, acquire
from model.checkpoint.policy import CheckpointConfig
from model.layout import Layout

warnings.filterwarnings("ignore", module="torch")

# replicas x shards x tensor parallel. 15 columns divide by none of them: shards are uneven, the last ones empty.
LAYOUTS = {1: [(1, 1, 1)], 2: [(1, 2, 1), (1, 1, 2), (2, 1, 1)], 4: [(1, 4, 1), (2, 2, 1), (1, 2, 2)]}


class Trainee:
    def __init__(self, layout: tuple[int, int, int], seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(6, 16), nn.Linear(16, 5), nn.Linear(5, 3, bias=False))
        if dist.get_world_size() > 1:
            mesh = init_device_mesh("cpu", layout, mesh_dim_names=("replicate", "shard", "tp"))
            if layout[2] > 1:
                parallelize_module(self.model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
            data = mesh["replicate", "shard"] if layout[0] > 1 else mesh["shard"]
            for layer in self.model:
                fully_shard(layer, mesh=data)
            fully_shard(self.model, mesh=data)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)

    def train(self) -> None:
        torch.manual_seed(5)
        self.model(torch.randn(4, 6)).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def load(self, state: dict[str, Any]) -> None:
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])

    def whole(self) -> dict[str, list[Any]]:
        """Every tensor of model and optimizer, unsharded."""
        found = {}
        model, optimizer = get_state_dict(self.model, self.optimizer)
        moments = {f"{n}.{k}": t for n, ts in optimizer["state"].items() for k, t in ts.items()}
        for name, tensor in {**model, **moments}.items():
            found[name] = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).tolist()
        return found


def carry_on(rank: int, folder: str, step: int, layout: tuple[int, int, int]) -> Any:
    """Resumes, trains a step, saves: what was loaded and what was saved, whole."""
    store, trainee = make_store(folder), Trainee(layout, seed=step)
    state = trainee.state()
    loaded = store.load_latest(state)
    before = None
    if loaded:
        trainee.load(state)
        before = trainee.whole()
    trainee.train()
    store.save(step, trainee.state(), {"layout": layout}, wait=True)
    return (loaded.step if loaded else None, before, trainee.whole())


def test_one_run_goes_through_worlds_of_1_2_4_and_back_and_through_layouts(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    saved = None
    layouts = [(1, 1, 1), (1, 2, 1), (1, 2, 2), (2, 2, 1), (1, 1, 2), (1, 1, 1), (1, 4, 1), (2, 1, 1)]
    for step, layout in enumerate(layouts, 1):
        world = layout[0] * layout[1] * layout[2]
        results = run_ranks(carry_on, world, tmp_path, str(folder), step, layout)
        for loaded_step, before, after in results:
            assert loaded_step == (step - 1 or None)
            assert before == saved, f"{layouts[step - 2]} -> {layout}"
            assert after == results[0][2]
        saved = results[0][2]


def save_replicas(rank: int, folder: str) -> int:
    store, trainee = make_store(folder), Trainee((2, 1, 1))
    store.save(1, trainee.state(), {}, wait=True)
    return sum(slot.bytes for slot in store._slots)


def test_replicas_are_written_once_and_shared_out(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    written = run_ranks(save_replicas, 2, tmp_path, str(folder))
    parameters = 6 * 16 + 16 + 16 * 5 + 5 + 5 * 3
    assert sum(written) == 4 * (3 * parameters + 5)  # weights, two moments, a step counter each
    assert min(written) > 0


def damaged(rank: int, folder: str) -> Any:
    events = Events()
    store, trainee = make_store(folder, events), Trainee((1, 2, 1))
    for step in (1, 2, 3):
        store.save(step, trainee.state(), {}, wait=True)
    if rank == 1:  # the file that rank 1 wrote, and one that it does not read
        for step, name in ((3, "rank-00001.safetensors"), (2, "rank-00000.safetensors")):
            with open(f"{folder}/step-{step:09d}-e000001/{name}", "r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"\x55")
    dist.barrier()
    del events[:]
    loaded = store.load_latest(trainee.state())
    assert loaded
    return loaded.step, events


def test_what_one_rank_finds_damaged_all_ranks_pass_over(tmp_path: Path) -> None:
    (step, events), (other, silent) = run_ranks(damaged, 2, tmp_path, str(tmp_path / "checkpoints"))
    assert step == other == 1
    assert [kind for kind, _, _ in events] == ["passed_over", "passed_over", "loaded"]
    assert "rank 1: rank-00001.safetensors is damaged" in events[0][2]
    assert "rank 0: rank-00000.safetensors is damaged" in events[1][2]
    assert silent == []  # rank 0 speaks for all


def faults_of_one_rank(rank: int, folder: str) -> Any:
    """On rank 1 in turn: its disk fails; its state is not finite; its write hangs for longer than anyone waits."""
    events = Events()
    store, trainee = make_store(f"faulty://{folder}", events, write_timeout_s=1.0), Trainee((1, 2, 1))
    store.load_latest(trainee.state())

    if rank == 1:
        FaultyFileSystem.faults["write", "000001-e000001"] = eio()
    store.save(1, trainee.state(), {}, wait=True)

    state = trainee.state()
    if rank == 1:
        state["model"]["0.weight"].to_local()[0, 0] = float("nan")
    store.save(2, state, {}, wait=True)
    if rank == 1:
        state["model"]["0.weight"].to_local()[0, 0] = 0.0

    gate = threading.Event()
    if rank == 1:
        FaultyFileSystem.faults["write", "000003-e000001"] = gate.wait  # type: ignore[assignment]
    store.save(3, trainee.state(), {})
    if rank == 0:
        store._idle.wait()  # rank 0 has given up on rank 1, which still hangs
    dist.barrier()
    store.save(4, trainee.state(), {})  # skipped, and nobody waits
    gate.set()
    store._idle.wait()
    dist.barrier()
    store.save(5, trainee.state(), {}, wait=True)
    assert store.saved_step == 5
    return events, [(c.step, c.committed) for c in store.steps()]


def test_what_fails_on_one_rank_fails_the_save_on_all_and_the_next_goes_through(tmp_path: Path) -> None:
    (events, steps), _ = run_ranks(faults_of_one_rank, 2, tmp_path, str(tmp_path / "checkpoints"))
    told = {step: (kind, detail) for kind, step, detail in events if kind != "removed"}
    assert told[1][0] == "save_failed"
    assert "rank 1: OSError: [Errno 5]" in told[1][1]
    assert told[2][0] == "save_refused"
    assert "rank 1: model.0.weight holds non-finite values" in told[2][1]
    assert told[3][0] == "save_failed"
    assert "the ranks lost each other" in told[3][1]
    assert told[4][0] == "save_skipped"
    assert told[5][0] == "saved"
    assert steps == [(5, True)]


def killed_in_a_save(rank: int, folder: str) -> Any:
    events = Events()
    store, trainee = make_store(f"faulty://{folder}", events), Trainee((1, 2, 1))
    store.save(1, trainee.state(), {}, wait=True)
    if rank == 1:
        FaultyFileSystem.faults["close", "000002-e000001/rank-00001"] = kill
    store.save(2, trainee.state(), {}, wait=True)
    return events, store.saved_step


def test_a_rank_killed_between_its_write_and_the_commit_leaves_no_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    (events, saved_step), exit_code = run_ranks(killed_in_a_save, 2, tmp_path, str(folder))
    assert exit_code == -9
    assert saved_step == 1
    assert [kind for kind, _, _ in events] == ["saved", "save_failed"]
    loaded, _, _ = run_ranks(carry_on, 1, tmp_path, str(folder), 3, (1, 1, 1))[0]
    assert loaded == 1


def fenced_together(rank: int, folder: str) -> list[str]:
    store, trainee = make_store(folder), Trainee((1, 2, 1))
    store.load_latest(trainee.state())
    if rank == 0:  # the same run is started elsewhere
        acquire(store.storage, "a second launch")
    dist.barrier()
    said = []
    for _ in range(2):
        with pytest.raises(Fenced) as fenced:
            store.save(1, trainee.state(), {}, wait=True)
        said.append(str(fenced.value))
    return said


def test_all_ranks_of_a_fenced_run_stop(tmp_path: Path) -> None:
    for said in run_ranks(fenced_together, 2, tmp_path, str(tmp_path / "checkpoints")):
        assert "taken over by epoch 2 (a second launch)" in said[0]


def overtaken_while_it_trains(rank: int, folder: str) -> tuple[int, str]:
    """The steps trained, and what ended them: no save is due for long."""
    store_module.LEASE_CHECK_S = 0.05
    store = make_store(folder)
    load = store.load_latest

    def load_and_start_elsewhere(state: dict[str, Any]) -> Any:
        loaded = load(state)
        if rank == 0:
            acquire(store.storage, "a second launch")
        return loaded

    store.load_latest = load_and_start_elsewhere  # type: ignore[method-assign, assignment]
    losses: list[float] = []
    seldom = CheckpointConfig(name="t", every_steps=10**6)
    layout = Layout(name="t", dp_shard=2)
    trainer = make_trainer(rank, layout, 10**6, store, lambda *_, **__: None, losses, checkpoint=seldom)
    with pytest.raises(Fenced) as fenced:
        trainer.run()
    return trainer.step, str(fenced.value)


def test_ranks_between_two_saves_stop_together_when_overtaken(tmp_path: Path) -> None:
    (steps, said), other = run_ranks(
        overtaken_while_it_trains, 2, tmp_path, str(tmp_path / "checkpoints"), timeout_s=150
    )
    assert other == (steps, "a newer writer has taken over: rank 0 knows which")
    assert "taken over by epoch 2 (a second launch)" in said


def overtaken_before_a_rewind(rank: int, folder: str) -> str:
    store_module.LEASE_CHECK_S = 0.05
    told = threading.Event()
    store, trainee = make_store(folder, lambda kind, *_: told.set() if kind == "fenced" else None), Trainee((1, 2, 1))
    store.load_latest(trainee.state())
    if rank == 0:
        acquire(store.storage, "a second launch")
        assert told.wait(30)
    dist.barrier()
    store.finish()  # rank 0 alone knows, and leaves nobody behind
    with pytest.raises(Fenced) as fenced:
        store.load_latest(trainee.state(), max_step=0)
    return str(fenced.value)


def test_ranks_that_rewind_when_overtaken_stop_together(tmp_path: Path) -> None:
    for said in run_ranks(overtaken_before_a_rewind, 2, tmp_path, str(tmp_path / "checkpoints")):
        assert "taken over by epoch 2 (a second launch)" in said
