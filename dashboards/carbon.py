"""The carbon statement as a table, CSV, HTML, Prometheus textfile or model card. Rendering only: no figure is made here
but sums and products of the statement's own."""

import csv
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Range:
    """A figure and what it may be: low <= central <= high."""

    low: float
    central: float
    high: float

    def __mul__(self, factor: float) -> "Range":
        return Range(self.low * factor, self.central * factor, self.high * factor)

    def __add__(self, other: "Range") -> "Range":
        return Range(self.low + other.low, self.central + other.central, self.high + other.high)


@dataclass(frozen=True, kw_only=True)
class CarbonStatement:
    """The energy of one run, or of several together. Energies are of the devices, without PUE, unless named `site`."""

    name: str
    energy_kwh: Range | None  # None: nothing was measured
    by_source_kwh: dict[str, float]  # counter, sampled, modelled, estimated
    by_class_kwh: dict[str, float]  # kept, lost, startup, checkpoint, evaluation, idle
    by_kind_kwh: dict[str, float]  # gpu, cpu, ram, unseen nodes
    apportioned_kwh: float  # of devices that the run had a share of only: MIG, shared nodes
    pue: float
    co2e_kg: Range | None  # of the site, location-based; None: no intensity is configured
    intensity: str  # where the intensity comes from and of which year; or how to get one
    market_co2e_kg: float | None  # of the site, market-based
    embodied_co2e_kg: float | None
    gpu: str  # its name
    gpu_watts: float
    gpu_hours: float
    formula_co2e_kg: float | None
    slurm_kwh: float | None
    slurm: str  # where `slurm_kwh` comes from, or why there is none
    method: str  # how low and high were got
    location: str | None = None
    covered_share: float = 1.0  # of the device-hours, those whose energy is in `energy_kwh`; the others count as 0
    notes: list[str] = field(default_factory=list)

    @property
    def site_energy_kwh(self) -> Range | None:
        return self.energy_kwh * self.pue if self.energy_kwh else None

    @property
    def formula_kwh(self) -> float:
        """GPU-h x W x PUE (arXiv 2302.13971, section 6), whatever the device that `gpu` names."""
        return self.gpu_hours * self.gpu_watts * self.pue / 1000


def central(statement: CarbonStatement | None, name: str) -> float | None:
    """Of the range `name`; None where it is not known."""
    figure = getattr(statement, name, None)
    return figure.central if figure else None


@dataclass(frozen=True)
class Figure:
    """One line of a statement."""

    key: str  # with its unit
    value: float
    how: str
    low: float | None = None
    high: float | None = None


def figures(s: CarbonStatement) -> list[Figure]:
    """Every figure of a statement, each with how it was got."""
    got = _got(s)
    rows: list[Figure] = []
    if s.energy_kwh is not None and s.site_energy_kwh is not None:
        rows.append(_ranged("energy_kwh", s.energy_kwh, got))
        if s.covered_share < 1:
            rows.append(Figure("covered_share", s.covered_share, "of the device-hours, those whose energy is counted"))
        rows.append(_ranged("site_energy_kwh", s.site_energy_kwh, f"energy_kwh x PUE {s.pue:g}"))
        central = s.energy_kwh.central
        relative = s.energy_kwh * (1 / central) if central else Range(0, 0, 0)
        for kind, kwh in s.by_class_kwh.items():
            how = "energy_kwh by the run's steps and events, low and high as its own"
            rows.append(_ranged(f"{kind}_kwh", relative * kwh, how))
        rows += [Figure(f"source_{k}_kwh", v, f"energy_kwh that was {k}") for k, v in s.by_source_kwh.items()]
        rows += [Figure(f"{k.replace(' ', '_')}_kwh", v, "energy_kwh by device") for k, v in s.by_kind_kwh.items()]
        if s.apportioned_kwh:
            rows.append(
                Figure("apportioned_kwh", s.apportioned_kwh, "of devices shared with others, by slices or CPUs")
            )
    if s.co2e_kg is not None:
        rows.append(_ranged("co2e_kg", s.co2e_kg, f"location-based: site_energy_kwh x {s.intensity}"))
    if s.market_co2e_kg is not None:
        rows.append(
            Figure("market_co2e_kg", s.market_co2e_kg, "market-based: site_energy_kwh x carbon.market_g_per_kwh")
        )
    if s.embodied_co2e_kg is not None:
        how = "gpu_hours / carbon.gpu_lifetime_h x carbon.embodied_kg_per_gpu"
        rows.append(Figure("embodied_co2e_kg", s.embodied_co2e_kg, how))
    rows.append(Figure("gpu_hours", s.gpu_hours, f"time held x devices ({s.gpu}), over every attempt"))
    rows.append(
        Figure(
            "formula_site_energy_kwh", s.formula_kwh, f"{s.gpu} hours x {s.gpu_watts:g} W x PUE {s.pue:g}, not measured"
        )
    )
    if s.formula_co2e_kg is not None:
        rows.append(Figure("formula_co2e_kg", s.formula_co2e_kg, f"formula_site_energy_kwh x {s.intensity}"))
    if s.slurm_kwh is not None:
        rows.append(Figure("slurm_kwh", s.slurm_kwh, f"{s.slurm}; whole nodes, without PUE: a cross-check"))
    return rows


