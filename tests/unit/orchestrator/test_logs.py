import resource
from pathlib import Path

import pytest

from orchestrator.cli import main
from orchestrator.logs import _growing


def test_the_logs_of_more_ranks_are_followed_than_files_may_be_open_by_default(tmp_path: Path) -> None:
    soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_now = len([*Path("/proc/self/fd").iterdir()])
    for rank in range(100):
        (tmp_path / f"7_{rank}_log.out").write_text(f"of {rank}\n")
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + 50, most))
    try:
        growing = _growing(tmp_path, None, set())
        assert {next(growing)[1] for _ in range(100)} == {f"of {rank}\n" for rank in range(100)}
        growing.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, most))


@pytest.mark.parametrize("lines", ["0", "-3"])
def test_no_lines_are_a_users_mistake_and_not_an_empty_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: str
) -> None:
    assert main(["logs", str(tmp_path), "--lines", lines]) == 2
    assert capsys.readouterr().err == f"arriero: --lines {lines}: give 1 or more\n"
