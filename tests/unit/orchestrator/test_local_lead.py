"""The lead of the ranks on this machine."""

import signal
import subprocess
from pathlib import Path

import pytest

from orchestrator import spec as specs
from orchestrator.local_lead import _LocalLead
from orchestrator.record import read_events
from orchestrator.run_dir import RunDir


def test_a_time_limit_is_named_and_reaches_the_ranks_as_slurms_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUBMITIT_LOCAL_JOB_ID", "1")
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    directory = RunDir(tmp_path)
    directory.spec.write_text(specs.to_yaml(specs.compose(["cluster.time_limit_min=3"])))
    lead = _LocalLead(directory, "m:f")
    keeper = subprocess.Popen(["sleep", "60"])
    lead.keepers = [keeper]
    lead._time_is_over()
    assert keeper.wait(10) == -signal.SIGUSR2
    (event,) = read_events(directory.events)
    assert (event.kind, event.detail) == (
        "time_limit",
        "cluster.time_limit_min=3 is over",
    )
