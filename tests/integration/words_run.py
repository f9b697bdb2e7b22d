"""Runs of a few steps on a few words, through the command: shared by the tests that launch."""

import os
import subprocess
import sys
from pathlib import Path

from orchestrator.chaos import stage
from orchestrator.record import StepRecord, kept_steps, read_all_steps
from orchestrator.run_dir import RunDir

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-P", "-c", "import sys; from orchestrator.cli import main; sys.exit(main())", "launch"]
STEPS = 30


def make_workplace(folder: Path) -> Path:
    """Two small sources of text in `folder`, a group that mixes them, and a file of the user's that no rank must import."""
    (folder / "model.py").write_text("raise RuntimeError('the model.py of the folder of the launch')\n")
    return stage.make_workplace(folder)


def words(name: str, *more: str) -> list[str]:
    return [
        *COMMAND,
        "--config-dir=conf",
        "model=nano",
        "data=words",
        f"name={name}",
        f"steps={STEPS}",
        "optim.warmup_steps=5",
        "eval_every_steps=10",
        "checkpoint.every_steps=10",
        *more,
    ]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def launch(workplace: Path, name: str, *more: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words(name, *more),
        cwd=workplace,
        env={**environment(), **env},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )


def arriero(workplace: Path, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND[:-1], *command],
        cwd=workplace,
        env={**environment(), **env},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )


def run_dir(workplace: Path, name: str) -> RunDir:
    return RunDir(workplace / "runs" / name)


def losses(workplace: Path, name: str) -> dict[int, tuple[float, float]]:
    kept: list[StepRecord] = kept_steps(read_all_steps(run_dir(workplace, name).records))
    return {r.step: (r.loss, r.grad_norm) for r in kept}
