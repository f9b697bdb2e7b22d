"""Submission through submitit: on this machine, or to Slurm. All state is on disk; a Slurm job is a name and a folder."""

import contextlib
import errno
import fcntl
import importlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import submitit
from submitit.slurm.slurm import _make_sbatch_string

from slurm import queue
from slurm.request import CannotSubmit, JobRequest, Refused

# What sbatch says where slurmctld has not answered, and may have taken the job all the same.
_UNHEARD = ("timed out", "Unable to contact", "Zero Bytes", "Connection", "Transport endpoint")
SUPERVISE = "orchestrator.supervise"  # leads the ranks of a Slurm job
_NO_LIMIT_MIN = 60 * 24 * 365  # submitit's goes by the wall clock and kills: the lead keeps the time itself
LOCAL_LEAD = "orchestrator.local_lead:main"  # the same on this machine
CUDA_DEVICES = "ARRIERO_CUDA_VISIBLE_DEVICES"  # of the launch; submitit hides all devices from what it starts


@dataclass(frozen=True)
class Entry:
    """What submitit is told to run: "module:function", and its arguments."""

    entry: str
    arguments: tuple[str, ...]

    def __call__(self) -> Any:
        module, _, function = self.entry.partition(":")
        return getattr(importlib.import_module(module), function)(*self.arguments)


class Job:
    """A submitted job."""

    def __init__(self, job: Any) -> None:
        self._job = job
        self.id = str(job.job_id)

    def running(self) -> bool:
        return not self._job.done()

    def stop(self) -> None:
        """Asks all ranks to save and end."""
        process = self._job._process
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGTERM)  # submitit's controller passes it on to every rank

    def failure(self) -> str | None:
        """The cause in one line and what there is to it, once the job has ended; None when all went well."""
        try:
            error = self._job.exception()
        except submitit.core.utils.UncompletedJobError as uncompleted:  # ended without a result
            return f"the process that leads the ranks was killed\n{uncompleted}"
        if error is not None:
            return f"{str(error).strip().splitlines()[-1]}\n{error}"  # the last line of a traceback
        said: str | None = self._job.result()
        return said


