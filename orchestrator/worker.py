"""What every rank runs: reads the run directory, takes its place, trains, writes records. The only room here that knows torch.

First start, fortieth requeue and a move to other nodes take this one path: read the directory, go on.
"""

import os
import threading
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from model.checkpoint.lease import Fenced
from model.checkpoint.store import CheckpointError, CheckpointStore
from model.cost import flops_per_token
from model.data.loader import Loader
from model.data.prepare import PreparedData
from model.device import choose, has_bf16, keep_memory, prepare
from model.generate import generate
from model.parallel import Ranks, place_ranks
from model.profile import StepProfiler
from model.train import TrainConfig, Trainer
from orchestrator import spec as specs
from orchestrator.carbon_report import budget
from orchestrator.energy.carbon import BudgetVerdict
from orchestrator.energy.sampler import sampling
from orchestrator.incidents import failures_so_far
from orchestrator.mirror import mirroring
from orchestrator.plan.forecast import learnt_mttf_s, mttf_s
from orchestrator.record import Event, JsonlWriter, StepRecord, read_events, say, utc_now
from orchestrator.run_dir import RunDir
from orchestrator.shrink import shrunk
from orchestrator.spikes.watch import SpikeWatch
from orchestrator.webhook import post
from slurm.pulse import pulse
from slurm.rendezvous import Place, place
from slurm.signals import PAUSE, StopFlag, first_told

_GO_ON = "to go on, change what spikes.* allows (or choose spikes=watch) and launch it again"


_BUDGET_EVERY_S = 60.0


class _BudgetWatch(threading.Thread):
    """Looks at the run's energy and carbon budgets now and then, beside the training, and once at its end; asks it to stop once
    one is spent."""

    def __init__(self, directory: RunDir, recorder: "RunRecorder", stop: StopFlag) -> None:
        super().__init__(name="budget", daemon=True)
        self.directory, self.recorder, self.stop = directory, recorder, stop
        self._warned = ""
        self._ended = threading.Event()

    def __enter__(self) -> "_BudgetWatch":
        self.look()
        self.start()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._ended.set()
        self.join()
        if error is None:  # a run may be over before the first look, and spend its last minute beyond the budget
            self.look()

    def run(self) -> None:
        every_s = min(_BUDGET_EVERY_S, 4 * specs.load(self.directory.spec).carbon.sample_s)
        while self.stop.requested is None and not self._ended.wait(every_s):
            self.look()

    def look(self) -> None:
        try:
            verdict = budget(self.directory.root)
        except Exception as error:  # the account must not take the training down; it is told, once
            verdict = BudgetVerdict("warn", f"the budget could not be checked: {type(error).__name__}: {error}")
        if verdict.action == "stop" and not self._ended.is_set():
            self.stop.ask(verdict.reason)
            self.directory.cancelled.write_text(f"{verdict.reason}\n")  # not to be put back into the queue
        if verdict.action != "ok" and self._warned != verdict.action:
            self._warned = verdict.action
            self.recorder.event("budget", 0, f"{verdict.action}: {verdict.reason}")


class RunRecorder:
    """Rank 0's records and events of one attempt; drops them on the other ranks."""

    def __init__(self, run_dir: RunDir, attempt: int, is_main: bool) -> None:
        self.attempt, self.run = attempt, run_dir.root.name
        self.posted: threading.Thread | None = None  # the webhook's last call
        self.is_overtaken: Callable[[], bool] = lambda: False
        self._run_dir, self._writes_steps = run_dir, is_main
        self._steps: JsonlWriter | None = None
        self.events = JsonlWriter(run_dir.attempt_file(run_dir.events, attempt)) if is_main else None

    def step(self, **fields: Any) -> None:
        """The file is made with the first step, after the checkpoints' epoch was taken and before a look for a newer one: of two
        starts at one moment, the records of the one that goes on are read last; one overtaken by then writes none."""
        if self._writes_steps and not self._steps:
            self._steps = JsonlWriter(self._run_dir.take_records(self.attempt))
            self._writes_steps = not self.is_overtaken()
        if self._writes_steps and self._steps:
            self._steps.write(StepRecord(time_utc=utc_now(), attempt=self.attempt, **fields))

    def event(self, kind: str, step: int, detail: str, /, **data: Any) -> None:
        if self.events:
            event = Event(time_utc=utc_now(), kind=kind, step=step, detail=detail, attempt=self.attempt, data=data)
            self.events.write(event, durable=True)
            say(f"{kind}: {detail}")
            self.posted = post(event, self.run) or self.posted


