"""What a scene does to processes, tried on one of its own."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orchestrator.chaos.scenes import faked_clock, find_libfaketime

SLEEPER = """
import time
began_s, cpu_s = time.monotonic(), time.process_time()
said = time.sleep(0.5)
print(said, time.monotonic() - began_s, time.process_time() - cpu_s, time.time())
"""


def test_a_faked_clock_is_a_day_ahead_and_sleeps_last(tmp_path: Path) -> None:
    library = find_libfaketime()
    if library is None:
        pytest.skip("NOT TESTED: the clock is shifted by libfaketime (make faketime)")
    shift = tmp_path / "shift"
    env = {**os.environ, **faked_clock(library, shift, tmp_path / "tools")}
    shift.write_text("+1d\n")
    done = subprocess.run([sys.executable, "-c", SLEEPER], capture_output=True, text=True, check=True, env=env)
    said, slept_s, cpu_s, now_s = done.stdout.split()
    assert said == "None"
    assert float(slept_s) >= 0.5
    assert float(cpu_s) < 0.25  # it has waited, not turned in a loop
    assert float(now_s) - time.time() == pytest.approx(86_400, abs=60)
