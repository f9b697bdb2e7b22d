"""`arriero plan`: what a run will take, before anything is submitted. Every figure has its unit in its name."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from dashboards.carbon import Range
from model.checkpoint.policy import AUTO, Interval, best_interval
from model.cost import parameter_count
from model.layout import Layout
from orchestrator import shrink
from orchestrator.energy import carbon
from orchestrator.errors import UserError
from orchestrator.plan.memory import Memory, memory, rank_memory
from orchestrator.plan.search import best, closed, fits, nearest, needed_gb, sizes, step_of, with_rows
from orchestrator.plan.step import Step
from orchestrator.spec import RunSpec

PRIOR_FAILURES = 2  # published rates lie a factor of two around the central one: as unsure as two failures leave one
NEVER_ENDS = 0.01  # of ETTR: a hundred times the work is no run
HARDLY = 0.2  # of ETTR at the highest rate of failures, below which it is told
SINCE_HOPPER = ("h100", "h200", "b200")
# Of a step's time: eight tenths of the published rows are at most so much faster, and slower, than the forecast (docs/plan.md).
FASTER, SLOWER = 0.08, 0.22


@dataclass(frozen=True, kw_only=True)
class Plan:
    spec: RunSpec
    layout: Layout
    memory: Memory
    step: Step
    figures: dict[str, Range]
    restarts: Range
    save_s: float  # training waits for so long at each save
    every_steps: int  # between saves
    best_interval: Interval  # what checkpoint.every_steps=auto comes to
    carbon_source: str | None
    start: str | None  # the greenest, in words
    assumed: list[str]  # where the forecast counts otherwise than this run trains
    rank0_tensors_bytes: float  # at the peak: what the trainer measures

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.spec.model.name,
            "cluster": self.spec.cluster.name,
            "gpu": self.spec.gpu.name,
            "gpus": self.layout.gpus,
            "nodes": self.spec.cluster.nodes,
            "steps": self.spec.steps,
            "tokens_per_step": self.spec.optim.batch_sequences * self.spec.model.sequence_length,
            "layout": asdict(self.layout),
            "memory": asdict(self.memory),
            "step": asdict(self.step),
            "run": {name: asdict(figure) for name, figure in self.figures.items()},
            "restarts": asdict(self.restarts),
            "checkpoint": {
                "save_s": self.save_s,
                "every_steps": self.every_steps,
                "best_interval_s": self.best_interval.steps * self.step.step_s,
                "best_every_steps": self.best_interval.steps,
                "best_why": self.best_interval.why,
            },
            "carbon_source": self.carbon_source,
            "start": self.start,
            "assumed": self.assumed,
        }


def ettr(failures_per_s: float, restart_s: float, interval_s: float, save_s: float) -> float:
    """Effective training time ratio: what failures, redone work and saves leave of the time.

    Failures come while the run trains, at a constant rate, and throw it back to the last save: an interval with its save takes
    (exp(rate x both) - 1) / rate of training, and a restart for each of exp(rate x both) - 1 failures (Daly, 2006, without
    failures while it restarts). To first order that is arXiv 2410.21680's 1 - rate x (restart + interval / 2); unlike that it
    holds where failures are frequent.
    """
    both_s = interval_s + save_s
    if failures_per_s == 0:
        return interval_s / both_s
    failures = math.expm1(min(failures_per_s * both_s, 500.0))  # of each interval that is saved
    return interval_s / (failures * (1 / failures_per_s + restart_s))


def save_s(spec: RunSpec) -> float:
    """Parameters and both moments, fp32, each rank its share, into the host's memory."""
    return 12 * parameter_count(spec.model) / spec.cluster.gpus / (spec.plan.save_gb_per_s * 1e9)


def failures_per_s(spec: RunSpec) -> list[float]:
    nodes = spec.cluster.gpus / 8
    return [rate * nodes / 1000 / 86400 for rate in spec.plan.failures_per_1000_node_days]


def mttf_s(spec: RunSpec, rate: int = 1) -> float:
    """Of the whole job, at the low, central or high rate of failures (0, 1, 2); infinite where none is expected."""
    per_s = failures_per_s(spec)[rate]
    return 1 / per_s if per_s else math.inf


