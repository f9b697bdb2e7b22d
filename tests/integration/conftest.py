"""The real Slurm that the tests under Slurm share."""

import os
from collections.abc import Iterator

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
