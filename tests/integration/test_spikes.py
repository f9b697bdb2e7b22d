"""Poisoned batches, arithmetic that goes wrong once, and kills in between: the run comes out as it should, without a hand."""

import math
import shutil
import statistics
from pathlib import Path

import pytest

from orchestrator.faults import Fault, write
from orchestrator.record import Event, kept_steps, read_all_steps, read_events
from orchestrator.run_dir import RunDir
from tests.integration.words_run import launch, losses, make_workplace, run_dir

pytestmark = pytest.mark.slow

STEPS = 120
SETTINGS = [
    f"steps={STEPS}",
    "eval_every_steps=60",
    "checkpoint.every_steps=10",
    "spikes.patience=0",
    "spikes.vet_steps=5",
    "spikes.margin_steps=3",
]
POISON = Fault(kind="poison", batches=list(range(70, 75)))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("spikes"))


@pytest.fixture(scope="module")
def clean(workplace: Path) -> dict[int, tuple[float, float]]:
    done = launch(workplace, "clean", *SETTINGS)
    assert done.returncode == 0, done.stderr
    assert [e.kind for e in events(workplace, "clean") if e.kind in ("spike", "rewound")] == []
    return losses(workplace, "clean")


@pytest.fixture(scope="module")
def poisoned(workplace: Path) -> dict[int, tuple[float, float]]:
    write(run_dir(workplace, "poisoned").faults, [POISON])
    done = launch(workplace, "poisoned", *SETTINGS)
    assert done.returncode == 0, done.stdout + done.stderr
    return losses(workplace, "poisoned")


def events(workplace: Path, name: str, *kinds: str) -> list[Event]:
    return [e for e in read_events(run_dir(workplace, name).events) if not kinds or e.kind in kinds]


def weights(workplace: Path, name: str) -> dict[str, bytes]:
    """Parameters and moments of the last checkpoint, a file a rank."""
    newest = max(run_dir(workplace, name).checkpoints.glob("step-*"))
    return {file.name: file.read_bytes() for file in newest.glob("*.safetensors")}


def end(of: dict[int, tuple[float, float]]) -> float:
    return statistics.fmean(of[step][0] for step in range(STEPS - 9, STEPS + 1))


def test_a_run_with_poisoned_batches_rewinds_skips_them_and_ends_like_one_without(
    workplace: Path, clean: dict[int, tuple[float, float]], poisoned: dict[int, tuple[float, float]]
) -> None:
    verdict = next(e for e in events(workplace, "poisoned", "spike") if e.data["act"] == "rewind")
    back = next(e for e in events(workplace, "poisoned", "rewound"))
    assert verdict.time_utc <= back.time_utc
    assert verdict.data["to_step"] == back.data["to_step"] == 60
    assert verdict.data["skip_from"] <= 70
    assert verdict.data["window"]
    records = kept_steps(read_all_steps(run_dir(workplace, "poisoned").records))
    assert [r.step for r in records] == list(range(1, STEPS + 1))
    trained = {r.data_batch for r in records}
    assert not trained & set(POISON.batches)
    assert {step: poisoned[step] for step in range(1, 61)} == {step: clean[step] for step in range(1, 61)}
    assert end(poisoned) == pytest.approx(end(clean), rel=0.02)


@pytest.fixture(scope="module")
def cut(workplace: Path) -> Path:
    """A run that was killed between a verdict on the disk and its rewind, and that nobody has restarted."""
    run = run_dir(workplace, "cut")
    write(run.faults, [POISON, Fault(kind="kill_in_rewind")])
    assert launch(workplace, "cut", *SETTINGS, "cluster.crash_budget=0").returncode == 1
    (verdict,) = events(workplace, "cut", "spike")
    assert verdict.data["act"] == "rewind"
    assert not events(workplace, "cut", "rewound", "restarted")
    return run.root


def copied(run: Path, to: RunDir) -> RunDir:
    shutil.copytree(run, to.root)
    to.spec.write_text(to.spec.read_text().replace(f"name: {run.name}\n", f"name: {to.root.name}\n"))
    return to


def test_killed_in_the_middle_of_a_rewind_it_comes_out_the_same(
    workplace: Path, poisoned: dict[int, tuple[float, float]]
) -> None:
    write(run_dir(workplace, "killed").faults, [POISON, Fault(kind="kill_in_rewind")])
    assert launch(workplace, "killed", *SETTINGS).returncode == 0
    assert events(workplace, "killed", "restarted")
    assert [e.attempt for e in events(workplace, "killed", "rewound")] == [2]
    assert losses(workplace, "killed") == poisoned
    assert weights(workplace, "killed") == weights(workplace, "poisoned")


def test_killed_in_the_middle_of_a_rewind_a_later_launch_does_that_rewind(
    workplace: Path, poisoned: dict[int, tuple[float, float]], cut: Path
) -> None:
    copied(cut, run_dir(workplace, "later"))
    again = launch(workplace, "later", *SETTINGS)
    assert again.returncode == 0, again.stdout + again.stderr
    (verdict,), (back,) = events(workplace, "later", "spike"), events(workplace, "later", "rewound")
    assert (back.attempt, back.step) == (2, verdict.data["to_step"])
    assert losses(workplace, "later") == poisoned
    assert weights(workplace, "later") == weights(workplace, "poisoned")


