"""The carbon report names the device that there was, and says modelled where most of an energy is."""

from dataclasses import replace
from pathlib import Path

import pytest

from dashboards.carbon import (
    CarbonStatement,
    Range,
    figures,
    llama_form,
    sentence,
    to_html,
    to_markdown,
    to_model_card,
)
from orchestrator.cli import main

CPU = CarbonStatement(
    name="mine",
    energy_kwh=Range(1, 2, 3),
    by_source_kwh={"counter": 0.0, "modelled": 1.98, "estimated": 0.02},
    by_class_kwh={"kept": 2.0},
    by_kind_kwh={"cpu": 1.0, "ram": 1.0},
    apportioned_kwh=0.0,
    pue=1.1,
    co2e_kg=None,
    intensity="set carbon.zone",
    market_co2e_kg=None,
    embodied_co2e_kg=None,
    gpu="cpu",
    gpu_watts=60,
    gpu_hours=2.0,
    formula_co2e_kg=None,
    slurm_kwh=None,
    slurm="not asked",
    method="",
)


def test_a_run_without_a_gpu_is_told_of_its_processor() -> None:
    header, rows = llama_form([CPU, replace(CPU, gpu="h100", gpu_watts=700)])
    assert header[:4] == ("run", "device", "power", "device-hours")
    assert [row[1:4] for row in rows] == [("cpu", "60 W", "2")] * 2 + [("h100", "700 W", "2")] * 2
    for text in (to_markdown([CPU]), to_html([CPU]), sentence(replace(CPU, energy_kwh=None))):
        assert "GPU" not in text
        assert "cpu" in text
    assert {f.key: f.how for f in figures(CPU)}["gpu_hours"] == "time held x devices (cpu), over every attempt"


@pytest.mark.parametrize(
    ("by_source_kwh", "said"),
    [
        ({"counter": 0.01, "modelled": 0.99}, "modelled x PUE 1.1: 99% modelled, 1% counter"),
        ({"counter": 0.9, "modelled": 0.1}, "measured x PUE 1.1: 90% counter, 10% modelled"),
        ({"sampled": 0.3, "estimated": 0.7}, "estimated x PUE 1.1: 70% estimated, 30% sampled"),
        ({"counter": 0.0, "modelled": 0.0}, "measured x PUE 1.1: nothing consumed"),
    ],
)
def test_only_what_was_looked_at_is_called_measured(by_source_kwh: dict[str, float], said: str) -> None:
    assert llama_form([replace(CPU, by_source_kwh=by_source_kwh)])[1][0][-1] == said


def test_an_energy_of_a_part_of_the_time_says_so_wherever_it_stands() -> None:
    part = replace(CPU, covered_share=0.62, co2e_kg=Range(1, 2, 3))
    said = "covers 62% of the device-hours"
    assert said in llama_form([part])[1][0][-1]
    assert said in sentence(part)
    assert said in to_model_card(part)
    assert {f.key: f.value for f in figures(part)}["covered_share"] == 0.62
    assert said in {f.key: f.how for f in figures(part)}["energy_kwh"]
    assert "covers 99.9% of" in sentence(replace(part, covered_share=0.9999))
    assert "covers" not in to_markdown([CPU])


def test_a_run_without_a_measurement_is_named_so_in_the_first_table() -> None:
    assert [row[-1] for row in llama_form([replace(CPU, energy_kwh=None)])[1]] == [
        "formula: hours x W x PUE; nothing was measured"
    ]


def test_two_forms_at_once_are_a_users_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "carbon", str(tmp_path), "--json", "--format", "csv"]) == 2
    assert capsys.readouterr().err == "arriero: --json and --format csv are two forms: give one of them\n"