def remarks(s: CarbonStatement) -> list[str]:
    """What a reader must know beside the figures."""
    said = list(s.notes)
    if s.energy_kwh is None:
        said.insert(0, "nothing was measured: only the formula's figure stands")
    elif s.co2e_kg is None:
        said.append(f"no carbon is told: {s.intensity}")
    if s.slurm_kwh is None:
        said.append(f"no cross-check with Slurm: {s.slurm}")
    return [*said, s.method]


def sentence(s: CarbonStatement) -> str:
    """The statement in one line, for the end of a run."""
    if s.energy_kwh is None or s.site_energy_kwh is None:
        return f"energy: nothing was measured; by hours x W x PUE of {s.gpu} {_number(s.formula_kwh)} kWh"
    total = s.energy_kwh.central
    lost = 100 * s.by_class_kwh.get("lost", 0.0) / total if total else 0.0
    kept = 100 * s.by_class_kwh.get("kept", 0.0) / total if total else 0.0
    energy = (
        f"energy: {_span(s.site_energy_kwh)} kWh at the site (PUE {s.pue:g}; {_got(s)}), "
        f"{kept:.0f}% in kept steps, {lost:.0f}% in lost ones"
    )
    carbon = f"{_span(s.co2e_kg)} kg CO2e ({s.intensity})" if s.co2e_kg else f"no carbon is told: {s.intensity}"
    return f"{energy}; {carbon}"


# -------------------------------------------------------------------------------------------------------------- formats


def to_json(statements: Sequence[CarbonStatement]) -> list[dict[str, Any]]:
    return [
        {
            "name": s.name,
            "figures": {
                f.key: {"value": f.value, "how": f.how} | ({"low": f.low, "high": f.high} if f.low is not None else {})
                for f in figures(s)
            },
            "remarks": remarks(s),
        }
        for s in statements
    ]


def to_csv(statements: Sequence[CarbonStatement]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", "figure", "value", "low", "high", "how"])
    for s in statements:
        writer.writerows([s.name, f.key, f.value, _blank(f.low), _blank(f.high), f.how] for f in figures(s))
    return out.getvalue()


def to_markdown(statements: Sequence[CarbonStatement]) -> str:
    parts: list[str] = ["# Energy and carbon", "", *_table(*llama_form(statements))]
    for s in statements:
        parts += ["", f"## {s.name}", ""]
        parts += _table(("figure", "value", "low", "high", "how it was got"), [_cells(f) for f in figures(s)])
        parts += ["", *(f"- {remark}" for remark in remarks(s))]
    return "\n".join(parts) + "\n"


def to_html(statements: Sequence[CarbonStatement]) -> str:
    """One page that opens with no network."""
    body = ["<h1>Energy and carbon</h1>", _html_table(*llama_form(statements))]
    for s in statements:
        rows = [_cells(f) for f in figures(s)]
        body.append(f"<h2>{html.escape(s.name)}</h2>")
        body.append(_html_table(("figure", "value", "low", "high", "how it was got"), rows))
        body.append("<ul>" + "".join(f"<li>{html.escape(remark)}</li>" for remark in remarks(s)) + "</ul>")
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
        "table{border-collapse:collapse;width:100%}td,th{border-bottom:1px solid #8884;padding:.25rem .5rem;"
        "text-align:left;vertical-align:top}td:nth-child(n+2):nth-child(-n+4){font-variant-numeric:tabular-nums}"
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Energy and carbon</title>'
        f"<style>{style}</style><body>{''.join(body)}</body></html>\n"
    )


def to_prometheus(statements: Sequence[CarbonStatement]) -> str:
    """For node_exporter's textfile collector. Gauges: a rewind moves energy from kept to lost."""
    families: dict[str, list[str]] = {}
    for s in statements:
        run = s.name.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        for f in figures(s):
            for bound, value in (("central", f.value), ("low", f.low), ("high", f.high)):
                if value is not None:
                    families.setdefault(f.key, []).append(f'arriero_{f.key}{{run="{run}",bound="{bound}"}} {value!r}')
    lines = []
    for key, samples in families.items():
        lines += [f"# TYPE arriero_{key} gauge", *samples]
    return "\n".join(lines) + "\n"


def to_model_card(s: CarbonStatement) -> str:
    """The model card's YAML (Hugging Face's `co2_eq_emissions`: grams)."""
    if s.co2e_kg is None:
        return f"# co2_eq_emissions is left out: {s.intensity}\n"
    got = _got(s)
    lines = [
        "co2_eq_emissions:",
        f"  emissions: {1000 * s.co2e_kg.central:.6g}",
        f'  source: "arriero: {got}; {s.intensity}; PUE {s.pue:g}"'.replace("\\", "/"),
        "  training_type: pre-training",
        *([f'  geographical_location: "{s.location}"'] if s.location else []),
        f'  hardware_used: "{s.gpu}"',
    ]
    return "\n".join(lines) + "\n"


