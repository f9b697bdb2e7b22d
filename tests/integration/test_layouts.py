"""Every way to lay the model over ranks computes what one rank computes, and reads the others' checkpoints. fp32, gloo."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoint_faults import make_store, run_ranks

from model import device as device_module
from model.config import ModelConfig, OptimConfig
from model.device import choose, prepare
from model.layout import Layout
from model.optim import clip_gradients, global_grad_norm, make_optimizer
from model.parallel import Ranks, build_model, forward_backward, place_ranks
from model.pipeline import Pipeline
from model.train import training_state

warnings.filterwarnings("ignore", module="torch")
pytestmark = pytest.mark.slow

MODEL = ModelConfig(name="t", dim=32, n_layers=4, n_heads=4, ffn_dim=64, vocab_size=96, sequence_length=32)
DEEP = replace(MODEL, n_layers=8)
GROUPED = replace(MODEL, n_kv_heads=2)
OPTIM = OptimConfig(name="t", lr=1e-2, warmup_steps=0, batch_sequences=8)
ONE = Layout(name="one", microbatch_sequences=2)
LAYOUTS = {
    "fsdp": {"dp_shard": 2},
    "hsdp": {"dp_shard": 2, "dp_replicate": 2},
    "tp": {"tp": 2, "recompute": "selective"},
    "cp": {"cp": 2},
    "pp": {"pp": 2},
    "interleaved": {"pp": 2, "virtual_stages": 2, "pipeline_schedule": "interleaved_1f1b", "recompute": "full"},
    "zero_bubble": {"pp": 2, "pipeline_schedule": "zero_bubble"},
    "dp x tp": {"dp_shard": 2, "tp": 2},
    "dp x pp": {"dp_shard": 2, "pp": 2},
    "tp x pp": {"tp": 2, "pp": 2, "recompute": "selective"},
    "dp x tp x pp": {"dp_shard": 2, "tp": 2, "pp": 2},
}
FOUR_GROUPS = {
    "dp_shard": 2,
    "pp": 2,
    "virtual_stages": 4,
    "pipeline_schedule": "interleaved_1f1b",
}  # of layers, on each rank


def train(
    rank: int,
    layout: Layout,
    first: int,
    steps: int,
    folder: str | None,
    compile: str = "off",
    config: ModelConfig = MODEL,
) -> list[tuple[float, float, float]]:
    """Loss, gradient norm and, after the update, loss of evaluation of each step; resumes from and saves to `folder`."""
    ranks = place_ranks(layout, torch.device("cpu"))
    choices = choose(ranks.device, compile, 0.0, layout)
    assert choices.compile == (compile == "on"), choices.why
    prepare(choices, ranks.mesh)
    model = build_model(config, layout, ranks, torch.float32, seed=3, compiled=choices.compile)
    optimizer = make_optimizer(model, OPTIM)
    store = make_store(folder) if folder else None
    if store:
        loaded = store.load_latest(training_state(model, optimizer))
        assert (loaded.step if loaded else 0) == first
    found = []
    for step in range(first, first + steps):
        rows = torch.randint(0, 96, (8, 33), generator=torch.Generator().manual_seed(step))
        mine = rows.chunk(ranks.dp)[ranks.dp_rank]
        optimizer.zero_grad()
        total = forward_backward(model, mine, layout.microbatch_sequences, ranks.dp * ranks.cp / (8 * 32)) / ranks.tp
        norm = global_grad_norm(model.parameters(), model.group if isinstance(model, Pipeline) else None)
        clip_gradients(model.parameters(), 0.5, norm)
        optimizer.step()
        with torch.no_grad():
            seen = model(rows[:2, :-1], rows[:2, 1:]).double()
        if dist.is_initialized():
            dist.all_reduce(total)
        if ranks.context:
            dist.all_reduce(seen, group=ranks.context.group)
        found.append((total.item() / 256, norm.item(), seen.item() / 64))
    if store:
        store.save(first + steps, training_state(model, optimizer), {}, wait=True)
    return found


def laid(**degrees: Any) -> Layout:
    return Layout(name="t", **degrees)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_ranks(train, 1, tmp_path_factory.mktemp("one"), ONE, 0, 3, None)[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_loss_and_gradient_norm_of_three_steps_are_those_of_one_rank(name: str, one_rank: Any, tmp_path: Path) -> None:
    layout = laid(**LAYOUTS[name])
    assert layout.problems(MODEL, 8, layout.gpus, layout.gpus) == []
    for found in run_ranks(train, layout.gpus, tmp_path, layout, 0, 3, None, timeout_s=150):
        for step, expected in zip(found, one_rank, strict=True):
            assert step == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def one_rank_grouped(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_ranks(train, 1, tmp_path_factory.mktemp("one"), ONE, 0, 3, None, "off", GROUPED)[0]


@pytest.mark.parametrize(
    ("name", "compile"), [("tp", "off"), ("cp", "off"), ("dp x tp x pp", "off"), ("fsdp", "on"), ("tp", "on")]
)
def test_queries_in_groups_are_those_of_one_rank(
    name: str, compile: str, one_rank_grouped: Any, one_rank: Any, tmp_path: Path
) -> None:
    layout = laid(**LAYOUTS[name])
    assert layout.problems(GROUPED, 8, layout.gpus, layout.gpus) == []
    assert one_rank_grouped[0] != pytest.approx(one_rank[0], rel=1e-3)
    for found in run_ranks(train, layout.gpus, tmp_path, layout, 0, 3, None, compile, GROUPED, timeout_s=500):
        for step, expected in zip(found, one_rank_grouped, strict=True):
            assert step == pytest.approx(expected, rel=1e-5)


def gathers_and_losses(rank: int) -> tuple[int, list[float]]:
    """All-gathers of parameters in the second of two steps, and the steps' losses as far as this rank has them."""
    layout = laid(**FOUR_GROUPS)
    ranks = place_ranks(layout, torch.device("cpu"))
    model = build_model(DEEP, layout, ranks, torch.float32, seed=3)
    losses = []
    for step in range(2):
        rows = torch.randint(0, 96, (16, 33), generator=torch.Generator().manual_seed(step))
        with torch.profiler.profile() as profile:
            losses.append(forward_backward(model, rows.chunk(2)[ranks.dp_rank], 1, 1.0).item())
    calls = {event.key: event.count for event in profile.key_averages()}
    return calls["c10d::_allgather_base_"], losses


