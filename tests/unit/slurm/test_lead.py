"""Who is at fault, who is slow, and how the lead leads: real keepers on a small module, no torch."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from slurm.keeper import LEAD, TOKEN
from slurm.lead import Incident, Lead, Paces, Slow, blame, guilty

ROOT = Path(__file__).resolve().parents[3]
WAITING = """  File "/x/torch/distributed/distributed_c10d.py", line 1 in all_reduce
  File "/x/model/train.py", line 2 in forward_backward"""
WORKING = """  File "/x/model/train.py", line 3 in next_batch
  File "/x/torch/distributed/distributed_c10d.py", line 1 in wrapper"""


def seen(phase: str, step: int = 5, state: str = "S", stack: str = WAITING) -> dict[str, object]:
    dump = f"Thread 0x1 (most recent call first):\n{WORKING}\n\nCurrent thread 0x2 (most recent call first):\n{stack}"
    return {"phase": phase, "step": step, "state": state, "stack": dump}


@pytest.mark.parametrize(
    ("ranks", "expected", "why"),
    [
        ([seen("compute"), seen("data", state="T"), seen("compute")], [1], "stopped"),
        (
            [seen("compute"), seen("data", stack=WORKING), seen("compute")],
            [1],
            "not in a collective, in data of step 5",
        ),
        ([seen("compute"), seen("compute", stack=WORKING), seen("collective")], [1], "not in a collective"),
        ([seen("collective", stack=WORKING), seen("compute", stack=WORKING)], [1], "compute"),
        ([seen("collective"), seen("collective"), seen("compute")], [2], "furthest behind"),
        ([seen("collective"), seen("collective", step=4)], [1], "furthest behind, in collective of step 4"),
        ([seen("collective"), seen("collective")], [], "every rank waits"),
        ([seen("compute"), seen("compute", state="Z")], [1], "ended"),
    ],
)
def test_the_guilty_rank_is_told_from_those_that_wait(
    ranks: list[dict[str, object]], expected: list[int], why: str
) -> None:
    found, said = guilty(dict(enumerate(ranks)))
    assert found == expected
    assert why in said


def test_a_signal_is_blamed_before_an_exception_and_that_before_the_exception_of_a_peer() -> None:
    of_peer = (
        'Traceback (most recent call last):\n  File "/x/torch/distributed/distributed_c10d.py", line 1\nRuntimeError'
    )
    own = 'Traceback (most recent call last):\n  File "/x/model/train.py", line 1\nValueError: mine'
    ends = [(1, of_peer), (-6, ""), (1, own), (-9, "")]
    assert sorted(range(4), key=lambda n: blame(*ends[n]))[:2] == [3, 2]


def test_a_slow_rank_is_told_once_after_three_comparisons_and_again_after_it_recovered() -> None:
    paces = Paces(4, 1.5)
    told: list[Slow] = []
    for turn in range(1, 13):
        for rank in range(4):
            per_step = 0.3 if rank == 2 and turn not in (7, 8) else 0.1
            so_far = paces._last.get(rank, (0, 0.0))[1] + 20 * per_step
            said = {"pace": 20 * turn, "own_s": so_far, "step": 20 * turn}
            told += paces.heard(rank, f"node{rank}", said, 10.0 * turn)
    assert [(s.rank, s.node, round(s.ratio, 3)) for s in told] == [(2, "node2", 3.0)] * 2


class Run:
    """Restarts as often as it is told; keeps what it hears."""

    def __init__(self, restarts: int) -> None:
        self.left = restarts
        self.incidents: list[Incident] = []
        self.told: list[tuple[Incident, int, float]] = []

    def may_restart(self, incident: Incident) -> bool:
        self.incidents.append(incident)
        self.left -= 1
        return self.left >= 0

    def restarted(self, incident: Incident, generation: int, seconds: float) -> None:
        self.told.append((incident, generation, seconds))

    def straggles(self, slow: Slow) -> None: ...


SCRIPT = """
import ctypes, os, signal, sys, time
from pathlib import Path
from slurm.pulse import pulse
def main(folder):
    rank, generation = int(os.environ["SUBMITIT_LOCAL_GLOBALID"]), int(os.environ["ARRIERO_GENERATION"])
    folder = Path(folder)
    (folder / f"{generation}-{rank}").write_text(f"{os.getpid()} {os.environ['ARRIERO_MASTER_PORT']}")
    for step in range(1, 400):
        pulse("data", step)
        what = folder / f"do-{generation}-{rank}"
        if what.exists() and (step > 3 or what.read_text() == "raise"):
            what = what.read_text()
            if what == "kill": os.kill(os.getpid(), signal.SIGKILL)
            if what == "stop": os.kill(os.getpid(), signal.SIGSTOP)
            if what == "gil": ctypes.PyDLL(None).pause()
            if what == "end": return
            if what == "raise": raise ValueError("what a user reads")
        pulse("collective", step)
        time.sleep(0.02)
        pulse.stepped(0.02)
