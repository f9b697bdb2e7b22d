"""Layout to ranks: the device mesh, sharded parameters (FSDP2, HSDP) and the type that is computed in."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from model.config import ModelConfig
from model.layout import Layout
from model.transformer import Transformer


@dataclass(frozen=True)
class Ranks:
    """This rank's place among the data-parallel ones. One rank alone needs no process group."""

    device: torch.device
    dp_rank: int = 0
    dp: int = 1
    mesh: DeviceMesh | None = None

    @property
    def is_main(self) -> bool:
        return not dist.is_initialized() or dist.get_rank() == 0


def place_ranks(layout: Layout, device: torch.device) -> Ranks:
    """Builds the mesh over an initialised process group of `layout.gpus` ranks; no group for a single rank."""
    if layout.gpus == 1:
        return Ranks(device)
    mesh = init_device_mesh(
        device.type, (layout.dp_replicate, layout.dp_shard), mesh_dim_names=("dp_replicate", "dp_shard")
    )
    return Ranks(device, dp_rank=dist.get_rank(), dp=layout.dp, mesh=mesh)


def build_model(
    config: ModelConfig, layout: Layout, ranks: Ranks, compute_dtype: torch.dtype, seed: int
) -> Transformer:
    """A model laid over the ranks and initialised: the same values whatever the layout. Parameters are fp32 shards;
    each layer's are gathered in `compute_dtype`, gradients are reduced in fp32.
    """
    with torch.device("meta"):
        model = Transformer(config, compute_dtype, layout.recompute)
    if ranks.mesh is not None:
        policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        mesh = ranks.mesh if layout.dp_replicate > 1 else ranks.mesh["dp_shard"]
        for layer in model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
    model.to_empty(device=ranks.device)
    model.initialize(seed)
    return model


def average_gradients_only_on_last(model: nn.Module, last: bool) -> None:
    """With gradient accumulation, ranks exchange gradients once a step, after the last microbatch."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
