"""Fits and recommendations as Markdown, JSON and pictures."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dashboards.charts import Chart, Series, charts_svg, short
from orchestrator.errors import UserError
from orchestrator.scaling.fit import LEVEL, Fit, Interval, interval
from orchestrator.scaling.law import PUBLISHED, Allocation, Law, best_for_training, cheapest_at_loss

_NAMES = ("E", "A", "B", "alpha", "beta", "size_exponent")
_COLORS = ("#2563eb", "#d97706", "#059669", "#b91c1c", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f", "#475569")


def fit_as_json(fit: Fit, replicates: bool = False) -> dict[str, Any]:
    """`replicates`: with every bootstrap law, which `scaling recommend --fit` needs for its intervals."""
    return {
        "law": "loss = E + A / parameters^alpha + B / tokens^beta",
        "loss_unit": "nats per token",
        "confidence": LEVEL,
        "points": len(fit.points),
        "parameters_range": [float(fit.points.parameters.min()), float(fit.points.parameters.max())],
        "tokens_range": [float(fit.points.tokens.min()), float(fit.points.tokens.max())],
        **{name: asdict(fit.interval(name)) for name in _NAMES},
        "rms_log_error": fit.rms_log_error,
        "isoflops": [
            {
                "flops": i.flops,
                "points": len(i.points),
                "parameters": asdict(i.parameters) if i.parameters else None,
                "tokens": i.tokens,
                "loss": i.loss,
                "note": i.note,
            }
            for i in fit.isoflops
        ],
        "isoflop_size_exponent": asdict(fit.isoflop_exponent) if fit.isoflop_exponent else None,
        "notes": fit.notes,
    } | ({"replicates": [asdict(r) for r in fit.replicates]} if replicates else {})


def fit_as_markdown(fit: Fit) -> str:
    lines = [
        f"L(N, D) = E + A / N^alpha + B / D^beta, fitted to {len(fit.points)} points "
        f"(N {short(fit.points.parameters.min())} to {short(fit.points.parameters.max())}, "
        f"D {short(fit.points.tokens.min())} to {short(fit.points.tokens.max())} tokens).",
        "",
        f"| | estimate | {LEVEL:.0%} interval |",
        "|---|---:|---|",
    ]
    told = {"E": "E (nats per token)", "size_exponent": "a of N* ~ C^a = beta / (alpha + beta)"}
    for name in _NAMES:
        lines.append(_row(told.get(name, name), fit.interval(name)))
    if fit.isoflop_exponent:
        lines.append(_row("a by IsoFLOP minima", fit.isoflop_exponent))
    lines += ["", f"Root mean square error of log L: {fit.rms_log_error:.2%}."]
    if fit.isoflops:
        lines += ["", "| budget (FLOPs) | best size | interval | tokens | loss | |", "|---:|---:|---|---:|---:|---|"]
        for i in fit.isoflops:
            size, low_high, tokens, loss = "", "", "", ""
            if i.parameters and i.tokens and i.loss:
                size, low_high = short(i.parameters.value), f"{short(i.parameters.low)} to {short(i.parameters.high)}"
                tokens, loss = short(i.tokens), f"{i.loss:.3f}"
            lines.append(f"| {i.flops:.2e} | {size} | {low_high} | {tokens} | {loss} | {i.note} |")
    if fit.notes:
        lines += ["", *(f"- {note}" for note in fit.notes)]
    return "\n".join(lines) + "\n"


def _row(name: str, i: Interval) -> str:
    return f"| {name} | {i.value:.4g} | {i.low:.4g} to {i.high:.4g} |"


def write_fit(fit: Fit, folder: Path, title: str) -> list[Path]:
    """fit.json (with the bootstrap, for `recommend --fit`), fit.md and fit.svg in `folder`."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is a file: give a folder")
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "fit.json": json.dumps(fit_as_json(fit, replicates=True)) + "\n",
        "fit.md": fit_as_markdown(fit),
        "fit.svg": fit_picture(fit, title),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


def fit_picture(fit: Fit, title: str) -> str:
    """The law through the points; IsoFLOP parabolas where there are any; the best size for each budget."""
    charts = [_by_tokens(fit)]
    if fit.isoflops:
        charts.append(_parabolas(fit))
    charts.append(_best_sizes(fit))
    return charts_svg(title, charts)


