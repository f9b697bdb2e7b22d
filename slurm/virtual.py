"""A whole Slurm on one machine: real munged, MariaDB, slurmdbd, slurmctld and many slurmd, in one directory, on free ports.

For rehearsals and tests. Each virtual node claims its CPUs, memory and GPUs (files that stand for them); what runs on them is
real. Stopping touches only processes that this cluster started: a pid counts only with its start time.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

_NEEDED = {  # program -> Debian package
    "munged": "munge",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "srun": "slurm-client",
}
_NEEDED_FOR_ACCOUNTING = {"slurmdbd": "slurmdbd", "mariadbd": "mariadb-server", "mariadb-install-db": "mariadb-server"}
_PLUGINS = {"auth_munge.so": "slurm-wlm-basic-plugins", "accounting_storage_mysql.so": "slurm-wlm-mysql-plugin"}
_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])  # daemons are not on every user's PATH
READY_S = 60.0
_STATE = "cluster.json"


class ClusterError(Exception):
    """A virtual cluster that cannot be as asked; the text says why and what to do."""


@dataclass(frozen=True)
class Process:
    """A process that this cluster started. `start_ticks` tells it from a later one with the same pid."""

    pid: int
    start_ticks: int

    def alive(self) -> bool:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, os.WNOHANG)  # ours, where up() was called in this very process
        stat = _stat(self.pid)
        return stat is not None and stat[1] == self.start_ticks and stat[0] != "Z"

    def signal(self, number: int) -> None:
        if self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


@dataclass(kw_only=True)
class VirtualCluster:
    """A cluster that is up, or was; all of it stands in `directory`/cluster.json."""

    directory: Path
    name: str
    nodes: int
    gpus_per_node: int
    accounting: bool
    first_port: int  # slurmctld, slurmdbd, MariaDB, then one a node
    cpus_per_node: int = 64
    memory_mb_per_node: int = 1_000_000
    preempt_send_user_signal: bool = False  # preempted jobs get what they asked for with --signal, before TERM
    up_s: float = 0.0
    daemons: dict[str, Process] = field(default_factory=dict)  # munged, mariadbd, slurmdbd, slurmctld, node001 ...

    @classmethod
    def up(
        cls,
        *,
        nodes: int = 8,
        gpus_per_node: int = 8,
        directory: Path | None = None,
        name: str = "virtual",
        accounting: bool = True,
        cpus_per_node: int = 64,
        memory_mb_per_node: int = 1_000_000,
        preempt_send_user_signal: bool = False,
    ) -> Self:
        """Starts a cluster and returns when every node is idle. Raises ClusterError; then nothing of it is left running.

        CPUs and memory are what the nodes claim, whatever this machine has.
        """
        directory = (directory or default_directory(name)).resolve()
        _check(directory, name, nodes, gpus_per_node, accounting)
        cls._refuse_taken(directory, name)  # before its lock leaves a file beside what is not ours
        directory.parent.mkdir(parents=True, exist_ok=True)
        with _claimed(directory, name):
            return cls._up(
                directory=directory,
                name=name,
                nodes=nodes,
                gpus_per_node=gpus_per_node,
                accounting=accounting,
                cpus_per_node=cpus_per_node,
                memory_mb_per_node=memory_mb_per_node,
                preempt_send_user_signal=preempt_send_user_signal,
            )

    @classmethod
    def _refuse_taken(cls, directory: Path, name: str) -> None:
        if (directory / _STATE).exists():
            if cls.load(directory).running():
                by_name = directory == default_directory(name).resolve()
                option, value = ("--name", name) if by_name else ("--directory", directory)
                raise ClusterError(
                    f"a cluster is up in {directory} already: use it, stop it with `arriero cluster down {option} {value}`, "
                    f"or choose another {option}"
                )
        elif directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
            raise ClusterError(f"{directory} holds something else: choose an empty --directory")

    @classmethod
    def _up(cls, *, directory: Path, name: str, nodes: int, **more: Any) -> Self:
        cls._refuse_taken(directory, name)
        if (directory / _STATE).exists():
            shutil.rmtree(directory)
        started = time.monotonic()
        with _choosing_ports():
            cluster = cls(directory=directory, name=name, nodes=nodes, first_port=_free_ports(nodes + 3), **more)
            try:
                cluster._write_configuration()
                cluster._start()
                cluster.wait_ready()
            except BaseException:
                cluster.down(keep_files=True)
                raise
        cluster.up_s = time.monotonic() - started
        cluster._save()
        return cluster

    @classmethod
    def load(cls, directory: Path) -> Self:
        path = directory / _STATE
        if not path.exists():
            raise ClusterError(f"no virtual cluster was ever up in {directory}: start one with `arriero cluster up`")
        if path.stat().st_uid != os.geteuid():
            raise ClusterError(f"the cluster in {directory} is another user's, and theirs to use and to stop")
        values = json.loads(path.read_text())
        values["daemons"] = {n: Process(**p) for n, p in values["daemons"].items()}
        return cls(**{**values, "directory": directory})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    @property
    def env(self) -> dict[str, str]:
        """What chooses this cluster, for any Slurm command and for the ranks: nodes' names are known to Slurm alone."""
        return {"SLURM_CONF": str(self.conf), "ARRIERO_MASTER_ADDR": "127.0.0.1"}

    @property
    def slurm_name(self) -> str:
        """ClusterName. By it a run's journal tells clusters apart, and many of a --directory have the default name."""
        if self.directory == default_directory(self.name).resolve():
            return self.name
        return f"{self.name}-{hashlib.sha256(str(self.directory).encode()).hexdigest()[:8]}"

    @property
    def conf(self) -> Path:
        return self.directory / "slurm.conf"

    @property
    def node_names(self) -> list[str]:
        return [f"node{n:03d}" for n in range(1, self.nodes + 1)]

    def running(self) -> bool:
        return any(p.alive() for p in self.daemons.values())

    def status(self) -> dict[str, Any]:
        """What is up, and how many nodes are in which state as slurmctld tells it; units in the keys."""
        states: dict[str, int] = {}
        done = self.command("sinfo", "--noheader", "--Node", "--partition=normal", "--format=%T", timeout_s=10)
        for state in done.stdout.split() if done.returncode == 0 else []:
            states[state] = states.get(state, 0) + 1
        down = [name for name, process in self.daemons.items() if not process.alive()]
        return {
            "name": self.name,
            "directory": str(self.directory),
            "slurm_conf": str(self.conf),
            "nodes": self.nodes,
            "gpus_per_node": self.gpus_per_node,
            "accounting": self.accounting,
            "up": self.running(),
            "controller_answers": done.returncode == 0,
            "nodes_by_state": states,
            "daemons_down": down,
            "up_s": round(self.up_s, 2),
        }

    def command(self, *words: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        """One of Slurm's commands, on this cluster. 124 where it does not answer in time."""
        try:
            return subprocess.run(
                words, env=self._env(), capture_output=True, text=True, timeout=timeout_s, check=False, errors="replace"
            )
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(words, 124, "", f"{words[0]} did not answer in {timeout_s:g} s")

    def wait_ready(self, timeout_s: float = READY_S) -> None:
        """Until every node is idle, or in use."""
        timeout_s += self.nodes / 4
        until = time.monotonic() + timeout_s
        while True:
            done = self.command("sinfo", "--noheader", "--Node", "--partition=normal", "--format=%T")
            states = done.stdout.split()
            ready = [s for s in states if s in ("idle", "mixed", "allocated", "completing")]
            if done.returncode == 0 and len(ready) == self.nodes:
                return
            dead = [n for n, p in self.daemons.items() if not p.alive()]
            if dead or time.monotonic() > until:
                what = (
                    f"{dead[0]} has ended"
                    if dead
                    else f"after {timeout_s:g} s {len(ready)} of {self.nodes} nodes are up"
                )
                log = self.directory / "log" / f"{dead[0] if dead else 'slurmctld'}.log"
                raise ClusterError(
                    f"the cluster {self.name} does not come up: {what}\n{_tail(log)}\n{done.stderr}".rstrip()
                )
            time.sleep(0.1)

    # ------------------------------------------------------------------------------------------- what can go wrong

    def kill_node(self, node: str, steps: bool = True) -> None:
        """The node's slurmd is killed; with `steps`, all that runs on the node too. Without, its ranks live on, as on a node
        that only lost its network. slurmctld notices by itself after SlurmdTimeout."""
        self.daemons[node].signal(signal.SIGKILL)
        if steps:
            _wait_for(lambda: self._kill_all_on(node), 10, f"something on {node} does not die")

    def start_node(self, node: str) -> None:
        """A new slurmd for a node, which comes back empty."""
        self._start_node(node)
        self.command("scontrol", "update", f"nodename={node}", "state=resume")

    def _kill_all_on(self, node: str | None = None) -> bool:
        """Whether nothing was left to kill."""
        there = self.processes_on(node)
        _signal_all(there, signal.SIGKILL)
        return not there

    def restart_controller(self, down_s: float = 0.0) -> None:
        """slurmctld ends, as on an upgrade, and is started again on its saved state; jobs run on meanwhile."""
        self.daemons["slurmctld"].signal(signal.SIGTERM)
        _wait_for(lambda: not self.daemons["slurmctld"].alive(), 10, "slurmctld does not end")
        time.sleep(down_s)
        self._start_controller()
        _wait_for(lambda: self.command("scontrol", "ping").returncode == 0, READY_S, "slurmctld does not come back")

    def processes_on(self, node: str | None = None) -> list[Process]:
        """Every slurmstepd and every process of a job on a node, or on any."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            with contextlib.suppress(OSError):
                variables = (entry / "environ").read_bytes().split(b"\0")
                if f"SLURM_CONF={self.conf}".encode() not in variables:
                    continue
                mine = [
                    v.partition(b"=")[2].decode()
                    for v in variables
                    if v.startswith((b"ARRIERO_NODE=", b"SLURMD_NODENAME="))
                ]
                stat = _stat(int(entry.name))
                if mine and (node is None or node in mine) and stat and stat[0] != "Z":
                    found.append(Process(int(entry.name), stat[1]))
        slurmds = {p.pid for p in self.daemons.values()}
        return [p for p in found if p.pid not in slurmds]

    def down(self, keep_files: bool = False) -> None:
        """Stops all that this cluster started, jobs first, and nothing else."""
        self._kill_all_on()
        for names in (self.node_names, ["slurmctld"], ["slurmdbd"], ["mariadbd"], ["munged"]):
            ours = [self.daemons[n] for n in names if n in self.daemons]
            # slurmd and slurmctld are about to lose their directory: there is nothing for them to save.
            _signal_all(ours, signal.SIGTERM if names[0] in ("munged", "mariadbd", "slurmdbd") else signal.SIGKILL)
            with contextlib.suppress(ClusterError):
                _wait_for(lambda ours=ours: not any(p.alive() for p in ours), 10, "")  # type: ignore[misc]
            _signal_all(ours, signal.SIGKILL)
        with contextlib.suppress(ClusterError):  # a step that was starting meanwhile
            _wait_for(self._kill_all_on, 10, "")
        if not keep_files:
            shutil.rmtree(self.directory, ignore_errors=True)

    # --------------------------------------------------------------------------------------------------- starting

    def _write_configuration(self) -> None:
        here, user = self.directory, pwd.getpwuid(os.geteuid()).pw_name
        for folder in ("log", "run", "state", "spool", "gpus", "munge"):
            (here / folder).mkdir(parents=True, mode=0o755)
        here.chmod(0o700)
        for number in range(self.gpus_per_node):
            (here / "gpus" / f"gpu{number}").touch()
        _private(here / "munge" / "key", secrets.token_bytes(128))
        gres = f" Gres=gpu:virtual:{self.gpus_per_node}" if self.gpus_per_node else ""
        ports = f"{self.first_port + 3}-{self.first_port + 2 + self.nodes}"
        nodes = f"node[001-{self.nodes:03d}]" if self.nodes > 1 else "node001"
        # Both read all of /proc, once for each node of a step: thousands of ranks on one machine took minutes to end.
        crowded = self.nodes * self.gpus_per_node > 512
        storage = (
            ["AccountingStorageType=accounting_storage/slurmdbd", "AccountingStorageHost=127.0.0.1",
             f"AccountingStoragePort={self.first_port + 1}", f"AccountingStoragePass={here}/munge/socket",
             f"JobAcctGatherType=jobacct_gather/{'none' if crowded else 'linux'}",
             "AccountingStoreFlags=job_comment",  # numbers begin anew with a cluster: the comment says whose a job was
             "JobAcctGatherFrequency=30", "AccountingStorageTRES=gres/gpu" if self.gpus_per_node else ""]
            if self.accounting
            else ["AccountingStorageType=accounting_storage/none", "JobAcctGatherType=jobacct_gather/none"]
        )  # fmt: skip
        lines = [
            f"ClusterName={self.slurm_name}",
            "SlurmctldHost=localhost(127.0.0.1)",
            f"SlurmctldPort={self.first_port}",
            f"SlurmUser={user}",
            f"SlurmdUser={user}",
            "AuthType=auth/munge",
            f"AuthInfo=socket={here}/munge/socket",
            "CredType=cred/munge",
            f"StateSaveLocation={here}/state",
            f"SlurmdSpoolDir={here}/spool/%n",
            f"SlurmctldPidFile={here}/run/slurmctld.pid",
            f"SlurmdPidFile={here}/run/%n.pid",
            f"SlurmctldLogFile={here}/log/slurmctld.log",
            f"SlurmdLogFile={here}/log/%n.log",
            f"ProctrackType=proctrack/{'pgid' if crowded else 'linuxproc'}",
            "TaskPlugin=task/none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_Core",
            "SlurmdParameters=config_overrides",
            "GresTypes=gpu" if self.gpus_per_node else "",
            "MpiDefault=none",
            "ReturnToService=2",
            "JobRequeue=1",
            "TreeWidth=256",
            "MaxArraySize=10001",
            "MaxJobCount=50000",
            # Thousands of ranks on a few cores end and answer more slowly than on as many machines.
            f"SlurmdTimeout={20 + self.nodes * self.gpus_per_node // 40}",
            "SlurmctldTimeout=20",
            f"KillWait={15 + self.nodes * self.gpus_per_node // 20}",
            # Slurm warns above 100 s, for nodes that are machines: 51 were too few for 2,048 ranks on two slow cores, 138 not.
            f"MessageTimeout={10 + self.nodes * self.gpus_per_node // 16}",
            "MinJobAge=600",
            "SchedulerType=sched/backfill",
            "SchedulerParameters=bf_interval=2,sched_interval=5,batch_sched_delay=0,sched_min_interval=0,defer_batch",
            "PreemptType=preempt/partition_prio",
            "PreemptMode=REQUEUE",
            "SlurmctldParameters=preempt_send_user_signal" if self.preempt_send_user_signal else "",
            *storage,
            f"NodeName={nodes} NodeHostname=localhost NodeAddr=127.0.0.1 Port="
            + (f"[{ports}]" if self.nodes > 1 else f"{self.first_port + 3}")
            + f" CPUs={self.cpus_per_node} RealMemory={self.memory_mb_per_node}{gres}",
            f"PartitionName=normal Nodes={nodes} Default=YES MaxTime=INFINITE State=UP PriorityTier=1",
            f"PartitionName=graceful Nodes={nodes} MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60",
            f"PartitionName=urgent Nodes={nodes} MaxTime=INFINITE State=UP PriorityTier=10",
        ]
        self.conf.write_text("\n".join(line for line in lines if line) + "\n")
        if self.gpus_per_node:
            last = self.gpus_per_node - 1
            files = f"{here}/gpus/gpu" + (f"[0-{last}]" if last else "0")
            (here / "gres.conf").write_text(f"AutoDetect=off\nNodeName={nodes} Name=gpu Type=virtual File={files}\n")
        if self.accounting:
            password = secrets.token_hex(16)
            _private(
                here / "init.sql",
                (
                    "CREATE DATABASE IF NOT EXISTS slurm_acct_db;\n"
                    f"CREATE USER IF NOT EXISTS 'slurm'@'%' IDENTIFIED BY '{password}';\n"
                    "GRANT ALL ON slurm_acct_db.* TO 'slurm'@'%';\n"
                ).encode(),
            )
            _private(
                here / "slurmdbd.conf",
                "\n".join([
                    "AuthType=auth/munge", f"AuthInfo=socket={here}/munge/socket", "DbdHost=localhost", "DbdAddr=127.0.0.1",
                    f"DbdPort={self.first_port + 1}", f"SlurmUser={user}", f"LogFile={here}/log/slurmdbd.log",
                    f"PidFile={here}/run/slurmdbd.pid", "StorageType=accounting_storage/mysql", "StorageHost=127.0.0.1",
                    f"StoragePort={self.first_port + 2}", "StorageUser=slurm", f"StoragePass={password}",
                    "StorageLoc=slurm_acct_db", "",
                ]).encode(),
            )  # fmt: skip

    def _start(self) -> None:
        here = self.directory
        self._daemon(
            "munged", "--foreground", "--force", f"--key-file={here}/munge/key", f"--socket={here}/munge/socket",
            f"--pid-file={here}/munge/pid", f"--seed-file={here}/munge/seed", f"--log-file={here}/log/munged.log",
        )  # fmt: skip
        _wait_for(
            lambda: (here / "munge" / "socket").exists(),
            READY_S,
            "munged does not start",
            here / "log/munged.out",
        )
        if self.accounting:
            self._start_accounting()
        self._start_controller()
        for node in self.node_names:
            self._start_node(node)

    def _start_accounting(self) -> None:
        here, user = self.directory, pwd.getpwuid(os.geteuid()).pw_name
        done = self.command(
            "mariadb-install-db", "--no-defaults", f"--datadir={here}/db", f"--user={user}", "--skip-test-db",
            "--auth-root-authentication-method=normal",
        )  # fmt: skip
        if done.returncode:
            raise ClusterError(f"mariadb-install-db failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        self._daemon(
            "mariadbd", "--no-defaults", f"--datadir={here}/db", f"--user={user}", f"--port={self.first_port + 2}",
            "--bind-address=127.0.0.1", f"--socket={here}/run/db.sock", f"--pid-file={here}/run/db.pid",
            f"--init-file={here}/init.sql", "--innodb-buffer-pool-size=64M", "--innodb-lock-wait-timeout=900",
            "--skip-log-bin", "--innodb-flush-log-at-trx-commit=0",
        )  # fmt: skip
        _wait_for(
            lambda: _answers(self.first_port + 2),
            READY_S,
            "MariaDB does not start",
            here / "log/mariadbd.out",
        )
        self._daemon("slurmdbd", "-D")
        _wait_for(
            lambda: self.command("sacctmgr", "--immediate", "add", "cluster", self.slurm_name).returncode == 0,
            READY_S,
            "slurmdbd does not answer",
            here / "log/slurmdbd.out",
        )

    def _start_controller(self) -> None:
        self._daemon("slurmctld", "-D")

    def _start_node(self, node: str) -> None:
        self._daemon("slurmd", "-D", "-N", node, as_name=node)

    def _daemon(self, program: str, *words: str, as_name: str = "") -> None:
        name = as_name or program
        with (self.directory / "log" / f"{name}.out").open("ab") as out:
            process = subprocess.Popen(
                [_path(program), *words],
                env={**self._env(), "ARRIERO_NODE": as_name} if as_name else self._env(),
                stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True, cwd=self.directory,
            )  # fmt: skip
        process.returncode = 0  # not waited for by Popen's destructor: alive() does
        stat = _stat(process.pid)
        self.daemons[name] = Process(process.pid, stat[1] if stat else -1)
        self._save()  # at once: `down` finds what a killed `up` has started

    def _env(self) -> dict[str, str]:
        """Without what a surrounding Slurm job or cluster has set."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "SRUN", "MUNGE"))}
        return {**kept, **self.env, "PATH": _PATH}

    def _save(self) -> None:
        values = {**asdict(self), "directory": str(self.directory)}
        temporary = self.directory / f".{_STATE}"
        temporary.write_text(json.dumps(values))
        temporary.replace(self.directory / _STATE)


def default_directory(name: str) -> Path:
    """Short, for Unix sockets live in it. Raises ClusterError."""
    return _own_folder() / name


def _own_folder() -> Path:
    """The user's own: nobody else may have put it there, for what stands in it names processes that `down` ends. Raises
    ClusterError."""
    folder = Path(tempfile.gettempdir()) / f"arriero-cluster-{os.geteuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise ClusterError(
            f"{folder} is not a folder of yours: somebody else made it; delete it, or choose a --directory"
        )
    if found.st_mode & 0o077:
        folder.chmod(0o700)
    return folder


