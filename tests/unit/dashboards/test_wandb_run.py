"""What is known of W&B before a run is mirrored there."""

from pathlib import Path

import pytest

from dashboards.wandb_run import has_key


def test_a_key_is_found_where_the_client_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not has_key()
    (tmp_path / "netrc").write_text("machine wandb.example.org login user password 0123\n")
    (tmp_path / "netrc").chmod(0o600)
    assert not has_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org/")
    assert has_key()
    (tmp_path / "netrc").write_text("no netrc at all")
    assert not has_key()
    monkeypatch.setenv("WANDB_API_KEY", "0123")
    assert has_key()
