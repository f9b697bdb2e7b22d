"""Lives under failures, against the closed formulas where those hold."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from model.checkpoint.policy import CheckpointConfig, Interval, young_interval_s
from orchestrator import spec as specs
from orchestrator.errors import UserError
from orchestrator.page_data import _forecast
from orchestrator.plan import forecast
from orchestrator.plan.simulate import Life, best_of, ettr, interval_grid, simulate, wall_s
from orchestrator.run_dir import RunDir

DAY = 86400.0
PLAIN = Life(
    work_s=21 * DAY, interval_s=600, save_s=10, failures_per_s=1 / DAY, restart_s=600, failed_restart_share=0,
    rack_share=0, rack_nodes=16, spare_nodes=0, repair_s=DAY, queue_wait_s=0,
)  # fmt: skip


def test_without_failures_only_saves_take_time() -> None:
    assert ettr(replace(PLAIN, failures_per_s=0), 3) == pytest.approx(600 / 610, rel=1e-4)


@pytest.mark.parametrize(
    ("rate", "interval_s", "save_s"),
    [(0.5, 600, 0.1), (1, 600, 10), (4, 1800, 60), (6, 120, 1), (48, 60, 1), (96, 600, 30), (200, 60, 0)],
)
def test_the_mean_agrees_with_the_closed_formula_where_there_is_neither_queue_nor_rack(
    rate: float, interval_s: float, save_s: float
) -> None:
    life = replace(PLAIN, failures_per_s=rate / DAY, interval_s=interval_s, save_s=save_s)
    formula = forecast.ettr(life.failures_per_s, life.restart_s, interval_s, save_s)
    assert float(np.mean(ettr(life, 1000))) == pytest.approx(formula, abs=0.005)


def test_youngs_interval_is_as_good_as_the_best() -> None:
    life = replace(PLAIN, failures_per_s=4 / DAY, save_s=30)
    young = young_interval_s(life.save_s, 1 / life.failures_per_s)
    tried = {i: float(np.mean(ettr(replace(life, interval_s=i), 1000))) for i in interval_grid(young, 1.0, life.work_s)}
    best = max(tried, key=lambda i: tried[i])
    assert young / 2 <= best <= young * 2
    assert max(tried.values()) - float(np.mean(ettr(replace(life, interval_s=young), 1000))) < 0.002


def test_each_hardship_costs_and_spares_give_back() -> None:
    hard = replace(PLAIN, failures_per_s=4 / DAY, queue_wait_s=3600)
    plain, queued = float(np.mean(ettr(replace(hard, queue_wait_s=0), 1000))), float(np.mean(ettr(hard, 1000)))
    spared = [float(np.mean(ettr(replace(hard, spare_nodes=n), 1000))) for n in (1, 4, 16)]
    assert queued < spared[0] < spared[1] < spared[2] <= plain + 0.002
    few = replace(hard, spare_nodes=16)
    assert np.mean(ettr(replace(few, rack_share=0.5), 1000)) < spared[2]
    assert np.mean(ettr(replace(few, failed_restart_share=0.5), 1000)) < spared[2]


def test_the_whole_rack_is_waited_for() -> None:
    """Without spares 16 nodes keep a run waiting for the last of them: 3.4 times one node's mean, the 16th harmonic number."""
    racks = replace(
        PLAIN, failures_per_s=4 / DAY, queue_wait_s=3600, repair_s=100 * DAY, rack_share=0.999, rack_nodes=16
    )
    nodes = replace(racks, rack_share=0.0)

    def waits_s(life: Life) -> float:
        return float(np.mean(wall_s(life, 4000)) - np.mean(wall_s(replace(life, queue_wait_s=0), 4000)))

    assert waits_s(racks) / waits_s(nodes) == pytest.approx(sum(1 / n for n in range(1, 17)), rel=0.05)
    once = replace(racks, work_s=DAY / 2, failures_per_s=0.05 / DAY)  # one rack at most, of which 15 find a spare
    assert waits_s(once) / waits_s(replace(once, spare_nodes=15)) == pytest.approx(3.38, rel=0.35)
    assert waits_s(replace(once, spare_nodes=16)) < 0.1 * waits_s(once)  # of lives with two
    assert np.mean(ettr(replace(racks, repair_s=600), 500)) > np.mean(ettr(racks, 500)) + 0.3


def test_spares_are_taken_in_turn_and_come_back_after_their_repair() -> None:
    """Two nodes fail at once, always; with k spares the first k outages of a repair's time find theirs."""
    twos = replace(PLAIN, failures_per_s=8 / DAY, rack_share=0.999, rack_nodes=2, queue_wait_s=7200, repair_s=DAY / 2)
    means = [float(np.mean(ettr(replace(twos, spare_nodes=n), 1000))) for n in (0, 1, 2, 4, 8, 64)]
    assert means == sorted(means)
    assert means[-1] == pytest.approx(float(np.mean(ettr(replace(twos, queue_wait_s=0), 1000))), abs=0.002)
    assert means[0] < means[-1] - 0.3


