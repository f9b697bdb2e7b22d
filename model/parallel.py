"""Layout to ranks: the device mesh, tensor and sequence parallelism, sharded parameters (FSDP2, HSDP), pipeline stages.

A rank's place in the mesh (pp, dp_replicate, fsdp, tp) is its number, tensor ranks next to each other. Context parallel ranks see
other tokens of the same rows; to FSDP2 they are data-parallel ranks like the others (fsdp = dp_shard x cp).
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from model.attention import ContextParallel
from model.config import ModelConfig
from model.layout import Layout, stage_layers
from model.pipeline import Pipeline
from model.transformer import Transformer


@dataclass(frozen=True)
class Ranks:
    """This rank's place among the others. One rank alone needs no process group."""

    device: torch.device
    dp_rank: int = 0  # which rows
    dp: int = 1
    tp: int = 1  # ranks that each return the loss of the same tokens
    cp: int = 1  # ranks that each return the loss of some tokens of the same rows
    mesh: DeviceMesh | None = None
    context: ContextParallel | None = None

    @property
    def is_main(self) -> bool:
        return not dist.is_initialized() or dist.get_rank() == 0


def place_ranks(layout: Layout, device: torch.device) -> Ranks:
    """Builds the mesh over an initialised process group of `layout.gpus` ranks; no group for a single rank."""
    if layout.gpus == 1:
        return Ranks(device)
    shards = layout.dp_shard * layout.cp
    names = ("pp", "dp_replicate", "fsdp", "tp")
    mesh = init_device_mesh(device.type, (layout.pp, layout.dp_replicate, shards, layout.tp), mesh_dim_names=names)
    if layout.tp > 1:
        mesh["fsdp", "tp"]._flatten()  # the gradient norm is then summed over both in one go
    _, replica, shard, _ = mesh.get_coordinate() or (0, 0, 0, 0)
    context = None
    if layout.cp > 1:
        by_row = init_device_mesh(
            device.type, (layout.pp, layout.dp, layout.cp, layout.tp), mesh_dim_names=("pp", "dp", "cp", "tp")
        )
        context = ContextParallel(by_row["cp"].get_group())
    dp_rank = replica * layout.dp_shard + shard // layout.cp
    return Ranks(device, dp_rank, layout.dp, layout.tp, layout.cp, mesh, context)


def build_model(
    config: ModelConfig,
    layout: Layout,
    ranks: Ranks,
    compute_dtype: torch.dtype,
    seed: int,
    compiled: bool = False,
) -> Transformer | Pipeline:
    """A model laid over the ranks and initialised: the same values whatever the layout. Parameters are fp32 shards;
    each layer's are gathered in `compute_dtype`, gradients are reduced in fp32. `compiled`: layers and loss, for training.
    """
    stage = ranks.mesh["pp"].get_local_rank() if ranks.mesh is not None else 0
    parts = []
    for layers in stage_layers(config.n_layers, layout.pp, layout.virtual_stages)[stage :: layout.pp]:
        part = shape_part(config, layout, ranks, compute_dtype, layers)
        part.to_empty(device=ranks.device)
        part.initialize(seed)
        if compiled:
            part.compile_training()
        parts.append(part)
    if layout.pp == 1:
        return parts[0]
    assert ranks.mesh is not None
    return Pipeline(parts, layout, ranks.mesh["pp"].get_group(), ranks.device)


def shape_part(
    config: ModelConfig, layout: Layout, ranks: Ranks, compute_dtype: torch.dtype, layers: range
) -> Transformer:
    """What this rank has of the model's `layers`: on the meta device, without values."""
    with torch.device("meta"):
        part = Transformer(config, compute_dtype, layout.recompute, layers)
    if ranks.mesh is None:
        return part
    part.share_rows(ranks.context, layout.tp)
    if layout.tp > 1:
        _share_matrices(part, ranks.mesh["tp"])
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = ranks.mesh["dp_replicate", "fsdp"] if layout.dp_replicate > 1 else ranks.mesh["fsdp"]
    # A pipeline stage is needed once for each microbatch: it stays gathered until the last.
    reshard = layout.pp == 1
    for layer in part.layers.values():
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    return part


def _share_matrices(part: Transformer, tp: DeviceMesh) -> None:
    """Tensor parallelism (Megatron, arXiv 1909.08053) with sequence parallelism (arXiv 2205.05198): each rank has some heads,
    some of the feed-forward width and some of the vocabulary's logits; between the sublayers, some of the tokens.
    """
    tokens, whole = Shard(1), Replicate()  # of [B, T, D]
    edges: dict[str, object] = {}
    if part.is_first:
        # By columns: by rows, each rank's gradient would be of the whole vocabulary until it is reduced.
        edges["embedding"] = ColwiseParallel(output_layouts=tokens)
    if part.is_last:
        edges["norm"] = SequenceParallel()
        edges["output"] = ColwiseParallel(input_layouts=tokens, output_layouts=whole)
    parallelize_module(part, tp, edges)  # type: ignore[arg-type]
    for layer in part.layers.values():
        parallelize_module(
            layer,
            tp,
            {
                "attention_norm": SequenceParallel(),
                "attention": PrepareModuleInput(input_layouts=(tokens, None), desired_input_layouts=(whole, None)),
                "attention.wq": ColwiseParallel(),
                "attention.wk": ColwiseParallel(),
                "attention.wv": ColwiseParallel(),
                "attention.wo": RowwiseParallel(output_layouts=tokens),
                "ffn_norm": SequenceParallel(),
                "ffn": PrepareModuleInput(input_layouts=(tokens,), desired_input_layouts=(whole,)),
                "ffn.w1": ColwiseParallel(),
                "ffn.w3": ColwiseParallel(),
                "ffn.w2": RowwiseParallel(output_layouts=tokens),
            },
        )


def forward_backward(model: nn.Module, rows_BT: Tensor, microbatch: int, scale: float) -> Tensor:
    """Adds the gradients of `scale` times the summed loss of `rows_BT` (with one token more than the model sees), a microbatch
    at a time. Returns this rank's part of that sum, not scaled: nats, fp64; 0 on all but the last stage of a pipeline.

    FSDP2 averages gradients over the ranks that it shards over: a `scale` with their number in it makes it the sum.
    """
    if isinstance(model, Pipeline):
        return model.forward_backward(rows_BT, scale)
    loss_sum = torch.zeros((), dtype=torch.float64, device=rows_BT.device)
    for start in range(0, len(rows_BT), microbatch):
        if isinstance(model, FSDPModule):
            # Each microbatch's gradients are reduced to this rank's shards: whole ones would not fit where sharding is
            # needed. Replicas exchange theirs once a step; until then FSDP2 keeps their sum where zero_grad does not reach,
            # so that a step must not be abandoned in the middle.
            model.set_requires_all_reduce(start + microbatch >= len(rows_BT))
        rows = rows_BT[start : start + microbatch]
        loss = model(rows[:, :-1], rows[:, 1:])
        (loss * scale).backward()
        loss_sum += loss.detach()
    return loss_sum
