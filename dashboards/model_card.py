"""The model card of a run: Markdown in Hugging Face's form, its front matter in YAML. Figures as they were recorded, no other."""

import json
from typing import Any

from dashboards.carbon import remarks, to_markdown, to_model_card
from dashboards.panels import PANELS
from dashboards.run_view import Happening, RunView
from dashboards.terminal import sparkline


def model_card(run: RunView, weights_step: int | None = None) -> str:
    """The whole card; `weights_step`: of exported weights, which may be older than the run. What is not known is said to be not
    known."""
    return "\n".join(_front_matter(run, weights_step) + _body(run, weights_step))


def _evaluated(run: RunView, weights_step: int | None) -> Happening | None:
    """The newest evaluation, of no later step than the weights."""
    of_weights = [e for e in run.events if weights_step is None or e.step <= weights_step]
    return next((e for e in reversed(of_weights) if e.kind == "evaluated" and "loss" in e.data), None)


def _front_matter(run: RunView, weights_step: int | None) -> list[str]:
    evaluated = _evaluated(run, weights_step)
    library = "pytorch" if weights_step is None else "transformers"
    lines = ["---", f"library_name: {library}", "tags:", "- llama", "- causal-lm", "- arriero"]
    if run.statement is not None:
        lines += to_model_card(run.statement).rstrip("\n").splitlines()
    if evaluated is not None:
        lines += [
            "model-index:",
            f"- name: {json.dumps(run.name)}",
            "  results:",
            "  - task: {type: text-generation}",
            "    dataset: {name: held-out documents of the training mix, type: held-out}",
            "    metrics:",
            f"    - {{type: loss, name: held-out loss (nats per token), value: {evaluated.data['loss']:.6g}}}",
        ]
    return [*lines, "---", ""]


def _body(run: RunView, weights_step: int | None) -> list[str]:
    c = run.config
    model, optim = c.get("model", {}), c.get("optim", {})
    reached = f"{run.steps_done:,} of {run.steps_planned:,} steps"
    tokens = run.headline.get("tokens")
    said = f"A LLaMA-style decoder that arriero has not trained yet ({run.state})."
    if weights_step is not None:
        seen = weights_step * optim["batch_sequences"] * model["sequence_length"]
        said = (
            f"A LLaMA-style decoder trained by arriero: the weights of step {weights_step:,} of {run.steps_planned:,}, after "
            f"{seen:,} tokens. The run has {reached} ({run.state}); its curve, its speed and its energy below are all of its."
        )
    elif tokens is not None:
        said = f"A LLaMA-style decoder trained by arriero: {reached}, {tokens:,.0f} tokens ({run.state})."
    lines = [
        f"# {run.name}",
        "",
        said,
        f"Code: `{run.code}`.",
        "",
        "## Model",
        "",
        *_rows(model),
        "",
        "## Training",
        "",
        *_rows(
            {
                **{f"optim.{k}": v for k, v in optim.items()},
                "precision": c.get("precision"),
                "seed": c.get("seed"),
                **{f"layout.{k}": v for k, v in c.get("layout", {}).items()},
                **{f"gpu.{k}": c.get("gpu", {}).get(k) for k in ("name", "device")},
                **{f"cluster.{k}": c.get("cluster", {}).get(k) for k in ("nodes", "gpus_per_node")},
            }
        ),
        "",
        "| figure | median of the last steps |",
        "|---|--:|",
    ]
    for panel in PANELS:
        for line in panel.step_lines[:1]:
            value = run.headline.get(line.source.removeprefix("step."))
            if value is not None and panel.section in ("Throughput", "Memory"):
                lines.append(f"| {panel.title} | {value * panel.scale:,.4g} {panel.unit} |")
    if (ettr := run.headline.get("ettr")) is not None:
        lines.append(f"| Effective training time ratio, {len(run.attempts)} attempt(s) | {ettr:.1%} |")
    lines += ["", "## Data", "", "| source | share of rows | tokens there | epochs |", "|---|--:|--:|--:|"]
    for m in run.mix:
        name = f"{m.source} (stands in for {m.stands_in_for})" if m.stands_in_for else m.source
        there = "unknown" if m.tokens is None else f"{m.tokens:,}"
        epochs = "unknown" if m.epochs is None else f"{m.epochs:.3g}"
        lines.append(f"| {name} | {m.proportion:.1%} | {there} | {epochs} |")
    lines += ["", "## Loss", ""]
    curve = run.curve.mean.get("loss", [])
    if curve:
        known = [v for v in curve if v is not None]
        lines += ["```", sparkline(curve, 72), "```", ""]
        lines.append(
            f"Training loss, nats per token: {known[0]:.4g} at first, {known[-1]:.4g} at the end." if known else ""
        )
    lines += ["", "## Evaluation", ""]
    if (newest := _evaluated(run, weights_step)) is not None:
        lines += [
            f"Held-out documents of the mix at step {newest.step:,}, nats per token.",
            "",
            "| source | loss |",
            "|---|--:|",
        ]
        lines += [f"| {k} | {v:.4g} |" for k, v in dict(newest.data.get("loss_by_source", {})).items()]
        lines.append(f"| mean by share of rows | {newest.data['loss']:.4g} |")
    else:
        lines.append("Not evaluated.")
    lines += ["", "## Energy and carbon", ""]
    if run.statement is None:
        lines.append("Not measured.")
    else:
        table = to_markdown([run.statement]).splitlines()
        lines += table[2 : next(i for i, line in enumerate(table) if line.startswith("## "))]
        lines += [f"- {remark}" for remark in remarks(run.statement)]
    lines += [
        "",
        "## Limits",
        "",
        "Not aligned, not filtered for safety, evaluated only as above. Before it is shared, name its licence and intended use.",
        "",
    ]
    return lines


def _rows(values: dict[str, Any]) -> list[str]:
    rows = [f"| {k} | {v} |" for k, v in values.items() if v is not None]
    return ["| | |", "|---|---|", *rows]
