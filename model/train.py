"""The training loop, and what it needs. Every rank runs it; rank 0 writes the records."""

import math
import resource
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from model.checkpoint.policy import CheckpointConfig, SaveSchedule
from model.checkpoint.store import CheckpointError, CheckpointStore
from model.config import ModelConfig, OptimConfig
from model.cost import GpuConfig, flops_per_token
from model.data.loader import Loader
from model.data.mixture import Skip
from model.evaluate import held_out_losses
from model.layout import Layout
from model.optim import clipped_step, global_grad_norm, learning_rate, make_optimizer, set_learning_rate
from model.own_time import OwnTime
from model.parallel import Ranks, build_model, forward_backward
from model.pipeline import Pipeline
from model.profile import StepProfiler
from model.transformer import Transformer

T = TypeVar("T")

Share = tuple[float, ...]
"""What one rank has computed of a step, in the order in which it is computed: the sums of absolute values of what each stage of
the model returns (the last one the loss), then, from the last stage back, of the gradient at its beginning; 0 for a stage of
another rank. All but pipelines have one stage. Where two computations differ first, there the fault is."""


class SpikeWatch(Protocol):
    """What watches the loss: told of every step, it says what becomes of it (orchestrator/spikes/watch.py). Every rank has one
    and is told the same, so that all do the same."""

    rewind_to: int | None

    @property
    def skips(self) -> Sequence[tuple[int, int]]: ...
    @property
    def lr_scale(self) -> float: ...
    @property
    def usual_grad_norm(self) -> float | None: ...
    def vetted_step(self, step: int) -> int | None: ...
    def withhold(self, step: int, loss: float, grad_norm: float) -> bool: ...
    def recomputed(
        self, step: int, loss: float, grad_norm: float, by_rank: Sequence[tuple[Share, Share, str]]
    ) -> str: ...
    def judged(self, step: int, loss: float, grad_norm: float) -> str: ...
    def rewound(self, step: int) -> None: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, saved: dict[str, Any] | None) -> None: ...


class Recorder(Protocol):
    """Where rank 0's records go; on other ranks it drops them."""

    def step(self, **fields: Any) -> None: ...

    def event(self, kind: str, step: int, detail: str, /, **data: Any) -> None: ...


class Pulse(Protocol):
    """Told what this rank does, for whoever watches it from outside: a few words of memory (slurm/pulse.py)."""

    def __call__(self, phase: str, step: int) -> None: ...
    def stepped(self, own_s: float) -> None: ...


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What the loop takes from the run's configuration."""

    seed: int
    steps: int
    eval_every_steps: int
    eval_rows_per_source: int
    compute_dtype: torch.dtype
    compiled: bool
    model: ModelConfig
    layout: Layout
    optim: OptimConfig
    checkpoint: CheckpointConfig
    vet_steps: int  # clean steps after which a checkpoint is a place to rewind to
    mttf_s: float  # of the whole job: the mean time to a failure
    gpu: GpuConfig


