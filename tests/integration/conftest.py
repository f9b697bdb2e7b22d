"""The real Slurm that the tests under Slurm share, and a disk that is soon full."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from slurm.virtual import VirtualCluster, missing_packages


def require_slurm() -> None:
    """Skips, and says what is missing; in CI it fails instead."""
    if packages := missing_packages():
        why = f"no Slurm here: apt-get install --no-install-recommends {' '.join(packages)}"
        if os.environ.get("CI"):
            pytest.fail(why)
        pytest.skip(why)


@pytest.fixture(scope="session")
def slurm_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VirtualCluster]:
    """Eight nodes of four GPUs, with accounting; it warns whom it preempts (a rehearsal's does not). Tests leave it as
    they found it: no job, every node idle."""
    require_slurm()
    name = f"tests-{os.getpid()}"
    with VirtualCluster.up(nodes=8, gpus_per_node=4, name=name, preempt_send_user_signal=True) as cluster:
        yield cluster


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A disk of 2 MB, or of what its parameter says."""
    if os.geteuid() != 0:
        pytest.skip("NOT TESTED: a full disk needs root, to mount a small tmpfs")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={getattr(request, 'param', '2m')}", "tmpfs", disk],
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(f"NOT TESTED: a full disk; tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)
