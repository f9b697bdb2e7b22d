"""How a run's energy is measured, and how it becomes carbon."""

from dataclasses import dataclass
from datetime import datetime

STARTS = ("now", "greenest")
ON_BUDGET = ("warn", "stop")


@dataclass(kw_only=True)
class CarbonConfig:
    """Nothing here is guessed: without an intensity, a series, a zone or a cloud region a run reports energy alone."""

    name: str
    measure: bool = True  # one sampler process a node, outside the ranks
    sample_s: float = 15.0  # between two readings of every device
    # The grid's intensity, the first that is given: a value, a time series, a cloud region, a zone.
    intensity_g_per_kwh: float | None = None
    series: str | None = None  # CSV file: time_utc,g_per_kwh (each row holds until the next)
    cloud: str | None = None  # provider/region as in codecarbon's offline table, such as gcp/europe-west1
    zone: str | None = None  # ISO-3 country as in codecarbon's offline table, such as FRA
    region: str | None = None  # state, province or bidding zone within USA, CAN, CHN, SWE, NOR or FIN
    market_g_per_kwh: float | None = None  # of the contract or certificates: adds the market-based account
    pue: float = 1.1  # power usage effectiveness of the site (LLaMA's, arXiv 2302.13971 section 6)
    embodied_kg_per_gpu: float | None = None  # CO2e of making one GPU with its share of the node: adds embodied carbon
    gpu_lifetime_h: float = 6 * 365 * 24 * 0.85  # hours of work one GPU does in its life (BLOOM, arXiv 2211.02001)
    start: str = "now"  # now | greenest: when `launch` lets the job begin
    deadline: str | None = None  # ISO 8601 with a zone; `greenest` is done by then
    duration_h: float | None = None  # how long the run takes, for `greenest`; null: as the plan forecasts
    budget_kwh: float | None = None  # of the site: devices x PUE
    budget_t_co2e: float | None = None
    on_budget: str = "warn"  # warn | stop

    def problems(self) -> list[str]:
        found = []
        if self.pue < 1:
            found.append(f"carbon.pue={self.pue} must be at least 1 (a site uses no less than its machines)")
        if self.sample_s < 0.1:
            found.append(f"carbon.sample_s={self.sample_s} must be at least 0.1: a measurement itself takes time")
        if self.duration_h is not None and self.duration_h <= 0:
            found.append(f"carbon.duration_h={self.duration_h} must be above 0, or null: as the plan forecasts")
        for name in ("intensity_g_per_kwh", "market_g_per_kwh", "embodied_kg_per_gpu", "budget_kwh", "budget_t_co2e"):
            value = getattr(self, name)
            if value is not None and value < 0:
                found.append(f"carbon.{name}={value} must be 0 or more")
        if self.gpu_lifetime_h <= 0:
            found.append(f"carbon.gpu_lifetime_h={self.gpu_lifetime_h} must be above 0")
        if self.zone is not None and not (len(self.zone) == 3 and self.zone.isalpha() and self.zone.isupper()):
            found.append(f"carbon.zone={self.zone} is no ISO-3 country code: write FRA for France, USA, DEU, ...")
        if self.region is not None and self.zone is None:
            found.append(
                f"carbon.region={self.region} needs carbon.zone: set carbon.zone=USA, CAN, CHN, SWE, NOR or FIN"
            )
        if self.cloud is not None and self.cloud.count("/") != 1:
            found.append(f"carbon.cloud={self.cloud} must be provider/region, such as gcp/europe-west1")
        if self.start not in STARTS:
            found.append(f"carbon.start={self.start} is none of {', '.join(STARTS)}")
        if self.on_budget not in ON_BUDGET:
            found.append(f"carbon.on_budget={self.on_budget} is none of {', '.join(ON_BUDGET)}")
        if self.deadline is not None:
            try:
                if datetime.fromisoformat(self.deadline).tzinfo is None:
                    found.append(f"carbon.deadline={self.deadline} names no time zone: add Z, or +02:00")
            except ValueError:
                found.append(f"carbon.deadline={self.deadline} is no time: write 2026-12-01T08:00:00Z")
        if self.start == "greenest" and (self.series is None or self.deadline is None):
            found.append(
                "carbon.start=greenest needs a forecast and a deadline: set carbon.series=FILE.csv and "
                "carbon.deadline=2026-12-01T08:00:00Z"
            )
        if self.budget_t_co2e is not None and self.without_intensity:
            found.append(
                f"carbon.budget_t_co2e={self.budget_t_co2e} needs an intensity: set carbon.zone, carbon.cloud, "
                "carbon.series or carbon.intensity_g_per_kwh"
            )
        return found

    @property
    def without_intensity(self) -> bool:
        """Whether carbon cannot be told, only energy."""
        return all(v is None for v in (self.intensity_g_per_kwh, self.series, self.cloud, self.zone))
