"""Forecasts against what others published, and what a person is told."""

import json
import subprocess
import sys

import published
import pytest

from orchestrator import spec as specs
from orchestrator.errors import UserError
from orchestrator.plan import forecast

NOW_S = 1.8e9
LLAMA = {  # arXiv 2302.13971, table 15; tokens/s from its GPU-hours
    "llama_7b": (1.0e12, 82_432, 36, 14),
    "llama_13b": (1.0e12, 135_168, 59, 23),
    "llama_33b": (1.4e12, 530_432, 233, 90),
    "llama_65b": (1.4e12, 1_022_362, 449, 173),
}


@pytest.mark.parametrize("name", LLAMA)
def test_the_four_llama_runs_are_forecast_within_5_percent(name: str) -> None:
    tokens, gpu_hours, mwh, tonnes = LLAMA[name]
    found = forecast.plan(specs.compose([f"experiment={name}", "carbon.intensity_g_per_kwh=385"]), NOW_S).figures
    assert found["gpu_hours"].central == pytest.approx(gpu_hours, rel=0.05)
    assert found["train_gpu_hours"].central == pytest.approx(gpu_hours, rel=0.05)
    assert found["tokens_per_s_per_gpu"].central == pytest.approx(tokens / gpu_hours / 3600, rel=0.05)
    # The paper cuts its MWh and tonnes off to whole ones.
    assert mwh * 0.95 <= found["site_energy_kwh"].central / 1e3 <= (mwh + 1) * 1.05
    assert tonnes * 0.95 <= found["co2e_kg"].central / 1e3 <= (tonnes + 1) * 1.05
    if name == "llama_65b":
        assert found["tokens_per_s_per_gpu"].central == pytest.approx(380, rel=0.05)
        assert found["days"].central == pytest.approx(21, rel=0.05)


@pytest.mark.parametrize("row", published.megatron(), ids=lambda r: r.label)
def test_megatrons_table_is_forecast_within_15_percent(row: published.Row) -> None:
    assert abs(row.error) < 0.15


HELD = [
    *published.selective(), *published.llama3(), *published.open_replications(), *published.fsdp_of_torch(),
    *published.mpt("a100_80gb"), *published.nvidia(), *published.newer_gpus(),
]  # fmt: skip


@pytest.mark.parametrize("row", HELD, ids=lambda r: r.label)
def test_other_tables_are_forecast_within_15_percent(row: published.Row) -> None:
    assert abs(row.error) < 0.15


@pytest.mark.parametrize("row", published.tables(), ids=lambda r: r.label)
def test_every_published_row_is_of_whole_microbatches(row: published.Row) -> None:
    rows_a_pass = row.layout.dp * row.layout.microbatch_sequences
    assert row.batch_sequences == rows_a_pass * row.layout.accumulation_steps(row.batch_sequences)


def test_what_cannot_fit_is_refused_with_layouts_that_do() -> None:
    spec = specs.compose(["experiment=llama_65b", "layout.tp=1", "layout.dp_shard=8", "layout.dp_replicate=256",
                          "layout.microbatch_sequences=1"])  # fmt: skip
    with pytest.raises(UserError, match="GB and a a100_80gb has 80 GB") as raised:
        forecast.plan(spec, NOW_S)
    ways = str(raised.value).splitlines()[1:]
    assert ways
    for way in ways:
        overrides = dict(o.split("=") for o in way.split())
        for key, value in overrides.items():
            degree = key.removeprefix("layout.")
            setattr(spec.layout, degree, type(getattr(spec.layout, degree))(value))
        break
    assert not spec.problems()
    assert forecast.plan(spec, NOW_S).memory.total_bytes < 80e9


def test_layout_auto_is_at_least_as_fast_as_the_written_one_and_keeps_what_is_set() -> None:
    written = forecast.plan(specs.compose(["experiment=llama_65b"]), NOW_S)
    chosen = forecast.plan(specs.compose(["experiment=llama_65b", "layout=auto"]), NOW_S)
    assert chosen.step.step_s <= written.step.step_s
    assert chosen.layout.gpus == 2048
    kept = forecast.plan(specs.compose(["experiment=llama_65b", "layout=auto", "layout.tp=8", "layout.pp=1"]), NOW_S)
    assert (kept.layout.tp, kept.layout.pp) == (8, 1)


@pytest.mark.parametrize("gpu", ["a100_80gb", "h100", "h200", "b200", "mi300x"])
def test_every_gpu_forecasts_and_the_parts_add_up(gpu: str) -> None:
    found = forecast.plan(specs.compose(["experiment=llama_65b", f"gpu={gpu}"]), NOW_S)
    step = found.step
    parts = (
        step.matmul_s + step.attention_s + step.elementwise_s + step.recompute_s + step.head_s + step.exposed_tp_s
        + step.exposed_cp_s + step.exposed_dp_s + step.exposed_pp_s + step.bubble_s + step.contention_s
        + step.optimizer_s + step.straggling_s
    )  # fmt: skip
    assert parts == pytest.approx(step.step_s, rel=1e-9)
    assert 0.1 < step.mfu < 0.7
    assert all(f.low <= f.central <= f.high for f in found.figures.values())


