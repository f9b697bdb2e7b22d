"""One process per node, outside the ranks, that writes the energy ledger. codecarbon measures; this makes it safe.

- A process of its own, so that no rank's crash or signal handling touches it, with Slurm's job id taken out of the
  environment before the import: codecarbon would put the whole job's CPU count on each node.
- Every measurement goes to the ledger at once through a handler, since codecarbon's own file is only written at the end.
- A lock per node and attempt, so that four ranks that each start one count the node once.
- What is written is the devices' own cumulative counters where they have one (NVML, RAPL), so that a killed sampler loses
  no energy; else codecarbon's sums, which start at 0 in each sampler.
"""

import contextlib
import fcntl
import hashlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.energy.ledger import EnergyReading, LedgerWriter, Tick
from orchestrator.run_dir import RunDir
from slurm.energy import job_share_of_node
from slurm.rendezvous import job_id_of

J_PER_KWH = 3.6e6


def node_name() -> str:
    """As Slurm names it; the host's name elsewhere."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def ledger_path(run_dir: Path, attempt: int, node: str) -> Path:
    return RunDir(run_dir).energy / f"{attempt:04d}-{node}.jsonl"


def start_sampler(run_dir: Path, attempt: int, watch_pid: int, sample_s: float) -> subprocess.Popen[bytes]:
    """Starts this node's sampler and returns at once. It ends by itself when process `watch_pid` is gone."""
    log = RunDir(run_dir).logs / f"energy-{attempt:04d}-{node_name()}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    main = "from orchestrator.cli import main; raise SystemExit(main())"
    numbers = ["--attempt", str(attempt), "--watch", str(watch_pid), "--sample-s", str(sample_s)]
    command = [sys.executable, "-P", "-c", main, "energy-sample", str(run_dir), *numbers]
    with log.open("ab") as output:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)


def stop_sampler(process: subprocess.Popen[bytes], within_s: float = 10.0) -> None:
    """Asks a sampler for its last reading and waits for it; one that does not answer is left to end by itself."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(within_s)


@contextlib.contextmanager
def sampling(run_dir: Path, attempt: int, sample_s: float) -> Iterator[None]:
    """This node is sampled while the block runs. A sampler that cannot start never stops a run: it is told, and the
    account estimates this node."""
    process = None
    try:
        process = start_sampler(run_dir, attempt, os.getpid(), sample_s)
    except OSError as error:
        print(f"the energy of {node_name()} is not measured: {error}", flush=True)
    try:
        yield
    finally:
        if process is not None:
            stop_sampler(process)


def sample(run_dir: Path, attempt: int, watch_pid: int | None, sample_s: float) -> int:
    """Writes the ledger of this node until `watch_pid` is gone or SIGTERM comes. Returns the exit code."""
    node, job = node_name(), job_id_of(os.environ)
    lock = _lock(run_dir, attempt, node)
    if lock is None:
        print(f"{node} is sampled already for attempt {attempt}: nothing to do")
        return 0
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())

    wanted_gpus = _wanted_gpus(os.environ)
    node_share = job_share_of_node()
    for name in ("SLURM_JOB_ID", "SLURM_JOBID", "CUDA_VISIBLE_DEVICES"):
        os.environ.pop(name, None)
    import psutil
    from codecarbon import OfflineEmissionsTracker
    from codecarbon.output_methods.base_output import BaseOutput

    writer = LedgerWriter(ledger_path(run_dir, attempt, node))
    sampler, boot, host = uuid.uuid4().hex[:8], _boot_id(), socket.gethostname()
    ticks = 0
    sampled_j: dict[str, float] = {}
    gpu_shares: dict[str, float] | None = None

    class Handler(BaseOutput):  # type: ignore[misc]
        def live_out(self, total: Any, delta: Any) -> None:
            nonlocal ticks, gpu_shares
            if gpu_shares is None:
                gpu_shares = shares_of_gpus(_gpu_uuids(tracker._hardware), wanted_gpus, _mig_share)
            time_s = time.time() - (time.perf_counter() - tracker._last_measured_time)  # the handler comes later
            readings = _readings(tracker._hardware, total, host, node_share, gpu_shares, sampled_j)
            try:
                writer.append(Tick(time_s, node, boot, sampler, attempt, job, tuple(readings)))
                ticks += 1
            except OSError as error:  # a full disk, a server that is away: the next tick carries all of it
                print(f"could not write the energy ledger: {error}", flush=True)

    tracker = OfflineEmissionsTracker(
        force_carbon_intensity_g_co2e_kwh=0.0,  # only energy is taken from it; carbon is the report's
        pue=1.0,
        gpu_ids=None,
        tracking_mode="machine",
        measure_power_secs=sample_s,
        api_call_interval=1,
        output_methods=[],
        output_handlers=[Handler()],
        allow_multiple_runs=True,
        log_level="error",
    )
    tracker.start()
    if not ticks:  # codecarbon swallows what goes wrong at its start
        print("codecarbon measured nothing: no energy of this node is recorded", flush=True)
        _unlock(lock)
        return 1
    watched = None
    if watch_pid is not None:
        try:
            watched = psutil.Process(watch_pid)
        except psutil.NoSuchProcess:
            stop.set()
    while not stop.wait(min(1.0, sample_s)):
        if watched is not None and not _alive(watched):
            break
    tracker.stop()  # measures once more, so that the last stretch is counted
    writer.close()
    _unlock(lock)
    return 0


def shares_of_gpus(
    uuids: Sequence[str], wanted: Sequence[str] | None, mig_share: Callable[[str], tuple[str, float] | None]
) -> dict[str, float]:
    """The GPUs of this job, each with the share of it that the job has.

    `uuids` are those NVML shows, `wanted` what CUDA_VISIBLE_DEVICES or Slurm name (None: all): indices, GPU or MIG UUIDs.
    A name that NVML does not know means that a cgroup shows this job its own GPUs only, renumbered: then all count.
    """
    if wanted is None:
        return dict.fromkeys(uuids, 1.0)
    shares: dict[str, float] = {}
    for name in wanted:
        if name.startswith("MIG-") and (found := mig_share(name)):
            parent, share = found
            shares[parent] = min(1.0, shares.get(parent, 0.0) + share)
            continue
        if name == "-1":  # CUDA sees none from here on
            break
        matching = [u for i, u in enumerate(uuids) if (name == str(i) if name.isdigit() else u.startswith(name))]
        if len(matching) != 1:
            return dict.fromkeys(uuids, 1.0)
        shares[matching[0]] = 1.0
    return shares


def _wanted_gpus(environ: Mapping[str, str]) -> list[str] | None:
    """What names the whole job's GPUs on this node: Slurm's list, for a rank may see only its own; MIG by CUDA's."""
    cuda = environ.get("CUDA_VISIBLE_DEVICES")
    slurm = environ.get("SLURM_STEP_GPUS") or environ.get("SLURM_JOB_GPUS")
    named = slurm if slurm and "MIG-" not in (cuda or "") else cuda
    return None if named is None else [name.strip() for name in named.split(",") if name.strip()]


