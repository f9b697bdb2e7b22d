"""`arriero launch -m hydra/sweeper=optuna`: Optuna chooses the points, a batch after the other, by the loss that each came to.

The grammar and the words are those of Hydra's own Optuna sweeper (`hydra.sweeper.n_trials`, `n_jobs`, `sampler.seed`), which asks
for an Optuna of before 2022 and can't go on with a study. Here the study is a journal in the sweep's directory: the same command
goes on with the trials that are open, tries those that failed once more, and ends at `n_trials` in all.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import IntervalSweep, Override

from orchestrator.errors import UserError

STUDY = "study.jsonl"
SAMPLERS = ("tpe", "random")


@dataclass(frozen=True, kw_only=True)
class Search:
    """What `hydra.sweeper.*` says."""

    n_trials: int = 20  # of the study, over all commands
    n_jobs: int = 1  # points of a batch
    sampler: str = "tpe"
    seed: int | None = None


def search_of(words: dict[str, str]) -> Search | None:
    """`hydra/sweeper` and `hydra.sweeper.*` of the command line; None for Hydra's basic sweeper. Raises UserError."""
    sweeper = words.pop("hydra/sweeper", "basic")
    if sweeper not in ("basic", "optuna"):
        raise UserError(f"hydra/sweeper={sweeper} is none of basic, optuna")
    known = {"hydra.sweeper.n_trials", "hydra.sweeper.n_jobs", "hydra.sweeper.sampler.seed", "hydra/sweeper/sampler"}
    if unknown := sorted(words.keys() - (known if sweeper == "optuna" else set())):
        choices = f": with hydra/sweeper=optuna there are {', '.join(sorted(known))}"
        raise UserError(f"{', '.join(unknown)} is not known to `launch -m`{choices}")
    if sweeper == "basic":
        return None
    numbers: dict[str, int] = {}
    for key in known - {"hydra/sweeper/sampler"}:
        if key in words:
            name = key.rpartition(".")[2]
            if not words[key].isdigit() or (name != "seed" and int(words[key]) < 1):
                raise UserError(f"{key}={words[key]} must be a whole number, {0 if name == 'seed' else 1} or more")
            numbers[name] = int(words[key])
    sampler = words.get("hydra/sweeper/sampler", "tpe")
    if sampler not in SAMPLERS:
        raise UserError(f"hydra/sweeper/sampler={sampler} is none of {', '.join(SAMPLERS)}")
    return Search(sampler=sampler, **numbers)


def optimise(
    root: Path,
    search: Search,
    fixed: Sequence[str],
    content: Sequence[str],
    swept: Sequence[Override],
    run: Callable[[list[list[str]]], list[float | None]],
) -> bool:
    """Until the study has `n_trials` finished ones; whether none failed.

    `content` is what of `fixed` the losses depend on. `run` trains points, given as overrides, and says for each the loss (the
    lower the better), None where it failed.
    """
    study, space = _study(root, search, content, swept)
    from optuna.trial import TrialState

    def trials(state: TrialState) -> list[Any]:
        return list(study.get_trials(deepcopy=False, states=(state,)))

    open_trials = []  # of a command that was cut off
    for trial in trials(TrialState.RUNNING):
        if trial.params.keys() == space.keys():
            open_trials.append((trial.number, trial.params))
        else:
            study.tell(trial.number, state=TrialState.FAIL)
    again = [t.params for t in trials(TrialState.WAITING)]
    tried = [t.params for s in (TrialState.COMPLETE, TrialState.RUNNING) for t in trials(s)]
    for trial in trials(TrialState.FAIL):
        if trial.params.keys() == space.keys() and trial.params not in tried + again:
            study.enqueue_trial(trial.params)
            again.append(trial.params)
    failed = 0
    while (missing := search.n_trials - len(trials(TrialState.COMPLETE)) - failed) > 0:
        batch = open_trials[: min(missing, search.n_jobs)]
        open_trials = open_trials[len(batch) :]
        while len(batch) < min(missing, search.n_jobs):
            asked = study.ask(space)
            batch.append((asked.number, asked.params))
        losses = run(
            [[*fixed, *(f"{k}={v!r}" if isinstance(v, float) else f"{k}={v}" for k, v in p.items())] for _, p in batch]
        )
        for (number, _), loss in zip(batch, losses, strict=True):
            if loss is None:
                study.tell(number, state=TrialState.FAIL)
                failed += 1
            else:  # what diverged is worse than all that did not
                study.tell(number, loss if math.isfinite(loss) else math.inf)
        if all(loss is None for loss in losses):
            print("every point of this batch failed: no more are tried. The same command again goes on", flush=True)
            return False
    if done := trials(TrialState.COMPLETE):
        best = min(done, key=lambda t: t.value)
        told = " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in best.params.items())
        print(f"{len(done)} trials are finished; the best came to a loss of {best.value:.4f}: {told}", flush=True)
    return not failed


def _study(root: Path, search: Search, content: Sequence[str], swept: Sequence[Override]) -> tuple[Any, dict[str, Any]]:
    """The study, new or gone on with, and its space. Raises UserError where it is of another search."""
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend
    except ImportError:
        raise UserError("hydra/sweeper=optuna needs Optuna: pip install 'arriero[optuna]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {o.get_key_element(): _distribution(o) for o in swept}
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(root / STUDY)))
    study = optuna.create_study(storage=storage, study_name=root.name, load_if_exists=True)
    # Another seed for each command: a sampler that began anew would choose what it has chosen before.
    seed = None if search.seed is None else search.seed + len(study.trials)
    make = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}[search.sampler]
    study.sampler = make(
        seed=seed, **({"constant_liar": True} if search.sampler == "tpe" and search.n_jobs > 1 else {})
    )
    said = {"fixed": list(content), "space": {k: repr(v) for k, v in space.items()}}
    before = study.user_attrs.get("search", said)
    if before != said:
        raise UserError(
            f"{root / STUDY} is a study of another search:\n  it has {before}\n  this is {said}\n"
            "A study compares what is alike: choose another name=..., or leave the command as it was."
        )
    study.set_user_attr("search", said)
    return study, space


def _distribution(override: Override) -> Any:
    """Of one swept key: interval() as it is, log with tag(log, ...); range() in its steps; all else a choice."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value = override.value()
    if isinstance(value, IntervalSweep):
        low, high, log = value.start, value.end, "log" in value.tags
        if isinstance(low, int) and isinstance(high, int):
            return IntDistribution(low, high, log=log)
        assert low is not None
        assert high is not None
        return FloatDistribution(float(low), float(high), log=log)
    if override.is_range_sweep():
        steps: list[Any] = sorted(override.sweep_iterator())
        if len(steps) > 1 and all(isinstance(s, int) for s in steps):
            return IntDistribution(steps[0], steps[-1], step=steps[1] - steps[0])
    return CategoricalDistribution([str(v) for v in override.sweep_string_iterator()])
