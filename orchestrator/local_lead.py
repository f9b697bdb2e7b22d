"""A run's ranks on this machine: what submitit starts. It starts a keeper a rank and leads them, as supervise.py does under
Slurm, passes stop signals on and outlives the ranks. Torch-free.
"""

import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import FrameType

from submitit.core.utils import JobPaths

from orchestrator import spec as specs
from orchestrator.incidents import Incidents, step_on_disk
from orchestrator.record import Event, JsonlWriter, read_events, say, utc_now
from orchestrator.run_dir import RunDir
from orchestrator.webhook import post
from slurm.lead import Incident
from slurm.signals import STOP_SIGNALS
from slurm.submit import CUDA_DEVICES


class _LocalLead:
    def __init__(self, directory: RunDir, entry: str) -> None:
        self.directory, self.entry = directory, entry
        self.spec = specs.load(directory.spec)
        self.job_id = os.environ["SUBMITIT_LOCAL_JOB_ID"]
        self.keepers: list[subprocess.Popen[bytes]] = []
        self.posts: list[threading.Thread] = []
        self.stopping = False
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # Ctrl-C, which the command passes on itself
                signal.signal(number, self._pass_on)

    def run(self) -> str | None:
        """Until the ranks have ended: why, where they failed."""
        incidents = Incidents(self.directory, self.spec, self.tell, lambda node, why: None, self.job_id, restarts=0)
        ranks = self.spec.cluster.gpus_per_node
        limit_s = 60.0 * self.spec.cluster.time_limit_min
        limit = threading.Timer(limit_s, self._time_is_over)  # monotonic
        limit.daemon = True
        limit.start()
        while True:
            lead = incidents.lead(ranks, "127.0.0.1", bind="127.0.0.1")
            thread = threading.Thread(target=lead.serve, name="lead")
            self._start_keepers(ranks, lead.environment)
            thread.start()
            for keeper in self.keepers:
                keeper.wait()
            lead.close()
            thread.join()
            incident = lead.incident
            if incident is None:
                return None
            if incident.cause == "lost" and not self.stopping and not lead.stopping and incidents.may_restart(incident):
                incidents.restarted(
                    replace(incident, cause="crash"), 1, 0.0
                )  # a keeper itself has died: all start anew
                continue
            return _told(incident)

    def _start_keepers(self, ranks: int, lead: dict[str, str]) -> None:
        logs = [JobPaths(self.directory.logs, self.job_id, rank).stdout for rank in range(ranks)]
        env = {**os.environ, **lead, "SUBMITIT_LOCAL_NTASKS": str(ranks)}
        if (devices := env.pop(CUDA_DEVICES, None)) is None:
            env.pop("CUDA_VISIBLE_DEVICES", None)
        else:
            env["CUDA_VISIBLE_DEVICES"] = devices
        self.keepers = []
        # What comes before a keeper listens stays pending until it does.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        for rank, log in enumerate(logs):
            env |= {"SUBMITIT_LOCAL_GLOBALID": str(rank), "SUBMITIT_LOCAL_LOCALID": str(rank)}
            words = [sys.executable, "-u", "-m", "slurm.rank", self.entry, str(self.directory.root)]
            with log.open("ab") as output:
                self.keepers.append(
                    subprocess.Popen(words, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
                )
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def _time_is_over(self) -> None:
        """As Slurm's warning, and told: of the signal alone nobody would know whose it was."""
        detail = f"cluster.time_limit_min={self.spec.cluster.time_limit_min} is over"
        attempts = len([*self.directory.events.glob("attempt-*.jsonl")])
        self.tell("time_limit", step_on_disk(read_events(self.directory.events)), detail, attempts=attempts)
        self._pass_on(signal.SIGUSR2, None)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.stopping = True
        for keeper in self.keepers:
            if keeper.poll() is None:
                keeper.send_signal(number)

    def tell(self, kind: str, step: int, detail: str, **data: object) -> None:
        event = Event(time_utc=utc_now(), kind=kind, step=step, detail=detail, data=data)
        say(f"{kind}: {detail}")
        if thread := post(event, self.directory.root.name):
            self.posts.append(thread)
        try:
            with JsonlWriter(self.directory.events / "supervise.jsonl") as events:
                events.write(event, durable=True)
        except OSError as error:  # a full disk: the ranks are started again all the same
            say(f"the event {kind} could not be written: {error}")


def _told(incident: Incident) -> str:
    return f"{incident.detail}\n{incident.words}".rstrip() if incident.words else incident.detail


def main(run_dir: str, entry: str) -> str | None:
    """Runs `entry` on every rank until all have ended: why the run failed, where it did."""
    directory = RunDir(Path(run_dir))
    with directory.at_work():
        lead = _LocalLead(directory, entry)
        try:
            return lead.run()
        finally:
            for thread in lead.posts:
                thread.join(10)