def test_a_seed_gives_the_same_lives() -> None:
    assert (wall_s(PLAIN, 50, seed=3) == wall_s(PLAIN, 50, seed=3)).all()


def test_the_llama_run_is_simulated_with_its_picture() -> None:
    found = simulate(specs.compose(["experiment=llama_65b"]), 200)
    assert 0.8 < found.ettr[0] <= found.ettr[1] <= found.ettr[2] < 1
    assert found.best_interval_s == found.life.interval_s  # checkpoint.every_steps=auto
    assert found.spares[16] > found.spares[0]
    assert found.picture().startswith("<svg")
    assert set(found.to_json()["ettr"]) == {"p5", "p50", "p95"}


@pytest.mark.parametrize(
    "words",
    [
        "experiment=llama_7b",
        "experiment=llama_65b",
        "experiment=llama_65b plan.save_gb_per_s=0.05 checkpoint.every_steps=500",  # Young's: a save stalls 7.6 s
        "experiment=llama_65b plan.save_gb_per_s=0.002 checkpoint.auto_min_s=600 checkpoint.auto_max_s=1200",
        "experiment=llama_65b plan.failures_per_1000_node_days=[5,50,100] spikes.vet_steps=0",
        "experiment=llama_7b steps=50 optim.warmup_steps=5",  # shorter than an interval
    ],
)
def test_plan_and_simulate_name_the_same_best_interval(words: str) -> None:
    spec = specs.compose(words.split())
    planned = forecast.plan(spec, 0.0).best_interval.steps
    assert simulate(spec, 300).best_every_steps == planned


def test_a_life_that_is_better_by_more_than_noise_is_named_against_the_plan() -> None:
    planned = Interval(steps=100, least_steps=20, why="")
    config = CheckpointConfig(name="t", auto_min_s=0)
    tried = [10.0, 20.0, 50.0, 100.0, 200.0]
    assert best_of(tried, [0.97, 0.95, 0.93, 0.92, 0.9], planned, 1.0, config) == 20.0  # 10 steps are too few
    assert best_of(tried, [0.97, 0.921, 0.92, 0.92, 0.9], planned, 1.0, config) == 100.0


def test_a_run_that_never_ends_is_told() -> None:
    spec = specs.compose(["experiment=llama_65b", "checkpoint.every_steps=100000",
                          "plan.failures_per_1000_node_days=[300,300,300]"])  # fmt: skip
    with pytest.raises(UserError, match="never ends"):
        simulate(spec, 2)


def test_the_written_forecast_is_graded_by_the_runs_page(tmp_path: Path) -> None:
    import json

    found = forecast.plan(specs.compose(["experiment=llama_7b"]), 0.0)
    run_dir = RunDir(tmp_path)
    run_dir.plan.write_text(json.dumps(forecast.figures_json(found)))
    names = [
        "step_s",
        "tokens_per_s",
        "mfu",
        "memory_bytes",
        "hours",
        "ettr",
        "gpu_hours",
        "energy_kwh",
        "site_energy_kwh",
    ]
    lines = _forecast(run_dir, dict.fromkeys(names, 1.0))
    assert lines is not None
    assert {line.figure for line in lines} == set(names)
    assert all(line.low is not None and line.measured == 1.0 for line in lines)


def test_layout_auto_is_resolved_where_nothing_is_calibrated() -> None:
    spec = forecast.resolved(specs.compose(["layout=auto", "cluster.gpus_per_node=2"]))
    assert (spec.layout.dp_shard, spec.problems()) == (2, [])


def test_layout_auto_launches_only_what_the_trainer_can_run_and_keeps_what_is_set() -> None:
    spec = specs.compose(["experiment=llama_7b", "layout=auto"])
    chosen = forecast.resolved(spec).layout
    assert chosen.recompute in ("none", "selective", "full")
    assert chosen.gpus == 2048
    kept = forecast.resolved(specs.compose(["layout=auto", "cluster.gpus_per_node=2", "layout.dp_replicate=2"])).layout
    assert (kept.dp_replicate, kept.dp_shard, kept.recompute) == (2, 1, "none")


def test_a_run_without_failures_is_planned_and_simulated() -> None:
    import json

    spec = specs.compose(["experiment=llama_7b", "plan.failures_per_1000_node_days=[0,0,0]"])
    for found in (forecast.plan(spec, 0.0).to_json(), simulate(spec, 5).to_json()):
        assert "Infinity" not in json.dumps(found)
