"""NVML as two made-up GPUs for the sampler's tests: 300 W and 200 W, counters since a driver load before the test.

FAKE_NVML_LOG: a file that gets "time device millijoules" for every reading: the truth that the ledger is held against.
A file beside it with the suffix .reset holds the time at which the driver was loaded anew.
"""

import os
import time
from pathlib import Path
from types import SimpleNamespace

NVML_TEMPERATURE_GPU = 0
LOG = Path(os.environ["FAKE_NVML_LOG"])
WATTS = (300, 200)
LOADED_S = 1_790_000_000.0


class NVMLError(Exception):
    pass


class NVMLError_NotSupported(NVMLError):
    pass


def nvmlInit():
    pass


def nvmlDeviceGetCount():
    return len(WATTS)


def nvmlDeviceGetHandleByIndex(index):
    return index


def nvmlDeviceGetTotalEnergyConsumption(handle):
    now = time.time()
    reset = LOG.with_suffix(".reset")
    loaded_s = float(reset.read_text()) if reset.exists() else LOADED_S
    millijoules = int(1000 * WATTS[handle] * (now - loaded_s))
    with LOG.open("a") as log:
        log.write(f"{now} {nvmlDeviceGetUUID(handle)} {millijoules}\n")
    return millijoules


def nvmlDeviceGetName(handle):
    return "a GPU"


def nvmlDeviceGetUUID(handle):
    return f"GPU-{handle}"


def nvmlDeviceGetMemoryInfo(handle):
    return SimpleNamespace(total=80e9, free=40e9, used=40e9)


def nvmlDeviceGetTemperature(handle, sensor):
    return 50


def nvmlDeviceGetPowerUsage(handle):
    return 1000 * WATTS[handle]


def nvmlDeviceGetEnforcedPowerLimit(handle):
    return 400_000


def nvmlDeviceGetUtilizationRates(handle):
    return SimpleNamespace(gpu=90)


def nvmlDeviceGetComputeMode(handle):
    return 0


def nvmlDeviceGetComputeRunningProcesses(handle):
    return []


def nvmlDeviceGetGraphicsRunningProcesses(handle):
    return []
