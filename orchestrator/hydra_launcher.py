"""`hydra/launcher=arriero`: the multirun of any Hydra application as job arrays on Slurm, or one after another on this machine.

As Hydra's launchers do, it comes back when all jobs have ended, with what each returned. `arriero launch -m` does not go this
way: its points are runs that go on by themselves. Each job has a folder in `hydra.sweep.dir`: what it is to do, and what came of
it. Both are pickles, as in Hydra's own launchers (an application's function has no other form), of one user to himself.
"""

import logging
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides, run_job, setup_globals
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from slurm.request import ArrayRequest, ClusterConfig, JobRequest

log = logging.getLogger(__name__)
ENTRY = "orchestrator.hydra_launcher:run_task"
_LOOK_S = 0.2  # between two looks for results; the queue is asked every tenth time


@dataclass
class LauncherConfig:
    """`hydra.launcher.*` of an application: the cluster as in the group `cluster`, one rank unless it says more."""

    _target_: str = "hydra_plugins.arriero.ArrieroLauncher"
    cluster: ClusterConfig = field(default_factory=lambda: ClusterConfig(name="slurm", kind="slurm"))
    limit_parallel: int | None = None  # jobs of an array at one time


class ArrieroLauncher(Launcher):
    def __init__(self, cluster: DictConfig, limit_parallel: int | None) -> None:
        self.cluster = cast(ClusterConfig, OmegaConf.to_object(cluster))
        self.limit_parallel = limit_parallel

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Blocks until all have ended. A job that failed, or was killed, is a result whose `return_value` raises; the others
        are not touched by it. Raises HydraException where nothing can be submitted."""
        if problems := self.cluster.problems():
            raise HydraException("\n".join(f"hydra.launcher.{p}" for p in problems))
        setup_globals()
        hydra = self.config.hydra
        configure_log(hydra.hydra_logging, hydra.verbose)
        root = Path(str(hydra.sweep.dir)).absolute()
        root.mkdir(parents=True, exist_ok=True)
        if "mode" in hydra.sweep:
            root.chmod(int(str(hydra.sweep.mode), 8))
        where = "this machine" if self.cluster.kind == "local" else self.cluster.name
        log.info(f"Launching {len(job_overrides)} jobs on {where}")
        folders = []
        for number, overrides in enumerate(job_overrides, initial_job_idx):
            log.info(f"\t#{number} : {' '.join(filter_overrides(overrides))}")
            folders.append(root / ".arriero" / str(number))
            self._write_task(folders[-1], list(overrides), number)
        run = self._run_here if self.cluster.kind == "local" else self._run_on_slurm
        run(root, folders)
        return [_result(f, list(o)) for f, o in zip(folders, job_overrides, strict=True)]

    def _write_task(self, folder: Path, overrides: list[str], number: int) -> None:
        import cloudpickle  # submitit's: it takes functions of __main__ and closures too

        folder.mkdir(parents=True, exist_ok=True)
        (folder / "result.pkl").unlink(missing_ok=True)
        task = (self.hydra_context, self.task_function, self.config, overrides, number, Singleton.get_state())
        # The application's modules are found where it found them itself: the path comes before the task is read.
        (folder / "task.pkl").write_bytes(cloudpickle.dumps((sys.path, cloudpickle.dumps(task))))

    def _run_here(self, root: Path, folders: Sequence[Path]) -> None:
        """A process each. What it prints goes to the terminal, as with Hydra's basic launcher."""
        for folder in folders:
            # -P: a slurm.py beside the application is not ours; the application's own path comes with the task
            subprocess.run([sys.executable, "-P", "-m", "slurm.rank", ENTRY, str(folder)], check=False)

    def _run_on_slurm(self, root: Path, folders: Sequence[Path]) -> None:
        from slurm import queue
        from slurm.request import CannotSubmit
        from slurm.submit import only_one, submit_array

        arrays = []
        largest = queue.max_array_size()
        parts = [folders[i : i + largest] for i in range(0, len(folders), largest)]
        limit = max(1, self.limit_parallel // len(parts)) if self.limit_parallel else None
        for part in parts:
            token = uuid.uuid4().hex
            lines = root / ".arriero" / f"{token}.txt"
            lines.write_text("".join(f"{f}\n" for f in part))
            request = JobRequest(
                name=str(self.config.hydra.job.name),
                entry=ENTRY,
                run_dir=str(root / ".arriero"),
                cluster=self.cluster,
                token=token,
                array=ArrayRequest(run_dirs=str(lines), count=len(part), limit_parallel=limit),
                supervised=False,
            )
            try:
                with only_one(lines.with_suffix(".lock")) as lock:
                    arrays.append(submit_array(request, lock))
            except CannotSubmit as error:
                raise HydraException(str(error)) from None
            log.info(f"job array {arrays[-1]}: {len(part)} jobs")
        looks = 0
        while not all((f / "result.pkl").exists() for f in folders):
            if looks % 10 == 9 and (jobs := queue.queued()) is not None:
                live = [j for j in jobs.values() if j.live and j.job_id.partition("_")[0] in arrays]
                if not live:  # what has left no result was killed
                    return
            looks += 1
            time.sleep(_LOOK_S)


def run_task(folder: str) -> None:
    """What each rank of a job runs; rank 0 leaves the result. Fails where the application does, so that Slurm says FAILED."""
    import cloudpickle

    from slurm.rendezvous import place

    path = Path(folder)
    sys.path[:], task = cloudpickle.loads((path / "task.pkl").read_bytes())
    context, function, config, overrides, number, state = cloudpickle.loads(task)
    here = place()
    try:
        Singleton.set_state(state)
        setup_globals()
        sweep_config = context.config_loader.load_sweep_config(config, overrides)
        with open_dict(sweep_config):
            sweep_config.hydra.job.id, sweep_config.hydra.job.num = here.job_id, number
        result = run_job(
            hydra_context=context,
            task_function=function,
            config=sweep_config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
    except Exception as error:
        result = _failed(overrides, error)
    if here.rank == 0:
        try:
            written = cloudpickle.dumps(result)
        except Exception as error:
            result = _failed(overrides, HydraException(f"what the application returned cannot be sent back: {error}"))
            written = cloudpickle.dumps(result)
        temporary = path / ".result.pkl"
        temporary.write_bytes(written)
        temporary.replace(path / "result.pkl")
    _ = result.return_value  # raises what the application raised


def _failed(overrides: list[str], error: Exception) -> JobReturn:
    result = JobReturn(overrides=overrides, status=JobStatus.FAILED)
    result.return_value = error
    return result


def _result(folder: Path, overrides: list[str]) -> JobReturn:
    import cloudpickle

    try:
        return cast(JobReturn, cloudpickle.loads((folder / "result.pkl").read_bytes()))
    except FileNotFoundError:
        log.error(f"job {folder.name} ended without a result")
        return _failed(
            overrides, HydraException(f"job {folder.name} ended without a result: its logs are in {folder}/logs")
        )