def _by_tokens(fit: Fit) -> Chart:
    p = fit.points
    key = np.round(np.log(p.parameters) / 0.05)
    sizes = np.unique(key)
    if len(sizes) > len(_COLORS):  # a line for some, evenly chosen; every point is drawn
        sizes = sizes[np.unique(np.linspace(0, len(sizes) - 1, len(_COLORS)).round().astype(int))]
    series = [Series("", "#9ca3af", dots=list(zip(p.tokens.tolist(), p.loss.tolist(), strict=True)))]
    along = np.geomspace(p.tokens.min(), p.tokens.max(), 60)
    for color, size in zip(_COLORS, sizes, strict=False):
        mine = key == size
        n = float(np.exp(np.log(p.parameters[mine]).mean()))
        series.append(
            Series(
                short(n),
                color,
                line=[(float(d), fit.law.loss(n, float(d))) for d in along],
                dots=list(zip(p.tokens[mine].tolist(), p.loss[mine].tolist(), strict=True)),
            )
        )
    span = float(np.ptp(p.loss))
    return Chart(
        title="the law (lines) at the points' sizes",
        x_label="training tokens",
        y_label="loss (nats per token)",
        y_range=(float(p.loss.min()) - 0.06 * span, float(p.loss.max()) + 0.06 * span),
        series=series,
    )


def _parabolas(fit: Fit) -> Chart:
    series = []
    for number, i in enumerate(fit.isoflops):
        color = _COLORS[number % len(_COLORS)]
        n = np.geomspace(i.points.parameters.min(), i.points.parameters.max(), 40)
        u = np.log(n) - i.center
        y = i.parabola[0] + i.parabola[1] * u + i.parabola[2] * u**2
        dots = list(zip(i.points.parameters.tolist(), i.points.loss.tolist(), strict=True))
        series.append(Series(f"{i.flops:.1e}", color, line=list(zip(n.tolist(), y.tolist(), strict=True)), dots=dots))
        if i.parameters and i.loss:
            series.append(Series("", color, ticks=[(i.parameters.value, i.loss)]))
    return Chart(title="IsoFLOP curves, by FLOPs", x_label="parameters", y_label="loss (nats per token)", series=series)


def _best_sizes(fit: Fit) -> Chart:
    c = np.geomspace(fit.points.flops.min(), 100 * fit.points.flops.max(), 30)
    best = [best_for_training(fit.law, float(v)).parameters for v in c]
    bounds = [
        _spread([best_for_training(r, float(v)).parameters for r in fit.replicates if _usable(r)], b)
        for v, b in zip(c, best, strict=True)
    ]
    series = [
        Series(
            "the law",
            _COLORS[0],
            line=list(zip(c.tolist(), best, strict=True)),
            band=[(float(v), i.low, i.high) for v, i in zip(c, bounds, strict=True)],
        )
    ]
    minima = [i for i in fit.isoflops if i.parameters]
    if minima:
        series.append(
            Series(
                "IsoFLOP minima",
                _COLORS[1],
                dots=[(i.flops, i.parameters.value) for i in minima if i.parameters],
                bars=[(i.flops, i.parameters.low, i.parameters.high) for i in minima if i.parameters],
            )
        )
    return Chart(
        title=f"best size for a budget, {LEVEL:.0%}",
        x_label="training FLOPs",
        y_label="parameters",
        log_y=True,
        series=series,
    )


def _usable(law: Law) -> bool:
    return law.alpha > 1e-3 and law.beta > 1e-3


def _spread(values: list[float], value: float) -> Interval:
    return interval(value, values) if values else Interval(value, value, value)


@dataclass(frozen=True)
class Known:
    """A law, how far it may be off, and how far it was seen."""

    law: Law
    replicates: Sequence[Law] = ()
    most_parameters: float = float("inf")
    most_tokens: float = float("inf")


def known(fit: Fit) -> Known:
    return Known(fit.law, fit.replicates, float(fit.points.parameters.max()), float(fit.points.tokens.max()))


