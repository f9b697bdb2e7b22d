"""Optuna's choice of points: the study is gone on with, and what is finished is not trained again."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from orchestrator import launch, sweep
from orchestrator.errors import Failure, UserError
from orchestrator.record import Event, JsonlWriter, utc_now
from orchestrator.run_dir import RunDir
from orchestrator.spec import RunSpec

WORDS = ["model=nano", "name=best", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=6", "hydra.sweeper.n_jobs=2"]
WORDS += ["hydra.sweeper.sampler.seed=1"]
RATES = "optim.lr=tag(log,interval(1e-4,1e-1))"


class Trainings(list[float]):
    """Learning rates in the order they were trained; the loss is lowest at 1e-2. `fail_at`, `cut_at`: numbers of trainings."""

    fail_at: Sequence[int] = ()
    cut_at: Sequence[int] = ()

    def __call__(self, spec: RunSpec, overrides: Sequence[str]) -> int:
        self.append(spec.optim.lr)
        if len(self) in self.cut_at:
            raise KeyboardInterrupt
        if len(self) in self.fail_at:
            raise Failure("the node burnt")
        loss = abs(spec.optim.lr - 1e-2)
        with JsonlWriter(RunDir(spec.run_dir).events / "attempt-0001.jsonl") as events:
            for kind, data in (("evaluated", {"loss": loss}), ("finished", {})):
                events.write(Event(time_utc=utc_now(), kind=kind, step=spec.steps, detail="", attempt=1, data=data))
        return 0


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Trainings:
    monkeypatch.chdir(tmp_path)
    found = Trainings()
    monkeypatch.setattr(launch, "launch", found)
    return found


def study_states() -> dict[str, int]:
    import optuna
    from optuna.storages.journal import JournalFileBackend

    storage = optuna.storages.JournalStorage(JournalFileBackend("runs/best/study.jsonl"))
    states = [t.state.name for t in optuna.load_study(study_name="best", storage=storage).trials]
    return {s: states.count(s) for s in states}


def test_the_study_ends_at_its_trials_and_tells_the_best(
    trainings: Trainings, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep.launch_sweep([*WORDS, RATES]) == 0
    assert len(set(trainings)) == 6
    assert all(1e-4 <= lr <= 1e-1 for lr in trainings)
    best = min(trainings, key=lambda lr: abs(lr - 1e-2))
    assert f"optim.lr={best:.4g}" in capsys.readouterr().out
    assert len(json.loads(Path("runs/best/sweep.json").read_text())["points"]) == 6
    assert sweep.launch_sweep([*WORDS, RATES]) == 0
    assert len(trainings) == 6
    more = [w.replace("n_trials=6", "n_trials=8") for w in WORDS]
    assert sweep.launch_sweep([*more, RATES]) == 0
    assert len(set(trainings)) == 8


def test_a_point_that_cannot_fit_its_gpu_has_failed_and_ends_no_search(
    trainings: Trainings, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*WORDS, "gpu=h100", "gpu.memory_gb=4", "layout=fsdp", "model.n_layers=choice(2,20000)", RATES]
    words = [w.replace("n_trials=6", "n_trials=12") for w in words]
    sweep.launch_sweep(words)
    said = capsys.readouterr().out
    assert "cannot run: each rank needs" in said
    assert trainings
    assert "RUNNING" not in study_states()  # which the next command would take up, and fail again


def test_a_search_that_was_cut_off_or_had_a_failure_goes_on_with_its_open_points(trainings: Trainings) -> None:
    trainings.cut_at, trainings.fail_at = (4,), (5,)
    with pytest.raises(KeyboardInterrupt):  # in its fourth
        sweep.launch_sweep([*WORDS, RATES])
    assert sweep.launch_sweep([*WORDS, RATES]) == 1  # the fourth again, fails; the others finish
    assert trainings[4] == trainings[3]
    assert sweep.launch_sweep([*WORDS, RATES]) == 0  # the failed one once more
    assert trainings[-1] == trainings[3]
    assert len(set(trainings)) == 6
    assert study_states() == {"COMPLETE": 6, "FAIL": 1}


def test_a_choice_that_comes_again_is_not_trained_again(trainings: Trainings) -> None:
    assert sweep.launch_sweep([*WORDS, "optim.lr=1e-3,2e-3"]) == 0
    assert sorted(trainings) == [1e-3, 2e-3]
    assert study_states() == {"COMPLETE": 6}


def test_where_all_fail_no_more_are_tried(trainings: Trainings) -> None:
    trainings.fail_at = range(1, 100)
    assert sweep.launch_sweep([*WORDS, RATES]) == 1
    assert len(trainings) == 2


def test_what_cannot_be_searched_is_told_before_anything_runs(trainings: Trainings) -> None:
    assert sweep.launch_sweep([*WORDS, RATES]) == 0
    for words, message in (
        ([*WORDS, RATES, "steps=500"], "study of another search"),
        ([*WORDS, "optim.lr=1e-3"], "nothing is left to choose"),
        ([*WORDS, RATES, "cluster=local,slurm"], "says where and how"),
        ([*WORDS, RATES, "cluster=slurm", "cluster.gpus_per_node=1"], "add --wait"),
        (["hydra/sweeper=ax", RATES], "none of basic, optuna"),
        (["hydra.sweeper.n_trials=3", RATES], "not known"),
        ([*WORDS, RATES, "hydra.sweeper.n_jobs=0"], "must be a whole number"),
    ):
        with pytest.raises(UserError, match=message):
            sweep.launch_sweep(words)
    assert len(trainings) == 6
