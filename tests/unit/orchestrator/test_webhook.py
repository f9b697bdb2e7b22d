"""The webhook, against a real server on loopback."""

import queue

import pytest

from orchestrator.record import Event
from orchestrator.webhook import URL, post

SPIKE = Event(
    time_utc="2026-01-01T00:00:00.000Z", kind="spike", step=71, detail="step 71: rewind", data={"to_step": 60}
)


def test_a_verdict_is_posted_with_its_numbers(webhook: "queue.Queue[dict[str, object]]") -> None:
    thread = post(SPIKE, "my_run")
    assert thread
    body = webhook.get(timeout=10)
    thread.join(10)
    assert body["text"] == "my_run: spike: step 71: rewind"
    assert body["data"] == {"to_step": 60}


def test_what_nobody_needs_to_hear_is_not_posted(webhook: object, monkeypatch: pytest.MonkeyPatch) -> None:
    assert post(Event(time_utc="", kind="evaluated", step=1, detail=""), "r") is None
    monkeypatch.delenv(URL)
    assert post(SPIKE, "r") is None


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/secret", "file:///etc/hostname"])
def test_a_webhook_that_fails_is_told_without_its_address(
    url: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(URL, url)
    thread = post(SPIKE, "r")
    assert thread
    thread.join(20)
    said = capfd.readouterr().out
    assert "was not told of spike at step 71" in said
    assert "secret" not in said