class Trainer:
    """One rank's share of a run: model, optimizer, and the step they stand at."""

    def __init__(
        self,
        config: TrainConfig,
        ranks: Ranks,
        loader: Loader,
        store: CheckpointStore,
        recorder: Recorder,
        stop_requested: Callable[[], str | None],
        watch: SpikeWatch,
        node: str,
        pulse: Pulse,
        profiler: StepProfiler,
    ) -> None:
        self.config, self.ranks, self.loader, self.store = config, ranks, loader, store
        self.recorder, self.stop_requested, self.watch = recorder, stop_requested, watch
        self.node, self.pulse, self.profiler = node, pulse, profiler
        self.model: Transformer | Pipeline = build_model(
            config.model, config.layout, ranks, config.compute_dtype, config.seed, config.compiled
        )
        self.optimizer = make_optimizer(self.model, config.optim)
        self.own_time = OwnTime(self.model, ranks.device)
        self.schedule = SaveSchedule(config.checkpoint, config.vet_steps, config.mttf_s)
        self._steps_s: deque[float] = deque(maxlen=50)
        self.step = 0  # optimizer steps done
        self.asked: str | None = None  # why this rank was asked to stop
        self.stop_reasons: list[str | None] = []  # every rank's `asked`, once they have agreed to stop
        self.share: Share = ()  # of the step computed last
        pipeline = self.model if isinstance(self.model, Pipeline) else None
        self._share_sums = torch.zeros(2 * (pipeline.n_stages if pipeline else 1), device=ranks.device)
        for number, part in enumerate(pipeline.parts if pipeline else [self.model]):
            self._watch_share(part, number * config.layout.pp + pipeline.group.rank() if pipeline else 0)

    @property
    def batch_tokens(self) -> int:
        return self.config.optim.batch_sequences * self.config.model.sequence_length

    def run(self) -> Literal["finished", "stopped", "failed"]:
        """Trains from the newest checkpoint to the last step. "stopped" when asked to, "failed" when a person must look."""
        self.pulse("load", 0)
        self.resume()
        stopping = False
        while self.step < self.config.steps and not stopping:
            self.profiler.step_begins(self.step + 1)
            started = time.perf_counter()
            self.pulse("data", self.step + 1)
            rows_BT = self.next_batch()
            data_s = time.perf_counter() - started
            loss, grad_norm, stopping, out_of_turn = self.forward_backward(rows_BT)
            if stopping:  # before the save: whoever asks may not leave time after it
                self.stop_reasons = self._of_every_rank(self.asked)
            act, max_norm = "apply", self.config.optim.grad_clip
            if self.watch.withhold(self.step + 1, loss, grad_norm.item()):
                act, loss, grad_norm = self.compute_again(rows_BT)
                if act == "clip":
                    act, max_norm = "apply", min(max_norm, self.watch.usual_grad_norm or math.inf)
            if act == "apply" or act == "leave_out":
                self.update(grad_norm, max_norm, act == "apply")
                self._steps_s.append(time.perf_counter() - started)
                self.record(loss, grad_norm, self._steps_s[-1], data_s)
                self.pulse.stepped(data_s + self.own_time.seconds())
            if act == "apply":
                act = self.watch.judged(self.step, loss, grad_norm.item())
            if act == "stop":
                self.store.finish()
                return "failed"
            if act == "rewind":
                self.rewind()
                continue
            if act == "skip":  # the same step, with the next batch
                self.take_skips()
                stopping = False  # nothing has been saved yet: whoever asked is heard again in the step to come
                continue
            if self.step % self.config.eval_every_steps == 0 or self.step == self.config.steps:
                self.evaluate()
            due = self.step >= min(self.schedule.next_step, self.config.steps)
            if due or stopping or out_of_turn:
                self.save(wait=stopping or self.step == self.config.steps)
            self.vet()
        self.pulse("save", self.step)
        self.store.finish()
        return "finished" if self.step >= self.config.steps else "stopped"

    def next_batch(self) -> Tensor:
        """This rank's rows of the step to come: [rows, sequence_length + 1] token ids."""
        return torch.from_numpy(self.loader.batch(self.step, self.ranks.dp_rank, self.ranks.dp)).long()

    def forward_backward(self, rows_BT: Tensor) -> tuple[float, Tensor, bool, bool]:
        """Accumulates the gradient of the global batch's mean loss.

        Returns that loss (nats per token), the global gradient norm, whether any rank was asked to stop, and whether any
        rank's store wants a save out of turn: all the same on every rank.
        """
        self.pulse("compute", self.step + 1)
        self.optimizer.zero_grad()
        self.own_time.reset()
        self._share_sums.zero_()
        rows_BT = rows_BT.to(self.ranks.device, non_blocking=True)
        # FSDP2 averages gradients over the ranks with other tokens: times their number makes it the sum over the global batch.
        scale = self.ranks.dp * self.ranks.cp / self.batch_tokens
        loss_sum = forward_backward(self.model, rows_BT, self.config.layout.microbatch_sequences, scale)
        self.pulse("collective", self.step + 1)
        stages = self.model.group if isinstance(self.model, Pipeline) else None
        grad_norm = global_grad_norm(self.model.parameters(), stages)
        self.asked = self.stop_requested()
        said = torch.tensor([self.asked is not None, self.store.save_due], dtype=loss_sum.dtype, device=loss_sum.device)
        agreed = torch.cat([loss_sum[None] / self.ranks.tp, said])
        if self.ranks.mesh is not None:
            dist.all_reduce(agreed)
        total, stops, saves = agreed.tolist()
        self.share = tuple(self._share_sums.tolist())
        return total / self.batch_tokens, grad_norm, stops > 0, saves > 0

    def _watch_share(self, part: torch.nn.Module, stage: int) -> None:
        """Has a stage's own part of `share` summed up with every microbatch that it trains on."""

        def add(place: int, values: Tensor) -> None:
            self._share_sums[place] += values.detach().abs().sum(dtype=torch.float32)

        def begun(module: object, inputs: tuple[Tensor, ...], begin: Tensor) -> None:
            if begin.requires_grad:  # not in an evaluation
                begin.register_hook(lambda grad: add(-1 - stage, grad))

        def ended(module: object, inputs: tuple[Tensor, ...], end: Tensor) -> None:
            if end.requires_grad:
                add(stage, end)
                if stage > 0:
                    begun(module, inputs, inputs[0])

        part.register_forward_hook(ended)
        if stage == 0:
            part.get_submodule("embedding").register_forward_hook(begun)

    def compute_again(self, rows_BT: Tensor) -> tuple[str, float, Tensor]:
        """A withheld step once more, from the same weights and rows: bad data gives the same again, a hardware fault does not.

        Returns what becomes of it, and the second loss and gradient norm.
        """
        first = self.share
        loss, grad_norm, _, _ = self.forward_backward(rows_BT)
        by_rank = self._of_every_rank((first, self.share, self.node))
        return self.watch.recomputed(self.step + 1, loss, grad_norm.item(), by_rank), loss, grad_norm

    def _of_every_rank(self, own: T) -> list[T]:
        if self.ranks.mesh is None:
            return [own]
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, own)
        return gathered

    def update(self, grad_norm: Tensor, max_norm: float, apply: bool) -> None:
        """One optimizer step. What is not finite never gets here with `apply`."""
        self.step += 1
        self.pulse("update", self.step)
        if apply:
            set_learning_rate(self.optimizer, self.learning_rate())
            clipped_step(self.optimizer, max_norm, grad_norm)

    def learning_rate(self) -> float:
        return learning_rate(self.step, self.config.steps, self.config.optim) * self.watch.lr_scale

    def record(self, loss: float, grad_norm: Tensor, step_s: float, data_s: float) -> None:
        ranks = self.config.layout.gpus
        tokens_per_s = self.batch_tokens / step_s
        peak_flops = ranks * self.config.gpu.peak_bf16_tflops * 1e12
        self.recorder.step(
            step=self.step,
            tokens=self.step * self.batch_tokens,
            loss=loss,
            grad_norm=grad_norm.item(),
            lr=self.learning_rate(),
            step_s=step_s,
            data_s=data_s,
            tokens_per_s=tokens_per_s,
            mfu=tokens_per_s * flops_per_token(self.config.model) / peak_flops,
            data_batch=self.loader.data_batch(self.step - 1),
            memory_bytes=peak_memory_bytes(self.ranks.device),
            clipped=grad_norm.item() > self.config.optim.grad_clip,
        )

    def evaluate(self) -> None:
        """The loss on held-out rows, as an event."""
        self.pulse("evaluate", self.step)
        started = time.perf_counter()
        losses = held_out_losses(
            self.model,
            self.loader,
            self.ranks,
            self.config.eval_rows_per_source,
            self.config.layout.microbatch_sequences,
        )
        if not losses:
            why = "no source has held-out rows" if self.config.eval_rows_per_source else "eval_rows_per_source=0"
            self.recorder.event("evaluated", self.step, f"{why}: nothing to evaluate")
            return
        shares = {s: self.loader.proportions[s] for s in losses}
        mean = sum(losses[s] * shares[s] for s in losses) / sum(shares.values())
        self.recorder.event(
            "evaluated",
            self.step,
            f"held-out loss {mean:.3f} nats per token",
            loss=mean,
            loss_by_source=losses,
            seconds=time.perf_counter() - started,
        )

    def save(self, wait: bool) -> None:
        self.pulse("save", self.step)
        started = time.perf_counter()
        extra = {"step": self.step, "spikes": self.watch.state()}
        if self.schedule.is_auto:
            extra["auto_every_steps"] = self.schedule.every_steps
        if self.store.save(self.step, training_state(self.model, self.optimizer), extra, wait=wait):
            self.schedule.began(self.step, None if wait else time.perf_counter() - started)
        if self.schedule.is_auto and not wait:
            self.tune_interval()
        self.schedule.went_by(self.step)

    def tune_interval(self) -> None:
        """The interval between saves after what steps and saves have taken, on the slowest rank: the same on every rank."""
        stall_s = self.schedule.stall_s
        if stall_s is None or not self._steps_s:
            return
        took = torch.tensor(
            [median(self._steps_s), stall_s, self.store.write_s], dtype=torch.float32, device=self.ranks.device
        )
        if self.ranks.mesh is not None:
            dist.all_reduce(took, op=dist.ReduceOp.MAX)
        step_s, stall_s, write_s = took.tolist()
        before = self.schedule.every_steps
        if changed := self.schedule.tune(step_s, stall_s, write_s):
            self.recorder.event(
                "save_interval",
                self.step,
                f"saves every {changed.steps} steps from now, before every {before}: {changed.why}",
                every_steps=changed.steps,
                step_s=step_s,
                stall_s=stall_s,
                write_s=write_s,
                mttf_s=self.config.mttf_s if math.isfinite(self.config.mttf_s) else None,
            )

    def vet(self) -> None:
        """Marks the checkpoint that has proved healthy by now, so that retention keeps it as a place to rewind to."""
        step = self.watch.vetted_step(self.step)
        if step is not None and step in self.schedule.saved_steps:
            self.store.vet(step)

    def resume(self) -> None:
        """Stands where the newest valid checkpoint does; at step 0 where there is none.

        A rewind that was decided and not yet done, because the run was killed in between, is done now.
        """
        if self.watch.rewind_to is not None:
            self.rewind()
            return
        loaded = self.store.load_latest(training_state(self.model, self.optimizer))
        if loaded is not None:
            self.step = loaded.step
            self.watch.restore(loaded.extra.get("spikes"))
            self.recorder.event("resumed", self.step, f"resumed from the checkpoint of step {self.step}")
            self.schedule.stand_at(self.step, self.store.history_steps(), loaded.extra.get("auto_every_steps"))
        self.take_skips()

    def rewind(self) -> None:
        """Back to the checkpoint that the watch has chosen, or the next older one that is whole."""
        self.pulse("load", self.step)
        to_step = self.watch.rewind_to
        loaded = self.store.load_latest(training_state(self.model, self.optimizer), max_step=to_step)
        if loaded is None:
            raise CheckpointError(
                f"the run must go back to step {to_step}, and no checkpoint is left from there or before: to go on from "
                "its newest checkpoint instead, change what spikes.* allows and launch it again"
            )
        self.step = loaded.step
        self.watch.restore(loaded.extra.get("spikes"))
        self.watch.rewound(self.step)
        self.schedule.stand_at(self.step, self.store.history_steps(), loaded.extra.get("auto_every_steps"))
        self.take_skips()

    def take_skips(self) -> None:
        self.loader.skips = [Skip(first, end) for first, end in self.watch.skips]


def training_state(model: Transformer | Pipeline, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters and AdamW's moments by name: the live tensors (DTensors where sharded), to save or to load in place.

    What is computed from the step (learning rate, data) or stands in the configuration is not state.
    """
    for module in model.modules():  # an evaluation leaves parameters gathered, and the optimizer knows the shards
        if isinstance(module, FSDPModule):
            module.reshard()
    state: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        state[f"model.{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            state[f"optim.{name}.{key}"] = value
    return state


def peak_memory_bytes(device: torch.device) -> int:
    """The most that this rank has held: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