def learnt_mttf_s(planned_s: float, failures: int, worked_s: float) -> float:
    """A job's mean time to failure after what it has lived through itself: the plan's counts as PRIOR_FAILURES failures seen
    before (the mean of a Gamma posterior)."""
    if planned_s == math.inf:
        return worked_s / failures if failures and worked_s else math.inf
    return (PRIOR_FAILURES * planned_s + worked_s) / (PRIOR_FAILURES + failures)


def best_save_interval(spec: RunSpec, step_s: float, rate: int = 1) -> Interval:
    """What checkpoint.every_steps=auto will come to, if steps and saves take what is forecast. How long a write takes in the
    background, nobody knows before the first."""
    found = best_interval(
        spec.checkpoint,
        spec.spikes.vet_steps,
        step_s=step_s,
        stall_s=save_s(spec),
        write_s=0.0,
        mttf_s=mttf_s(spec, rate),
    )
    return replace(found, steps=min(found.steps, spec.steps))


def saves_every_steps(spec: RunSpec, step_s: float) -> int:
    every = spec.checkpoint.every_steps
    return best_save_interval(spec, step_s).steps if every == AUTO else min(int(every), spec.steps)  # the last is saved


def _missing(spec: RunSpec) -> list[str]:
    """The constants of the GPU that the forecast needs and does not have."""
    return [
        f"gpu.{name}" for name in ("matmul_fraction", "attention_fraction", "cores") if getattr(spec.gpu, name) is None
    ]


def is_calibrated(spec: RunSpec) -> bool:
    return not _missing(spec)


def why_no_forecast(spec: RunSpec) -> str:
    """Empty where there is one."""
    if not is_calibrated(spec):
        return f"gpu={spec.gpu.name} is not calibrated"
    return "precision=fp32 is not calibrated" if spec.precision == "fp32" else ""


def planned_layout(spec: RunSpec) -> Layout:
    """Raises UserError where there is no forecast, or where the layout does not fit the GPU's memory."""
    if why := why_no_forecast(spec):
        way_out = (
            "set precision=auto"
            if is_calibrated(spec)
            else f"choose gpu=a100_80gb, h100, h200, b200 or mi300x as it is, or set {', '.join(_missing(spec))}"
        )
        raise UserError(f"{why}, so there is no forecast: {way_out}")
    return fitting_layout(spec)


def fitting_layout(spec: RunSpec) -> Layout:
    """Raises UserError where it does not fit the GPU's memory: in bf16, which is the least that any precision takes."""
    layout = best(spec) if spec.layout.is_open else closed(spec, spec.layout)
    if not fits(spec, layout):
        need, where = needed_gb(spec, layout), ""
        if need <= spec.gpu.memory_gb:
            tight = max(sizes(spec, layout), key=lambda size: needed_gb(spec, size))
            need = needed_gb(spec, tight)
            nodes = tight.gpus // spec.cluster.gpus_per_node
            where = f" on {nodes} nodes, which cluster.min_nodes={spec.cluster.min_nodes} allows,"
        ways = nearest(spec, layout)
        raise UserError(
            f"each rank needs {need:.1f} GB{where} and gpu={spec.gpu.name} has {spec.gpu.memory_gb:g} GB. "
            + (
                "Nearest layouts that fit, and the fastest:\n  " + "\n  ".join(ways)
                if ways
                else "No layout fits: take more nodes."
            )
        )
    return layout


def planned_step(spec: RunSpec) -> Step:
    return step_of(spec, planned_layout(spec))


