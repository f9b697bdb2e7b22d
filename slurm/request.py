"""What a cluster is and what a job asks of it. Pure: no Slurm is called here."""

from dataclasses import dataclass, field

KINDS = ("local", "slurm")


@dataclass(kw_only=True)
class ClusterConfig:
    """One cluster. `local` is this machine (gloo ranks on CPU, or one a GPU); `slurm` submits with sbatch."""

    name: str
    kind: str = "local"  # local | slurm
    nodes: int = 1
    gpus_per_node: int = 1  # ranks on each node
    cpus_per_gpu: int = 8
    memory_gb_per_node: int | None = None  # null: all of it
    time_limit_min: int = 60 * 24
    warn_s: int = 180  # so long before the time limit Slurm warns the ranks: they save and the job is requeued
    crash_budget: int = 3  # crashes without a new checkpoint in between before the run stops for a person
    exclusive: bool = False  # whole nodes
    preflight: bool = True  # every node is checked before the ranks start (slurm/preflight.py)
    preflight_command: str | None = None  # the site's own check, a line of bash run on each node; not 0: unfit
    nodelist: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    reservation: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    wckey: str | None = None
    gres: str | None = "gpu:{gpus_per_node}"  # null where the site uses --gpus-per-node or nothing
    setup: list[str] = field(default_factory=list)  # lines before srun: modules, containers
    sbatch: dict[str, str] = field(default_factory=dict)  # further sbatch parameters, name: value

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    def problems(self) -> list[str]:
        found = []
        if self.kind not in KINDS:
            found.append(f"cluster.kind={self.kind} is none of {', '.join(KINDS)}")
        for name in ("nodes", "gpus_per_node", "cpus_per_gpu", "time_limit_min"):
            if getattr(self, name) < 1:
                found.append(f"cluster.{name}={getattr(self, name)} must be at least 1")
        if self.kind == "slurm" and not 10 <= self.warn_s < 60 * self.time_limit_min:
            found.append(
                f"cluster.warn_s={self.warn_s} must be at least 10 and less than cluster.time_limit_min={self.time_limit_min} "
                f"({60 * self.time_limit_min} s): a save must fit between the warning and the end"
            )
        if self.crash_budget < 0:
            found.append(f"cluster.crash_budget={self.crash_budget} must be 0 (stop at the first crash) or more")
        for name in ("setup", "sbatch"):
            values = self.setup if name == "setup" else [f"{k}={v}" for k, v in self.sbatch.items()]
            found += [f"cluster.{name} holds a line break: {v!r}" for v in values if "\n" in v]
        found += [
            f"cluster.sbatch.{k}: sbatch's long option, without dashes in front"
            for k in self.sbatch
            if k.startswith("-")
        ]
        if self.kind == "local" and self.nodes != 1:
            found.append(f"cluster.nodes={self.nodes} but cluster.kind=local is this one machine: set cluster.nodes=1")
        return found


@dataclass(frozen=True, kw_only=True)
class JobRequest:
    """One job: `entry` ("module:function", called with `run_dir` on every rank) on nodes x gpus_per_node ranks."""

    name: str
    entry: str
    run_dir: str
    cluster: ClusterConfig
    code: str | None = None  # the snapshot that the ranks run, first on their PYTHONPATH; null: what is installed
    token: str = ""  # what the job can be found by: in its comment
    begin: str | None = None  # not before this time, as sbatch --begin takes it
    exclude: tuple[str, ...] = ()  # nodes, beside cluster.exclude
    array: "ArrayRequest | None" = None  # many runs in one job; `run_dir` is then where its script and logs go


@dataclass(frozen=True, kw_only=True)
class ArrayRequest:
    """One job array: task i runs the run directory in line i + 1 of `run_dirs`."""

    run_dirs: str  # a file
    count: int
    limit_parallel: int | None = None


class CannotSubmit(Exception):
    """Slurm refused, or does not answer; the text says which, and what to do."""
