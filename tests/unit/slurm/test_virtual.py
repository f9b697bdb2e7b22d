"""What a virtual cluster claims on a machine that others use too: its folder, its name, its ports."""

import os
import socket
import stat
from pathlib import Path

import pytest

from slurm import virtual
from slurm.virtual import ClusterError


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(virtual.tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_its_folder_is_the_users_own_and_closed_to_others(temporary: Path) -> None:
    folder = temporary / f"arriero-cluster-{os.geteuid()}"
    folder.mkdir(mode=0o755)
    assert virtual.default_directory("x") == folder / "x"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_folder_that_somebody_else_put_there_is_refused(temporary: Path) -> None:
    (temporary / "elsewhere").mkdir()
    (temporary / f"arriero-cluster-{os.geteuid()}").symlink_to(temporary / "elsewhere")
    with pytest.raises(ClusterError, match="is not a folder of yours"):
        virtual.default_directory("x")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_refused(temporary: Path) -> None:
    folder = temporary / "arriero-cluster-0"
    folder.mkdir(mode=0o700)
    os.chown(folder, 12345, 12345)
    with pytest.raises(ClusterError, match="is not a folder of yours"):
        virtual.default_directory("x")


def test_two_of_one_name_do_not_start_at_once(temporary: Path) -> None:
    directory = virtual.default_directory("x")
    with virtual._claimed(directory, "x"):
        with (
            pytest.raises(ClusterError, match="another `arriero cluster up` is starting x"),
            virtual._claimed(directory, "x"),
        ):
            pass
        with virtual._claimed(virtual.default_directory("y"), "y"):
            pass
    with virtual._claimed(directory, "x"):  # free again
        pass


def test_ports_in_use_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("", 0)) as server:
        taken = server.getsockname()[1]
        assert not virtual._is_free(taken)
    monkeypatch.setattr(virtual.secrets, "randbelow", lambda most: 0)
    monkeypatch.setattr(virtual, "_is_free", lambda port: port != 10_004)
    assert virtual._free_ports(4) == 10_000
    assert virtual._free_ports(8) == 10_005
    monkeypatch.setattr(virtual, "_is_free", lambda port: False)
    with pytest.raises(ClusterError, match="no 8 free ports"):
        virtual._free_ports(8)


def test_missing_daemons_are_told_with_the_command_that_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(virtual.shutil, "which", lambda program, path=None: None)
    with pytest.raises(ClusterError, match=r"apt-get install --no-install-recommends .*slurmctld"):
        virtual._check(Path("/tmp/x"), "x", 1, 1, accounting=True)


def test_a_cluster_with_a_directory_of_its_own_has_a_name_of_its_own_for_slurm(temporary: Path) -> None:
    def named(directory: Path) -> str:
        more = {"nodes": 1, "gpus_per_node": 0, "accounting": False, "first_port": 1}
        return virtual.VirtualCluster(directory=directory, name="virtual", **more).slurm_name  # type: ignore[arg-type]

    assert named(virtual.default_directory("virtual")) == "virtual"
    one, two = named(temporary / "one"), named(temporary / "two")
    assert one == named(temporary / "one") != two
    assert one.startswith("virtual-")
    assert len(one) <= 40  # Slurm's most


def test_a_directory_that_slurms_configuration_cannot_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("with space", "a#b", "a=b", "100%"):
        monkeypatch.setattr(virtual, "missing_packages", lambda accounting: [])
        with pytest.raises(ClusterError, match="Slurm's configuration takes no other in a path"):
            virtual._check(tmp_path / name, "x", 1, 1, accounting=True)


def test_what_is_refused_leaves_no_lock_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(virtual, "missing_packages", lambda accounting: [])
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").touch()
    with pytest.raises(ClusterError, match="holds something else"):
        virtual.VirtualCluster.up(nodes=1, directory=mine, name="x")
    (tmp_path / "file").touch()
    with pytest.raises(ClusterError, match="holds something else"):
        virtual.VirtualCluster.up(nodes=1, directory=tmp_path / "file", name="x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "mine"]
