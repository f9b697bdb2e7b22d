"""Which runs a carbon report is about, and what their configurations say of energy and carbon."""

from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dashboards.carbon import sentence
from orchestrator import spec as specs
from orchestrator.energy.carbon import BudgetVerdict, budget_verdict, place_problems
from orchestrator.energy.config import CarbonConfig
from orchestrator.energy.report import AccountedRun, account
from orchestrator.errors import UserError
from orchestrator.run_dir import RunDir

_INTENSITIES = ("intensity_g_per_kwh", "series", "cloud", "zone", "region")


def run_dirs(paths: Sequence[Path]) -> list[Path]:
    """Run directories as they are; of other folders (a sweep, a project) the run directories below them."""
    found: list[Path] = []
    for path in paths:
        inside = [path] if RunDir(path).spec.exists() else sorted(p.parent for p in path.rglob("spec.yaml"))
        if not inside:
            raise UserError(f"{path} is no run directory and holds none: none has a spec.yaml")
        found += inside
    return found


def accounted(root: Path, overrides: Sequence[str] = ()) -> AccountedRun:
    """A run directory, with `carbon.KEY=VALUE` in place of the run's own. Raises UserError."""
    spec = specs.load(RunDir(root).spec)
    carbon = OmegaConf.structured(spec.carbon)
    given = OmegaConf.from_dotlist([o.removeprefix("carbon.") for o in overrides])
    if any(key in given for key in _INTENSITIES):  # one that is given now replaces the run's own
        carbon.update(dict.fromkeys(_INTENSITIES))
    try:
        section = OmegaConf.to_object(OmegaConf.merge(carbon, given))
    except OmegaConfBaseException as error:
        raise UserError(f"{' '.join(overrides)}: {str(error).splitlines()[0]}") from None
    assert isinstance(section, CarbonConfig)
    problems = section.problems()
    if not problems and any(key in given for key in _INTENSITIES):  # what is asked for now must be known
        problems = place_problems(section)
    if problems:
        raise UserError("\n".join(problems))
    return AccountedRun(
        name=root.name,
        root=root,
        carbon=section,
        gpu=spec.gpu.name,
        gpu_watts=spec.gpu.watts,
        gpus=spec.cluster.gpus,
        nodes=spec.cluster.nodes,
    )


def carbon_sentence(root: Path) -> str:
    """A run's energy and carbon in one line."""
    return sentence(account([accounted(root)], ask_slurm=False)[0])


def budget(root: Path) -> BudgetVerdict:
    """What a run has used so far against carbon.budget_kwh and carbon.budget_t_co2e."""
    run = accounted(root)
    used = account([run], ask_slurm=False)[0]
    kwh = used.site_energy_kwh.central if used.site_energy_kwh else 0.0
    return budget_verdict(run.carbon, kwh, used.co2e_kg.central if used.co2e_kg else None)
