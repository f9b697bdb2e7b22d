"""The life of a Slurm job: checks its nodes, starts the ranks, tells causes apart, goes on by itself or stops for a person.

What the batch script comes to, on the job's first node: it runs srun and outlives it. Torch-free. A warned run has saved, and a
requeue goes on from the newest checkpoint; a crash goes on too, until `cluster.crash_budget` crashes came without a new
checkpoint in between. With spare nodes, or where fewer are allowed, a lost node costs no requeue: the ranks start again on what
is left of the allocation.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

from orchestrator import shrink
from orchestrator import spec as specs
from orchestrator.incidents import Incidents, crashes_so_far, step_on_disk
from orchestrator.record import Event, JsonlWriter, read_events, utc_now
from orchestrator.run_dir import RunDir
from orchestrator.webhook import post
from slurm import lemons, queue
from slurm.lead import Incident, Lead
from slurm.preflight import CANNOT_RUN
from slurm.rendezvous import expand_hostlist, job_id_of

Cause = Literal[
    "timeout",
    "preempted",
    "signalled",
    "requeued",
    "node_failure",
    "crash",
    "error",
    "user",
    "finished",
    "paused",
    "person",
    "unknown",
]
_PREFLIGHT_S = 180.0  # and a second more for every fourth node
_REJECTIONS = 3  # starts in a row that the preflight may refuse
_OWN_FAULTS = 3  # of the supervisor itself, without a new checkpoint in between
_UNTOLD_RESTARTS = 16  # of the job, where not even the events can be read or written
_BREATH_S = 8  # between the end of one start and the next
_LOST_NODE_S = 75  # the same after a lost node: slurmstepd waits for its report, 60 s and 3 more a tree level
_DOWN_LATE_S = 30  # after SlurmdTimeout, within which slurmctld holds a silent node for down
_LATER_S = 60  # the same, after a fault that may pass: a file system that does not answer
_REFUSALS = 60  # of a requeue, one a second, by a slurmctld that answers
_MUTE_S = 3600  # for which slurmctld is asked again while it does not answer: nothing could be requeued without it
_ENDS = ("finished", "stopped", "failed")
_SRUN_ENDS_S = 60.0  # after its ranks, a tenth where a node may be gone; then it is ended, and this long later killed
_WARNED = (128 + signal.SIGUSR2, 128 + signal.SIGUSR1)  # exit codes of what had no handler yet for Slurm's warning
_SLURMS_WORDS: dict[str, Cause] = {
    "PREEMPTED": "preempted",
    "NODE_FAIL": "node_failure",
    "BOOT_FAIL": "node_failure",
    "TIMEOUT": "timeout",
    "REQUEUED": "requeued",
    "CANCELLED": "user",
    "FAILED": "crash",
    "OUT_OF_MEMORY": "crash",
}


@dataclass(frozen=True)
class Decision:
    """`requeue`: back into the queue. `release`: Slurm has requeued it already, only its two minutes' hold is to go.
    `again`: the ranks start once more inside the allocation. `end`: nothing more is to be done."""

    act: Literal["requeue", "release", "again", "end"]
    cause: Cause
    reason: str


def decide(
    last: Event | None,
    exit_code: int,
    job: queue.JobDetails | None,
    cancelled: bool,
    crashes: int,
    crash_budget: int,
    warn_s: float,
    *,
    restarts: int = 0,
    lost: Sequence[str] = (),
    elastic: bool = False,
    incident: Incident | None = None,
) -> Decision:
    """What becomes of a job whose ranks have ended. Pure.

    last: the start's own last word (finished, stopped, failed), if it had one. job: what slurmctld says; None where it does
    not answer. crashes: so far, without a new checkpoint since the first of them. restarts: which start of the job this is,
    from 0. lost: its nodes that are gone. elastic: whether it can go on inside its allocation without them.
    incident: what the lead knows of the ranks' end.
    """
    if last is not None and last.kind == "finished":
        return Decision("end", "finished", "the run is finished")
    if cancelled or (job is not None and job.state == "CANCELLED"):
        return Decision("end", "user", "cancelled")
    if last is not None and last.kind == "failed":
        return Decision("end", "person", last.detail)
    if ended := ended_by_slurm(job, restarts):
        return ended
    if last is not None and last.data.get("paused"):  # by a sweep's halving, which submits it again or drops it
        return Decision("end", "paused", last.detail)
    # Slurm warns up to a minute early.
    near_end = job is not None and job.time_left_s is not None and job.time_left_s <= warn_s + 90
    if last is not None and last.kind == "stopped":
        if job is None:
            return Decision("requeue", "unknown", f"{last.detail}; slurmctld does not answer, so nobody knows why")
        # Slurm says so during a time of grace; a preemption without one is a requeue, whose next start asks the accounting.
        return Decision(
            "requeue", "timeout" if near_end else "preempted" if job.preempted else "signalled", last.detail
        )
    if exit_code in _WARNED and near_end:
        return Decision("requeue", "timeout", "warned before the ranks were ready to save")
    if lost:  # srun is told before slurmctld has ended the job, and with --no-kill it does not end it
        return Decision("again" if elastic else "requeue", "node_failure", f"lost {', '.join(lost)}")
    if incident is not None and incident.at_start and not restarts:
        return Decision("end", "error", f"every rank failed before its first step: {incident.detail}")
    what = incident.detail if incident else f"exit code {exit_code}"
    if crashes >= crash_budget:
        return Decision(
            "end",
            "crash",
            f"{what}; {crashes + 1} crashes without a new checkpoint in between, and cluster.crash_budget "
            f"forgives {crash_budget}: a person must look",
        )
    return Decision(
        "requeue",
        "crash",
        f"{what}, crash {crashes + 1} of {crash_budget} that are forgiven without a new checkpoint",
    )


def ended_by_slurm(job: queue.JobDetails | None, restarts: int) -> Decision | None:
    """Why Slurm itself ends this start; None where it does not, or does not answer.

    While a start comes to its end slurmctld says COMPLETING, whatever the cause: a requeue has counted one restart more by
    then, a time limit stands in the reason, and what is left is scancel.
    """
    if job is not None and (job.restarts or 0) > restarts:  # also where it runs already: this start is a lost node's
        return Decision("release", "requeued", "Slurm has put it back into the queue")
    if job is None or job.state in (
        "RUNNING",
        "UNKNOWN",
        "CONFIGURING",
        "SUSPENDED",
        "STOPPED",
        "RESIZING",
        "SIGNALING",
    ):
        return None
    if job.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT"):
        return Decision("release", "requeued", "Slurm has put it back into the queue")
    left_s = job.time_left_s
    if job.state == "TIMEOUT" or job.reason == "TimeLimit" or (left_s is not None and left_s <= 0):
        return Decision("requeue", "timeout", "the time limit came before the ranks had saved")
    if job.state == "COMPLETING" and not job.reason:
        return Decision("end", "user", "cancelled with scancel")
    why = job.reason if job.state == "COMPLETING" else job.state
    return Decision("requeue", "node_failure" if "node" in why.lower() else "crash", f"Slurm says {why}")


def rejections_so_far(events: Sequence[Event]) -> int:
    """Starts in a row that the preflight has refused."""
    refused = 0
    for event in events:
        if event.kind == "requeued" and event.data.get("cause") == "unfit_node":
            refused += 1
        elif event.kind in ("started", "resumed_by_hand"):
            refused = 0
    return refused


class _NoCheck(Exception):
    """The site's own check of the nodes cannot be run on any of them; the text says why."""


