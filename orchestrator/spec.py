"""The whole configuration of a run: composes every section with Hydra and checks across them before anything is done."""

import copy
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import yaml
from fsspec.utils import get_protocol
from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf._utils import OmegaConfDumper
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from dashboards.config import DashboardConfig
from model.checkpoint.policy import CheckpointConfig
from model.config import ModelConfig, OptimConfig, ProfileConfig
from model.cost import GpuConfig
from model.data.config import DataConfig
from model.layout import Layout
from orchestrator import shrink
from orchestrator.energy.carbon import place_problems
from orchestrator.energy.config import CarbonConfig
from orchestrator.errors import UserError
from orchestrator.plan.config import PlanConfig
from orchestrator.spikes.config import SpikesConfig
from slurm.request import ClusterConfig

if TYPE_CHECKING:
    from model.data.loader import Loader
    from model.data.prepare import PreparedData


@dataclass(kw_only=True)
class RunSpec:
    """A run, resolved: what `spec.yaml` in its run directory holds."""

    name: str
    seed: int
    steps: int
    eval_every_steps: int
    eval_rows_per_source: int
    precision: str  # auto (bf16 where the hardware has it) | bf16 | fp32
    compile: str  # layers and loss through torch.compile: auto (where the run is long enough) | on | off
    run_root: str  # run directories are made below it
    model: ModelConfig
    data: DataConfig
    layout: Layout
    optim: OptimConfig
    cluster: ClusterConfig
    gpu: GpuConfig
    checkpoint: CheckpointConfig
    spikes: SpikesConfig
    carbon: CarbonConfig
    dashboard: DashboardConfig
    plan: PlanConfig
    profile: ProfileConfig
    experiment: Any = None  # the name of the experiment that was chosen is in overrides.txt

    @property
    def run_dir(self) -> Path:
        return Path(self.run_root) / self.name

    @property
    def batch_tokens(self) -> int:
        return self.optim.batch_sequences * self.model.sequence_length

    def loader(self, prepared: "PreparedData") -> "Loader":
        """The rows that this run trains on and is evaluated on. Raises ValueError where the data have less than a row."""
        from model.data.loader import Loader  # `plan` and `status` need none of it

        return Loader(
            prepared,
            self.data,
            sequence_length=self.model.sequence_length,
            batch_sequences=self.optim.batch_sequences,
            seed=self.seed,
            skips=[],
        )

    def problems(self) -> list[str]:
        """Every combination that cannot be, all at once; where a number is none, those alone."""
        if found := [f"{name}={value} must be a finite number" for name, value in _not_finite(asdict(self))]:
            return found
        found = [
            f"{f}={getattr(self, f)} must be at least 1" for f in ("steps", "eval_every_steps") if getattr(self, f) < 1
        ]
        if self.eval_rows_per_source < 0:
            found.append(f"eval_rows_per_source={self.eval_rows_per_source} must be 0 (no evaluation) or more")
        found += [*name_problems(self.name), *self._url_problems()]
        if self.cluster.kind == "slurm" and "%" in self.name:
            found.append(
                f"name={self.name}: Slurm reads % in the path of a log as the beginning of a job's number: leave it out"
            )
        if self.precision not in ("auto", "bf16", "fp32"):
            found.append(f"precision={self.precision} is none of auto, bf16, fp32")
        if self.compile not in ("auto", "on", "off"):
            found.append(f"compile={self.compile} is none of auto, on, off")
        sections = (
            self.model,
            self.data,
            self.optim,
            self.cluster,
            self.gpu,
            self.checkpoint,
            self.spikes,
            self.carbon,
            self.dashboard,
            self.plan,
        )
        for section in sections:
            found += section.problems()
        if not self.cluster.problems():
            found += self.profile.problems(self.steps, self.cluster.gpus)
        if not self.carbon.problems():
            found += place_problems(self.carbon)
        if (ids := self.data.tokenizer.vocab_size) > self.model.vocab_size:
            found.append(
                f"data.tokenizer.vocab_size={ids} is more than model.vocab_size={self.model.vocab_size}: set "
                f"model.vocab_size={ids}, or leave data.tokenizer.vocab_size out"
            )
        if not self.model.problems() and not self.cluster.problems():
            found += self.layout.problems(
                self.model, self.optim.batch_sequences, self.cluster.gpus, self.cluster.gpus_per_node
            )
        if not found:
            found += shrink.problems(self.cluster, self.layout, self.optim.batch_sequences)
        if self.optim.warmup_steps >= self.steps:
            found.append(
                f"optim.warmup_steps={self.optim.warmup_steps} leaves no step of steps={self.steps} to train: lower it"
            )
        return found

    def _url_problems(self) -> list[str]:
        """URLs that no file system is there for: unknown, or its package is missing."""
        found = []
        if "://" in self.run_root:
            found.append(f"run_root={self.run_root} must be a folder of a file system: records are appended there")
        if get_protocol(self.checkpoint.url or "") == "memory":
            found.append(
                f"checkpoint.url={self.checkpoint.url} is gone with the process: give a path, or a URL such as s3://bucket/folder"
            )
        urls = {"checkpoint.url": self.checkpoint.url, "data.tokenizer.path": self.data.tokenizer.path}
        for field, url in (urls | {f"data.sources.{n}.path": s.path for n, s in self.data.sources.items()}).items():
            if url and "://" in url:
                try:
                    fsspec.get_filesystem_class(get_protocol(url))
                except (ValueError, ImportError) as error:
                    found.append(f"{field}={url}: {error}: give a path, or a URL such as s3://bucket/folder")
        return found