def plan(spec: RunSpec, now_s: float) -> Plan:
    """Raises UserError where there is no forecast (`planned_layout`), or where failures leave no time to train."""
    layout = planned_layout(spec)
    step = step_of(spec, layout)
    used = memory(spec.model, layout, spec.plan, spec.optim.batch_sequences)
    rank0 = rank_memory(spec.model, layout, spec.plan, spec.optim.batch_sequences, 0)
    step_s = Range((1 - FASTER) * step.step_s, step.step_s, (1 + SLOWER) * step.step_s)
    rates, pause = failures_per_s(spec), save_s(spec)
    every_steps = saves_every_steps(spec, step.step_s)
    every_s = every_steps * step.step_s
    ratios = [ettr(r, u, every_s, pause) for r, u in zip(rates, spec.plan.restart_s, strict=True)]
    if ratios[1] < NEVER_ENDS:
        oftener = best_save_interval(spec, step.step_s).steps
        never = f"one failure comes every {1 / rates[1]:,.0f} s of training"
        if ettr(rates[1], spec.plan.restart_s[1], oftener * step.step_s, pause) < NEVER_ENDS:
            raise UserError(
                f"{never}, and a restart takes {spec.plan.restart_s[1]:,.0f} s: no time is left to train. Lower "
                "plan.failures_per_1000_node_days or plan.restart_s, or take fewer nodes"
            )
        raise UserError(
            f"{never}: a save every {every_s:,.0f} s is too seldom. Set checkpoint.every_steps={oftener}"
            + ("" if spec.checkpoint.every_steps == AUTO else ", or auto")
        )
    ratio = Range(ratios[2], ratios[1], ratios[0])
    train_h = step_s * (spec.steps / 3600)
    hours = Range(train_h.low / ratio.high, train_h.central / ratio.central, train_h.high / ratio.low)
    gpu_hours = hours * spec.cluster.gpus
    allocated = gpu_hours * (1 + spec.cluster.spare_nodes / spec.cluster.nodes)
    site = carbon.energy_forecast(gpu_hours.central, spec.gpu.watts, spec.carbon.pue)
    site = Range(site.low * hours.low / hours.central, site.central, site.high * hours.high / hours.central)
    figures = {
        "step_s": step_s,
        "tokens_per_s": _speed(step.tokens_per_s),
        "tokens_per_s_per_gpu": _speed(step.tokens_per_s_per_gpu),
        "mfu": _speed(step.mfu),
        "memory_bytes": Range(0.95 * used.total_bytes, used.total_bytes, 1.05 * used.total_bytes),
        "train_gpu_hours": train_h * spec.cluster.gpus,
        "hours": hours,
        "days": hours * (1 / 24),
        "ettr": ratio,
        "gpu_hours": allocated,
        "energy_kwh": site * (1 / spec.carbon.pue),
        "site_energy_kwh": site,
    }
    start, start_s, source = None, now_s, None
    if spec.carbon.start == "greenest":
        chosen = carbon.start_of(spec.carbon, hours.central, now_s)
        start, start_s = chosen.describe(site.central), chosen.start_s
    if (found := carbon.carbon_forecast(site, spec.carbon, start_s, hours.central)) is not None:
        figures["co2e_kg"], source = found
    if spec.gpu.usd_per_hour:
        usd = spec.gpu.usd_per_hour
        figures["cost_usd"] = Range(allocated.low * usd[0], allocated.central * usd[1], allocated.high * usd[2])
    return Plan(
        spec=spec, layout=layout, memory=used, step=step, figures=figures,
        restarts=Range(
            *(
                rate * 3600 * h / (1 + rate * restart)  # of the time, what is training
                for rate, restart, h in zip(
                    rates, spec.plan.restart_s, (hours.low, hours.central, hours.high), strict=True
                )
            )
        ),
        save_s=pause, every_steps=every_steps, best_interval=best_save_interval(spec, step.step_s),
        carbon_source=source, start=start,
        assumed=[*assumed(spec, layout), *not_counted(spec, hours.central, ratio)],
        rank0_tensors_bytes=rank0.total_bytes - rank0.overhead_bytes,
    )  # fmt: skip


def _speed(central: float) -> Range:
    return Range(central / (1 + SLOWER), central, central / (1 - FASTER))


def assumed(spec: RunSpec, layout: Layout) -> list[str]:
    """Settings of plan.* under which other people's tables are forecast, and this trainer is not."""
    plan, tp, selective = spec.plan, layout.tp > 1, layout.recompute == "selective"
    overlaps = tp and spec.compile == "on" and spec.gpu.name in SINCE_HOPPER  # model/device.py
    told = {
        "plan.attention=unfused: the trainer's is fused": plan.attention == "unfused",
        "plan.sequence_parallel=false: the trainer's tensor parallel ranks share norms and residuals": tp
        and not plan.sequence_parallel,
        "plan.recompute_whole=true: the trainer stops before a layer's last product": plan.recompute_whole
        and layout.recompute == "full",
        "plan.recompute_alternate=true: the trainer's selective recomputation repeats no product": plan.recompute_alternate
        and selective,
        "plan.recompute_alternate=true: without effect, layout.recompute is not selective": plan.recompute_alternate
        and not selective,
        f"plan.gradient_bytes={plan.gradient_bytes}: the trainer reduces gradients of 4 bytes": plan.gradient_bytes
        != 4,
        "plan.async_tp=true: without effect, layout.tp is 1": plan.async_tp and not tp,
        f"plan.async_tp=true: the trainer overlaps with compile=on only, on {', '.join(SINCE_HOPPER)}": plan.async_tp
        and tp
        and not overlaps,
        "plan.async_tp=false: with compile=on the trainer overlaps tensor parallel communication": overlaps
        and not plan.async_tp,
    }
    return [text for text, holds in told.items() if holds]


