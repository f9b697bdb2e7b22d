"""What the sampler reads, and whose it is."""

import fcntl
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.energy import sampler
from orchestrator.energy.sampler import _mig_share, _readings, _wanted_gpus, shares_of_gpus
from slurm import energy as slurm_energy

GPUS = ["GPU-aa", "GPU-bb", "GPU-cc", "GPU-dd"]


def no_mig(name: str) -> tuple[str, float] | None:
    return None


@pytest.mark.parametrize(
    ("wanted", "shares"),
    [
        (None, dict.fromkeys(GPUS, 1.0)),
        ([], {}),
        (["-1"], {}),
        (["1", "3"], {"GPU-bb": 1.0, "GPU-dd": 1.0}),
        (["GPU-cc"], {"GPU-cc": 1.0}),
        (["4", "5", "6", "7"], dict.fromkeys(GPUS, 1.0)),  # a cgroup shows the job's own, renumbered
    ],
)
def test_a_job_counts_the_gpus_it_was_given(wanted: list[str] | None, shares: dict[str, float]):
    assert shares_of_gpus(GPUS, wanted, no_mig) == shares


def test_slurms_list_is_the_whole_jobs_where_a_rank_sees_one_gpu():
    assert _wanted_gpus({"CUDA_VISIBLE_DEVICES": "0", "SLURM_STEP_GPUS": "0,1,2,3"}) == ["0", "1", "2", "3"]
    assert _wanted_gpus({"CUDA_VISIBLE_DEVICES": "MIG-1", "SLURM_JOB_GPUS": "0"}) == ["MIG-1"]
    assert _wanted_gpus({"CUDA_VISIBLE_DEVICES": ""}) == []
    assert _wanted_gpus({}) is None


@pytest.fixture
def mig(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML with two instances of three of seven slices on GPU-aa."""

    class NVMLError(Exception):
        pass

    def by_uuid(name: str) -> str:
        if not name.startswith("MIG-"):
            raise NVMLError
        return name

    monkeypatch.setitem(
        sys.modules,
        "pynvml",
        SimpleNamespace(
            NVMLError=NVMLError,
            nvmlDeviceGetHandleByUUID=by_uuid,
            nvmlDeviceGetDeviceHandleFromMigDeviceHandle=lambda mig: "parent",
            nvmlDeviceGetAttributes_v2=lambda mig: SimpleNamespace(gpuInstanceSliceCount=3),
            nvmlDeviceGetMaxMigDeviceCount=lambda parent: 7,
            nvmlDeviceGetUUID=lambda parent: b"GPU-aa",
        ),
    )


@pytest.mark.usefixtures("mig")
def test_mig_instances_are_shares_of_their_gpu():
    assert shares_of_gpus(GPUS, ["MIG-1"], _mig_share) == {"GPU-aa": pytest.approx(3 / 7)}
    assert shares_of_gpus(GPUS, ["MIG-1", "MIG-2"], _mig_share) == {"GPU-aa": pytest.approx(6 / 7)}


def test_rapl_is_read_as_the_packages_own_counters(tmp_path: Path):
    """codecarbon chooses the domains; the ledger gets each one's raw counter and where it wraps."""
    from codecarbon.external.hardware import CPU

    for package in (0, 1):
        domain = tmp_path / "intel-rapl" / f"intel-rapl:{package}"
        domain.mkdir(parents=True)
        (domain / "name").write_text(f"package-{package}\n")
        (domain / "energy_uj").write_text(f"{(package + 1) * 5_000_000}\n")
        (domain / "max_energy_range_uj").write_text("262143328850\n")
    cpu = CPU(str(tmp_path), "intel_rapl", "a processor", 100, rapl_dir=str(tmp_path / "intel-rapl"))
    cpu.start()
    (tmp_path / "intel-rapl" / "intel-rapl:0" / "energy_uj").write_text("7500000\n")
    cpu.measure_power_and_energy(1.0)
    total = SimpleNamespace(cpu_energy=0.0, ram_energy=0.0)
    readings = {r.device: r for r in _readings([cpu], total, "n1", 0.5, {}, {})}
    assert readings["n1/cpu0"].joules == pytest.approx(7.5)
    assert readings["n1/cpu1"].joules == pytest.approx(10)
    assert readings["n1/cpu0"].wraps_at_j == pytest.approx(262143.328850)
    assert {(r.source, r.share) for r in readings.values()} == {("counter", 0.5)}


def test_a_second_sampler_of_a_node_and_attempt_finds_the_lock_taken(tmp_path: Path):
    first = sampler._lock(tmp_path, 1, "n1")
    assert first is not None
    assert sampler._lock(tmp_path, 1, "n1") is None
    other = sampler._lock(tmp_path, 2, "n1")
    assert other is not None
    sampler._unlock(first)
    assert not Path(first.name).exists()
    again = sampler._lock(tmp_path, 1, "n1")
    assert again is not None
    sampler._unlock(other)
    sampler._unlock(again)


def test_a_lock_that_its_last_holder_removes_while_it_is_taken_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = sampler._lock(tmp_path, 1, "n1")
    assert last is not None
    flock, asked = fcntl.flock, []

    def as_the_last_one_goes(file: Any, how: int) -> None:
        if not asked:
            sampler._unlock(last)
        asked.append(file.fileno())
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", as_the_last_one_goes)
    lock = sampler._lock(tmp_path, 1, "n1")
    assert len(asked) == 2
    assert lock is not None
    assert sampler._lock(tmp_path, 1, "n1") is None  # not a file of its own beside it
    sampler._unlock(lock)


def test_sacct_rows_add_up_over_requeues_and_count_once():
    text = "41|2026-11-24T01:00:00|1000\n41|2026-11-24T02:00:00|500\n41|2026-11-24T02:00:00|500\n42|x|\n"
    assert slurm_energy.parse_consumed_energy_j(text) == 1500


def test_a_cluster_without_energy_counters_has_no_figure():
    assert slurm_energy.parse_consumed_energy_j("41|2026-11-24T01:00:00|0\n42||\n43|s|18446744073709551614\n") is None
    assert slurm_energy.consumed_energy_j([])[0] is None


def test_the_share_of_a_node_is_of_its_cpus(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(slurm_energy, "_output", lambda command: "NodeName=n1 CPUAlloc=16 CPUTot=64 CPULoad=1")
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "16")
    assert slurm_energy.job_share_of_node() == 0.25
    monkeypatch.delenv("SLURMD_NODENAME")
    assert slurm_energy.job_share_of_node() == 1.0
