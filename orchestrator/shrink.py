"""On how many nodes a run can go on, and with which layout: the same global batch on fewer data-parallel ranks. Pure."""

from dataclasses import replace

from model.layout import Layout
from slurm.request import ClusterConfig


def shrunk(layout: Layout, gpus: int, batch_sequences: int) -> Layout:
    """The layout on another number of GPUs; tp, pp and cp stay as they are. Replicas go first, then the shards are fewer.

    Raises ValueError, with the numbers, where the GPUs or the batch do not divide.
    """
    if gpus == layout.gpus:
        return layout
    rest = layout.tp * layout.pp * layout.cp
    if gpus < rest or gpus % rest:
        raise ValueError(f"{gpus} GPUs do not divide by tp {layout.tp} x pp {layout.pp} x cp {layout.cp} = {rest}")
    dp = gpus // rest
    dp_shard = layout.dp_shard if dp % layout.dp_shard == 0 else dp
    smaller = replace(layout, dp_shard=dp_shard, dp_replicate=dp // dp_shard)
    if wrong := smaller.batch_problems(batch_sequences):
        raise ValueError(wrong[0])
    return smaller


def nodes_to_use(cluster: ClusterConfig, layout: Layout, batch_sequences: int, fit: int) -> int | None:
    """Of `fit` nodes, how many the ranks get: all that the run wants, or the most with which it can go on and that
    cluster.min_nodes allows; None where these are too few."""
    if fit >= cluster.nodes:
        return cluster.nodes
    return next(iter(smaller(cluster, layout, batch_sequences, fit)), None)


def smaller(cluster: ClusterConfig, layout: Layout, batch_sequences: int, most: int) -> list[int]:
    """The numbers of nodes below cluster.nodes, up to `most`, that cluster.min_nodes allows and the batch divides by."""
    found = []
    rest, rows = layout.tp * layout.pp * layout.cp, layout.microbatch_sequences
    for nodes in range(min(most, cluster.nodes - 1), (cluster.min_nodes or cluster.nodes) - 1, -1):
        gpus = nodes * cluster.gpus_per_node
        if gpus % rest or batch_sequences % (gpus // rest * rows or 1):
            continue  # most, and an exception takes long
        try:
            shrunk(layout, gpus, batch_sequences)
        except ValueError:
            continue
        found.append(nodes)
    return found


def problems(cluster: ClusterConfig, layout: Layout, batch_sequences: int) -> list[str]:
    """Why cluster.min_nodes promises what can't be."""
    least, nodes = cluster.min_nodes, cluster.nodes
    if layout.microbatch_sequences == 0:
        layout = replace(layout, microbatch_sequences=1)  # with which the most can be
    if least is None or layout.has_open_degrees or least >= nodes or smaller(cluster, layout, batch_sequences, nodes):
        return []
    try:
        shrunk(layout, (nodes - 1) * cluster.gpus_per_node, batch_sequences)
        why = ""
    except ValueError as error:
        why = str(error)
    return [
        f"cluster.min_nodes={least}: with no number of nodes from {least} to {nodes - 1} can the run go on; "
        f"with {nodes - 1}, {why}: lower cluster.min_nodes, choose another optim.batch_sequences or "
        "layout.microbatch_sequences, or set cluster.min_nodes=null"
    ]
