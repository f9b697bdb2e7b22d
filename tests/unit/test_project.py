"""The project as it is packed: six folders under one root, the YAML in the wheel, no path of one machine."""

import importlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ["orchestrator", "model", "slurm", "dashboards", "hydra_conf"]


def test_all_packages_resolve_under_one_root() -> None:
    roots = {Path(str(importlib.import_module(name).__file__)).parent.parent for name in PACKAGES}
    assert roots == {ROOT}


@pytest.mark.slow
def test_the_wheel_carries_the_yaml_and_nothing_of_the_tests(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    names = zipfile.ZipFile(next(tmp_path.glob("arriero-*.whl"))).namelist()
    there = {str(p.relative_to(ROOT)) for p in (ROOT / "hydra_conf").rglob("*.yaml")}
    assert there <= set(names)
    assert {"dashboards/page.js", "dashboards/page.css", "dashboards/vendor/uPlot.iife.min.js"} <= set(names)
    assert "dashboards/vendor/uPlot-LICENSE.txt" in names
    assert len(there) > 30
    assert not [n for n in names if n.startswith("tests/")]


def test_the_configurations_of_the_readme_are_valid() -> None:
    """Each line that takes overrides composes; what they do is tested in tests/integration."""
    from orchestrator import spec

    lines = [
        line.split() for line in (ROOT / "README.md").read_text().splitlines() if line.startswith(".venv/bin/arriero")
    ]
    taking = ("launch", "config", "rehearse", "plan", "simulate")
    single = [line for line in lines if "-m" not in line]  # a sweep's values are no single run's
    overrides = {(n, line[1]): [w for w in line[2:] if not w.startswith("--")] for n, line in enumerate(single)}
    composed = [name for (_, name), words in overrides.items() if name in taking and spec.compose(words)]
    assert {"launch", "config", "rehearse"} <= set(composed)


def test_every_command_of_the_readme_exists() -> None:
    import contextlib

    from orchestrator.cli import _parser

    for line in (ROOT / "README.md").read_text().splitlines():
        if line.startswith(".venv/bin/arriero"):
            with contextlib.suppress(FileNotFoundError):
                assert _parser().parse_args(line.split()[1:]).handler
