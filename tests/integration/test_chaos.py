"""The campaign's faults, each once: seen, got over, and the loss that of a run without it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from orchestrator.chaos.campaign import run
from orchestrator.chaos.judge import Row
from orchestrator.chaos.plan import PLAN
from slurm.virtual import VirtualCluster

ARRIERO = str(Path(sys.executable).with_name("arriero"))


@pytest.fixture(scope="module")
def rows(slurm_cluster: VirtualCluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Row]:
    """The whole campaign, as `arriero chaos` runs it."""
    root = tmp_path_factory.mktemp("chaos")
    return {r.fault: r for r in run(PLAN, root, 1, 2, Console(), slurm_cluster)}


@pytest.mark.slow
@pytest.mark.slurm
@pytest.mark.timeout(900)
@pytest.mark.parametrize("fault", [p.name for p in PLAN])
def test_a_run_gets_over(rows: dict[str, Row], fault: str) -> None:
    row = rows[fault]
    if row.passed is None:
        pytest.skip(f"NOT TESTED: {row.why}")
    assert row.passed, row


def test_an_unknown_fault_is_refused_with_the_names_of_all() -> None:
    done = subprocess.run([ARRIERO, "chaos", "meteorite"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "meteorite is no fault of the campaign" in done.stderr
    assert "sigkill_rank_0" in done.stderr


@pytest.mark.slow
def test_random_kills_leave_the_run_as_the_control(tmp_path: Path) -> None:
    words = [ARRIERO, "chaos", "--random", "3", "--json", "--directory", str(tmp_path / "kills")]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=500)
    account = json.loads(done.stdout)
    assert done.returncode == 0, account
    assert account["kills"] >= 1
    assert account["runs_equal_to_control"] == account["runs"]
