"""A real sweep through the command: a point that cannot run, the command again, status, report, page, fit."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.integration.words_run import arriero, environment, make_workplace, words


@pytest.mark.slow
def test_a_sweep_runs_tells_its_failure_goes_on_and_reports(tmp_path: Path) -> None:
    workplace = make_workplace(tmp_path)
    command = [*words("sizes", "-m", "steps=6,8", "data.sources.a.path=a.jsonl,later.jsonl")]
    command = [c for c in command if c != "steps=30"]

    def launched() -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            command, cwd=workplace, env=environment(), capture_output=True, text=True, check=False, timeout=250
        )

    first = launched()
    assert first.returncode == 1, first.stderr
    assert "2 of 4 finished" in first.stdout
    rows = json.loads(arriero(workplace, "sweep", "status", "runs/sizes", "--json").stdout)
    assert sorted(r["state"] for r in rows) == ["failed", "failed", "finished", "finished"]
    assert all("later.jsonl" in r["detail"] for r in rows if r["state"] == "failed")

    (workplace / "later.jsonl").write_text((workplace / "a.jsonl").read_text())
    again = launched()
    assert again.returncode == 0, again.stdout + again.stderr
    assert "4 points, 2 finished, 2 to run" in again.stdout

    told = arriero(workplace, "sweep", "report", "runs/sizes", "--json")
    assert told.returncode == 0, told.stderr
    found = json.loads(told.stdout)
    assert set(found["axes"]) == {"steps", "data.sources.a.path"}
    ranked = [(p["corpus"], p["held_out_loss"]) for p in found["points"]]
    assert len({corpus for corpus, _ in ranked}) == 2  # of two files: ranked apart
    assert ranked[:2] == sorted(ranked[:2])
    assert ranked[2:] == sorted(ranked[2:])
    # Runs of a second: any may end between two looks at the meter.
    measured = [p["energy_site_kwh"] for p in found["points"]]
    assert all(kwh is None or kwh >= 0 for kwh in measured)
    if any(kwh is not None for kwh in measured):
        assert found["energy_site_kwh"] == pytest.approx(sum(kwh or 0 for kwh in measured))
    else:  # of nothing measured no sum is told
        assert found["energy_site_kwh"] is None
    assert found["co2e_kg"] is None  # no intensity is configured
    given = arriero(workplace, "sweep", "report", "--json", "runs/sizes", "carbon.intensity_g_per_kwh=1000")
    assert json.loads(given.stdout)["co2e_kg"] == pytest.approx(found["energy_site_kwh"])
    page = (workplace / "runs" / "sizes" / "sweep.html").read_text()
    assert "Parallel coordinates" in page
    assert "<script" not in page
    fit = arriero(workplace, "scaling", "fit", "runs/sizes")
    assert fit.returncode == 2
    assert "differ in model.vocab_size or in data" in fit.stderr


@pytest.mark.slow
def test_halving_pauses_real_runs_at_the_step_and_goes_on_with_the_best(tmp_path: Path) -> None:
    workplace = make_workplace(tmp_path)
    command = [*words("rates", "-m", "--halving=10", "optim.lr=1e-7,4e-3")]
    done = subprocess.run(
        command, cwd=workplace, env=environment(), capture_output=True, text=True, check=False, timeout=250
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(arriero(workplace, "sweep", "status", "runs/rates", "--json").stdout)
    told = {r["point"].split("-")[0]: (r["state"], r["step"]) for r in rows}
    assert told == {"lr=1e": ("dropped", 10), "lr=0.004": ("finished", 30)}
    assert "33% of all steps saved" in done.stdout