@contextlib.contextmanager
def _claimed(directory: Path, name: str) -> Iterator[None]:
    """One `up` at a time in a directory; ends with this process, however it ends. Raises ClusterError."""
    with (directory.parent / f".{directory.name}.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ClusterError(
                f"another `arriero cluster up` is starting {name} in {directory} right now: wait for it, or choose another --name"
            ) from None
        yield


@contextlib.contextmanager
def _choosing_ports() -> Iterator[None]:
    """One at a time on this machine: what two choose at once is free for both."""
    with (_own_folder() / ".ports.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def missing_packages(accounting: bool = True) -> list[str]:
    """The Debian packages that a virtual cluster needs and that are not here."""
    needed = {**_NEEDED, **(_NEEDED_FOR_ACCOUNTING if accounting else {})}
    packages = {package for program, package in needed.items() if not shutil.which(program, path=_PATH)}
    folders = [*Path("/usr/lib").glob("*/slurm-wlm"), *Path("/usr/lib").glob("*/slurm"), Path("/usr/lib64/slurm")]
    for plugin, package in _PLUGINS.items():
        if (accounting or "mysql" not in plugin) and not any((folder / plugin).exists() for folder in folders):
            packages.add(package)
    return sorted(packages)


def _check(directory: Path, name: str, nodes: int, gpus_per_node: int, accounting: bool) -> None:
    if packages := missing_packages(accounting):
        raise ClusterError(
            "a virtual cluster needs Slurm's daemons, and some are missing: install them with\n"
            f"  sudo apt-get install --no-install-recommends {' '.join(packages)}"
        )
    if not 1 <= nodes <= 999 or not 0 <= gpus_per_node <= 64:
        raise ClusterError(f"--nodes {nodes} --gpus-per-node {gpus_per_node}: from 1 to 999 nodes of 0 to 64 GPUs")
    if not name.replace("_", "").replace("-", "").isalnum() or name != name.lower():
        raise ClusterError(f"--name {name}: small letters, digits, - and _ only, as Slurm's cluster names")
    if not re.fullmatch(r"[\w./+-]+", str(directory)):
        raise ClusterError(
            f"{str(directory)!r}: letters, digits and . _ + - only, for Slurm's configuration takes no other in a path: choose "
            "another --directory"
        )
    if len(str(directory / "munge" / "socket")) > 100:
        raise ClusterError(
            f"{directory} is too long for the sockets in it: choose a --directory of at most 80 characters"
        )


def _stat(pid: int) -> tuple[str, int] | None:
    """A process's state letter and start time in clock ticks since boot; None where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[19])


def _signal_all(processes: Iterable[Process], number: int) -> None:
    for process in processes:
        process.signal(number)


def _free_ports(count: int) -> int:
    """The first of `count` ports in a row that nobody listens on, below Linux's ephemeral ones."""
    first = 10_000 + secrets.randbelow(4_000)
    while first + count < 32_000:
        taken = next((p for p in range(first, first + count) if not _is_free(p)), None)
        if taken is None:
            return first
        first = taken + 1
    raise ClusterError(f"there are no {count} free ports in a row below 32,000")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def _wait_for(condition: Callable[[], bool], timeout_s: float, otherwise: str, log: Path | None = None) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > until:
            raise ClusterError(f"{otherwise}\n{_tail(log)}" if log else otherwise)
        time.sleep(0.05)


def _private(path: Path, content: bytes) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)


def _path(program: str) -> str:
    found = shutil.which(program, path=_PATH)
    if not found:
        raise ClusterError(f"{program} is not installed")
    return found


def _tail(log: Path, lines: int = 12) -> str:
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""


@contextlib.contextmanager
def in_environment(cluster: VirtualCluster) -> Iterator[None]:
    """This process's own Slurm commands, submitit's too, speak to `cluster` inside."""
    before = {name: os.environ.get(name) for name in cluster.env}
    os.environ.update(cluster.env)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
