"""Ranks that die, hang or lag on this machine: restarted beside the launch that follows them, and the losses are the same."""

from pathlib import Path

import pytest

from orchestrator.faults import Fault, write
from orchestrator.record import Event, read_events
from tests.integration.words_run import arriero, launch, losses, make_workplace, run_dir

pytestmark = pytest.mark.slow

TWO_RANKS = ["cluster.gpus_per_node=2", "layout=fsdp", "layout.dp_shard=2", "steps=30"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("keepers"))


@pytest.fixture(scope="module")
def undisturbed(workplace: Path) -> dict[int, tuple[float, float]]:
    done = launch(workplace, "undisturbed", *TWO_RANKS)
    assert done.returncode == 0, done.stderr
    return losses(workplace, "undisturbed")


def events(workplace: Path, name: str, kind: str) -> list[Event]:
    return [e for e in read_events(run_dir(workplace, name).events) if e.kind == kind]


def test_dead_and_hung_ranks_are_restarted_told_and_leave_no_trace_in_the_losses(
    workplace: Path, undisturbed: dict[int, tuple[float, float]]
) -> None:
    name = "disturbed"
    faults = [
        Fault(kind="segv", rank=0, step=7),
        Fault(kind="freeze", rank=1, step=15),
        Fault(kind="gil", rank=0, step=25),
    ]
    write(run_dir(workplace, name).faults, faults)
    done = launch(workplace, name, *TWO_RANKS, "cluster.hang_timeout_s=5")
    assert done.returncode == 0, done.stderr
    assert losses(workplace, name) == undisturbed
    restarted = [(e.data["cause"], e.data["rank"], e.data["signal"]) for e in events(workplace, name, "restarted")]
    assert restarted == [("crash", 0, "SIGSEGV"), ("hung", 1, None), ("hung", 0, None)]
    frozen, held = events(workplace, name, "hung")
    assert (frozen.data["rank"], frozen.data["phase"], frozen.step) == (1, "data", 15)
    assert "stopped" in frozen.detail
    assert "hung" in done.stdout
    stacks = (run_dir(workplace, name).root / held.data["stacks"]).read_text()
    assert "rank 0" in stacks
    assert "next_batch" in stacks.split("==> rank 1")[0]  # the guilty one's stacks come first
    log = next(run_dir(workplace, name).logs.glob("*_0_log.out")).read_text()
    assert "Segmentation fault" in log


def test_a_slow_rank_is_reported(workplace: Path) -> None:
    write(run_dir(workplace, "slow").faults, [Fault(kind="slow", rank=1, seconds=0.2)])
    done = launch(workplace, "slow", *TWO_RANKS, "steps=60")
    assert done.returncode == 0, done.stderr
    (told,) = events(workplace, "slow", "straggler")
    assert told.data["rank"] == 1
    assert told.data["ratio"] > 1.5
    assert "straggler" not in done.stderr
    assert "computes" in done.stdout


def test_the_crash_budget_ends_it_with_the_ranks_own_error(workplace: Path) -> None:
    name = "again_and_again"
    write(run_dir(workplace, name).faults, [Fault(kind="raise", rank=1, step=3), Fault(kind="kill", rank=1, step=4)])
    done = launch(workplace, name, *TWO_RANKS, "cluster.crash_budget=1")
    assert done.returncode == 1
    (restarted,) = events(workplace, name, "restarted")
    assert "exit code 1: RuntimeError: [/a/file.cc:1]" in restarted.detail
    assert restarted.detail in done.stdout  # brackets and all
    assert "rank 1" in done.stderr
    assert "signal 9" in done.stderr
    status = arriero(workplace, "status", f"runs/{name}")
    assert status.returncode == 1
    assert "failed" in status.stdout
    (failed,) = events(workplace, name, "failed")
    assert "rank 1" in failed.detail
    assert "signal 9" in failed.detail
    assert failed.detail[:40] in run_dir(workplace, name).page.read_text()
    again = launch(workplace, name, *TWO_RANKS)  # its faults are behind it: it goes on
    assert again.returncode == 0, again.stderr
    assert arriero(workplace, "status", f"runs/{name}").returncode == 0
