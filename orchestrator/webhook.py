"""Tells a web address of what a person may want to know: ARRIERO_WEBHOOK_URL, in the environment and never in a file."""

import json
import os
import threading
import urllib.parse
import urllib.request
from dataclasses import asdict

from orchestrator.record import Event

URL = "ARRIERO_WEBHOOK_URL"
KINDS = frozenset(
    {"spike", "rewound", "recomputed", "failed", "unfit", "stopped", "finished", "hung", "restarted", "straggler"}
)
_TIMEOUT_S = 10.0


def post(event: Event, run: str) -> threading.Thread | None:
    """Posts `{"run", "text", ...event}` as JSON in the background; None where it is not asked for. A failure is printed."""
    url = os.environ.get(URL)
    if not url or event.kind not in KINDS:
        return None
    thread = threading.Thread(target=_post, args=(url, event, run), name="webhook", daemon=True)
    thread.start()
    return thread


def _post(url: str, event: Event, run: str) -> None:
    try:
        if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
            raise ValueError("it is neither http nor https")
        body = json.dumps({"run": run, "text": f"{run}: {event.kind}: {event.detail}", **asdict(event)}).encode()
        request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S):
            pass
    except Exception as error:  # a chat that is down must not touch the training; the address may hold a secret
        print(
            f"the webhook of {URL} was not told of {event.kind} at step {event.step}: {type(error).__name__}",
            flush=True,
        )