def test_another_number_of_ranks_skips_the_same_batches(workplace: Path, poisoned: object) -> None:
    write(run_dir(workplace, "two").faults, [POISON])
    done = launch(workplace, "two", *SETTINGS, "cluster.gpus_per_node=2", "layout.dp_shard=2")
    assert done.returncode == 0, done.stdout + done.stderr
    batches = {
        name: [r.data_batch for r in kept_steps(read_all_steps(run_dir(workplace, name).records))]
        for name in ("two", "poisoned")
    }
    assert batches["two"] == batches["poisoned"]


def test_wrong_arithmetic_of_one_rank_once_is_named_computed_again_and_leaves_no_trace(workplace: Path) -> None:
    """NaN in the forward pass of one, and in the backward pass of the other, where the reduction spreads it over all ranks;
    then a stuck bit, which leaves the loss as it was and the gradient finite."""
    two = ["cluster.gpus_per_node=2", "layout.dp_shard=2", "steps=60"]
    assert launch(workplace, "two_clean", *SETTINGS, *two).returncode == 0
    faults = [
        Fault(kind="nan", rank=1, step=50),
        Fault(kind="nan_grad", rank=0, step=55),
        Fault(kind="stuck_grad", rank=1, step=58),
    ]
    write(run_dir(workplace, "nan").faults, faults)
    done = launch(workplace, "nan", *SETTINGS, *two)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(workplace, "nan") == losses(workplace, "two_clean")
    assert weights(workplace, "nan") == weights(workplace, "two_clean")
    forward, backward, stuck = events(workplace, "nan", "recomputed")
    assert (forward.step, forward.data["cause"], forward.data["ranks"]) == (50, "hardware", [1])
    assert forward.data["nodes"]
    assert "rank 1" in forward.detail
    assert (backward.step, backward.data["cause"], backward.data["ranks"]) == (55, "hardware", [0])
    assert (stuck.step, stuck.data["cause"], stuck.data["ranks"]) == (58, "hardware", [1])
    assert stuck.data["nodes"] == forward.data["nodes"]
    assert "nan" not in stuck.detail
    withheld = [e.detail for e in events(workplace, "nan", "withheld")]
    assert ["not finite" in detail for detail in withheld] == [True, True, False]


def test_a_warned_stop_on_a_skipped_step_is_saved_at_the_next(workplace: Path) -> None:
    """Two computations of one step give NaN, so its batch is left out; the warning comes with the second."""
    write(
        run_dir(workplace, "warned").faults,
        [Fault(kind="nan", step=45), Fault(kind="nan", step=45), Fault(kind="usr2", step=45)],
    )
    assert launch(workplace, "warned", *SETTINGS, "steps=60").returncode == 0
    (stopped,) = events(workplace, "warned", "stopped")
    assert stopped.step == 45
    assert any(e.step == 45 for e in events(workplace, "warned", "saved"))
    assert launch(workplace, "warned", *SETTINGS, "steps=60").returncode == 0
    assert sorted(losses(workplace, "warned")) == list(range(1, 61))


def test_a_rewind_whose_checkpoint_is_gone_says_how_to_go_on(workplace: Path, cut: Path) -> None:
    run = copied(cut, run_dir(workplace, "gone"))
    (verdict,) = events(workplace, "gone", "spike")
    for folder in run.checkpoints.glob("step-*"):
        if int(folder.name.split("-")[1]) <= verdict.data["to_step"]:
            shutil.rmtree(folder)
    failed = launch(workplace, "gone", *SETTINGS)
    assert failed.returncode == 1
    assert "change what spikes.* allows" in failed.stderr
    again = launch(workplace, "gone", *SETTINGS, "spikes.act=false")
    assert again.returncode == 0, again.stdout + again.stderr
    assert events(workplace, "gone", "rewind_dropped")


def test_a_loss_that_stays_nan_rewinds_and_then_calls_a_person(workplace: Path) -> None:
    nans = [Fault(kind="nan", step=45) for _ in range(18)]  # 16 for all that may be tried, 2 for later
    write(run_dir(workplace, "hopeless").faults, nans)
    settings = [*SETTINGS, "spikes.max_rewinds_per_incident=1"]
    failed = launch(workplace, "hopeless", *settings)
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr
    acts = [e.data["act"] for e in events(workplace, "hopeless", "spike")]
    assert acts[-1] == "stop"
    assert "rewind" in acts
    assert all(math.isfinite(loss) for loss, _ in losses(workplace, "hopeless").values())

    again = launch(workplace, "hopeless", *settings)
    assert again.returncode == 2
    assert "a person" in again.stderr
    looked_at = launch(workplace, "hopeless", *settings, "spikes.max_skipped_batches=3000")
    assert looked_at.returncode == 0, looked_at.stdout + looked_at.stderr
