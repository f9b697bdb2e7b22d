"""The code that a Slurm job runs: copied beside the run, so that what is edited afterwards changes nothing."""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

PACKAGES = ("orchestrator", "model", "slurm", "dashboards", "hydra_conf")
ROOT = Path(__file__).resolve().parent.parent


def snapshot(folder: Path, dry_run: bool = False) -> Path:
    """Copies the packages into `folder`/<hash of their content> unless they are there; returns that path, for PYTHONPATH."""
    files = [(name, (ROOT / name).read_bytes()) for name in _files()]
    digest = hashlib.sha256()
    for name, content in files:
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    target = folder / digest.hexdigest()[:16]
    if dry_run or target.exists():
        return target
    temporary = folder / f".{target.name}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    for name, content in files:
        (temporary / name).parent.mkdir(parents=True, exist_ok=True)
        (temporary / name).write_bytes(content)
    try:
        temporary.rename(target)
    except OSError:  # another launch was first
        shutil.rmtree(temporary)
    return target


def _files() -> list[str]:
    """What belongs to the packages: in a checkout what git tracks and does not ignore, else all that is installed."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        listed = subprocess.run(
            ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *PACKAGES],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if listed.returncode == 0 and listed.stdout:
            return sorted(n for n in set(listed.stdout.split("\0")) if n and (ROOT / n).is_file())
    found = [
        p for package in PACKAGES for p in (ROOT / package).rglob("*") if p.is_file() and "__pycache__" not in p.parts
    ]
    return sorted(str(p.relative_to(ROOT)) for p in found)