def test_recomputation_trades_memory_for_time() -> None:
    plans = [
        forecast.plan(
            specs.compose(["experiment=llama_65b", f"layout.recompute={r}", "layout.microbatch_sequences=1"]), NOW_S
        )
        for r in ("none", "selective", "full")
    ]
    memories = [p.memory.activations_bytes for p in plans]
    assert memories == sorted(memories, reverse=True)
    times = [p.step.step_s for p in plans]
    assert times == sorted(times)
    assert plans[2].step.hfu > plans[2].step.mfu
    whole = specs.compose(["experiment=llama_65b", "layout.recompute=full", "layout.microbatch_sequences=1",
                           "plan.recompute_whole=true"])  # fmt: skip
    assert forecast.plan(whole, NOW_S).step.recompute_s > 1.2 * plans[2].step.recompute_s


def test_what_others_repeat_and_overlap_is_counted() -> None:
    words = ["experiment=llama_65b", "gpu=h100", "layout.recompute=selective"]
    ours, op, overlapped, unfused = (
        forecast.plan(specs.compose([*words, *more]), NOW_S).step
        for more in ([], ["plan.recompute_alternate=true"], ["plan.async_tp=true"], ["plan.attention=unfused"])
    )
    # k, attention's output and w3: 2 dim^2 + dim ffn of 4 dim^2 + 3 dim ffn, of a forward pass of which backward is two.
    repeated = (2 * 8192**2 + 8192 * 22016) / (4 * 8192**2 + 3 * 8192 * 22016)
    assert op.recompute_s - ours.recompute_s == pytest.approx(repeated * ours.matmul_s / 3, rel=0.05)
    assert op.hfu / op.mfu - 1 == pytest.approx(repeated / 3, rel=0.1)
    # An eighth cannot hide at tp 8, and what hides slows the products by less than its own time.
    assert ours.exposed_tp_s / 8 < overlapped.exposed_tp_s < ours.exposed_tp_s / 2
    assert overlapped.step_s < ours.step_s
    # Attention's masked half in the forward pass and twice in the backward one, and both halves when computed again.
    half = 2 * 80 * 2048 * 8192 / (ours.model_tflops_per_gpu * 1e12 / ours.tokens_per_s_per_gpu)
    assert unfused.hfu / unfused.mfu - 1 == pytest.approx(5 * half, rel=1e-6)


def test_recompute_auto_is_the_least_that_fits() -> None:
    def chosen(memory_gb: int) -> str:
        words = ["experiment=llama_65b", "layout.recompute=auto", f"gpu.memory_gb={memory_gb}"]
        return forecast.resolved(specs.compose(words)).layout.recompute

    assert [chosen(gb) for gb in (180, 80, 20)] == ["none", "selective", "full"]


def test_a_gpu_that_nobody_calibrated_has_no_forecast() -> None:
    with pytest.raises(UserError, match="gpu=cpu is not calibrated"):
        forecast.plan(specs.compose([]), NOW_S)


def test_plan_prints_json_with_units_and_imports_no_torch() -> None:
    code = (
        "import sys; from orchestrator.cli import main; main(['plan', 'experiment=llama_7b', '--json']); "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert set(found["run"]["gpu_hours"]) == {"low", "central", "high"}
    assert found["memory"]["total_bytes"] > 1e9


def test_the_greenest_start_is_told_with_what_it_saves(tmp_path) -> None:  # type: ignore[no-untyped-def]
    series = tmp_path / "grid.csv"
    rows = [f"2027-01-{day:02d}T00:00:00Z,{100 if day >= 10 else 400}" for day in range(1, 32)]
    series.write_text("time_utc,g_per_kwh\n" + "\n".join(rows) + "\n")
    spec = specs.compose(["experiment=llama_7b", f"carbon.series={series}", "carbon.start=greenest",
                          "carbon.deadline=2027-01-20T00:00:00Z"])  # fmt: skip
    found = forecast.plan(spec, 1798848000.0)  # 2027-01-02
    assert found.start is not None
    assert "2027-01-10" in found.start
    assert "saves" in found.start
    assert found.figures["co2e_kg"].central == pytest.approx(found.figures["site_energy_kwh"].central * 0.1)


def test_the_commands_of_the_documentation_run(capsys: pytest.CaptureFixture[str]) -> None:
    from pathlib import Path

    from orchestrator.cli import main

    text = (Path(__file__).resolve().parents[4] / "docs" / "plan.md").read_text()
    commands = [line.split()[1:] for line in text.splitlines() if line.startswith(".venv/bin/arriero")]
    assert len(commands) == 5
    for words in commands:
        assert main(words) == 0
        assert capsys.readouterr().out
