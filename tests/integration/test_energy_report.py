"""`arriero report carbon` as a person meets it, on run directories written by hand."""

import csv
import io
import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from orchestrator import spec
from orchestrator.carbon_report import budget
from orchestrator.cli import main
from orchestrator.energy.ledger import EnergyReading, Tick, encode
from orchestrator.record import Event, JsonlWriter, StepRecord
from orchestrator.run_dir import RunDir

T0 = 1_790_000_000.0


def iso(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).isoformat(timespec="milliseconds")


def write_run(root: Path, watts: float = 360.0, device: str = "GPU-1", **carbon: object) -> Path:
    """A run of one attempt: 10 s of start-up, nine kept steps of 10 s, one GPU at even power."""
    root.mkdir(parents=True)
    overrides = [f"carbon.{key}={value}" for key, value in carbon.items()]
    paths = RunDir(root)
    paths.spec.write_text(spec.to_yaml(spec.compose(overrides)))
    with JsonlWriter(paths.attempt_file(paths.events, 1)) as events:
        events.write(Event(time_utc=iso(T0), kind="started", step=0, detail="", attempt=1))
    with JsonlWriter(paths.attempt_file(paths.records, 1)) as steps:
        for n in range(1, 10):
            steps.write(
                StepRecord(
                    time_utc=iso(T0 + 10 + 10 * n), attempt=1, step=n, tokens=n, loss=1.0, grad_norm=1.0, lr=1.0,
                    step_s=10.0, tokens_per_s=1.0, mfu=None,
                )
            )  # fmt: skip
    paths.energy.mkdir()
    ticks = [
        Tick(T0 + t, "n1", "b", root.name, 1, "", (EnergyReading(device, 1e6 + watts * t, "counter"),))
        for t in range(0, 101, 10)
    ]
    (paths.energy / "0001-n1.jsonl").write_text("".join(map(encode, ticks)))
    return root