def test_a_pipeline_gathers_each_layer_once_a_step_whatever_its_groups(tmp_path: Path) -> None:
    """torch's schedule would drop and gather again what is over three groups: two times a round, of which here are four."""
    found = run_ranks(gathers_and_losses, 4, tmp_path, timeout_s=150)
    one = build_model(DEEP, ONE, Ranks(torch.device("cpu")), torch.float32, seed=3)
    for step in range(2):
        rows = torch.randint(0, 96, (16, 33), generator=torch.Generator().manual_seed(step))
        whole = forward_backward(one, rows, 2, 1.0).item()
        assert sum(losses[step] for _, losses in found) == pytest.approx(whole, rel=1e-5)
    # A rank's four layers, and what its parts have beside them: embedding, or norm and head.
    assert {gathered for gathered, _ in found} == {5}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["fsdp", "cp", "dp x tp", "tp", "interleaved"])  # recomputing nothing (3), some, all
def test_compiled_too(name: str, one_rank: Any, tmp_path: Path) -> None:
    layout = laid(**LAYOUTS[name])
    for found in run_ranks(train, layout.gpus, tmp_path, layout, 0, 3, None, "on", timeout_s=500):
        for step, expected in zip(found, one_rank, strict=True):
            assert step == pytest.approx(expected, rel=1e-5)


def choose_where_one_rank_has_no_compiler(rank: int) -> tuple[bool, str]:
    if rank == 1:
        device_module._compile_fails = lambda device: "no C++ compiler"
    choices = choose(torch.device("cpu"), "on", 0.0, laid(dp_shard=2))
    return choices.compile, choices.why


def test_where_one_rank_cannot_compile_none_does(tmp_path: Path) -> None:
    first, second = run_ranks(choose_where_one_rank_has_no_compiler, 2, tmp_path, timeout_s=150)
    assert (first[0], second[0]) == (False, False)
    assert "on another rank" in first[1]
    assert "no C++ compiler" in second[1]


def test_a_run_moves_through_layouts_and_back_to_one_rank(one_rank: Any, tmp_path: Path) -> None:
    folder = str(tmp_path / "checkpoints")
    found = []
    for step, layout in enumerate([laid(tp=2), laid(dp_shard=2, tp=2), laid(pp=2)]):
        found += run_ranks(train, layout.gpus, tmp_path, layout, step, 1, folder, timeout_s=150)[0]
    assert found == [pytest.approx(expected, rel=1e-5) for expected in one_rank]
    again = run_ranks(train, 1, tmp_path, ONE, 3, 1, folder)[0]
    straight = run_ranks(train, 1, tmp_path, ONE, 0, 4, None)[0]
    assert again == [pytest.approx(straight[3], rel=1e-5)]


def exchanges(rank: int, layout: Layout) -> tuple[int, int, int]:
    """Of one step: microbatches, times that gradients were reduced to shards, times that replicas summed theirs."""
    ranks = place_ranks(layout, torch.device("cpu"))
    model = build_model(MODEL, layout, ranks, torch.float32, seed=3)
    rows = torch.randint(0, 96, (4, 33), generator=torch.Generator().manual_seed(rank))
    with torch.profiler.profile() as profile:
        forward_backward(model, rows, layout.microbatch_sequences, 1.0)
    calls = {event.key: event.count for event in profile.key_averages()}
    return len(rows) // layout.microbatch_sequences, calls["c10d::_reduce_scatter_base_"], calls["c10d::allreduce_"]


def test_each_microbatch_is_reduced_to_shards_and_replicas_sum_once_a_step(tmp_path: Path) -> None:
    layout = laid(dp_shard=2, dp_replicate=2)
    groups = MODEL.n_layers + 1  # one each layer, one of embedding, norm and head
    for microbatches, scattered, summed in run_ranks(exchanges, 4, tmp_path, layout):
        assert (microbatches, scattered, summed) == (4, 4 * groups, groups)