def submit(request: JobRequest) -> Job:
    """Starts the job on this machine: one process that leads the ranks. They write to `<run_dir>/logs/`."""
    executor = submitit.LocalExecutor(Path(request.run_dir) / "logs")
    executor.update_parameters(
        nodes=1,
        tasks_per_node=1,
        gpus_per_node=0,
        timeout_min=_NO_LIMIT_MIN,
        stderr_to_stdout=True,
    )
    os.environ["PYTHONSAFEPATH"] = "1"  # for the ranks: a model.py in the folder of the launch is not ours
    if (devices := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        os.environ[CUDA_DEVICES] = devices
    with _ignored(signal.SIGINT, signal.SIGHUP):
        return Job(executor.submit(Entry(LOCAL_LEAD, (request.run_dir, request.entry))))


@contextmanager
def _ignored(*signals: signal.Signals) -> Iterator[None]:
    """Children started inside begin with these signals ignored: Ctrl-C or a closed terminal must not kill submitit's
    controller, which would kill the ranks before they have saved. The ranks themselves handle Ctrl-C (signals.StopFlag)."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def sbatch_script(request: JobRequest) -> str:
    """The script, as submitit writes it: the same for --dry-run and for the submission."""
    return str(_slurm_executor(request)._make_submission_file_text(_job_command(request), "dry-run"))


def submit_once(request: JobRequest, journal: Path) -> tuple[str, bool]:
    """The run's Slurm job: its id, and whether this call submitted it. Never a second one while the first is queued or runs.

    The journal is on disk, with a token that goes into the job's comment, before sbatch is called; so a launch that was
    killed in between finds the job again. sbatch itself holds the lock too: who comes later waits for its end, however
    long that takes. Raises CannotSubmit.
    """
    if not shutil.which("sbatch"):
        raise Refused(
            f"cluster={request.cluster.name} is Slurm's, and this machine has no sbatch: launch from a login node, or start a "
            "virtual cluster with `arriero cluster up`"
        )
    with only_one(journal.with_suffix(".lock")) as lock:
        if known := _find(journal):
            return known, False
        token = uuid.uuid4().hex
        cluster = queue.cluster_name()
        _write_journal(journal, token, None, cluster)
        job_id = _sbatch(replace(request, token=token), lock)
        _write_journal(journal, token, job_id, cluster)
        return job_id, True


def forget(journal: Path, folder: Path) -> None:
    """Removes the folder of a run whose submission was refused, unless there is a job after all, or nobody can tell."""
    with only_one(journal.with_suffix(".lock")), contextlib.suppress(CannotSubmit):
        if _find(journal) is None:  # another launch of it may have been taken meanwhile
            shutil.rmtree(folder, ignore_errors=True)


def find(journal: Path) -> str | None:
    """The job of a journal while it is queued or runs; None where there is none. Raises CannotSubmit where nobody can tell."""
    if not journal.exists():
        return None
    if not json.loads(journal.read_text())["job_id"]:  # sbatch may still be on its way
        sbatch_settled(journal.with_suffix(".lock"))
    return _find(journal)


def _find(journal: Path) -> str | None:
    if not journal.exists():
        return None
    entry = json.loads(journal.read_text())
    other = queue.written_for(journal, entry)
    if other and (other / journal.name).exists():
        return None  # a copy: that job trains into `other`
    here = queue.cluster_name() if entry.get("cluster") else None
    if here and here != entry["cluster"]:
        raise CannotSubmit(
            f"job {entry['job_id']} of this run is on the cluster {entry['cluster']}, and Slurm's commands speak to {here}: "
            f"choose the cluster (SLURM_CONF), or, where {entry['cluster']} is no more, delete {journal}"
        )
    jobs = queue.queued()
    if jobs is None:
        raise CannotSubmit(
            "squeue does not answer, so nobody can tell whether this run is queued already: try again later"
        )
    for job in jobs.values():
        if job.live and queue.is_of(job, entry["job_id"], entry["token"]):
            if other:
                raise CannotSubmit(
                    f"job {job.job_id}, in the queue or running, was submitted for {other}, which is not there: if this machine "
                    f"knows it as {journal.parent}, work where it has that name; if it was moved, `scancel {job.job_id}` first"
                )
            return job.job_id
    # An empty list is no proof: the job may be another user's, launched into the same run directory.
    if entry["job_id"] and entry["job_id"] not in jobs and queue.is_known(entry["job_id"]) is not False:
        raise CannotSubmit(
            f"job {entry['job_id']} of this run is not among your jobs, and slurmctld does not say that it is gone: if another "
            f"user launched it, leave it to them; else try again later (scontrol show job {entry['job_id']})"
        )
    return None


def _write_journal(path: Path, token: str, job_id: str | None, cluster: str | None) -> None:
    temporary, run_dir = path.with_name(f".{path.name}"), str(path.parent.resolve())
    with temporary.open("w") as file:
        json.dump(
            {"token": token, "job_id": job_id, "time_s": time.time(), "cluster": cluster, "run_dir": run_dir}, file
        )
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@contextmanager
def only_one(lock: Path) -> Iterator[int | None]:
    """One at a time inside; yields the lock's descriptor, for a child to hold it too. Raises CannotSubmit.

    Where the file system has no locks, a file that is made inside and is there afterwards if this process is killed: then
    the next one refuses, and says what to look at.
    """
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                raise
        else:
            yield file.fileno()
            return
    claim = lock.with_suffix(".claim")
    try:
        os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        raise CannotSubmit(
            f"{claim} is there: another launch is submitting, or was killed while it did (this file system has no locks that "
            "would tell). Once no launch is at work and squeue shows no job of this run, delete it"
        ) from None
    try:
        yield None
    finally:
        claim.unlink(missing_ok=True)


def _sbatch(request: JobRequest, lock: int | None) -> str:
    logs = Path(request.run_dir) / "logs"
    logs.mkdir(exist_ok=True)
    executor = _slurm_executor(request)
    script = logs / f".submission_{request.token}.sh"
    script.write_text(executor._make_submission_file_text(_job_command(request), request.token))
    done = subprocess.run(
        ["sbatch", str(script)],
        capture_output=True,
        text=True,
        check=False,
        pass_fds=[lock] if lock is not None else [],
    )
    if done.returncode:
        script.unlink()
        said = (done.stderr or done.stdout).strip()
        if any(words in said for words in _UNHEARD):
            raise CannotSubmit(f"nobody can tell whether Slurm has taken the job: {said}. Run the same command again")
        raise Refused(f"sbatch refused the job: {said}")
    try:
        job_id = str(executor._get_job_id_from_submission_command(done.stdout))
    except submitit.core.utils.FailedSubmissionError:
        raise CannotSubmit(
            f"sbatch says {done.stdout.strip()!r}, which names no job: see with squeue whether there is one"
        ) from None
    script.rename(logs / f"{job_id}_submission.sh")
    return job_id


def submit_array(request: JobRequest, lock: int | None) -> str:
    """One sbatch for many runs: the array's job id; task i of it is job "<id>_<i>". The caller keeps the journal and holds
    the lock (`only_one`) from before the journal is written."""
    assert request.array
    return _sbatch(request, lock)


def array_of(token: str, jobs: dict[str, queue.JobState]) -> str | None:
    """The array that was submitted with `token`, of those that squeue still knows."""
    found = (j.job_id for j in jobs.values() if j.comment == queue.comment_of(token))
    return next((job_id.partition("_")[0] for job_id in found), None)


def sbatch_settled(lock: Path) -> None:
    """Waits until the sbatch that was begun under this lock has come to its end, also where its caller was killed."""
    with only_one(lock):
        pass


def _run_word(request: JobRequest) -> str:
    """The run directory, as the script names it."""
    return '"$ARRIERO_RUN"' if request.array else shlex.quote(request.run_dir)


def _job_command(request: JobRequest) -> str:
    """What the batch script comes to: the supervisor, with the srun that it starts the ranks with; or srun alone."""
    run = _run_word(request)
    log = str(submitit.core.utils.JobPaths(Path(request.run_dir) / "logs").stdout)
    srun = ["srun", "--unbuffered", f"--output={log.replace('%j', '%A_%a') if request.array else log}"]
    # Slurm 22.05 and later: srun no longer takes --cpus-per-task from the job. One dead rank ends the others at once.
    srun += ["--kill-on-bad-exit=1", f"--cpus-per-task={request.cluster.cpus_per_gpu}"]
    ranks = [sys.executable, "-u", "-m", "slurm.rank", request.entry]
    if not request.supervised:
        return f"exec {shlex.join([*srun, *ranks])} {run}"
    # exec: TERM, which comes before an end or a requeue, goes to the supervisor itself.
    return f"exec {shlex.join([sys.executable, '-u', '-m', SUPERVISE])} {run} {shlex.join([*srun, *ranks])} {run}"


class _Executor(submitit.SlurmExecutor):  # type: ignore[misc]
    @classmethod
    def affinity(cls) -> int:
        return 2  # also without srun: a script can be read anywhere

    count: int | None = None  # of an array

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return str(_make_sbatch_string(command=command, folder=self.folder, map_count=self.count, **self.parameters))


def _task_of_array(request: JobRequest) -> list[str]:
    """Which run this task is; and its ranks' logs, which submitit puts beside the script, shown in the run's own folder."""
    assert request.array
    name = "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}_${rank}_log.out"
    logs = shlex.quote(str(Path(request.run_dir) / "logs"))
    return [
        f'ARRIERO_RUN=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {shlex.quote(request.array.run_dirs)})',
        'mkdir -p "$ARRIERO_RUN/logs"',
        f'for rank in $(seq 0 $((SLURM_NTASKS - 1))); do ln -sfn {logs}/"{name}" "$ARRIERO_RUN/logs/{name}"; done',
    ]


def _flags(options: dict[str, str]) -> dict[str, str | bool]:
    """Further options, where `true` is a flag without a value and `false` one that is not there."""
    return {k: v.lower() == "true" or v for k, v in options.items() if v.lower() != "false"}


def _slurm_executor(request: JobRequest) -> Any:
    """submitit's executor with all that the cluster's YAML says. Raises Refused."""
    if "%" in request.run_dir:
        raise Refused(
            f"{request.run_dir}: Slurm reads % in the path of a log as the beginning of a job's number or name: choose another "
            "name=... or run_root=..."
        )
    cluster = request.cluster
    folder = Path(request.run_dir) / "logs"
    executor = _Executor(folder)
    setup = [
        *(_task_of_array(request) if request.array else []),
        "export PYTHONSAFEPATH=1",  # else `python -m` takes the launch's folder before the snapshot: a checkout, or a model.py
        *([f"export PYTHONPATH={shlex.quote(request.code)}${{PYTHONPATH:+:$PYTHONPATH}}"] if request.code else []),
        *cluster.setup,
    ]
    if request.array:
        executor.count = request.array.count
        executor.update_parameters(array_parallelism=request.array.limit_parallel or request.array.count)
    exclude = ",".join([*([cluster.exclude] if cluster.exclude else []), *request.exclude])
    sbatch: dict[str, Any] = {"requeue": True, **({"begin": request.begin} if request.begin else {})}
    sbatch |= {k: v for k, v in (("reservation", cluster.reservation), ("no-kill", cluster.is_elastic)) if v}
    executor.update_parameters(
        job_name=request.name,
        nodes=cluster.nodes + cluster.spare_nodes,
        ntasks_per_node=cluster.gpus_per_node,
        cpus_per_task=cluster.cpus_per_gpu,
        gres=cluster.gpus_asked(),
        mem=f"{cluster.memory_gb_per_node}G" if cluster.memory_gb_per_node else "0",
        time=cluster.time_limit_min,
        signal_delay_s=cluster.warn_s,
        partition=cluster.partition,
        account=cluster.account,
        qos=cluster.qos,
        constraint=cluster.constraint,
        exclude=exclude or None,
        nodelist=cluster.nodelist,
        wckey=cluster.wckey,
        exclusive=cluster.exclusive or None,
        comment=queue.comment_of(request.token) if request.token else None,
        setup=setup,
        use_srun=False,  # the supervisor starts it
        stderr_to_stdout=True,
        additional_parameters={**sbatch, **_flags(cluster.sbatch)},
    )
    return executor
