"""`arriero export RUN --to FOLDER`: the model as transformers and what builds on it read it, with its model card."""

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dashboards.model_card import model_card
from orchestrator import spec as specs
from orchestrator.errors import Failure, UserError
from orchestrator.page_data import RunFollower
from orchestrator.run_dir import RunDir

BUCKETS = 100  # of the run's curve, which the card does not show


def export(run: Path, folder: Path, step: int | None, dtype: str, as_json: bool) -> int:
    """Writes `folder` whole or not at all. Raises UserError, and Failure where the checkpoints cannot be read."""
    run_dir, folder = RunDir.existing(run), folder.resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir()) or folder == Path.cwd()):
        raise UserError(f"--to {folder} is there already, and not an empty folder: name another")
    spec = specs.load(run_dir.spec)
    if not run_dir.data.exists():
        raise UserError(f"{run} was never prepared to train: there is no model")
    new = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)  # of an export that was killed
    new.mkdir(parents=True)
    try:
        found = _in_a_process_with_torch(
            model=asdict(spec.model),
            checkpoints=spec.checkpoint.url or str(run_dir.checkpoints),
            checkpoint=asdict(spec.checkpoint),
            data=run_dir.data.read_text().strip(),
            tokenizer_copy=str(run_dir.tokenizer),
            folder=str(new),
            step=step,
            dtype=dtype,
        )
        card = model_card(RunFollower(run_dir.root, BUCKETS).view(), found["step"])
        (new / "README.md").write_text(card, encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    if as_json:
        print(json.dumps({**found, "folder": str(folder)}, indent=2))
        return 0
    for text in found["passed_over"]:
        print(f"passed over   {text}")
    print(
        f"{folder}: the model of step {found['step']:,} ({found['checkpoint']}), {found['parameters']:,} parameters in {dtype}, "
        f"{found['weights_bytes'] / 1e9:.3g} GB; transformers' LlamaForCausalLM, its tokenizer and the model card"
    )
    return 0


def _in_a_process_with_torch(**asked: Any) -> dict[str, Any]:
    words = [sys.executable, "-P", "-c", "from model.export import main; main()"]
    done = subprocess.run(words, input=json.dumps(asked), capture_output=True, text=True, check=False)
    if done.returncode == 2:
        raise UserError(done.stderr.strip())
    if done.returncode < 0:
        signal_name = signal.Signals(-done.returncode).name
        raise Failure(
            f"the process that exports was ended by {signal_name} (KILL: perhaps memory, which holds the weights once)"
        )
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or ["it does not say why"]  # of a traceback the cause
        raise Failure(f"the model could not be exported: {said[0]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found