def _mig_share(mig_uuid: str) -> tuple[str, float] | None:
    """A MIG instance's GPU, and the share of that GPU's slices which the instance has."""
    import pynvml

    try:
        mig = pynvml.nvmlDeviceGetHandleByUUID(mig_uuid)
        parent = pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(mig)
        slices = pynvml.nvmlDeviceGetAttributes_v2(mig).gpuInstanceSliceCount
        of = pynvml.nvmlDeviceGetMaxMigDeviceCount(parent)
        parent_uuid = pynvml.nvmlDeviceGetUUID(parent)
    except pynvml.NVMLError:
        return None
    return (parent_uuid.decode() if isinstance(parent_uuid, bytes) else parent_uuid), slices / of


def _readings(
    hardware: Sequence[Any],
    total: Any,
    host: str,
    node_share: float,
    gpu_shares: Mapping[str, float],
    sampled_j: dict[str, float],
) -> list[EnergyReading]:
    """What codecarbon has just measured, device by device. `sampled_j` sums GPUs without a counter, across calls.

    Reads codecarbon's own objects (3.3): its totals are of a node, and an account needs each device's own counter.
    """
    from codecarbon.external.hardware import CPU, GPU

    readings: list[EnergyReading] = []
    for item in hardware:
        if isinstance(item, GPU):
            for gpu in item.devices.devices:
                uuid_ = gpu.get_static_details()["uuid"]
                share = gpu_shares.get(uuid_)
                if share is None:
                    continue
                if gpu.last_energy is not None and not gpu._use_power_fallback:
                    readings.append(EnergyReading(uuid_, gpu.last_energy.kWh * J_PER_KWH, "counter", share))
                else:
                    sampled_j[uuid_] = sampled_j.get(uuid_, 0.0) + gpu.energy_delta.kWh * J_PER_KWH
                    readings.append(EnergyReading(uuid_, sampled_j[uuid_], "sampled", share))
        elif isinstance(item, CPU) and item._mode == "intel_rapl":
            rapl = item._intel_interface
            for index, domain in enumerate(rapl._rapl_files):
                if domain.last_energy is not None and domain.path not in rapl._mirrored_candidates:
                    joules = domain.last_energy.kWh * J_PER_KWH
                    wraps_at_j = domain.max_energy_reading.kWh * J_PER_KWH or None
                    readings.append(EnergyReading(f"{host}/cpu{index}", joules, "counter", node_share, wraps_at_j))
        elif isinstance(item, CPU):
            readings.append(EnergyReading(f"{host}/cpu", total.cpu_energy * J_PER_KWH, "modelled", node_share))
    if total.ram_energy:
        readings.append(EnergyReading(f"{host}/ram", total.ram_energy * J_PER_KWH, "modelled", node_share))
    return readings


def _gpu_uuids(hardware: Sequence[Any]) -> list[str]:
    from codecarbon.external.hardware import GPU

    return [d.get_static_details()["uuid"] for item in hardware if isinstance(item, GPU) for d in item.devices.devices]


def _lock(run_dir: Path, attempt: int, node: str) -> Any | None:
    """Held while this process lives, on the node's own disk: flock on a network's disk is not to be trusted."""
    name = hashlib.sha256(f"{run_dir.resolve()} {attempt} {node}".encode()).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"arriero-energy-{os.getuid()}-{name}.lock"
    while True:
        file = path.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        try:
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except FileNotFoundError:
            pass
        file.close()  # between open and flock its last holder went, and took the file with it


def _unlock(lock: Any) -> None:
    Path(lock.name).unlink(missing_ok=True)
    lock.close()


def _alive(process: Any) -> bool:
    import psutil

    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    except OSError:
        return ""
