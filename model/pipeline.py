"""Pipeline parallelism: the layers cut into stages, each on its own ranks, scheduled by torch.distributed.pipelining.

The parts of one rank are whole in themselves (model/transformer.py): the first embeds, the last returns the loss, and names of
parameters are those of the whole model, so that checkpoints do not know of pipelines.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    RESHARD,
    UNSHARD,
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)

from model.layout import Layout
from model.transformer import Transformer


class Pipeline(nn.Module):
    """This rank's parts of the model, and the schedule that runs them together with the other ranks'."""

    def __init__(
        self, parts: Sequence[Transformer], layout: Layout, group: dist.ProcessGroup, device: torch.device
    ) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.config, self.row_multiple = parts[0].config, parts[0].row_multiple
        self.layout, self.group, self.device = layout, group, device
        self.n_stages = layout.pp * len(parts)
        self._schedule: Any = None
        self._shape: tuple[int, ...] = ()
        self._scale = 1.0

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """As the whole model names them."""
        for part in self.parts:
            yield from part.named_parameters(*args, **kwargs)

    def forward_backward(self, rows_BT: Tensor, scale: float) -> Tensor:
        """See model.parallel.forward_backward."""
        if self._shape != rows_BT.shape:
            self._schedule, self._shape = self._make_schedule(rows_BT), tuple(rows_BT.shape)
        self._scale = scale
        losses: list[Tensor] = []
        inputs = [rows_BT[:, :-1]] if self.group.rank() == 0 else []
        target = rows_BT if self._has(self.n_stages - 1) else None
        self._schedule.step(*inputs, target=target, losses=losses, return_outputs=False, targets_BT=rows_BT[:, 1:])
        total = torch.stack(losses).double().sum() / scale if losses else torch.zeros((), dtype=torch.float64)
        return total.detach().to(self.device)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        """As the whole model's, on every rank, without gradients: one stage after the other, for evaluation."""
        assert not torch.is_grad_enabled(), "a pipeline trains by forward_backward"
        ranks = dist.get_process_group_ranks(self.group)
        x = tokens_BT
        for stage in range(self.n_stages):
            here, there = ranks[stage % len(ranks)], ranks[(stage + 1) % len(ranks)]
            if self._has(stage):
                x = self.parts[stage // len(ranks)](x, targets_BT)
                if stage < self.n_stages - 1:
                    dist.send(x.contiguous(), there, group=self.group)
            elif self._has(stage + 1) and stage < self.n_stages - 1:
                x = self._hidden(len(tokens_BT), tokens_BT.shape[1])
                dist.recv(x, here, group=self.group)
        if not self._has(self.n_stages - 1):
            x = self._result(tokens_BT, targets_BT)
        dist.broadcast(x, ranks[(self.n_stages - 1) % len(ranks)], group=self.group)
        return x

    def _has(self, stage: int) -> bool:
        return stage % self.group.size() == self.group.rank()

    def _hidden(self, batch: int, tokens: int) -> Tensor:
        """What goes from one stage to the next: [B, T / (cp tp), D]."""
        part = self.parts[0]
        assert isinstance(part, Transformer)
        shape = (batch, tokens // part.row_shares, self.config.dim)
        return torch.empty(shape, dtype=part.compute_dtype, device=self.device)

    def _result(self, tokens_BT: Tensor, targets_BT: Tensor | None) -> Tensor:
        if targets_BT is not None:
            return torch.empty((), device=self.device)
        part = self.parts[0]
        assert isinstance(part, Transformer)
        return torch.empty(*tokens_BT.shape, self.config.vocab_size, dtype=part.compute_dtype, device=self.device)

    def _make_schedule(self, rows_BT: Tensor) -> Any:
        size, tokens = self.layout.microbatch_sequences, rows_BT.shape[1] - 1
        hidden, loss = self._hidden(size, tokens).requires_grad_(), torch.empty((), device=self.device).requires_grad_()
        stages: list[Any] = []
        for number, part in enumerate(self.parts):
            index = number * self.layout.pp + self.group.rank()
            stages.append(
                PipelineStage(
                    part,
                    index,
                    self.n_stages,
                    self.device,
                    input_args=rows_BT[:size, :-1] if index == 0 else hidden,
                    output_args=loss if index == self.n_stages - 1 else hidden,
                    group=self.group,
                )
            )
        microbatches = len(rows_BT) // size
        # The last part returns the summed loss itself; gradients are not divided by the number of microbatches.
        options: Any = {"loss_fn": lambda loss, _: loss * self._scale, "scale_grads": False}
        if self.layout.pipeline_schedule == "1f1b":
            return Schedule1F1B(stages[0], microbatches, **options)
        kind = (
            ScheduleInterleaved1F1B
            if self.layout.pipeline_schedule == "interleaved_1f1b"
            else ScheduleInterleavedZeroBubble
        )
        schedule = kind(stages, microbatches, **options)
        order, rank = schedule.pipeline_order_with_comms, self.group.rank()
        order[rank] = gathered_once(order[rank])
        return schedule


def gathered_once(actions: Sequence[Any]) -> list[Any]:
    """A rank's schedule with each part gathered before its first pass and sharded again after its last.

    torch keeps three parts gathered and drops the others, so that of four and more each is gathered twice for every round of
    microbatches: for half of the memory or less, all parameters over the network again and again (model/parallel.py).
    """
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for number, action in enumerate(actions):
        if action.computation_type is UNSHARD:
            first.setdefault(action.stage_index, number)
        elif action.computation_type is RESHARD:
            last[action.stage_index] = number
    kept = {UNSHARD: first, RESHARD: last}
    return [
        action
        for number, action in enumerate(actions)
        if action.computation_type not in kept or kept[action.computation_type][action.stage_index] == number
    ]