"""


class Keepers:
    def __init__(self, folder: Path, ranks: int, restarts: int = 3, hang_s: float = 1.0) -> None:
        (folder / "a_rank.py").write_text(SCRIPT)
        self.folder, self.ranks = folder, ranks
        self.run = Run(restarts)
        self.lead = Lead(ranks, "127.0.0.1", self.run, hang_s, 60.0, 1.5, "127.0.0.1")
        self.processes: list[subprocess.Popen[bytes]] = []
        self.thread = threading.Thread(target=self.lead.serve)

    def start(self) -> None:
        self.thread.start()
        for rank in range(self.ranks):
            env = {**os.environ, **self.lead.environment, "PYTHONPATH": f"{ROOT}:{self.folder}",
                   "SUBMITIT_LOCAL_GLOBALID": str(rank), "SUBMITIT_LOCAL_NTASKS": str(self.ranks),
                   "SUBMITIT_LOCAL_JOB_ID": str(os.getpid())}  # fmt: skip
            words = [sys.executable, "-m", "slurm.rank", "a_rank:main", str(self.folder)]
            self.processes.append(subprocess.Popen(words, env=env))

    def do(self, what: str, generation: int, *ranks: int) -> None:
        for rank in ranks:
            (self.folder / f"do-{generation}-{rank}").write_text(what)

    def end(self, generation: int) -> list[int]:
        """Lets this generation end; the keepers' exit codes."""
        self.do("end", generation, *range(self.ranks))
        return self.wait()

    def wait(self) -> list[int]:
        codes = [p.wait(60) for p in self.processes]
        self.thread.join(60)
        assert not self.thread.is_alive()
        return codes

    def ranks_of(self, generation: int) -> list[tuple[int, int]]:
        """Their process ids and ports, once all have started."""
        until = time.monotonic() + 60
        paths = [self.folder / f"{generation}-{r}" for r in range(self.ranks)]
        while not all(p.exists() and p.read_text() for p in paths):
            assert time.monotonic() < until
            time.sleep(0.02)
        return [(int(a), int(b)) for a, b in (p.read_text().split() for p in paths)]


def test_a_killed_rank_is_restarted_with_all_others_on_another_port(tmp_path: Path) -> None:
    keepers = Keepers(tmp_path, 3)
    keepers.do("kill", 1, 1)
    keepers.start()
    first, second = keepers.ranks_of(1), keepers.ranks_of(2)
    assert keepers.end(2) == [0, 0, 0]
    assert keepers.lead.incident is None
    ((incident, generation, _),) = keepers.run.told
    assert (incident.cause, incident.rank, incident.exit_code, generation) == ("crash", 1, 137, 2)
    assert len({port for _, port in first}) == len({port for _, port in second}) == 1
    assert first[0][1] != second[0][1]
    for pid, _ in first:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize(("what", "why"), [("stop", "stopped by a signal"), ("gil", "in main\n")])
def test_a_hang_names_the_rank_with_its_stacks_and_is_restarted(tmp_path: Path, what: str, why: str) -> None:
    keepers = Keepers(tmp_path, 2)
    keepers.do(what, 1, 1)
    keepers.start()
    keepers.ranks_of(2)
    assert keepers.end(2) == [0, 0]
    ((incident, _, _),) = keepers.run.told
    assert (incident.cause, incident.rank, incident.phase) == ("hung", 1, "data")
    assert why in incident.detail + incident.stacks
    assert "rank 1" in incident.stacks


def test_an_error_of_all_ranks_at_the_start_is_known_and_told_with_its_traceback(tmp_path: Path) -> None:
    keepers = Keepers(tmp_path, 2, restarts=0)
    keepers.do("raise", 1, 0, 1)
    keepers.start()
    assert keepers.wait() == [1, 1]
    (incident,) = keepers.run.incidents
    assert incident.at_start
    assert "ValueError: what a user reads" in incident.words
    assert keepers.lead.incident == incident


def test_a_stop_signal_reaches_the_rank_and_nothing_is_started_again(tmp_path: Path) -> None:
    keepers = Keepers(tmp_path, 2)
    keepers.start()
    keepers.ranks_of(1)
    keepers.processes[1].send_signal(signal.SIGTERM)  # this rank only takes note of it
    until = time.monotonic() + 20
    while not keepers.lead.stopping:
        assert time.monotonic() < until
        time.sleep(0.02)
    keepers.do("kill", 1, 0)
    assert keepers.wait() == [137, 137]
    assert not keepers.run.incidents


def test_ranks_end_with_their_keeper_and_keepers_with_their_lead(tmp_path: Path) -> None:
    keepers = Keepers(tmp_path, 2)
    keepers.start()
    pids = [pid for pid, _ in keepers.ranks_of(1)]
    keepers.processes[0].kill()
    assert keepers.wait() == [-signal.SIGKILL, 1]
    assert keepers.lead.incident is not None
    assert (keepers.lead.incident.cause, keepers.lead.incident.rank) == ("lost", 0)
    until = time.monotonic() + 20
    for pid in pids:
        while Path(f"/proc/{pid}").exists():
            assert time.monotonic() < until
            time.sleep(0.02)


def test_who_does_not_know_the_token_is_not_heard(tmp_path: Path) -> None:
    keepers = Keepers(tmp_path, 1)
    keepers.thread.start()
    host, port = keepers.lead.environment[LEAD].split(":")
    for said in (json.dumps({"token": "guessed", "rank": 0, "node": "n", "pid": 1}), "no JSON", "x" * 4500):
        with socket.create_connection((host, int(port))) as stranger:
            stranger.sendall(said.encode() + b"\n")
            assert stranger.recv(1) == b""
    keepers.lead.close()
    keepers.thread.join(20)
    assert keepers.lead.incident is not None


def test_a_keeper_that_goes_before_all_ranks_have_come_is_told_as_a_launch_that_may_have_failed(tmp_path: Path) -> None:
    keepers = Keepers(tmp_path, 2)
    keepers.thread.start()
    host, port = keepers.lead.environment[LEAD].split(":")
    with socket.create_connection((host, int(port))) as keeper:
        said = {"token": keepers.lead.environment[TOKEN], "rank": 1, "node": "node7", "pid": 1}
        keeper.sendall(json.dumps(said).encode() + b"\n")
    keepers.thread.join(20)
    incident = keepers.lead.incident
    assert incident is not None
    assert (incident.cause, incident.rank, incident.node) == ("lost", 1, "node7")
    assert "before all 2 ranks had come" in incident.detail