def report(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["report", "carbon", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_one_run_is_told_in_every_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = write_run(tmp_path / "llama", intensity_g_per_kwh=100)
    (told,) = json.loads(report(capsys, run, "--json"))
    figures = told["figures"]
    assert figures["energy_kwh"]["value"] == pytest.approx(0.01)  # 360 W for 100 s
    assert figures["kept_kwh"]["value"] == pytest.approx(0.009)
    assert figures["startup_kwh"]["value"] == pytest.approx(0.001)
    assert figures["co2e_kg"]["value"] == pytest.approx(0.01 * 1.1 * 0.1)
    assert figures["co2e_kg"]["low"] < figures["co2e_kg"]["value"] < figures["co2e_kg"]["high"]
    assert figures["formula_site_energy_kwh"]["value"] == pytest.approx(100 / 3600 * 60 * 1.1 / 1000)
    assert all(figure["how"] for figure in figures.values())

    rows = list(csv.DictReader(io.StringIO(report(capsys, run, "--format", "csv"))))
    assert {r["figure"]: float(r["value"]) for r in rows} == {k: f["value"] for k, f in figures.items()}
    markdown = report(capsys, run)
    assert "| llama | cpu    | 60 W" in markdown
    assert "100% counter" in markdown
    page = report(capsys, run, "--format", "html")
    assert "<h2>llama</h2>" in page
    assert "http" not in page
    assert 'arriero_energy_kwh{run="llama",bound="central"} 0.01' in report(capsys, run, "--format", "prometheus")
    assert "emissions: 1.1\n" in report(capsys, run, "--format", "model-card")


def test_without_an_intensity_it_tells_energy_and_how_to_get_carbon(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = write_run(tmp_path / "llama")
    (told,) = json.loads(report(capsys, run, "--json"))
    assert "co2e_kg" not in told["figures"]
    assert any("carbon.zone" in remark for remark in told["remarks"])
    (told,) = json.loads(report(capsys, run, "carbon.zone=FRA", "carbon.market_g_per_kwh=0", "--json"))
    assert told["figures"]["market_co2e_kg"]["value"] == 0
    assert "FRA (2023)" in told["figures"]["co2e_kg"]["how"]


@pytest.mark.parametrize("parallel_from", [1, 100])
def test_a_project_counts_a_shared_device_once(
    parallel_from: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("orchestrator.energy.report._PARALLEL_FROM", parallel_from)
    for name in ("a", "b"):
        write_run(tmp_path / "sweep" / name)
    write_run(tmp_path / "sweep" / "c", device="GPU-2")
    *runs, total = json.loads(report(capsys, tmp_path / "sweep", tmp_path / "sweep" / "a", "--json"))
    energies = {run["name"]: run["figures"]["energy_kwh"]["value"] for run in runs}
    assert energies == pytest.approx({"a": 0.005, "b": 0.005, "c": 0.01})
    assert total["name"] == "total of 3 runs"
    assert total["figures"]["energy_kwh"]["value"] == pytest.approx(0.02)


def test_a_run_without_a_ledger_has_the_formula_alone_and_leaves_the_total_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    write_run(tmp_path / "a")
    (next((write_run(tmp_path / "b") / "energy").iterdir())).unlink()
    _, b, total = json.loads(report(capsys, tmp_path, "carbon.zone=FRA", "carbon.market_g_per_kwh=10", "--json"))
    assert "energy_kwh" not in b["figures"]
    assert b["figures"]["formula_co2e_kg"]["value"] > 0
    assert "nothing was measured" in b["remarks"][0]
    assert total["figures"]["market_co2e_kg"]["value"] == pytest.approx(0.01 * 1.1 * 0.01)
    assert any("leaves out b" in remark for remark in total["remarks"])


@pytest.mark.parametrize(("budget_kwh", "action"), [(0.1, "ok"), (0.0125, "warn"), (0.01, "stop")])
def test_a_budget_is_held_against_what_the_site_has_used(tmp_path: Path, budget_kwh: float, action: str):
    run = write_run(tmp_path / "llama", budget_kwh=budget_kwh, on_budget="stop")  # 0.011 kWh with its PUE of 1.1
    assert budget(run).action == action


def test_a_node_that_left_no_line_is_estimated(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = write_run(tmp_path / "llama")
    started = next(RunDir(run).events.iterdir())
    started.write_text(started.read_text().replace('"data":{}', '"data":{"nodes":2,"gpus":16}'))
    (told,) = json.loads(report(capsys, run, "--json"))
    assert told["figures"]["energy_kwh"]["value"] == pytest.approx(0.02)
    assert told["figures"]["source_estimated_kwh"]["value"] == pytest.approx(0.01)
    assert told["figures"]["gpu_hours"]["value"] == pytest.approx(16 * 100 / 3600)


def test_a_series_weighs_the_hours_by_what_was_used_in_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = write_run(tmp_path / "llama")
    series = tmp_path / "grid.csv"
    rows = [f"{iso(T0 + 50 * n)},{g}" for n, g in enumerate([100, 300, 0])]
    series.write_text("\n".join(["time_utc,g_per_kwh", *rows]))
    (told,) = json.loads(report(capsys, run, f"carbon.series={series}", "carbon.pue=1", "--json"))
    assert told["figures"]["co2e_kg"]["value"] == pytest.approx(0.01 * 0.2)
    series.write_text("\n".join(["time_utc,g_per_kwh", *rows[:1], f"{iso(T0 + 20)},9"]))
    (told,) = json.loads(report(capsys, run, f"carbon.series={series}", "--json"))
    assert "co2e_kg" not in told["figures"]
    assert any("does not cover" in remark for remark in told["remarks"])


@pytest.mark.parametrize("place", ["zone: XKX", "series: /moved/grid.csv", "cloud: gcp/nowhere"])
def test_a_run_whose_place_is_known_no_more_is_told_with_its_energy_and_hides_no_other(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    lost, run = write_run(tmp_path / "lost"), write_run(tmp_path / "run")
    name = place.split(":")[0]
    spec = (lost / "spec.yaml").read_text()
    assert f"\n  {name}: null\n" in spec
    (lost / "spec.yaml").write_text(spec.replace(f"\n  {name}: null\n", f"\n  {place}\n"))
    told = json.loads(report(capsys, lost, run, "--json"))
    assert len(told) == 3
    assert "site_energy_kwh" in told[0]["figures"]
    assert "co2e_kg" not in told[0]["figures"]
    assert any(place.split()[1] in remark for remark in told[0]["remarks"])
    (told,) = json.loads(report(capsys, lost, "carbon.zone=FRA", "--json"))
    assert "co2e_kg" in told["figures"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "which runs"),
        (["nowhere"], "no run directory"),
        (["{run}", "carbon.zone=fr"], "ISO-3"),
        (["{run}", "carbon.zoen=FRA"], "zoen"),
        (["{run}", "carbon.zone=XKX"], "213 countries"),
        (["{run}", "carbon.pue=low"], "pue"),
    ],
)
def test_a_mistake_is_told_in_words(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = write_run(tmp_path / "llama")
    assert main(["report", "carbon", *(a.format(run=run) for a in arguments)]) == 2
    assert said in capsys.readouterr().err


def test_the_papers_table_is_printed(capsys: pytest.CaptureFixture[str]):
    assert report(capsys, "--llama-table") == (Path(__file__).parents[1] / "golden/llama_table_15.md").read_text()


def test_the_commands_of_the_document_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    write_run(tmp_path / "runs" / "first_run", intensity_g_per_kwh=100)
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "energy.md").read_text()
    commands = [line for line in text.splitlines() if line.startswith("arriero ")]
    assert len(commands) == 5
    for command in commands:
        words = command.partition("#")[0].partition(">")[0].split()
        assert main(words[1:]) == 0, command
        assert capsys.readouterr().out