def name_problems(name: str) -> list[str]:
    """Of a run or a sweep: a folder below run_root, and not one of those that are not for people (runs/.data)."""
    if name.isprintable() and all(part.strip() and not part.startswith(".") for part in name.split("/")):
        return []
    return [
        f"name={name!r} must name a folder below run_root, such as name=mine or name=group/mine: not empty, not absolute, "
        "no part beginning with a dot, no line break"
    ]


def _not_finite(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Where .nan and .inf are, which no comparison with a limit finds."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _not_finite(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for inner in value:
            yield from _not_finite(inner, name)
    elif isinstance(value, float) and not math.isfinite(value):
        yield name, value


# Sections that say where and how a run runs, not what it computes.
WHERE_AND_HOW = frozenset("cluster gpu layout checkpoint dashboard carbon spikes plan profile".split())  # noqa: SIM905

# What Hydra, OmegaConf and the YAML files of a user's own groups raise.
_UNREADABLE = (HydraException, OmegaConfBaseException, yaml.YAMLError)

ConfigStore.instance().store("schema", RunSpec)
OmegaConf.register_new_resolver("mul", lambda a, b: int(a) * int(b), replace=True)


def compose(overrides: Sequence[str], config_dir: Path | None = None) -> RunSpec:
    """Hydra overrides (`model=llama_7b optim.lr=1e-4`) to a checked RunSpec.

    `config_dir` is a folder of the user's own groups, searched beside the package's.
    Raises UserError with everything that is wrong, together.
    """
    search = _search(config_dir)
    wrong: list[str] = []
    try:
        spec = _compose([*search, *overrides])
    except _UNREADABLE:
        # Something is wrong: try each override by itself, so that all that is wrong is told together.
        good: list[str] = []
        for override in overrides:
            try:
                _compose([*search, *good, override])
                good.append(override)
            except _UNREADABLE as error:
                gone = ": cluster.spare_nodes says it now" if override.startswith("plan.spare_nodes=") else ""
                wrong.append(f"{override}: {_readable(error)}{gone}")
        spec = _compose([*search, *good])
    if wrong := [*wrong, *spec.problems()]:
        raise UserError(_told(wrong))
    return spec


def _search(config_dir: Path | None) -> list[str]:
    if config_dir is None:
        return []
    if not config_dir.is_dir():
        raise UserError(
            f"--config-dir {config_dir} is no folder: give one with your groups, as my_conf of my_conf/data/mine.yaml"
        )
    return [f"hydra.searchpath=[file://{config_dir.resolve()}]"]


def _told(wrong: Sequence[str]) -> str:
    plural = "is 1 problem" if len(wrong) == 1 else f"are {len(wrong)} problems"
    return f"there {plural} with this configuration:\n" + "\n".join(f"  - {w}" for w in wrong)


def compose_many(sweep: Sequence[Sequence[str]], config_dir: Path | None = None) -> list[RunSpec | str]:
    """What `compose` gives for each of many lists of overrides, or what is wrong with it, ten times as fast.

    Lists that choose the same groups and set the same keys share one composition by Hydra; what only sets values
    (`optim.lr=1e-4`) is then set as Hydra does it, after the groups. What Hydra refuses on this way goes through `compose`,
    which says why.
    """
    search = _search(config_dir)
    bases: dict[tuple[tuple[str, ...], ...], Any] = {}
    found: list[RunSpec | str] = []
    for overrides in sweep:
        try:
            found.append(_from_base(overrides, search, bases) or compose(overrides, config_dir))
        except UserError as error:
            found.append(str(error))
    return found


def _from_base(
    overrides: Sequence[str], search: list[str], bases: dict[tuple[tuple[str, ...], ...], Any]
) -> RunSpec | str | None:
    """None where Hydra refuses it."""
    try:
        parsed = [_parsed(o) for o in overrides]
        chosen = tuple(str(o.input_line) for o in parsed if not _only_sets_a_value(o))
        values = {o.key_or_group: o.value() for o in parsed if _only_sets_a_value(o)}
        base = (chosen, tuple(values))
        if base not in bases:
            GlobalHydra.instance().clear()
            with initialize_config_module("hydra_conf", version_base="1.3"):
                composed = hydra_compose("config", overrides=[*search, *chosen])
            if any(o.is_add() for o in parsed):  # Hydra adds any key: one that no section knows is refused here
                _typed(OmegaConf.to_container(composed, resolve=True))
            bases[base] = composed
        config = bases[base]  # each list sets the same keys, so nothing of the one before is left
        if any(isinstance(v, dict) for v in values.values()):  # but for these, which are merged
            config = copy.deepcopy(config)
        for key, value in values.items():
            OmegaConf.update(config, key, value, merge=True)
        spec = OmegaConf.to_object(config)
    except _UNREADABLE:
        return None
    assert isinstance(spec, RunSpec)
    return _told(wrong) if (wrong := spec.problems()) else spec


@cache  # a sweep's lists differ in few of them
def _parsed(override: str) -> Override:
    return OverridesParser.create().parse_override(override)


def _only_sets_a_value(override: Override) -> bool:
    """A dotted key that is neither added nor deleted nor in a package: no group has a dot."""
    key = override.key_or_group
    plain = not (override.is_add() or override.is_delete() or override.package)
    return plain and "/" not in key and not key.startswith("hydra.") and ("." in key or key in _PLAIN_KEYS)


_PLAIN_KEYS = frozenset(
    ("name", "seed", "steps", "eval_every_steps", "eval_rows_per_source", "precision", "compile", "run_root")
)  # of RunSpec, those that are no group


def load(path: Path) -> RunSpec:
    """The spec that a run directory holds. What did not exist when it was written has today's default; what is gone is left."""
    if not path.exists():
        raise UserError(f"{path} does not exist: is this a run directory?")
    try:
        return copy.deepcopy(_loaded(path.read_text(encoding="utf-8")))
    except (*_UNREADABLE, AssertionError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {_readable(error)}") from None


@lru_cache(maxsize=1024)  # a sweep's report asks several times for each of many
def _loaded(text: str) -> RunSpec:
    values = OmegaConf.create(text)
    assert isinstance(values, DictConfig)
    values.get("plan", {}).pop("spare_nodes", None)  # until 2026-11: cluster.spare_nodes says it now
    try:
        return _typed(values)
    except MissingMandatoryValue:
        defaults = as_dict(_compose([]))
        return _typed(OmegaConf.merge({k: v for k, v in defaults.items() if k not in values}, values))


def as_dict(spec: RunSpec) -> dict[str, Any]:
    """The spec as plain values."""
    values = OmegaConf.to_container(OmegaConf.structured(spec), resolve=True)
    assert isinstance(values, dict)
    return {str(k): v for k, v in values.items()}


def to_yaml(spec: RunSpec) -> str:
    """As OmegaConf.to_yaml writes it, without its tree of nodes, and by libyaml: many times as fast."""
    return str(yaml.dump(asdict(spec), sort_keys=False, allow_unicode=True, Dumper=_Dumper))


class _Dumper(getattr(yaml, "CDumper", yaml.Dumper)):  # type: ignore[misc]
    """OmegaConf's: what it would read as a number is quoted where it is text."""


_Dumper.add_representer(str, OmegaConfDumper.str_representer)


def _compose(overrides: Sequence[str]) -> RunSpec:
    GlobalHydra.instance().clear()
    with initialize_config_module("hydra_conf", version_base="1.3"):
        config = hydra_compose("config", overrides=list(overrides))
    return _typed(OmegaConf.to_container(config, resolve=True))


def _typed(values: Any) -> RunSpec:
    """Plain values to the typed spec. Refuses unknown keys, also those that Hydra's `+key=value` lets through."""
    spec = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunSpec), values))
    assert isinstance(spec, RunSpec)
    return spec


def _readable(error: Exception) -> str:
    """Hydra's and OmegaConf's first words, without the lines about types that only a programmer wants."""
    lines = [line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip()]
    kept = [line for line in lines if not re.match(r"(full_key|object_type|reference_type|set_struct|set )", line)]
    return " ".join(kept)