class _Terminated(Exception):
    """Slurm has sent TERM: KillWait seconds are left."""


class _Supervisor:
    def __init__(self, directory: RunDir, srun: Sequence[str]) -> None:
        self.directory, self.srun = directory, list(srun)
        self.job_id, self.restarts = job_id_of(os.environ), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        self._terminated = self._interruptible = False
        self._cancel_told = self._requeue_told = self._requeued = False
        self._posts: list[threading.Thread] = []
        signal.signal(signal.SIGTERM, self._note_term)

    def run(self) -> int:
        """Until the job ends or goes back into the queue: its exit code."""
        try:
            return self._lead()
        except Exception:
            traceback.print_exc()
            return self._after_own_fault()
        finally:
            for thread in self._posts:
                thread.join(10)

    def _lead(self) -> int:
        self._say_why_again()
        why = ""
        while True:
            try:
                step = self._prepare(why)
            except _Terminated:
                return self._settle(128 + signal.SIGTERM, frozenset()) or 0
            except _NoCheck as error:
                at = step_on_disk(read_events(self.directory.events))
                self._tell("failed", at, f"preflight: {error}", cause="preflight", job_id=self.job_id)
                return 1
            if isinstance(step, int):
                return step
            before = frozenset(e.attempt for e in read_events(self.directory.events) if e.kind == "started")
            ranks = int(next(o for o in step if o.startswith("--ntasks=")).partition("=")[2])
            exit_code, incident = self._run_ranks([self.srun[0], *step, *self.srun[1:]], ranks)
            ended = self._settle(exit_code, before, incident)
            if ended is not None:
                return ended
            why = "node_failure"

    # ------------------------------------------------------------------------------------------------ before the ranks

    def _say_why_again(self) -> None:
        """Why the job is here again, where its last start could not say so itself."""
        events = read_events(self.directory.events)
        told = [
            e
            for e in events
            if e.kind == "requeued" and e.data.get("restart") == self.restarts and e.data.get("job_id") == self.job_id
        ]
        if self.restarts and not told and any(e.kind == "started" for e in events):
            ends = queue.starts_of(self.job_id) or []
            before = ends[self.restarts - 1] if len(ends) >= self.restarts else ""
            cause = _SLURMS_WORDS.get(before, "requeued")
            said = f"Slurm says {before}" if before else "there is no accounting that would say why"
            self._tell_requeue(events, cause, said, self.restarts)

    def _prepare(self, why: str) -> list[str] | int:
        """srun's options for the ranks; or the job's exit code, where none are to be started. `why` the ranks before have
        ended, inside this allocation."""
        if self._is_cancelled():
            return 0
        spec = specs.load(self.directory.spec)
        job = queue.details(self.job_id)
        nodes = list(job.nodes if job and job.nodes else expand_hostlist(os.environ["SLURM_JOB_NODELIST"]))
        out: dict[str, list[str]] = {}
        if spec.cluster.preflight or spec.cluster.is_elastic:
            out = {node: [said] for node, said in queue.lost_among(nodes).items()}
        if spec.cluster.preflight and (there := [n for n in nodes if n not in out]):
            out |= self._preflight(spec, there)
        if self._is_cancelled():  # its signal has ended the check on some nodes
            return 0
        fit = [n for n in nodes if n not in out]
        for node, said in out.items():
            self._lemon(node, "; ".join(said))
            self._tell("unfit", 0, f"{node} is unfit: {'; '.join(said)}", node=node, job_id=self.job_id)
        wanted = shrink.nodes_to_use(spec.cluster, spec.layout, spec.optim.batch_sequences, len(fit))
        if wanted is None:
            return self._refuse(spec, sorted(out), why)
        gpus = wanted * spec.cluster.gpus_per_node
        if spec.cluster.is_elastic and (why or out or len(nodes) < spec.cluster.nodes):
            gone = sorted({*expand_hostlist(os.environ["SLURM_JOB_NODELIST"])} - {*fit})
            how = (
                f"{wanted} of {spec.cluster.nodes} nodes"
                if wanted < spec.cluster.nodes
                else f"{wanted} nodes, spares among them"
            )
            self._tell(
                "restarted",
                step_on_disk(read_events(self.directory.events)),
                f"inside the allocation, {why or 'unfit_node'}: without {', '.join(gone) or 'any loss'}, on {how}",
                cause=why or "unfit_node", job_id=self.job_id, restart=self.restarts, without=gone, nodes=wanted, gpus=gpus,
            )  # fmt: skip
        options = [f"--nodes={wanted}", f"--ntasks={gpus}", f"--ntasks-per-node={spec.cluster.gpus_per_node}"]
        if why:  # the step that lost a node holds its share of the other nodes until slurmctld hears of that node again
            options.append("--overlap")
        return [*options, f"--nodelist={','.join(fit[:wanted])}"] if wanted < len(nodes) else options

    def _preflight(self, spec: specs.RunSpec, nodes: Sequence[str]) -> dict[str, list[str]]:
        """Checks these nodes, all at once: the unfit ones, and why. A node that says nothing is unfit only where others do,
        and where Slurm's warning has not ended its check. Raises _NoCheck."""
        results = self.directory.root / "preflight" / f"{self.job_id}-{self.restarts}"
        results.mkdir(parents=True, exist_ok=True)
        wait_s = _PREFLIGHT_S + len(nodes) / 4
        with socket.create_server(("", 0), backlog=len(nodes) + 8) as head:
            asked = {
                "run_dir": str(self.directory.root),
                "results": str(results),
                "gpus_per_node": spec.cluster.gpus_per_node,
                "cuda": spec.gpu.device == "cuda",
                # this process listens
                "head": [_here(), head.getsockname()[1]],
                "command": spec.cluster.preflight_command,
            }  # fmt: skip
            words = ["srun", f"--nodes={len(nodes)}", f"--ntasks={len(nodes)}", "--ntasks-per-node=1", "--overlap"]
            words += [f"--nodelist={','.join(nodes)}", sys.executable, "-m", "slurm.preflight", json.dumps(asked)]
            with self._interrupted_by_term():
                code, _, error = queue.call(*words, timeout_s=wait_s)
        said = {n: json.loads(p.read_text()) for n in nodes if (p := results / f"{n}.json").exists()}
        shutil.rmtree(results, ignore_errors=True)
        unfit: dict[str, list[str]] = {n: why for n, why in said.items() if why}
        unrun = [w for why in unfit.values() for w in why if CANNOT_RUN in w]
        begun = any(e.kind == "started" for e in read_events(self.directory.events))
        if unrun and len(unrun) == len(nodes) and (len(nodes) > 1 or not begun):  # of one alone a mount may be gone
            raise _NoCheck(unrun[0].partition(": ")[2])  # a slip of the pen, and no node's fault
        waited = f" in {wait_s:g} s" if code == 124 else f" (srun: exit code {code})"
        silent = [f"no answer{waited} {error[-200:]}".rstrip()]
        missing = {n: silent for n in nodes if n not in said}
        # Slurm's warning ends the check where Python has not yet begun to ignore it; where not one node has answered, srun or
        # the check is at fault.
        if missing and (code in _WARNED or (not said and (len(nodes) > 1 or code != 124))):
            which = f"on {len(missing)} of {len(nodes)} nodes"
            if not self.directory.cancelled.exists():  # that has ended the check, and is told as what it is
                self._tell(
                    "preflight", 0, f"the preflight could not be made {which}, so none of them is left out: {silent[0]}"
                )
            missing = {}
        if len(unfit) == len(nodes) > 1:
            # Not one node is fit: the fault is the check's or the whole cluster's, and leaving all out would help nobody.
            self._tell("preflight", 0, f"no node passed the preflight, so none is left out: {unfit[nodes[0]][0]}")
            return {}
        return unfit | missing

    def _refuse(self, spec: specs.RunSpec, out: Sequence[str], why: str) -> int:
        """Too few nodes are fit: back into the queue without the others, a few times."""
        events = read_events(self.directory.events)
        refused = rejections_so_far(events)
        if not why and refused + 1 >= _REJECTIONS:
            detail = f"{refused + 1} starts in a row had unfit nodes (last: {', '.join(out)}): a person must look"
            self._tell("failed", step_on_disk(events), f"unfit_node: {detail}", cause="unfit_node", job_id=self.job_id)
            return 1
        reason, lost = f"without {', '.join(out)}", [*queue.lost_among(out)]
        if (ended := self._requeue(events, why or "unfit_node", reason, lost)) is not None:
            return ended
        self._leave_out(spec, out)
        self._start_again(_BREATH_S)
        return 0

    # ------------------------------------------------------------------------------------------------ ranks, and after

    def _run_ranks(self, words: Sequence[str], ranks: int) -> tuple[int, Incident | None]:
        """srun's exit code as a shell has it, and why the ranks ended, where it was not well. While it waits, the lead restarts
        them inside the allocation. TERM settles at once what does not wait for the ranks: they may never end."""
        spec = specs.load(self.directory.spec)
        lead = Incidents(self.directory, spec, self._tell, self._lemon, self.job_id, self.restarts).lead(ranks, _here())
        process = subprocess.Popen(words, env={**os.environ, **lead.environment})
        thread = threading.Thread(target=self._serve, args=(lead, process), name="lead", daemon=True)
        thread.start()
        try:
            with self._interrupted_by_term():
                code = process.wait()
        except _Terminated:
            lead.stopping = True
            try:
                self._settle_early(process)
            except Exception:
                traceback.print_exc()  # what is left happens when the ranks have ended
            code = process.wait()
        lead.close()
        thread.join()
        return code if code >= 0 else 128 - code, lead.incident

    def _serve(self, lead: Lead, process: subprocess.Popen[bytes]) -> None:
        """Leads the ranks; once they have ended srun does, in a moment. Where a node is gone with its ranks it may not."""
        lead.serve()
        ends_s = _SRUN_ENDS_S if lead.incident is None or lead.incident.cause != "lost" else _SRUN_ENDS_S / 10
        for end in (process.terminate, process.kill):
            try:
                process.wait(ends_s)
                return
            except subprocess.TimeoutExpired:
                print(f"{utc_now()} supervise: the ranks have ended, and srun has not: it is ended", flush=True)
                end()

    def _settle_early(self, process: subprocess.Popen[bytes]) -> None:
        """What is certain when TERM comes: a time limit is a requeue, and a requeue is not to be held two minutes. Ranks that
        ignore TERM are killed after KillWait seconds, this process with them."""
        events = read_events(self.directory.events)
        if any(e.kind == "finished" for e in events):
            return
        decision = ended_by_slurm(self._details(lambda: process.poll() is None), self.restarts)
        if decision is None:
            return
        print(f"{utc_now()} supervise: TERM: {decision.cause}: {decision.reason}", flush=True)
        if decision.cause == "user" or self.directory.cancelled.exists():
            self._tell_cancelled(decision.reason)
        else:
            if decision.act == "requeue":
                self._tell_requeue(events, decision.cause, decision.reason, self.restarts + 1)
                until = time.monotonic() + 10
                self._put_back(lambda: time.monotonic() < until)
            # after the last of the ranks; `_settle` makes it sooner
            self._start_in(queue.kill_wait_s() + _BREATH_S, 10)
            if queue.lost_among(expand_hostlist(os.environ.get("SLURM_JOB_NODELIST", ""))):
                self._start_in(queue.kill_wait_s() + _LOST_NODE_S, 10)

    def _settle(self, exit_code: int, before: frozenset[int | None], incident: Incident | None = None) -> int | None:
        """After the ranks: requeues or ends the job. Its exit code; None where the ranks start again in this allocation."""
        spec = specs.load(self.directory.spec)
        config = spec.cluster
        events = read_events(self.directory.events)
        mine = _of_this_start(events, self.job_id, self.restarts, before)
        last = next((e for e in reversed(mine) if e.kind in _ENDS), None)
        for event in mine:  # arithmetic that went wrong on a node, as the spike gate has found
            named = event.data.get("nodes", [])
            if event.data.get("cause") == "hardware" and len(named) == 1:  # of several, nobody knows which it is
                self._lemon(str(named[0]), event.detail)
        decided = last is not None and (last.kind in ("finished", "failed") or bool(last.data.get("paused")))
        job = self._details(lambda: not decided and not self.directory.cancelled.exists())
        nodes = (job.nodes if job else ()) or expand_hostlist(os.environ.get("SLURM_JOB_NODELIST", ""))
        asked = sorted({*nodes, *expand_hostlist(os.environ.get("SLURM_JOB_NODELIST", ""))})
        lost = list(queue.lost_among(asked)) if exit_code else []
        decision = decide(
            last,
            exit_code,
            job,
            self.directory.cancelled.exists(),
            crashes_so_far(events),
            config.crash_budget,
            config.warn_s,
            restarts=self.restarts,
            lost=lost,
            elastic=config.is_elastic,
            incident=incident,
        )
        print(f"{utc_now()} supervise: {decision.cause}: {decision.reason}: {decision.act}", flush=True)
        if decision.act == "again":
            return None
        if decision.act == "end":
            if decision.cause == "user":
                self._tell_cancelled(decision.reason)
            if decision.cause in ("finished", "user", "paused"):
                return 0
            if decision.cause != "person":
                detail = f"{decision.cause}: {decision.reason}"
                self._tell("failed", step_on_disk(events), detail, cause=decision.cause, job_id=self.job_id)
            return 1
        # else the next start tells: the accounting knows who did it
        again = decision.act == "requeue" and not self._requeued
        if again and (ended := self._requeue(events, decision.cause, decision.reason, lost)) is not None:
            return ended
        self._start_again(_LOST_NODE_S if lost else _BREATH_S)
        return 0

    def _requeue(self, events: Sequence[Event], cause: str, reason: str, lost: Sequence[str] = ()) -> int | None:
        """Back into the queue, and tells it. The job's exit code where it ends instead: cancelled before that, or refused."""
        ended = self._await_down(lost) if lost else None
        if self.directory.cancelled.exists() or (ended and ended.act == "end"):
            self._tell_cancelled("cancelled after its ranks had ended")
            return 0
        if not self._requeue_told:
            self._tell_requeue(events, cause, reason, self.restarts + 1)
        if (ended and ended.act == "release") or self._put_back(lambda: not self.directory.cancelled.exists()):
            return None
        if self.directory.cancelled.exists():
            self._tell_cancelled("cancelled before Slurm had put it back into the queue")
            return 0
        detail = f"{cause}: Slurm has not put the job back into the queue: see its log, then `arriero resume`"
        self._tell("failed", step_on_disk(events), detail, cause=cause, job_id=self.job_id)
        return 1

    def _put_back(self, matters: Callable[[], bool]) -> bool:
        """Whether Slurm has put the job back into its queue. While that `matters` a slurmctld that does not answer is waited for
        as in `_details`, and one that refuses gets a minute: the job may not yet be where it takes the command."""
        refusals = 0
        while not self._requeued:
            code, _, error = queue.call("scontrol", "requeue", self.job_id)
            job = self._details(matters) if code else None
            self._requeued = not code or (job is not None and (job.restarts or 0) > self.restarts)
            if not self._requeued:
                refusals += 1
                if job is None or refusals > _REFUSALS or not matters():  # None: mute to the end, or the job is unknown
                    print(f"{utc_now()} supervise: scontrol requeue {self.job_id}: {error}", flush=True)
                    break
                time.sleep(1.0)
        return self._requeued

    def _await_down(self, lost: Sequence[str]) -> Decision | None:
        """Waits until slurmctld, too, holds these nodes for down, and what it has done to the job for it, if anything.

        Nothing could start sooner: a job is requeued when its last node has ended, or is down. And where a requeue's last node
        to end is one that goes down, Slurm 22.05 takes what the job held of it along into the next start, whose every srun then
        fails ("Invalid generic resource (gres) specification"; in slurmctld's log "_step_get_gres_cnt ... node offset invalid").
        """
        # slurmctld looks three times in SlurmdTimeout, and finds a node late that has been silent since the look before
        until = time.monotonic() + 2 * queue.slurmd_timeout_s() + _DOWN_LATE_S
        self._tell("node_lost", 0, f"lost {', '.join(lost)}: waits until Slurm holds it for down", nodes=list(lost))
        answers = 0  # in a row, of nodes that are there again: a slurmctld that does not answer looks the same
        while time.monotonic() < until and answers < 3 and not self.directory.cancelled.exists():
            if ended := ended_by_slurm(queue.details(self.job_id), self.restarts):
                return ended
            why = queue.lost_among(lost)
            if why and all(w.startswith(queue.HELD_DOWN) for w in why.values()):
                break
            answers = 0 if why else answers + 1
            time.sleep(0.5)
        return ended_by_slurm(queue.details(self.job_id), self.restarts)

    def _start_again(self, slowest_s: int) -> None:
        """When the last of this start is gone on every node, slurmctld holds the job for two minutes more, but only where its
        begin time has passed by then: so it gets one that has not. While other nodes have not come to their end it is put off
        again and again (Slurm kills this process after KillWait: `slowest_s` is what they may take from then on); this node,
        the last, will take as long as they did (their epilogs, for one)."""
        begun, kill_wait_s = time.monotonic(), queue.kill_wait_s()
        here = os.environ.get("SLURMD_NODENAME")
        while (job := queue.details(self.job_id)) and {*job.nodes} - {here}:
            if time.monotonic() > begun + kill_wait_s:
                return
            self._start_in(slowest_s + round(time.monotonic() - begun))
            time.sleep(0.5)
        self._start_in(_BREATH_S + round(time.monotonic() - begun))

    def _after_own_fault(self) -> int:
        """A fault of this process, or of the file system under it, is no end of the run: a while later, a few times."""
        with contextlib.suppress(OSError):
            if self.directory.cancelled.exists():
                return 0
        if not ended_by_slurm(queue.details(self.job_id), self.restarts):
            try:
                events = read_events(self.directory.events)
                faults, most = crashes_so_far(events, "supervisor"), _OWN_FAULTS
                told = self._tell_requeue(
                    events, "supervisor", "the supervisor failed: see the job's log", self.restarts + 1
                )
            except Exception:
                traceback.print_exc()
                told = False
            if not told:
                faults, most = self.restarts, _UNTOLD_RESTARTS
            if faults >= most:
                print(f"supervise: it has failed {faults} times: the job ends here", flush=True)
                self._tell(
                    "failed", 0, f"supervisor: it has failed {faults + 1} times: see the job's log", cause="supervisor"
                )
                return 1
            if not self._put_back(lambda: True):  # the file system that could tell of a cancel may be what is at fault
                self._tell(
                    "failed", 0, "supervisor: it has failed, and Slurm has not put the job back", cause="supervisor"
                )
                return 1
        self._start_in(_LATER_S)
        return 0

    # ------------------------------------------------------------------------------------------------------ the means

    def _details(self, matters: Callable[[], bool]) -> queue.JobDetails | None:
        """What slurmctld says of this job. While it does not answer and that `matters` it is asked again: what it says decides
        between causes, and a requeue would need it too."""
        until, told = time.monotonic() + _MUTE_S, False
        while (job := queue.details(self.job_id)) is None and queue.is_known(self.job_id) is not False:
            if not matters() or time.monotonic() > until:
                break
            if not told:
                print(f"{utc_now()} supervise: slurmctld does not answer: it is asked again", flush=True)
            told = True
            time.sleep(0.5)
        return job

    def _note_term(self, number: int, frame: FrameType | None) -> None:
        """Ends what waits; never interrupts anything else, such as a line being written."""
        self._terminated = True
        if self._interruptible:
            self._interruptible = False
            raise _Terminated

    @contextlib.contextmanager
    def _interrupted_by_term(self) -> Iterator[None]:
        self._interruptible = True
        try:
            if self._terminated:  # it came before
                raise _Terminated
            yield
        finally:
            self._interruptible = False

    def _is_cancelled(self) -> bool:
        """Whether `arriero cancel` came while no rank was there to hear its signal."""
        if self.directory.cancelled.exists():
            self._tell_cancelled("cancelled before the ranks started")
            return True
        return False

    def _leave_out(self, spec: specs.RunSpec, nodes: Sequence[str]) -> None:
        left_out = {*nodes, *expand_hostlist(spec.cluster.exclude or "")}
        with contextlib.suppress(OSError):
            left_out |= {*lemons.excluded(self.directory.lemons)}
        _until_it_works(["scontrol", "update", f"jobid={self.job_id}", f"ExcNodeList={','.join(sorted(left_out))}"])

    def _start_in(self, seconds: int, patience_s: float = 60.0) -> None:
        _until_it_works(["scontrol", "update", f"jobid={self.job_id}", f"StartTime=now+{seconds}seconds"], patience_s)

    def _lemon(self, node: str, why: str) -> None:
        try:
            lemons.add(self.directory.lemons, node, why, self.job_id)
        except OSError as error:
            print(f"supervise: {node} could not be written to {self.directory.lemons}: {error}", flush=True)

    def _tell_cancelled(self, reason: str) -> None:
        if not self._cancel_told:
            self._cancel_told = True
            events = read_events(self.directory.events)
            self._tell("cancelled", step_on_disk(events), f"user: {reason}", cause="user", job_id=self.job_id)

    def _tell_requeue(self, events: Sequence[Event], cause: str, reason: str, restart: int) -> bool:
        self._requeue_told = restart > self.restarts
        detail = f"requeued: {cause}: {reason}"
        return self._tell("requeued", step_on_disk(events), detail, cause=cause, job_id=self.job_id, restart=restart)

    def _tell(self, kind: str, step: int, detail: str, **data: object) -> bool:
        """Whether it is on disk. A full disk or a stale mount is printed: the run must go on all the same."""
        event = Event(time_utc=utc_now(), kind=kind, step=step, detail=detail, data=data)
        print(f"{event.time_utc} {kind}: {detail}", flush=True)
        if thread := post(event, self.directory.root.name):
            self._posts.append(thread)
        try:
            with JsonlWriter(self.directory.events / "supervise.jsonl") as events:
                events.write(event, durable=True)
        except OSError as error:
            print(f"supervise: the event {kind} could not be written: {error}", flush=True)
            return False
        return True


