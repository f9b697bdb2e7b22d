"""What Slurm says of jobs: one call of squeue, sacct or scontrol each, parsed. No answer is None, and never means "gone"."""

import contextlib
import re
import socket
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slurm.rendezvous import expand_hostlist

_TIMEOUT_S = 15.0
LIVE = frozenset(  # queued, running, or about to be either again
    {"PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED"}
    | {"RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "SPECIAL_EXIT"}
)
_SQUEUE = "%i|%T|%r|%M|%L|%D|%N|%k"


@dataclass(frozen=True, kw_only=True)
class JobState:
    job_id: str
    state: str  # Slurm's word, such as RUNNING
    reason: str = ""
    elapsed: str = ""
    left: str = ""
    nodes: int = 0
    node_list: str = ""
    comment: str = ""
    name: str = ""  # of those that the accounting tells

    @property
    def live(self) -> bool:
        return self.state in LIVE


def call(*words: str, timeout_s: float = _TIMEOUT_S) -> tuple[int, str, str]:
    """Exit code, output, error. 127 where the command is not there, 124 where it does not answer in time."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=timeout_s, check=False, errors="replace")
    except FileNotFoundError:
        return 127, "", f"{words[0]} is not on this machine"
    except subprocess.TimeoutExpired:
        return 124, "", f"{words[0]} did not answer in {timeout_s:g} s"
    return done.returncode, done.stdout, done.stderr.strip()


def queued() -> dict[str, JobState] | None:
    """This user's jobs that slurmctld still knows, the ended ones of the last minutes too; None where it does not answer."""
    code, out, _ = call("squeue", "--me", "--array", "--noheader", "--states=all", f"--format={_SQUEUE}")
    return None if code else parse_squeue(out)


def parse_squeue(text: str) -> dict[str, JobState]:
    jobs = {}
    for line in text.splitlines():
        fields = line.split("|", 7)
        if len(fields) == 8:
            job, state, reason, elapsed, left, nodes, node_list, comment = (f.strip() for f in fields)
            jobs[job] = JobState(
                job_id=job,
                state=state,
                reason="" if reason == "None" else reason,
                elapsed=elapsed,
                left=left,
                nodes=int(nodes) if nodes.isdigit() else 0,
                node_list=node_list,
                comment="" if comment == "(null)" else comment,
            )
    return jobs


def comment_of(token: str) -> str:
    return f"arriero:{token}"


def is_of(job: JobState, job_id: str | None, token: str) -> bool:
    """Whether a job is the one of a journal's entry. Numbers come again, on another cluster of one name; tokens do not."""
    if job.comment.startswith(comment_of("")):
        same_task = "." not in token or job.job_id == job_id  # the tasks of an array share its comment
        return same_task and job.comment == comment_of(token.partition(".")[0])
    return job.job_id == job_id  # the site has put its own words into the comment


def written_for(journal: Path, entry: Mapping[str, Any]) -> Path | None:
    """The run directory that a journal's entry is of, where it is not the one that the journal lies in: that is a copy, or was
    moved. None also where the entry does not say, as older ones."""
    other = Path(entry.get("run_dir") or journal.parent)
    with contextlib.suppress(OSError):
        if other.samefile(journal.parent):  # also by another mount
            return None
    return other


def max_array_size() -> int:
    """Tasks that one array may have; Slurm's default where it does not answer."""
    return int(_configured("MaxArraySize") or 1001)


def cluster_name() -> str | None:
    """Of the cluster that Slurm's commands speak to; None where it does not answer."""
    return _configured("ClusterName")


def kill_wait_s() -> int:
    """What lies between TERM and KILL when Slurm ends a job; Slurm's default where it does not answer."""
    return int(_configured("KillWait") or 30)


def slurmd_timeout_s() -> int:
    """How long a node may be silent until slurmctld holds it for down; Slurm's default where it does not answer."""
    return int(_configured("SlurmdTimeout") or 300)


def _configured(name: str) -> str | None:
    code, out, _ = call("scontrol", "show", "config")
    found = re.search(rf"^{name}\s*=\s*(\S+)", out, re.MULTILINE)
    return found[1] if found and not code else None


def accounted(job_ids: Sequence[str]) -> dict[str, JobState] | None:
    """The last state of each job in the accounting; None where there is none, or it does not answer."""
    if not job_ids:
        return {}
    words = ("--noheader", "--parsable2", "--format=JobID,State,Elapsed,NNodes,JobName,Comment")
    code, out, _ = call("sacct", "-X", f"--jobs={','.join(job_ids)}", *words)
    if code:
        return None
    jobs = {}
    for line in out.splitlines():
        fields = line.split("|", 5)
        if len(fields) == 6:
            jobs[fields[0]] = JobState(
                job_id=fields[0],
                state=fields[1].split()[0],  # "CANCELLED by 1000"
                elapsed=fields[2],
                nodes=int(fields[3]) if fields[3].isdigit() else 0,
                name=fields[4],
                comment=fields[5],  # empty where the site does not keep it (AccountingStoreFlags)
            )
    return jobs


def starts_of(job_id: str) -> list[str] | None:
    """How each start of a job ended, in order, as the accounting has it (REQUEUED, PREEMPTED, NODE_FAIL, TIMEOUT ...)."""
    code, out, _ = call("sacct", "-D", "-X", "--noheader", "--parsable2", f"--jobs={job_id}", "--format=State")
    return None if code else [line.split()[0] for line in out.splitlines() if line.strip()]


def is_known(job_id: str) -> bool | None:
    """Whether slurmctld holds the job as queued or running, whoever's it is; None where it does not answer. False is its word."""
    code, out, error = call("scontrol", "show", "job", job_id, "--oneliner")
    if code == 0:
        return parse_details(out).state in LIVE
    # Of an array it still holds, a task cancelled in the queue is "not found", told on the standard output.
    return False if "Invalid job id" in error or re.search(r"not found", out + error) else None


HELD_DOWN = "Slurm says"  # of a lost node: not only this process


def lost_among(nodes: Sequence[str]) -> dict[str, str]:
    """Of these nodes, those that are gone, and why: slurmctld holds them for down, or their slurmd takes no connection from
    here, which is known minutes earlier (SlurmdTimeout). Nobody is lost where slurmctld does not answer."""
    code, out, _ = call("scontrol", "show", "node", ",".join(nodes), "--oneliner")
    if code:
        return {}
    default_port = ""
    asked: dict[str, tuple[str, int]] = {}
    found: dict[str, str] = {}
    for line in out.splitlines():
        values = dict(re.findall(r"(\w+)=(\S*)", line))
        node, state = values.get("NodeName", ""), values.get("State", "")
        if re.match(r"DOWN|FAIL", state):
            found[node] = f"{HELD_DOWN} {state.lower()}"
        elif node:
            default_port = default_port or (values.get("Port") or _configured("SlurmdPort") or "6818")
            asked[node] = str(values.get("NodeAddr", node)), int(values.get("Port") or default_port.partition("-")[0])
    with ThreadPoolExecutor(max_workers=64) as threads:
        found |= {n: why for n, why in zip(asked, threads.map(_no_answer, asked.values()), strict=True) if why}
    return dict(sorted(found.items()))


def _no_answer(address: tuple[str, int]) -> str | None:
    """Why no slurmd answers there; None also where its name can't be looked up: that says nothing of the node."""
    why = None
    for _ in range(2):
        try:
            socket.create_connection(address, timeout=3.0).close()
            return None
        except socket.gaierror:
            return None
        except OSError as error:
            why = f"its slurmd does not answer: {error.strerror or error}"
    return why


@dataclass(frozen=True, kw_only=True)
class JobDetails:
    """What `scontrol show job` tells of one job."""

    state: str  # COMPLETING from the moment in which Slurm ends a start, whatever for
    time_left_s: float | None
    reason: str = ""
    restarts: int | None = None  # one more as soon as Slurm has decided on a requeue
    nodes: tuple[str, ...] = ()  # without those that a job with --no-kill has lost
    preempted: bool = False  # and now in its time of grace


def details(job_id: str) -> JobDetails | None:
    """None where slurmctld does not answer, or no longer knows the job."""
    code, out, _ = call("scontrol", "show", "job", job_id, "--oneliner")
    return None if code else parse_details(out)


def parse_details(text: str) -> JobDetails:
    values = dict(re.findall(r"(\w+)=(\S*)", text))
    limit, run = _seconds(values.get("TimeLimit", "")), _seconds(values.get("RunTime", ""))
    return JobDetails(
        state=values.get("JobState", "UNKNOWN"),
        time_left_s=None if limit is None or run is None else limit - run,
        reason="" if (reason := values.get("Reason", "")) == "None" else reason,
        restarts=int(restarts) if (restarts := values.get("Restarts", "")).isdigit() else None,
        nodes=tuple(expand_hostlist(listed)) if (listed := values.get("NodeList", "")) not in ("", "(null)") else (),
        preempted=values.get("PreemptTime", "None") != "None",
    )


def _seconds(text: str) -> float | None:
    """Slurm's [days-]hours:minutes:seconds; None for UNLIMITED and the like."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text)
    if not match:
        return None
    days, hours, minutes, seconds = (int(g or 0) for g in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60.0 + seconds