def main(run_dir: str) -> str:
    """Trains until the run is finished, asked to stop, or must not go on: returns "finished", "stopped" or "failed"."""
    stop = StopFlag()
    directory = RunDir(Path(run_dir))
    spec = specs.load(directory.spec)
    here = place()
    # on fewer nodes than it was launched for (cluster.min_nodes) fewer data-parallel ranks share the same batch
    spec.layout = shrunk(spec.layout, here.world_size, spec.optim.batch_sequences)
    device, dtype = _hardware(spec, here)
    memory = keep_memory(device)
    if here.world_size > 1:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"tcp://{here.master_addr}:{here.master_port}",
            rank=here.rank,
            world_size=here.world_size,
            timeout=timedelta(seconds=1.5 * spec.cluster.hang_timeout_slow_s),  # the keepers' watch comes first
            device_id=device if device.type == "cuda" else None,
        )
    recorder: RunRecorder | None = None
    try:
        ranks = place_ranks(spec.layout, device)
        recorder = RunRecorder(directory, _agreed_attempt(directory, ranks), ranks.is_main)
        measured = spec.carbon.measure and here.local_rank == 0
        mirrored = spec.dashboard.wandb == "online" and ranks.is_main
        with (
            sampling(directory.root, recorder.attempt, spec.carbon.sample_s) if measured else nullcontext(),
            mirroring(directory.root) if mirrored else nullcontext(),
            directory.at_work() if ranks.is_main else nullcontext(),
        ):
            try:
                return _train(spec, directory, here, ranks, dtype, memory, recorder, stop)
            except (CheckpointError, Fenced) as error:  # told to a person as it is; every rank has it
                recorder.event("failed", 0, str(error), fenced=isinstance(error, Fenced))
                return "failed"
    finally:
        if recorder and recorder.posted:  # the last word, such as "failed"
            recorder.posted.join(10)
        if dist.is_initialized():
            dist.destroy_process_group()


def _train(
    spec: specs.RunSpec,
    directory: RunDir,
    here: Place,
    ranks: Ranks,
    dtype: torch.dtype,
    memory: str,
    recorder: RunRecorder,
    stop: StopFlag,
) -> str:
    prepared = PreparedData.load(directory.data.read_text().strip())
    loader = spec.loader(prepared)
    place_of = spec.checkpoint.url or str(directory.checkpoints)
    claimed_by = directory.identity() if spec.checkpoint.url else None  # what lies in the run's directory is its own
    store = CheckpointStore(place_of, spec.checkpoint, on_event=recorder.event, run_id=claimed_by)
    recorder.is_overtaken = store.is_overtaken
    rank_flops = flops_per_token(spec.model) * spec.batch_tokens * spec.steps / spec.layout.gpus
    choices = choose(ranks.device, spec.compile, rank_flops, spec.layout)
    prepare(choices, ranks.mesh)
    past = _past_events(directory, ranks)
    config = TrainConfig(
        seed=spec.seed,
        steps=spec.steps,
        eval_every_steps=spec.eval_every_steps,
        eval_rows_per_source=spec.eval_rows_per_source,
        compute_dtype=dtype,
        compiled=choices.compile,
        model=spec.model,
        layout=spec.layout,
        optim=spec.optim,
        checkpoint=spec.checkpoint,
        vet_steps=spec.spikes.vet_steps,
        mttf_s=learnt_mttf_s(mttf_s(spec), *failures_so_far(past)),
        gpu=spec.gpu,
    )
    kind = str(dtype).removeprefix("torch.")
    recorder.event(
        "started",
        0,
        f"attempt {recorder.attempt} on {ranks.dp} rank(s), {ranks.device.type}, {kind}, {choices.why}; memory: {memory}",
        ranks=ranks.dp,
        device=ranks.device.type,
        precision=kind,
        compiled=choices.compile,
        threads=torch.get_num_threads(),
        host=here.node,
        node_list=os.environ.get("SLURM_STEP_NODELIST", here.node),
        job_id=here.job_id,
        restart=here.restart_count,
        nodes=here.world_size // here.local_size,
        gpus=here.world_size,
    )
    told_saved = max((e.step for e in past if e.kind == "saved"), default=0)
    if told_saved and not store.has_committed():
        raise CheckpointError(
            f"this run has saved step {told_saved:,}, and {place_of} holds no checkpoint: put them back, or say where they are "
            "(checkpoint.url); to start from the first step, launch under another name"
        )
    watch = SpikeWatch(
        spec.spikes,
        past,
        store.history_steps,
        loader.data_batch,
        recorder.event,
        changes=[spec.optim.warmup_steps + 1],
    )
    make: Callable[..., Trainer] = Trainer
    if directory.faults.exists():
        from orchestrator.faulty_trainer import FaultyTrainer

        make = partial(FaultyTrainer, faults=directory.faults)
        recorder.event("faults", 0, f"faults are injected on purpose: {directory.faults}")
    if directory.cancelled.exists():  # its signal came before this process could hear one
        stop.ask("cancelled")
    pause_step = directory.pause_step()

    def stop_requested() -> str | None:
        reached = pause_step is not None and trainer.step + 1 >= pause_step
        # looked at again there: a sweep without halving has taken it away
        return stop.requested or (PAUSE if reached and directory.pause_step() is not None else None)

    def profiled(kind: str, step: int, detail: str) -> None:
        recorder.event(kind, step, detail)
        if not ranks.is_main:
            say(f"{kind}: {detail}")  # in its own log

    profiler = StepProfiler(
        spec.profile,
        directory.profiles,
        recorder.attempt,
        here.rank,
        ranks.device,
        profiled,
        partial(pulse, "save"),
    )
    trainer = make(config, ranks, loader, store, recorder, stop_requested, watch, here.node, pulse, profiler)
    budgeted = ranks.is_main and (spec.carbon.budget_kwh is not None or spec.carbon.budget_t_co2e is not None)
    with _BudgetWatch(directory, recorder, stop) if budgeted else nullcontext():
        ended = trainer.run()
    profiler.end()
    pulse("end", trainer.step)
    if ended == "failed":
        recorder.event("failed", trainer.step, f"step {trainer.step}: {watch.said}; {_GO_ON}")
        return "failed"
    saved = store.saved_step == trainer.step
    newest = "none" if store.saved_step is None else f"of step {store.saved_step}"
    if ended == "stopped":
        # another rank may have heard first, and this one a signal that goes before that rank's
        why = first_told([*trainer.stop_reasons, stop.requested])
        said = f"asked to stop ({why}): " + (
            f"saved at step {trainer.step} of {spec.steps}"
            if saved
            else f"NOT saved at step {trainer.step} of {spec.steps}, the newest checkpoint is {newest} (see save_failed)"
        )
        recorder.event("stopped", trainer.step, said, paused=why == PAUSE, saved_step=store.saved_step, why=why)
        return "stopped"
    if not saved:
        raise CheckpointError(
            f"all {trainer.step} steps are trained, but the newest checkpoint is {newest}: see the save_failed events; mend the "
            "place of the checkpoints and run the same command again"
        )
    sample, said = _sample(trainer, prepared, loader), f"finished: {trainer.step} steps"
    if sample and ranks.is_main:
        try:
            directory.samples.mkdir(exist_ok=True)
            (directory.samples / f"step-{trainer.step:09d}.txt").write_text(sample, encoding="utf-8")
        except OSError as error:  # the model is safe
            said += f"; its sample could not be written: {error}"
    recorder.event("finished", trainer.step, said, sample=sample)
    return "finished"


