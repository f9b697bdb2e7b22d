"""Which spike rule watches the loss."""

from dataclasses import dataclass


@dataclass(kw_only=True)
class SpikesConfig:
    name: str
