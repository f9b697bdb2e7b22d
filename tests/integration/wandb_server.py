"""A loopback server that speaks what the real wandb client sends: GraphQL for runs, resuming, rewinding and alerts; the file
stream, with its offsets, for history and summary. It keeps lines by offset, as W&B does, so that what is sent twice stands once.
"""

import base64
import gzip
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class _Quiet(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """The client resets its connections when it ends."""


@dataclass
class StoredRun:
    history: dict[int, dict[str, Any]] = field(default_factory=dict)  # by offset
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    commit: str | None = None
    name: str = ""
    alerts: list[str] = field(default_factory=list)
    alert_levels: list[str] = field(default_factory=list)
    system: int = 0  # lines of host metrics

    def steps(self) -> list[int]:
        return [int(self.history[o]["_step"]) for o in sorted(self.history)]

    def figure(self, name: str) -> dict[int, float]:
        return {int(row["_step"]): row[name] for row in self.history.values() if name in row}


class WandbServer:
    """Runs by id; `operations` counts what was asked. `can_rewind=False`: a server that is older."""

    def __init__(self, can_rewind: bool = True) -> None:
        self.runs: dict[str, StoredRun] = {}
        self.operations: dict[str, int] = {}
        self.can_rewind = can_rewind
        self.crashes_the_client = False
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                with outer.lock:
                    if self.path.startswith("/graphql"):
                        answer = outer.graphql(json.loads(body))
                    elif self.path.endswith("/file_stream"):
                        answer = outer.file_stream(self.path.split("/")[-2], json.loads(body))
                    else:
                        answer = {}
                self.reply(answer)

            def do_PUT(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self.reply({})

            def do_GET(self) -> None:
                self.reply({})

            def reply(self, answer: dict[str, Any]) -> None:
                body = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.http = _Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def file_stream(self, run_id: str, message: dict[str, Any]) -> dict[str, Any]:
        run = self.runs[run_id]
        for name, part in (message.get("files") or {}).items():
            if name == "wandb-history.jsonl":
                for i, line in enumerate(part["content"]):
                    run.history[part["offset"] + i] = json.loads(line)
            elif name == "wandb-summary.json":
                run.summary = json.loads(part["content"][-1])
            elif name == "wandb-events.jsonl":
                run.system += len(part["content"])
        return {"exitcode": None, "limits": {}}

    def graphql(self, request: dict[str, Any]) -> dict[str, Any]:
        query, variables = request["query"], request.get("variables") or {}
        operation = request.get("operationName") or query.split("(")[0].split("{")[0].split()[-1]
        self.operations[operation] = self.operations.get(operation, 0) + 1
        answer = getattr(self, f"on_{operation}", None)
        if answer is None:
            return {"data": {}}
        return answer(variables)  # type: ignore[no-any-return]

    def on_Viewer(self, _: dict[str, Any]) -> dict[str, Any]:
        return {
            "data": {"viewer": {"id": "1", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
        }

    def on_RunResumeStatus(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(variables["name"])
        bucket = None
        if run is not None:
            tail = [json.dumps(run.history[o]) for o in sorted(run.history)[-1:]]
            bucket = {
                "id": variables["name"],
                "name": variables["name"],
                "displayName": run.name,
                "summaryMetrics": json.dumps(run.summary),
                "logLineCount": 0,
                "historyLineCount": len(run.history),
                "eventsLineCount": 0,
                "historyTail": json.dumps(tail),
                "eventsTail": "[]",
                "config": "{}",
                "tags": [],
                "notes": "",
                "wandbConfig": json.dumps({"t": 1}),
            }
        entity = {"id": "e", "name": "me"}
        return {"data": {"model": {"id": "p", "name": "arriero", "entity": entity, "bucket": bucket}}}

    def bucket(self, run_id: str, inserted: bool) -> dict[str, Any]:
        run = self.runs[run_id]
        project = {"id": "p", "name": "arriero", "entity": {"id": "e", "name": "me"}}
        return {
            "id": run_id,
            "name": run_id,
            "displayName": run.name,
            "description": "",
            "config": json.dumps({k: {"value": v} for k, v in run.config.items()}),
            "sweepName": None,
            "project": project,
            "historyLineCount": len(run.history),
        }

    def on_UpsertBucket(self, variables: dict[str, Any]) -> dict[str, Any]:
        run_id = variables.get("name") or base64.b64decode(variables["id"]).decode()
        inserted = run_id not in self.runs
        run = self.runs.setdefault(run_id, StoredRun())
        run.name = variables.get("displayName") or run.name
        run.commit = variables.get("commit") or run.commit
        if variables.get("config"):
            run.config = {k: v.get("value") for k, v in json.loads(variables["config"]).items()}
        return {"data": {"upsertBucket": {"bucket": self.bucket(run_id, inserted), "inserted": inserted}}}

    def on_RewindRun(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(variables["runName"])
        if not self.can_rewind or run is None:
            return {"errors": [{"message": "Cannot query field 'rewindRun' on type 'Mutation'."}], "data": None}
        run.history = {o: r for o, r in run.history.items() if r["_step"] <= variables["metricValue"]}
        return {"data": {"rewindRun": {"rewoundRun": self.bucket(variables["runName"], False)}}}

    def on_CreateRunFiles(self, variables: dict[str, Any]) -> dict[str, Any]:
        if self.crashes_the_client:  # an answer that wandb 0.31's own process does not survive
            return {"data": {}}
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
        return {"data": {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}}

    def on_NotifyScriptableRunAlert(self, variables: dict[str, Any]) -> dict[str, Any]:
        self.runs[variables["runName"]].alerts.append(variables["title"])
        self.runs[variables["runName"]].alert_levels.append(variables["severity"])
        return {"data": {"notifyScriptableRunAlert": {"success": True}}}
