"""How energy becomes carbon."""

from dataclasses import dataclass


@dataclass(kw_only=True)
class CarbonConfig:
    name: str
    intensity_g_per_kwh: float | None = None  # an explicit grid intensity; null: by zone
    zone: str | None = None  # ISO-3 country, for codecarbon's offline tables
    pue: float = 1.1  # power usage effectiveness of the site (the paper's 1.1)

    def problems(self) -> list[str]:
        found = []
        if self.pue < 1:
            found.append(f"carbon.pue={self.pue} must be at least 1 (a site uses no less than its machines)")
        if self.intensity_g_per_kwh is not None and self.intensity_g_per_kwh < 0:
            found.append(f"carbon.intensity_g_per_kwh={self.intensity_g_per_kwh} must be 0 or more")
        return found
