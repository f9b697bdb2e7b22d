"""Hydra's own tests of launchers, here and on a real Slurm; a job that fails, or is killed, among others."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.plugins.launcher import Launcher
from hydra.test_utils.launcher_common_tests import IntegrationTestSuite, LauncherTestSuite
from hydra.version import VersionBase

from slurm import queue
from slurm.virtual import VirtualCluster

pytestmark = [pytest.mark.slow]
CLUSTER = "hydra.launcher.cluster"
HERE = [f"{CLUSTER}.kind=local"]
ON_SLURM = [f"{CLUSTER}.cpus_per_gpu=1", f"{CLUSTER}.memory_gb_per_node=1"]


@pytest.fixture
def on_slurm(slurm_cluster: VirtualCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[VirtualCluster]:
    for name, value in slurm_cluster.env.items():
        monkeypatch.setenv(name, value)
    yield slurm_cluster
    while any(job.live for job in (queue.queued() or {}).values()):  # as the next test expects it
        pass


@pytest.fixture(autouse=True)
def no_version_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hydra's tests name none, and expect 1.1's working directories; a composition in this process before has left 1.3."""
    monkeypatch.delitem(Singleton._instances, VersionBase, raising=False)


def test_hydra_finds_the_launcher() -> None:
    assert "hydra_plugins.arriero" in [c.__module__ for c in Plugins.instance().discover(Launcher)]


@pytest.mark.parametrize(("launcher_name", "overrides"), [("arriero", HERE)])
class TestHere(LauncherTestSuite):
    pass


@pytest.mark.slurm
@pytest.mark.usefixtures("on_slurm")
@pytest.mark.parametrize(("launcher_name", "overrides"), [("arriero", ON_SLURM)])
class TestOnSlurm(LauncherTestSuite):
    pass


@pytest.mark.slurm
@pytest.mark.usefixtures("on_slurm")
@pytest.mark.parametrize(("task_launcher_cfg", "extra_flags"), [({}, ["-m", "hydra/launcher=arriero", *ON_SLURM])])
class TestApplicationsOnSlurm(IntegrationTestSuite):
    pass


@pytest.mark.slurm
def test_a_job_that_raises_or_is_killed_has_failed_and_takes_no_other_down(
    on_slurm: VirtualCluster, tmp_path: Path
) -> None:
    (tmp_path / "squares.py").write_text(
        "def square(x):\n    return x * x\n"
    )  # found by the jobs as by the application
    (tmp_path / "app.py").write_text(
        "import os, hydra, squares\n"
        "@hydra.main(version_base='1.3', config_path=None)\n"
        "def app(cfg):\n"
        "    if cfg.x == 1: raise ArithmeticError('one is too few')\n"
        "    if cfg.x == 2: os.kill(os.getpid(), 9)\n"
        "    print('square', squares.square(cfg.x))\n"
        "app()\n"
    )
    words = [sys.executable, "app.py", "-m", "hydra/launcher=arriero", *ON_SLURM, "hydra.sweep.dir=out", "+x=0,1,2,3"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 1
    assert "ArithmeticError: one is too few" in done.stderr
    assert "job 2 ended without a result" in done.stdout
    array = done.stdout.partition("job array ")[2].partition(":")[0]
    while any((jobs := queue.queued() or {})[f"{array}_{n}"].live for n in range(4)):
        pass
    assert [jobs[f"{array}_{n}"].state for n in range(4)] == ["COMPLETED", "FAILED", "FAILED", "COMPLETED"]
    assert "square 9" in next((tmp_path / "out" / ".arriero" / "logs").glob(f"{array}_3_*.out")).read_text()