# --------------------------------------------------------------------------------------------------- LLaMA's own table


def llama_form(statements: Sequence[CarbonStatement]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The ledger's account beside the formula's, in the columns of the paper's table 15: header and rows.

    In MWh and tonnes, or in kWh and kg where every run is below a MWh.
    """
    large = any(max(s.formula_kwh, s.site_energy_kwh.high if s.site_energy_kwh else 0.0) >= 1000 for s in statements)
    scale, units = (1e-3, ("MWh", "tCO2e")) if large else (1.0, ("kWh", "kgCO2e"))
    rows: list[tuple[str, ...]] = []
    for s in statements:
        device = (s.name, s.gpu, f"{s.gpu_watts:g} W", _number(s.gpu_hours))
        if s.site_energy_kwh is not None:
            carbon = _span(s.co2e_kg * scale) if s.co2e_kg else "-"
            how = f"{_mostly(s.by_source_kwh)} x PUE {s.pue:g}: {_got(s)}"
            rows.append((*device, _span(s.site_energy_kwh * scale), carbon, how))
        carbon = _number(s.formula_co2e_kg * scale) if s.formula_co2e_kg is not None else "-"
        alone = "" if s.site_energy_kwh is not None else "; nothing was measured"
        rows.append((*device, _number(s.formula_kwh * scale), carbon, f"formula: hours x W x PUE{alone}"))
    return ("run", "device", "power", "device-hours", *units, "how it was got"), rows


LLAMA_TABLE_15 = (
    ("OPT-175B", 809_472),
    ("BLOOM-175B", 1_082_880),
    ("LLaMA-7B", 82_432),
    ("LLaMA-13B", 135_168),
    ("LLaMA-33B", 530_432),
    ("LLaMA-65B", 1_022_362),
)


def llama_table(gpu_watts: float = 400, pue: float = 1.1, kg_per_kwh: float = 0.385) -> str:
    """Table 15 of the LLaMA paper, recomputed: MWh are cut, tonnes are rounded, as it prints them."""
    rows = []
    for model, gpu_hours in LLAMA_TABLE_15:
        kwh = gpu_hours * gpu_watts * pue / 1000
        rows.append(
            (model, f"{gpu_watts:g} W", f"{gpu_hours:,}", f"{int(kwh / 1000)}", f"{kwh * kg_per_kwh / 1000:.0f}")
        )
    table = _table(("model", "GPU power", "GPU-hours", "MWh", "tCO2e"), rows)
    return "\n".join(
        [
            *table,
            "",
            f"MWh = GPU-hours x {gpu_watts:g} W x PUE {pue:g} / 1e6, cut to whole MWh; tCO2e = MWh x {kg_per_kwh} before",
            "the cut, rounded. Every figure is the one that arXiv 2302.13971, table 15, prints but for BLOOM's MWh: the paper",
            "prints 475, and its own GPU-hours give 476.5. Its 183 tCO2e agrees with either.",
            "",
        ]
    )


# ------------------------------------------------------------------------------------------------------------- helpers


def _ranged(key: str, value: Range, how: str) -> Figure:
    return Figure(key, value.central, how, value.low, value.high)


def _got(s: CarbonStatement) -> str:
    """How an energy was got, and how much of the time it leaves out."""
    if s.covered_share >= 1:
        return _mixture(s.by_source_kwh)
    percent = f"{min(100 * s.covered_share, 99.9):.3g}%"
    return f"{_mixture(s.by_source_kwh)}; covers {percent} of the device-hours, the others count as 0"


def _mixture(by_source_kwh: dict[str, float]) -> str:
    """`62% counter, 38% modelled`: how an energy was got."""
    total = sum(by_source_kwh.values())
    if not total:
        return "nothing consumed"
    parts = sorted(((kwh / total, source) for source, kwh in by_source_kwh.items() if kwh), reverse=True)
    return ", ".join(f"{100 * share:.3g}% {source}" for share, source in parts)


def _mostly(by_source_kwh: dict[str, float]) -> str:
    """How most of an energy was got: only a counter or a sample is a measurement."""
    most = max(by_source_kwh, key=lambda source: by_source_kwh[source], default="")
    return most if most in ("modelled", "estimated") else "measured"


def _number(value: float) -> str:
    if value and abs(value) < 100:
        return f"{value:.3g}" if abs(value) >= 1e-4 else f"{value:.2e}"
    return f"{value:,.0f}"


def _span(value: Range) -> str:
    return f"{_number(value.central)} ({_number(value.low)} to {_number(value.high)})"


def _blank(value: float | None) -> float | str:
    return "" if value is None else value


def _cells(f: Figure) -> tuple[str, ...]:
    low, high = ("" if v is None else _number(v) for v in (f.low, f.high))
    return (f.key, _number(f.value), low, high, f.how)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown, its columns aligned for a terminal."""
    lines = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    padded = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines]
    return [padded[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *padded[1:]]


def _html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"