def not_counted(spec: RunSpec, hours: float, ratio: Range) -> list[str]:
    """What this run does beside training, and the forecast leaves out."""
    cluster, told = spec.cluster, []
    if spec.plan.failures_per_1000_node_days[1]:
        told.append(
            "waits for nodes in place of lost ones, failed racks and failed restarts are not counted: `arriero simulate` does"
        )
    if ratio.low < HARDLY:
        often_s = mttf_s(spec, rate=2)
        told.append(
            f"the highest rate of failures, one every {often_s:,.0f} s of training, leaves {ratio.low:.2g} of the time"
        )
    restarts = int(hours * 60 / cluster.time_limit_min) if cluster.kind == "slurm" else 0
    if restarts * spec.plan.restart_s[1] > 0.01 * 3600 * hours:
        told.append(f"cluster.time_limit_min={cluster.time_limit_min}: {restarts:,} requeues by it are not counted")
    evaluated = spec.eval_rows_per_source * len(spec.data.sources) / 3 / spec.eval_every_steps  # forward only
    if evaluated > 0.01 * spec.optim.batch_sequences:
        told.append(f"evaluation is not counted: {evaluated / spec.optim.batch_sequences:.0%} of the steps' FLOPs")
    if not spec.checkpoint.asynchronous:
        told.append("checkpoint.asynchronous=false: that training waits for whole writes is not counted")
    if cluster.spare_nodes:
        told.append(
            f"cluster.spare_nodes={cluster.spare_nodes}: GPU-hours and cost count them, energy and carbon do not"
        )
    return told


def figures_json(found: Plan) -> dict[str, Any]:
    """plan.json: figures by name, which the run's page holds against what it measured: of memory, rank 0's tensors; GPU-hours
    of the ranks, without spare nodes."""
    tensors = found.rank0_tensors_bytes
    figures = {
        **found.figures,
        "memory_bytes": Range(0.95 * tensors, tensors, 1.05 * tensors),
        "gpu_hours": found.figures["hours"] * found.layout.gpus,
    }
    return {name: asdict(figure) for name, figure in figures.items()}


def sentence(found: Plan) -> str:
    """What `launch` says that it expects."""
    f = found.figures
    kwh = f["site_energy_kwh"]
    return (
        f"expected           {f['tokens_per_s'].central:,.0f} tokens/s, MFU {f['mfu'].central:.0%}, "
        f"{found.memory.total_bytes / 1e9:.0f} GB a rank, {f['days'].central:.1f} days "
        f"({f['days'].low:.1f} to {f['days'].high:.1f}), {kwh.central:,.0f} kWh ({kwh.low:,.0f} to {kwh.high:,.0f})"
    )


