"""What `dashboard serve` says of a port that it cannot have."""

import socket
from pathlib import Path

import pytest

from orchestrator import spec as specs
from orchestrator.cli import main
from orchestrator.run_dir import RunDir


@pytest.mark.parametrize("port", ["99999", "-1"])
def test_a_port_out_of_range_is_a_users_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str], port: str) -> None:
    assert main(["dashboard", "serve", str(tmp_path), "--port", port]) == 2
    assert capsys.readouterr().err == f"arriero: --port {port}: ports are 1 to 65535, and 0 takes a free one\n"


def test_a_port_in_use_is_told_with_the_way_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RunDir(tmp_path).spec.write_text(specs.to_yaml(specs.compose(["name=mine"])))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["dashboard", "serve", str(tmp_path), "--port", str(port)]) == 2
    assert f"--port {port}: Address already in use. Choose another" in capsys.readouterr().err


def test_a_port_that_needs_rights_is_told_with_the_way_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    RunDir(tmp_path).spec.write_text(specs.to_yaml(specs.compose(["name=mine"])))

    def refused(*_: object) -> None:  # as bind does to whoever is not root
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("orchestrator.show.server", refused)
    assert main(["dashboard", "serve", str(tmp_path), "--port", "80"]) == 2
    assert "--port 80: Permission denied. Choose another with --port" in capsys.readouterr().err
