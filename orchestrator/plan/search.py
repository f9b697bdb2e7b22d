"""Which layouts a run could have: all that the cluster allows, the fastest first."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

from model.layout import MICROBATCHES, Layout
from orchestrator import shrink
from orchestrator.errors import UserError
from orchestrator.plan.memory import memory
from orchestrator.plan.step import Step, forecast_step
from orchestrator.spec import RunSpec

ROW_PARTS_TOKENS = (4096, 512)
"""Context parallel ranks have at least so many tokens of a row; fewer, which only send more, where nothing else is there."""


def needed_gb(spec: RunSpec, layout: Layout) -> float:
    return memory(spec.model, layout, spec.plan, spec.optim.batch_sequences).total_bytes / 1e9


def fits(spec: RunSpec, layout: Layout) -> bool:
    """Also on as few nodes as cluster.min_nodes lets the run go on with."""
    return all(needed_gb(spec, size) <= spec.gpu.memory_gb for size in sizes(spec, layout))


def sizes(spec: RunSpec, layout: Layout) -> Iterator[Layout]:
    """`layout`, and those that the run may shrink to."""
    cluster, batch = spec.cluster, spec.optim.batch_sequences
    yield layout
    for nodes in shrink.smaller(cluster, layout, batch, cluster.nodes) if cluster.min_nodes else ():
        yield shrink.shrunk(layout, nodes * cluster.gpus_per_node, batch)


def closed(spec: RunSpec, layout: Layout) -> Layout:
    """`recompute=auto` made the least that fits; full where none does."""
    if layout.recompute != "auto":
        return layout
    ways = ("none",) if layout.pp > 1 and layout.pipeline_schedule == "zero_bubble" else ("none", "selective", "full")
    tried = [replace(layout, recompute=r) for r in ways]
    return next((t for t in tried if fits(spec, t)), tried[-1])


def layouts(spec: RunSpec) -> list[tuple[Step, Layout]]:
    """Every layout that fits, fastest first; degrees of `spec.layout` that are not 0 are kept."""
    for part_tokens in ROW_PARTS_TOKENS:
        found = []
        for layout in _candidates(spec, part_tokens):
            layout = closed(spec, layout)
            if fits(spec, layout):
                found.append((step_of(spec, layout), layout))
        if found:
            return sorted(found, key=lambda pair: pair[0].step_s)
    return []


def step_of(spec: RunSpec, layout: Layout) -> Step:
    return forecast_step(
        spec.model, spec.gpu, spec.cluster.gpus_per_node, layout, spec.optim.batch_sequences, spec.plan
    )


def best(spec: RunSpec) -> Layout:
    """Raises UserError where nothing fits and degrees are open."""
    found = layouts(spec)
    if not found and not spec.layout.has_open_degrees:
        return closed(spec, replace(spec.layout, microbatch_sequences=1))
    if not found:
        want = spec.layout
        kept = [f"layout.{n}={v}" for n in ("tp", "pp", "cp", "dp_shard", "dp_replicate") if (v := getattr(want, n))]
        kept += [f"layout.virtual_stages={want.virtual_stages}"] if want.virtual_stages > 1 else []
        kept += [f"layout.pipeline_schedule={want.pipeline_schedule}"] if want.pipeline_schedule != "1f1b" else []
        kept += [f"layout.microbatch_sequences={want.microbatch_sequences}"] if want.microbatch_sequences else []
        kept += [f"layout.recompute={want.recompute}"] if want.recompute != "auto" else []
        if next(_candidates(spec, ROW_PARTS_TOKENS[-1]), None) is None:
            elastic = f" that can go on with {least} nodes" if (least := spec.cluster.min_nodes) else ""
            raise UserError(
                f"no layout of {spec.cluster.gpus} GPUs for model={spec.model.name} and "
                f"optim.batch_sequences={spec.optim.batch_sequences}{elastic} "
                + (f"has {' '.join(kept)}: leave them to layout=auto, or choose " if kept else "is there: choose ")
                + "divisors of the model's heads and sizes, of the batch and of the cluster, and rows a step for every data "
                "parallel rank and pipeline stage (optim.batch_sequences)"
            )
        raise UserError(
            f"no layout of model={spec.model.name} fits {spec.cluster.gpus} GPUs of {spec.gpu.memory_gb:g} GB: "
            f"take more nodes (cluster.nodes), or a GPU with more memory"
        )
    return found[0][1]


def with_rows(spec: RunSpec, layout: Layout) -> list[Layout]:
    """`layout` with each number of rows at a time that it allows, and with which a run shrinks to as many sizes."""
    found = [replace(layout, microbatch_sequences=rows) for rows in MICROBATCHES]
    batch, cluster = spec.optim.batch_sequences, spec.cluster
    sizes = shrink.smaller(cluster, found[0], batch, cluster.nodes)
    return [
        other
        for other in found
        if not other.problems(spec.model, batch, cluster.gpus, cluster.gpus_per_node)
        and shrink.smaller(cluster, other, batch, cluster.nodes) == sizes
    ]


def _powers_of_two(most: int) -> list[int]:
    return [2**n for n in range(most.bit_length())]


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _candidates(spec: RunSpec, part_tokens: int) -> Iterator[Layout]:
    want, gpus, layers = spec.layout, spec.cluster.gpus, spec.model.n_layers
    batch, cluster = spec.optim.batch_sequences, spec.cluster
    if not want.has_open_degrees:
        yield from with_rows(spec, want)
        return
    degrees = product(
        [want.tp] if want.tp else _divisors(cluster.gpus_per_node),
        [want.pp] if want.pp else [d for d in _divisors(gpus) if d <= min(layers, 64)],
        [want.cp]
        if want.cp
        else [c for c in _powers_of_two(gpus) if c == 1 or spec.model.sequence_length // c >= part_tokens],
    )
    schedule, stages = want.pipeline_schedule, want.virtual_stages
    for tp, pp, cp in degrees:
        if gpus % (tp * pp * cp) or (schedule != "1f1b" and pp == 1):
            continue
        dp = gpus // (tp * pp * cp)
        groups: Sequence[int] = [stages]
        if stages == 1 and pp > 1 and schedule != "zero_bubble":
            groups = range(1 if schedule == "1f1b" else 2, 9)
        # Several groups even only, unless asked for: what uneven ones wait for each other, the forecast does not know.
        groups = [v for v in groups if v == 1 or layers % (pp * v) == 0 or (stages > 1 and want.pp)]
        rows_at_a_time = [want.microbatch_sequences] if want.microbatch_sequences else MICROBATCHES
        rows_that_divide = [rows for rows in rows_at_a_time if batch % (dp * rows) == 0]
        for shard, rows, virtual in product(_shards(want, dp, cluster.gpus_per_node), rows_that_divide, groups):
            layout = replace(
                want, dp_replicate=dp // shard, dp_shard=shard, tp=tp, pp=pp, cp=cp,
                microbatch_sequences=rows, virtual_stages=virtual,
                pipeline_schedule="interleaved_1f1b" if schedule == "1f1b" and virtual > 1 else schedule,
            )  # fmt: skip
            if not (
                layout.problems(spec.model, batch, gpus, cluster.gpus_per_node)
                or shrink.problems(cluster, layout, batch)
            ):
                yield layout


def _shards(want: Layout, dp: int, gpus_per_node: int) -> list[int]:
    """Over how many of `dp` ranks a copy of the parameters may be shared: powers of two, and whole nodes."""
    if want.dp_shard:
        shards = [want.dp_shard]
    elif want.dp_replicate:
        shards = [dp // want.dp_replicate]
    else:
        shards = [d for d in _divisors(dp) if d in (1, dp) or d & (d - 1) == 0 or d % gpus_per_node == 0]
    return [shard for shard in shards if shard and dp % shard == 0 and want.dp_replicate in (0, dp // shard)]


def nearest(spec: RunSpec, layout: Layout, count: int = 3) -> list[str]:
    """Overrides of the layouts that fit and differ least from `layout`, the faster of equals first, and of the fastest; with what
    each is forecast to reach."""
    names = (
        "tp", "pp", "cp", "dp_shard", "dp_replicate", "microbatch_sequences", "recompute", "pipeline_schedule",
        "virtual_stages",
    )  # fmt: skip
    open_spec = replace(spec, layout=replace(
        layout, dp_replicate=0, dp_shard=0, tp=0, pp=0, cp=0, microbatch_sequences=0, recompute="auto",
        pipeline_schedule="1f1b", virtual_stages=1,
    ))  # fmt: skip
    found = layouts(open_spec)

    def others(pair: tuple[Step, Layout]) -> list[str]:
        return [f"layout.{n}={getattr(pair[1], n)}" for n in names if getattr(pair[1], n) != getattr(layout, n)]

    near = sorted(found, key=lambda pair: len(others(pair)))[:count]
    shown = near if not found or found[0] in near else [*near, found[0]]
    return [f"{' '.join(others(pair))}   ({pair[0].tokens_per_s_per_gpu:,.0f} tokens/s a GPU)" for pair in shown]
