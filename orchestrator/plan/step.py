"""How long one optimizer step takes: matrix products in waves of tiles, memory traffic, links, the pipeline.

Physical: every time is FLOPs over an achievable rate, bytes over a link, or a latency. The constants of a GPU are in
hydra_conf/gpu/, those below hold for all of them; docs/numbers.md says where each comes from. No constant belongs to a
model or to a row of a table.
"""

import math
from dataclasses import asdict, dataclass
from functools import lru_cache

from model.config import ModelConfig
from model.cost import GpuConfig, flops_per_token
from model.layout import Layout
from orchestrator.plan.config import PlanConfig
from orchestrator.plan.memory import layer_parameters, layers_by_stage

HBM_FRACTION = 0.80  # of the bandwidth, that elementwise kernels reach
INTRA_FRACTION = 0.77  # of NVLink, that NCCL's bus bandwidth reaches
INTER_FRACTION = 0.80  # of InfiniBand
INTRA_LATENCY_S = 3.4e-6  # one hop of a ring
INTER_LATENCY_S = 14e-6
KERNEL_S = 4e-6  # a kernel's launch, first loads and drain, that nothing hides
KERNELS_PER_LAYER = 14  # of a forward pass
# An output tile of a matrix product (rows, columns), and its rate against the best.
TILES = ((256, 128, 1.0), (128, 128, 0.92), (128, 64, 0.75))
PROLOGUE_K = 192  # of the inner dimension: filling the pipeline of a tile, and writing it
MAX_SPLIT_K = 8
BACKWARD_ATTENTION = 2.5  # FLOPs of flash attention's backward pass against the forward's (arXiv 2205.14135)
BACKWARD_ATTENTION_RATE = 0.85  # its rate against the forward's (arXiv 2307.08691, figures 4 to 6)
CONTENTION = 0.22  # of the time that communication is hidden behind compute, compute loses: cores and memory
STRAGGLING = 0.03  # a step waits for its slowest rank


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimizer step; the parts add up to `step_s`. `exposed`: what is not hidden behind compute."""

    matmul_s: float
    attention_s: float
    elementwise_s: float  # norms, rotations, activations, kernels' launches
    recompute_s: float
    head_s: float  # embedding, logits and loss
    exposed_tp_s: float  # tensor parallel, inside a node
    exposed_cp_s: float
    exposed_dp_s: float  # gathering parameters, reducing gradients
    exposed_pp_s: float  # sending activations between stages
    bubble_s: float
    contention_s: float
    optimizer_s: float
    straggling_s: float
    exposed_again_s: float  # communication that recomputation repeats, a part of recompute_s
    exposed_between_nodes_s: float  # of `exposed_s`, over the network; the rest over a node's own links
    step_s: float
    tokens_per_s: float  # all ranks
    tokens_per_s_per_gpu: float
    mfu: float
    hfu: float  # with what is recomputed
    model_tflops_per_gpu: float
    hardware_tflops_per_gpu: float

    @property
    def parts_s(self) -> dict[str, float]:
        """What adds up to `step_s`, by name."""
        whole = ("exposed_again_s", "exposed_between_nodes_s", "step_s", "tokens_per_s")
        return {name: value for name, value in asdict(self).items() if name.endswith("_s") and name not in whole}

    @property
    def exposed_s(self) -> float:
        """Communication that nothing hides."""
        return self.exposed_again_s + sum(value for name, value in self.parts_s.items() if name.startswith("exposed_"))


def forecast_step(
    model: ModelConfig, gpu: GpuConfig, gpus_per_node: int, layout: Layout, batch_sequences: int, plan: PlanConfig
) -> Step:
    """A calibrated GPU (`gpu.matmul_fraction` is known) and a closed layout with recompute none, selective or full."""
    assert gpu.matmul_fraction
    assert gpu.attention_fraction
    assert gpu.cores
    rate, cores = gpu.peak_bf16_tflops * 1e12 * gpu.matmul_fraction, gpu.cores
    d, kv, f, tp = model.dim, model.kv_dim, model.ffn_dim, layout.tp
    microbatches = layout.accumulation_steps(batch_sequences)
    tokens = layout.microbatch_sequences * model.sequence_length // layout.cp
    peak = gpu.peak_bf16_tflops * 1e12
    memory_bytes_per_s = gpu.memory_gb_per_s * 1e9 * HBM_FRACTION

    def product_s(rows: int, inner: int, columns: int) -> float:
        return matmul_s(rows, inner, columns, rate, cores, gpu.memory_gb_per_s * 1e9)

    # ---- one layer, one microbatch, one rank
    products = ((d, (d + 2 * kv) // tp), (d // tp, d), (d, 2 * f // tp), (f // tp, d))  # inner, columns
    matmul_forward = sum(product_s(tokens, k, n) for k, n in products)
    matmul_backward = sum(product_s(tokens, n, k) + product_s(k, tokens, n) for k, n in products)
    attention_flops = 2 * tokens * model.sequence_length * d / tp  # QK^T and AV, causal half
    if plan.attention == "flash":
        attention_rate = peak * gpu.attention_fraction * min(1.0, model.head_dim / 128) ** 0.5
        attention_forward = attention_flops / attention_rate
        attention_backward = BACKWARD_ATTENTION * attention_flops / (attention_rate * BACKWARD_ATTENTION_RATE)
    else:
        # Whole squares, and each score through memory: written, softmax in and out, dropout in, out and mask, read.
        scores = tokens * model.sequence_length * model.n_heads / tp
        through_memory = scores * 13 / memory_bytes_per_s
        squares = 2 * attention_flops / (peak * gpu.matmul_fraction * 0.6)  # inner dimension of a head only
        attention_forward = squares + through_memory
        attention_backward = 2 * squares + through_memory
    residual = 1 / tp if plan.sequence_parallel else 1.0
    elements = 9 * d * residual + (2 * (d + kv) + 3 * f) / tp
    elementwise_forward = 2 * tokens * elements / memory_bytes_per_s + KERNELS_PER_LAYER * KERNEL_S
    elementwise_backward = 2 * 2 * tokens * elements / memory_bytes_per_s + 2 * KERNELS_PER_LAYER * KERNEL_S
    # Tensor and sequence parallel: two all-gathers and two reduce-scatters of the residual stream in each direction.
    tp_pass = 4 * collective_s(2 * tokens * d, tp, tp, gpu)
    tp_forward = exposed_s(tp_pass, matmul_forward, tp, plan)
    tp_backward = exposed_s(tp_pass, matmul_backward, tp, plan)
    tp_contention_forward = CONTENTION * (tp_pass - tp_forward)
    tp_contention_backward = CONTENTION * (tp_pass - tp_backward)
    # Context parallel: keys and values go around the ring; hidden behind attention as far as that reaches.
    one_node = layout.gpus <= gpus_per_node
    node_ranks = max(1, gpus_per_node // tp)  # of one tensor parallel index, on one node
    cp_local = layout.cp if one_node else math.gcd(layout.cp, node_ranks)
    cp_pass = collective_s(2 * 2 * tokens * layout.cp * kv / tp, layout.cp, cp_local, gpu)
    cp_forward, cp_backward = max(0.0, cp_pass - attention_forward), max(0.0, 2 * cp_pass - attention_backward)

    # The backward pass needs no output of the layer's last product, and stops computing again before it (torch since 2.1).
    stops_early = layout.recompute == "full" and not plan.recompute_whole
    spared = product_s(tokens, f // tp, d) + (tp_forward + tp_contention_forward) / 4 if stops_early else 0.0
    forward_layer = (
        matmul_forward + attention_forward + elementwise_forward + tp_forward + tp_contention_forward + cp_forward
    )
    again = tp_again = cp_again = 0.0
    alternate = layout.recompute == "selective" and plan.recompute_alternate
    if layout.recompute == "full":
        again = forward_layer - spared
        tp_again, cp_again = tp_forward * (0.75 if stops_early else 1), cp_forward
    elif layout.recompute == "selective" and plan.attention == "unfused":
        again = elementwise_forward + attention_forward  # arXiv 2205.05198's
    elif layout.recompute == "selective":  # both sublayers' inputs are gathered again, for no product to hide it
        tp_again = tp_pass / 2
        again = elementwise_forward + tp_again
    if alternate:  # of q, k, v, attention's output, w1, w3, w2
        again += product_s(tokens, d, kv // tp) + product_s(tokens, d // tp, d) + product_s(tokens, d, f // tp)
    backward_layer = matmul_backward + attention_backward + elementwise_backward + tp_backward + tp_contention_backward
    backward_layer += cp_backward + again
    layer_s = forward_layer + backward_layer

    # ---- the head: logits and loss in chunks, forward and backward together
    columns = model.vocab_size // tp
    head_s = 3 * product_s(tokens, d, columns) + 10 * tokens * columns / memory_bytes_per_s

    # ---- the pipeline: the slowest rank sets the pace, the fill and drain of the others is the bubble
    full, last = layers_by_stage(model, layout)
    pace = max(full * layer_s, last * layer_s + head_s)
    mean = (model.n_layers * layer_s + head_s) / layout.pp
    bubble_s = (layout.pp - 1) * pace / layout.virtual_stages
    if layout.pipeline_schedule == "zero_bubble":
        bubble_s /= 3  # ZB-H1's, at 1F1B's memory (arXiv 2401.10241, section 2)
    # What the other ranks wait for the slowest one is bubble too; on average a rank has `mean` to do.
    imbalance_s = microbatches * (pace - mean)
    # Activations and their gradients: one boundary each way per microbatch and group of layers, over the node's links
    # to the network, where tensor parallel ranks send a share each.
    exposed_pp_s = 0.0
    if layout.pp > 1:
        link = gpu.intra_node_gb_per_s * INTRA_FRACTION if one_node else gpu.inter_node_gb_per_s * INTER_FRACTION
        one_way = 2 * tokens * d / tp / (link * 1e9) + INTER_LATENCY_S
        hidden = 0.5 if layout.virtual_stages > 1 else 0.0  # interleaving sends while another group computes
        exposed_pp_s = (1 - hidden) * 2 * layout.virtual_stages * microbatches * one_way + 2 * (layout.pp - 1) * one_way

    # ---- data parallel: over dp and cp ranks, in shards and replicas
    layers = model.n_layers / layout.pp
    per_rank = microbatches * layers  # passes of a layer
    rank_parameters = layers * layer_parameters(model) / tp + model.vocab_size * d / tp * (2 if layout.pp == 1 else 1)
    shards = layout.dp_shard * layout.cp
    replicas = layout.dp * layout.cp // shards
    # A group that starts or ends within a node has as few ranks on some node.
    shard_local = shards if one_node else math.gcd(shards, node_ranks)
    # Replicas of a shard lie on one node only as far as the shards leave room.
    room = node_ranks // shards if node_ranks % shards == 0 else 1
    replica_local = replicas if one_node else math.gcd(replicas, room)
    pieces = layers + 1  # collectives: one a layer, one for embedding and head
    gather_s = pieces * collective_s(2 * rank_parameters / pieces, shards, shard_local, gpu)
    scatter_s = pieces * collective_s(plan.gradient_bytes * rank_parameters / pieces, shards, shard_local, gpu)
    reduce_s = 2 * collective_s(plan.gradient_bytes * rank_parameters / shards, replicas, replica_local, gpu, tree=True)
    forward_s, backward_s = layers * forward_layer, layers * backward_layer + head_s / layout.pp
    if layout.pp > 1:
        # Gathered once a step and kept; gradients are reduced after the last microbatch. Both stick out but for what
        # the other groups of layers hide.
        hidden_share = 1 - 1 / max(2, layout.virtual_stages)
        comm_s = gather_s + scatter_s + reduce_s
        exposed_dp_s = (1 - hidden_share) * comm_s
    else:
        # Nothing is there yet to hide a pass's first gather and its last reduction.
        first = (microbatches * (gather_s + scatter_s) + reduce_s) / pieces
        gather_forward = max(0.0, gather_s - forward_s)
        each_backward = max(0.0, gather_s + scatter_s - backward_s)
        last_backward = max(0.0, gather_s + scatter_s + reduce_s - backward_s)
        exposed_dp_s = first + microbatches * gather_forward + (microbatches - 1) * each_backward + last_backward
        comm_s = microbatches * (2 * gather_s + scatter_s) + reduce_s
    contention_s = CONTENTION * max(0.0, comm_s - exposed_dp_s)
    # By link. What of the data parallel ranks' is exposed is shared as all of it is.
    shards_s = comm_s - reduce_s
    network_s = shards_s * (shard_local < shards) + reduce_s * (replica_local < replicas)
    between_nodes_s = exposed_dp_s * network_s / comm_s if comm_s else 0.0
    between_nodes_s += 0.0 if one_node else exposed_pp_s
    between_nodes_s += 0.0 if cp_local == layout.cp else per_rank * (cp_forward + cp_backward + cp_again)

    # AdamW reads parameter, gradient and two moments, writes three; clipping reads the gradient once more.
    optimizer_s = 32 * rank_parameters / shards / memory_bytes_per_s + 2e-3

    busy_s = microbatches * mean + imbalance_s + bubble_s + exposed_pp_s + exposed_dp_s + contention_s + optimizer_s
    straggling_s = STRAGGLING * busy_s * (1 if layout.gpus > 1 else 0)
    step_s = busy_s + straggling_s
    batch_tokens = batch_sequences * model.sequence_length
    tokens_per_s = batch_tokens / step_s
    model_flops = flops_per_token(model)
    # Of a forward pass; unfused attention computes the masked half too, which is not the model's.
    masked_flops = 2 * model.n_layers * model.sequence_length * d if plan.attention == "unfused" else 0.0
    again_flops = 0.0
    if layout.recompute == "full":  # all but the head
        spared_flops = 2 * model.n_layers * f * d if stops_early else 0.0
        again_flops = model_flops / 3 - 2 * model.vocab_size * d - spared_flops + masked_flops
    elif layout.recompute == "selective":
        again_flops = 2 * masked_flops + (2 * model.n_layers * d * (kv + d + f) if alternate else 0.0)
    hardware_flops = model_flops + 3 * masked_flops + again_flops
    per_gpu = tokens_per_s / layout.gpus
    return Step(
        matmul_s=per_rank * (matmul_forward + matmul_backward),
        attention_s=per_rank * (attention_forward + attention_backward),
        elementwise_s=per_rank * (elementwise_forward + elementwise_backward),
        recompute_s=per_rank * again,
        head_s=microbatches * head_s / layout.pp,
        exposed_tp_s=per_rank * (tp_forward + tp_backward),
        exposed_cp_s=per_rank * (cp_forward + cp_backward),
        exposed_dp_s=exposed_dp_s,
        exposed_pp_s=exposed_pp_s,
        bubble_s=bubble_s + imbalance_s,
        contention_s=contention_s + per_rank * (tp_contention_forward + tp_contention_backward),
        optimizer_s=optimizer_s,
        straggling_s=straggling_s,
        exposed_again_s=per_rank * (tp_again + cp_again),
        exposed_between_nodes_s=between_nodes_s,
        step_s=step_s,
        tokens_per_s=tokens_per_s,
        tokens_per_s_per_gpu=per_gpu,
        mfu=per_gpu * model_flops / peak,
        hfu=per_gpu * hardware_flops / peak,
        model_tflops_per_gpu=per_gpu * model_flops / 1e12,
        hardware_tflops_per_gpu=per_gpu * hardware_flops / 1e12,
    )


@lru_cache(maxsize=1 << 16)
def matmul_s(rows: int, inner: int, columns: int, rate: float, cores: int, memory_bytes_per_s: float) -> float:
    """A [rows x inner] by [inner x columns] product, bf16: whole tiles in whole waves of cores, or the memory's time.

    The last wave is as long as a full one (wave quantization); where tiles are few, the inner dimension is split among
    cores. `rate` in FLOP/s of all cores at work.
    """
    best = math.inf
    for tile_rows, tile_columns, share in TILES:
        for shape in ((tile_rows, tile_columns), (tile_columns, tile_rows)):
            tiles = math.ceil(rows / shape[0]) * math.ceil(columns / shape[1])
            for split in (1, 2, 4, MAX_SPLIT_K):
                waves = math.ceil(tiles * split / cores)
                k = inner / split + PROLOGUE_K
                best = min(best, waves * 2 * shape[0] * shape[1] * k * cores / (rate * share))
                if waves > 12:
                    break
    moved = 2 * (rows * inner + inner * columns + rows * columns)
    return max(best, moved / memory_bytes_per_s) + KERNEL_S


def exposed_s(communication_s: float, products_s: float, tp: int, plan: PlanConfig) -> float:
    """What of a pass's tensor parallel communication nothing hides. Asynchronous, each product goes in `tp` pieces beside the
    communication of the next piece: the first has nothing to hide behind, nor has what is longer than the products."""
    if not plan.async_tp:
        return communication_s
    return max(communication_s / tp, communication_s - products_s)


def collective_s(size_bytes: float, ranks: int, local: int, gpu: GpuConfig, tree: bool = False) -> float:
    """An all-gather to, or a reduce-scatter of, `size_bytes` on each of `ranks`, `local` of which share a node.

    A ring: each rank's own link to the network carries its part of what the node must receive. `tree`: latency grows
    with the logarithm, as NCCL's all-reduce has it.
    """
    if ranks == 1:
        return 0.0
    moved = size_bytes * (ranks - 1) / ranks
    nodes = ranks // local
    intra = gpu.intra_node_gb_per_s * 1e9 * INTRA_FRACTION
    if nodes <= 1:
        return moved / intra + (ranks - 1) * INTRA_LATENCY_S
    inter = min(local * gpu.inter_node_gb_per_s * 1e9 * INTER_FRACTION, intra)
    if tree:
        return moved / inter + math.log2(nodes) * INTER_LATENCY_S + (local - 1) * INTRA_LATENCY_S
    return moved / inter + nodes * INTER_LATENCY_S + (ranks - nodes) * INTRA_LATENCY_S