def read_fit(path: Path) -> Known:
    """A fit.json of `scaling fit --output`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        law = Law(**{k: float(value[k]["value"]) for k in ("E", "A", "B", "alpha", "beta")})
        replicates = [Law(**r) for r in value.get("replicates", [])]
        most = float(value["parameters_range"][1]), float(value["tokens_range"][1])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no fit.json of `arriero scaling fit --output DIR`: {error}") from None
    return Known(law, replicates, *most)


def published(name: str) -> Known:
    if name not in PUBLISHED:
        raise UserError(f"--law {name} is none of {', '.join(PUBLISHED)}")
    return Known(PUBLISHED[name])


def recommend(known: Known, *, flops: float | None, loss: float | None, inference_tokens: float) -> dict[str, Any]:
    """What to train, with units in the keys; intervals where the law brings replicates."""
    law, replicates = known.law, known.replicates
    for name, value in (("--flops", flops), ("--loss", loss)):
        if value is not None and not (np.isfinite(value) and value > 0):
            raise UserError(f"{name} {value:g} must be above 0")
    if not (np.isfinite(inference_tokens) and inference_tokens >= 0):
        raise UserError(f"--inference-tokens {inference_tokens:g} must be 0 or more")
    if (flops is None) == (loss is None):
        raise UserError("give either --flops C, the training budget, or --loss L, the loss to reach")
    if not _usable(law):
        raise UserError(
            f"this law has alpha {law.alpha:.3g} and beta {law.beta:.3g}: where an exponent is 0 there is no best size. "
            f"Fit more sizes and token counts"
        )
    notes: list[str] = []
    if flops is not None and not inference_tokens:
        chosen = best_for_training(law, flops)
        found = _told(chosen, [best_for_training(r, flops) for r in replicates if _usable(r)])
        return {"question": f"the lowest loss of {flops:.3g} training FLOPs", **found, "notes": _beyond(chosen, known)}
    if flops is not None:
        loss = best_for_training(law, flops).loss
        notes.append(f"the loss to reach is what {flops:.3g} training FLOPs reach at best: {loss:.4f} nats per token")
    assert loss is not None
    chosen = cheapest_at_loss(law, loss, inference_tokens)
    drawn = [cheapest_at_loss(r, loss, inference_tokens) for r in replicates if _usable(r) and loss > r.E]
    if replicates and len(drawn) < len(replicates):
        notes.append(f"{len(replicates) - len(drawn)} of {len(replicates)} bootstrap laws never reach this loss")
    found = _told(chosen, drawn)
    question = f"the fewest FLOPs to a loss of {loss:.4f}"
    if inference_tokens:
        plain = cheapest_at_loss(law, loss)
        plain_flops = plain.flops + 2 * plain.parameters * inference_tokens
        found["cheapest_to_train"] = {
            "parameters": plain.parameters,
            "tokens": plain.tokens,
            "training_flops": plain.training_flops,
            "training_and_inference_flops": plain_flops,
        }
        found["saved_share"] = 1 - chosen.flops / plain_flops
        question += f", counting {inference_tokens:.3g} tokens of inference"
    return {"question": question, **found, "notes": notes + _beyond(chosen, known)}


def _told(chosen: Allocation, drawn: list[Allocation]) -> dict[str, Any]:
    def with_interval(of: Callable[[Allocation], float]) -> dict[str, float | None]:
        if not drawn:
            return {"value": of(chosen), "low": None, "high": None}
        return asdict(interval(of(chosen), [of(d) for d in drawn]))

    return {
        "parameters": with_interval(lambda a: a.parameters),
        "tokens": with_interval(lambda a: a.tokens),
        "loss_nats_per_token": with_interval(lambda a: a.loss),
        "tokens_per_parameter": chosen.tokens / chosen.parameters,
        "training_flops": chosen.training_flops,
        "inference_flops": chosen.inference_flops,
        "training_and_inference_flops": chosen.flops,
    }


def _beyond(chosen: Allocation, known: Known) -> list[str]:
    return [
        f"{name} {short(value)} are {value / most:.0f} times the most that was trained ({short(most)}): an extrapolation"
        for name, value, most in (
            ("parameters", chosen.parameters, known.most_parameters),
            ("tokens", chosen.tokens, known.most_tokens),
        )
        if value > 2 * most
    ]


def recommendation_as_markdown(found: dict[str, Any], source: str) -> str:
    def row(name: str, value: dict[str, Any], form: Callable[[float], str]) -> str:
        spread = "" if value["low"] is None else f"{form(value['low'])} to {form(value['high'])}"
        return f"| {name} | {form(value['value'])} | {spread} |"

    lines = [
        f"{found['question'][0].upper()}{found['question'][1:]}, by {source}.",
        "",
        f"| | | {LEVEL:.0%} interval |",
        "|---|---:|---|",
        row("parameters", found["parameters"], short),
        row("tokens", found["tokens"], short),
        row("loss (nats per token)", found["loss_nats_per_token"], lambda v: f"{v:.4f}"),
        f"| tokens per parameter | {found['tokens_per_parameter']:.1f} | |",
        f"| training | {found['training_flops']:.3g} FLOPs | |",
    ]
    if found["inference_flops"]:
        plain = found["cheapest_to_train"]
        lines += [
            f"| inference | {found['inference_flops']:.3g} FLOPs | |",
            f"| together | {found['training_and_inference_flops']:.3g} FLOPs | |",
            "",
            f"Cheapest to train alone would be {short(plain['parameters'])} on {short(plain['tokens'])} tokens: "
            f"{plain['training_flops']:.3g} FLOPs of training, {plain['training_and_inference_flops']:.3g} with inference. "
            f"Counting inference saves {found['saved_share']:.1%}.",
        ]
    if found["notes"]:
        lines += ["", *(f"- {note}" for note in found["notes"])]
    return "\n".join(lines) + "\n"