def resolved(spec: RunSpec) -> RunSpec:
    """The run with the layout that `plan` shows, where `layout=auto` left it open, and with the least recomputation that fits
    the GPU's memory, where `layout.recompute=auto` did."""
    if not spec.layout.is_open:
        return replace(spec, layout=closed(spec, spec.layout))
    if is_calibrated(spec):
        return replace(spec, layout=best(spec))
    # Nothing is known of this hardware: share over all ranks, and as many rows at a time as go, up to 8.
    want = replace(spec.layout, tp=spec.layout.tp or 1, pp=spec.layout.pp or 1, cp=spec.layout.cp or 1)
    if want.virtual_stages > 1 and want.pp > 1 and want.pipeline_schedule == "1f1b":
        want = replace(want, pipeline_schedule="interleaved_1f1b")
    rows = spec.optim.batch_sequences
    dp = spec.cluster.gpus // (want.tp * want.pp * want.cp)
    shard = want.dp_shard or dp // (want.dp_replicate or 1)
    replicate = want.dp_replicate or dp // max(1, shard)
    chosen = replace(want, dp_shard=max(1, shard), dp_replicate=max(1, replicate))
    if not want.microbatch_sequences:
        allowed = [other for other in with_rows(spec, chosen) if other.microbatch_sequences <= 8]
        fitting = [other for other in allowed if fits(spec, closed(spec, other))]
        chosen = (fitting or allowed[:1] or [replace(chosen, microbatch_sequences=1)])[-1]
    wrong = chosen.problems(spec.model, rows, spec.cluster.gpus, spec.cluster.gpus_per_node)
    if wrong := wrong or shrink.problems(spec.cluster, chosen, rows):
        raise UserError(f"layout={spec.layout.name}: " + "; ".join(wrong))
    return replace(spec, layout=closed(spec, chosen))


def layout_sentence(layout: Layout) -> str:
    return (
        f"dp_replicate {layout.dp_replicate} x dp_shard {layout.dp_shard} x tp {layout.tp} x pp {layout.pp} x cp {layout.cp}, "
        f"{layout.microbatch_sequences} rows a microbatch, recompute {layout.recompute}, virtual stages {layout.virtual_stages}"
    )


def table(found: Plan) -> str:
    mem, step, spec = found.memory, found.step, found.spec
    cluster, step_tokens = spec.cluster, spec.optim.batch_sequences * spec.model.sequence_length
    lines = [
        f"run      {spec.model.name}, {spec.steps:,} steps of {step_tokens:,} tokens on "
        f"{cluster.nodes:,} node{'s' if cluster.nodes > 1 else ''} of {cluster.gpus_per_node} {spec.gpu.name}",
        f"layout   {layout_sentence(found.layout)}",
        "memory   "
        + ", ".join(
            f"{k.removesuffix('_bytes')} {v / 1e9:.1f} GB" for k, v in asdict(mem).items() if k != "total_bytes"
        )
        + f"; at the peak {mem.total_bytes / 1e9:.1f} GB a rank",
        f"step     {step.step_s:.3f} s, {step.model_tflops_per_gpu:.4g} TFLOP/s a GPU of the model "
        f"({step.hardware_tflops_per_gpu:.4g} with what is computed again): "
        + ", ".join(
            f"{k.removesuffix('_s').replace('_', ' ')} {100 * v / step.step_s:.1f}%"
            for k, v in step.parts_s.items()
            if v / step.step_s >= 0.001
        ),
        f"links    communication that nothing hides: {100 * (step.exposed_s - step.exposed_between_nodes_s) / step.step_s:.1f}% "
        f"inside nodes, {100 * step.exposed_between_nodes_s / step.step_s:.1f}% between them",
        "",
        f"{'':22}{'low':>16}{'central':>16}{'high':>16}",
    ]
    shown = dict(_shown(name, figure) for name, figure in found.figures.items()) | {"restarts": found.restarts}
    del shown["hours" if shown["days"].central >= 1 else "days"]
    lines += [f"{k:22}{_n(v.low):>16}{_n(v.central):>16}{_n(v.high):>16}" for k, v in shown.items()]
    lines += ["", f"saves    every {found.every_steps:,} steps ({found.every_steps * step.step_s:,.0f} s); best every "
              f"{found.best_interval.steps:,} (checkpoint.every_steps=auto): {found.best_interval.why}"]  # fmt: skip
    lines.append(f"carbon   {found.carbon_source or 'no intensity: give carbon.zone, carbon.series or another'}")
    if found.start:
        lines.append(found.start)
    lines += [f"assumed  {text}" for text in found.assumed]
    return "\n".join(lines)


def _shown(name: str, figure: Range) -> tuple[str, Range]:
    """A figure in the unit that a person reads."""
    if name == "memory_bytes":
        return "memory_gb", figure * 1e-9
    if name.endswith("_kwh") and figure.central >= 10_000:
        return name.removesuffix("kwh") + "mwh", figure * 1e-3
    if name == "co2e_kg" and figure.central >= 10_000:
        return "co2e_t", figure * 1e-3
    return name, figure


def _n(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