def _here() -> str:
    """The name under which the ranks reach this process: it is on the job's first node, whichever nodes the ranks get."""
    return os.environ.get("ARRIERO_MASTER_ADDR") or os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _of_this_start(
    events: Sequence[Event], job_id: str, restarts: int, before: frozenset[int | None] = frozenset()
) -> list[Event]:
    """The events of the attempts that this start's ranks have made, and of no earlier one: ranks that die early make none."""
    mine = {
        e.attempt
        for e in events
        if e.kind == "started" and e.data.get("job_id") == job_id and e.data.get("restart") == restarts
    } - before
    return [e for e in events if e.attempt is not None and e.attempt in mine]


def _until_it_works(words: list[str], seconds: float = 60.0) -> None:
    """slurmctld may be restarting, or the job not yet be where it takes the command."""
    until = time.monotonic() + seconds
    while True:
        code, _, error = queue.call(*words)
        if code == 0:
            return
        if time.monotonic() > until:
            print(f"supervise: {' '.join(words)}: {error}", file=sys.stderr, flush=True)
            return
        time.sleep(0.3)


def main() -> int:
    """`python -m orchestrator.supervise RUN_DIR srun ...`: what follows RUN_DIR starts the ranks."""
    run_dir, *srun = sys.argv[1:]
    return _Supervisor(RunDir(Path(run_dir)), srun).run()


if __name__ == "__main__":
    sys.exit(main())
