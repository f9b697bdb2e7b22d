"""What a cluster is and what a job asks of it. Pure: no Slurm is called here."""

from dataclasses import dataclass, field

KINDS = ("local", "slurm")
OURS = {  # options of sbatch that a user's must not replace
    "comment": "for a job is found again by it",
    "array": "for sweeps (`arriero launch -m`)",
    "output": "for `arriero logs` looks there",
    "error": "for `arriero logs` looks there",
    "open-mode": "so that a requeue keeps the log of before",
    "signal": "so long before the end as cluster.warn_s says",
    "requeue": "for a run goes on by itself",
    "no-requeue": "for a run goes on by itself",
    "job-name": "to the run's name (name=...)",
    "nodes": "from cluster.nodes",
    "ntasks": "from cluster.nodes and cluster.gpus_per_node",
    "ntasks-per-node": "from cluster.gpus_per_node",
    "time": "from cluster.time_limit_min",
    "no-kill": "with cluster.spare_nodes or cluster.min_nodes",
    "wrap": "for the script is what runs",
    "parsable": "for it reads what sbatch says",
    "wait": "for a launch does not wait",
    "test-only": "for `arriero launch --dry-run` is there",
}
_WORDS = ("nodelist", "partition", "account", "qos", "reservation", "constraint", "exclude", "wckey")


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
    crash_budget: int = 3  # crashes without a new checkpoint in between that are forgiven: the next one stops the run
    hang_timeout_s: float | None = None  # so long a rank may stand within a step; null: 5 median steps, at least 120 s
    hang_timeout_slow_s: float = 600.0  # the same where more is normal: start, first step, load, save, evaluation
    straggler_ratio: float = 1.5  # a rank that computes so many times as long as the median rank is reported
    exclusive: bool = False  # whole nodes
    preflight: bool = True  # every node is checked before the ranks start (slurm/preflight.py)
    preflight_command: str | None = None  # the site's own check, a line of bash run on each node; not 0: unfit
    spare_nodes: int = 0  # more nodes in the allocation: one takes a lost node's place at once, without a requeue
    min_nodes: int | None = None  # null: all; else the run goes on with as few, at the same global batch
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
    # Further sbatch parameters, name: value; true: a flag without one.
    sbatch: dict[str, str] = field(default_factory=dict)

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def is_elastic(self) -> bool:
        """Whether a lost node leaves the allocation standing."""
        return self.spare_nodes > 0 or self.min_nodes is not None

    def gpus_asked(self) -> str | None:
        """`gres` with this cluster's number in it."""
        return self.gres and self.gres.format(gpus_per_node=self.gpus_per_node)

    def problems(self) -> list[str]:
        found = []
        if self.kind not in KINDS:
            found.append(f"cluster.kind={self.kind} is none of {', '.join(KINDS)}")
        for name in ("nodes", "gpus_per_node", "cpus_per_gpu", "time_limit_min"):
            if getattr(self, name) < 1:
                found.append(f"cluster.{name}={getattr(self, name)} must be at least 1")
        if self.kind == "slurm" and self.time_limit_min >= 1 and not 10 <= self.warn_s < 60 * self.time_limit_min:
            found.append(
                f"cluster.warn_s={self.warn_s} must be at least 10 and less than cluster.time_limit_min={self.time_limit_min} "
                f"({60 * self.time_limit_min} s): a save must fit between the warning and the end"
            )
        if self.crash_budget < 0:
            found.append(f"cluster.crash_budget={self.crash_budget} must be 0 (stop at the first crash) or more")
        if self.hang_timeout_s is not None and self.hang_timeout_s < 1:
            found.append(f"cluster.hang_timeout_s={self.hang_timeout_s} must be at least 1, or null")
        if self.hang_timeout_slow_s < 10:
            found.append(f"cluster.hang_timeout_slow_s={self.hang_timeout_slow_s} must be at least 10")
        if self.straggler_ratio <= 1:
            found.append(f"cluster.straggler_ratio={self.straggler_ratio} must be more than 1")
        if self.spare_nodes < 0:
            found.append(f"cluster.spare_nodes={self.spare_nodes} must be 0 (none) or more")
        if self.min_nodes is not None and self.nodes >= 1 and not 1 <= self.min_nodes <= self.nodes:
            found.append(f"cluster.min_nodes={self.min_nodes} must be from 1 to cluster.nodes={self.nodes}, or null")
        if self.kind == "local" and self.is_elastic:
            found.append(
                "cluster.spare_nodes and cluster.min_nodes are of Slurm's jobs: choose cluster.kind=slurm, or leave them out"
            )
        if self.memory_gb_per_node is not None and self.memory_gb_per_node < 1:
            found.append(
                f"cluster.memory_gb_per_node={self.memory_gb_per_node} must be at least 1, or null (all of it)"
            )
        for name in _WORDS:
            if (word := getattr(self, name)) is not None and not word.strip():
                found.append(f"cluster.{name} is empty: give it a value, or null for none")
        try:
            self.gpus_asked()
        except (LookupError, ValueError, AttributeError):
            found.append(
                f"cluster.gres={self.gres}: in braces stands {{gpus_per_node}} and nothing else, as in gpu:{{gpus_per_node}}"
            )
        if self.preflight_command in ("True", "False"):  # what Hydra makes of true and false
            found.append(
                f"cluster.preflight_command={self.preflight_command} is no line of bash: null for none; the program of that "
                "name in quotes of its own, \"cluster.preflight_command='true'\""
            )
        for name in ("setup", "sbatch"):
            values = self.setup if name == "setup" else [f"{k}={v}" for k, v in self.sbatch.items()]
            found += [f"cluster.{name} holds a line break: {v!r}" for v in values if "\n" in v]
        for option in self.sbatch:
            if option.startswith("-"):
                found.append(f"cluster.sbatch.{option}: sbatch's long option, without dashes in front")
            elif why := OURS.get(option.replace("_", "-")):
                found.append(f"cluster.sbatch.{option} is set by arriero itself, {why}: leave it out")
        if self.kind == "local" and self.nodes > 1:
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
    supervised: bool = True  # false: the ranks are all there is; a job that ends badly has failed


@dataclass(frozen=True, kw_only=True)
class ArrayRequest:
    """One job array: task i runs the run directory in line i + 1 of `run_dirs`."""

    run_dirs: str  # a file
    count: int
    limit_parallel: int | None = None


class CannotSubmit(Exception):
    """Slurm refused, or does not answer; the text says which, and what to do."""


class Refused(CannotSubmit):
    """There is no job: sbatch refused it, or is not here."""
