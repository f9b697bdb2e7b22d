"""Every check says yes on a fit node and why on an unfit one."""

import os
import socket
import stat
from pathlib import Path
from typing import Any

import pytest

from slurm import preflight


@pytest.fixture
def asked(tmp_path: Path) -> Any:
    with socket.create_server(("127.0.0.1", 0)) as head:
        yield {
            "run_dir": str(tmp_path),
            "gpus_per_node": 4,
            "cuda": False,
            "head": ["127.0.0.1", head.getsockname()[1]],
            "command": "true",
        }


def test_a_fit_node(asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    assert preflight.unfit(asked) == []


def cards(*used_mib: int) -> str:
    return "".join(f"{n}, GPU-{n}, 81559, {used}\\n" for n, used in enumerate(used_mib))


def fake_nvidia_smi(folder: Path, output: str, code: int = 0) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '{output}'\nexit {code}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)


def test_gpus_that_are_missing_or_in_use(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "3")
    assert preflight.unfit(asked) == ["gpus: Slurm gives 3 GPUs, asked for were 4"]
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    cuda = {**asked, "cuda": True}
    fake_nvidia_smi(tmp_path, cards(5, 5, 5))
    assert preflight.gpus(cuda) == "3 GPUs answer, asked for were 4"
    fake_nvidia_smi(tmp_path, cards(5, 40000, 5, 5))
    assert preflight.gpus(cuda) == "the memory of GPU 1 is in use already"
    fake_nvidia_smi(tmp_path, "Unable to determine the device handle for GPU 0000:3B:00.0", 15)
    assert "Unable to determine" in str(preflight.gpus(cuda))
    fake_nvidia_smi(tmp_path, cards(5, 5, 5, 5))
    assert preflight.gpus(cuda) is None


def test_on_a_shared_node_only_the_jobs_own_gpus_are_asked(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_GPUS", "2,3")
    two = {**asked, "cuda": True, "gpus_per_node": 2}
    fake_nvidia_smi(tmp_path, cards(40000, 40000, 5, 5))
    assert preflight.gpus(two) is None
    fake_nvidia_smi(tmp_path, cards(5, 5, 5, 40000))
    assert preflight.gpus(two) == "the memory of GPU 3 is in use already"
    fake_nvidia_smi(tmp_path, cards(5, 5))  # cgroups show the job's own alone, numbered anew
    assert preflight.gpus(two) is None


def test_a_run_directory_that_is_not_there(asked: dict[str, Any]) -> None:
    found = preflight.unfit({**asked, "run_dir": "/nonexistent"})
    assert [f.split(":")[0] for f in found] == ["disk", "clock"]


def test_a_head_that_nobody_can_reach(asked: dict[str, Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    assert "can't be reached" in str(preflight.peers({**asked, "head": ["127.0.0.1", port]}))


def test_a_clock_that_is_off(asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    real = preflight.time.time
    monkeypatch.setattr(preflight.time, "time", lambda: real() + 86_400)
    assert "86400 s off" in str(preflight.clock(asked))


def test_the_sites_own_command(asked: dict[str, Any]) -> None:
    assert preflight.command({**asked, "command": "echo no fan >&2; exit 3"}) == (
        "cluster.preflight_command: exit code 3 no fan"
    )
    assert str(preflight.command({**asked, "command": "nvidia-smii"})).startswith(
        f"{preflight.CANNOT_RUN}: exit code 127 bash: "
    )
