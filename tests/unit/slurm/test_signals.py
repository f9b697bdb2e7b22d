"""Which of several stop signals is told."""

import subprocess
import sys

import pytest

from slurm.signals import PAUSE, first_told

SENDS = """
import os, signal
from slurm.signals import StopFlag, note_early
early, late = {early!r}, {late!r}
note_early()
for name in early: os.kill(os.getpid(), getattr(signal, name))
flag = StopFlag()
for name in late: os.kill(os.getpid(), getattr(signal, name))
print(flag.requested)
"""


@pytest.mark.parametrize(
    ("early", "late", "told"),
    [
        ([], [], "None"),
        ([], ["SIGTERM"], "SIGTERM"),
        (["SIGUSR2"], [], "SIGUSR2"),
        (["SIGTERM"], ["SIGUSR2"], "SIGUSR2"),
        ([], ["SIGTERM", "SIGCONT", "SIGUSR2", "SIGTERM"], "SIGUSR2"),
    ],
)
def test_a_warning_is_told_before_the_term_that_overtakes_it(early: list[str], late: list[str], told: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SENDS.format(early=early, late=late)], capture_output=True, text=True, timeout=30
    )
    assert done.stdout.strip() == told, done.stderr


@pytest.mark.parametrize(
    ("reasons", "told"),
    [
        ([None, None], None),
        ([None, "SIGUSR2"], "SIGUSR2"),
        ([PAUSE, "SIGTERM", None], "SIGTERM"),
        (["SIGUSR2", "the budget is spent"], "the budget is spent"),
    ],
)
def test_of_many_ranks_reasons_the_one_that_a_person_wants_is_told(reasons: list[str | None], told: str | None) -> None:
    assert first_told(reasons) == told
