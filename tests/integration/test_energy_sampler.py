"""Real sampler processes with codecarbon and a made-up NVML: killed, started four times over, left behind."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.energy.ledger import Tick, consumption, read_ledger
from orchestrator.energy.sampler import start_sampler

HERE = Path(__file__).parent


def until(happened: Callable[[], bool], within_s: float = 60) -> None:
    deadline = time.monotonic() + within_s
    while not happened():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


@pytest.fixture
def nvml_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two made-up GPUs for every process started in the test; the file that holds what was read of them."""
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\nexit 0\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{smi.parent}:{os.environ['PATH']}")
    path = [str(HERE / "fake_nvml"), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", ":".join(p for p in path if p))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("FAKE_NVML_LOG", str(tmp_path / "nvml.log"))
    # As inside a job: codecarbon must not hear of it, and the job's list of GPUs is what counts.
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_JOB_GPUS", "0,1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    return tmp_path / "nvml.log"


def read(run: Path) -> list[Tick]:
    return [t for path in sorted((run / "energy").glob("*.jsonl")) for t in read_ledger(path)[0]]


def true_gpu_j(log: Path, ticks: list[Tick]) -> float:
    """What the made-up counters showed from the first tick to the last."""
    total = 0.0
    for gpu in ("GPU-0", "GPU-1"):
        rows = [line.split() for line in log.read_text().splitlines()]
        seen = [(float(t), int(mj)) for t, device, mj in rows if device == gpu]
        first = max(mj for t, mj in seen if t <= ticks[0].time_s + 0.002)  # the ledger's times are cut to ms
        last = max(mj for t, mj in seen if t <= ticks[-1].time_s + 0.002)
        total += (last - first) / 1000
    return total


@pytest.mark.slow
def test_killed_and_started_four_times_over_a_node_is_counted_once_and_right(tmp_path: Path, nvml_log: Path):
    run = tmp_path / "run"
    train = subprocess.Popen(["sleep", "600"])
    killed = start_sampler(run, 1, train.pid, 0.3)
    until(lambda: (run / "energy").exists() and len(read(run)) >= 3)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    before = len(read(run))
    with next((run / "energy").iterdir()).open("a") as ledger:
        ledger.write('{"time_utc":"2026-')  # the line that the kill tore

    ranks = [start_sampler(run, 1, train.pid, 0.3) for _ in range(4)]
    until(lambda: sum(rank.poll() is not None for rank in ranks) == 3 and len(read(run)) >= before + 3)
    train.kill()
    train.wait()
    assert [rank.wait(timeout=60) for rank in ranks] == [0, 0, 0, 0]  # the last ends by itself

    ticks = read(run)
    assert len({t.sampler for t in ticks}) == 2
    assert {t.job for t in ticks} == {"77"}
    gpu = [i for i in consumption(ticks).intervals if i.device.startswith("GPU-")]
    assert {i.source for i in gpu} == {"counter"}  # the time without a sampler too
    assert sum(i.joules for i in gpu) == pytest.approx(true_gpu_j(nvml_log, ticks), rel=0.01)
    (path,) = (run / "energy").iterdir()
    assert read_ledger(path)[1] == 1


@pytest.mark.slow
def test_a_driver_reset_under_a_live_sampler_is_estimated_and_tagged(tmp_path: Path, nvml_log: Path):
    run = tmp_path / "run"
    sampler = start_sampler(run, 1, os.getpid(), 0.3)
    until(lambda: (run / "energy").exists() and len(read(run)) >= 8)
    nvml_log.with_suffix(".reset").write_text(str(time.time()))
    after = len(read(run))
    until(lambda: len(read(run)) >= after + 8)
    sampler.terminate()
    assert sampler.wait(timeout=60) == 0

    ticks = read(run)
    gpu = [i for i in consumption(ticks).intervals if i.device.startswith("GPU-")]
    estimated = [i for i in gpu if i.source == "estimated"]
    assert len({(i.start_s, i.end_s) for i in estimated}) == 1
    # The power is even, so the truth is power x the time between the first and the last reading.
    read_s = [float(line.split()[0]) for line in nvml_log.read_text().splitlines()]
    first_s, last_s = (max(t for t in read_s if t <= tick.time_s + 0.002) for tick in (ticks[0], ticks[-1]))
    assert sum(i.joules for i in gpu) == pytest.approx(500 * (last_s - first_s), rel=0.01)