def _sample(trainer: Trainer, prepared: PreparedData, loader: Loader) -> str:
    """A held-out beginning and how the model goes on; every rank takes part."""
    for source in sorted(loader.sources, key=lambda s: -loader.proportions[s]):
        rows = loader.held_out_rows(source, 1)
        if len(rows):
            prompt = [int(t) for t in rows[0][:32]]
            tokens = generate(trainer.model, prompt, 96, trainer.ranks.device)
            tokenizer = prepared.tokenizer()
            return f"{tokenizer.decode(prompt)}⟶{tokenizer.decode(tokens[len(prompt) :])}"
    return ""


def _hardware(spec: specs.RunSpec, here: Place) -> tuple[torch.device, torch.dtype]:
    """The device of this rank and the type it computes in."""
    if spec.gpu.device == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError(f"gpu={spec.gpu.name} needs CUDA, and torch finds none on this node: choose gpu=cpu")
        device = torch.device("cuda", here.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        if "OMP_NUM_THREADS" not in os.environ:  # what the user set stays
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // here.local_size))
    wanted = {"auto": has_bf16(device), "bf16": True, "fp32": False}[spec.precision]
    return device, torch.bfloat16 if wanted else torch.float32


def _past_events(directory: RunDir, ranks: Ranks) -> list[Event]:
    """What rank 0 finds on disk, on all ranks: the others' view of a network file system may be older."""
    found = [read_events(directory.events) if ranks.is_main else []]
    if dist.is_initialized():
        dist.broadcast_object_list(found, src=0)
    return found[0]


def _agreed_attempt(directory: RunDir, ranks: Ranks) -> int:
    """Rank 0 counts the attempts on disk, the others hear of it."""
    attempt = torch.tensor(directory.take_attempt() if ranks.is_main else 0, device=ranks.device)
    if dist.is_initialized():
        dist.broadcast(attempt, src=0)
    return int(attempt.item())
