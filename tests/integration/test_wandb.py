"""The W&B mirror with the real wandb client, against a loopback server that stores by offset as W&B does, and against a
W&B-compatible server of somebody else's where one is installed (`openwandb`: ARRIERO_OPENWANDB=its command)."""

import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from made_run import make_run
from wandb_server import StoredRun, WandbServer

from orchestrator.mirror import Progress, mirroring
from orchestrator.record import Event, JsonlWriter, utc_now

ROOT = Path(__file__).resolve().parents[2]
KEY = "0123456789abcdef0123456789abcdef01234567"
COMMAND = [sys.executable, "-c", "import sys; from orchestrator.cli import main; sys.exit(main())"]

pytestmark = pytest.mark.slow


@pytest.fixture
def wandb_server() -> Iterator[WandbServer]:
    running = WandbServer()
    yield running
    running.close()


def environment(url: str) -> dict[str, str]:
    plain = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    return plain | {"PYTHONPATH": str(ROOT), "WANDB_BASE_URL": url, "WANDB_API_KEY": KEY, "WANDB_INIT_TIMEOUT": "4"}


def sync(url: str, *roots: Path) -> subprocess.CompletedProcess[str]:
    words = [*COMMAND, "dashboard", "sync", *map(str, roots)]
    return subprocess.run(words, env=environment(url), capture_output=True, text=True, check=False, timeout=120)


def only(running: WandbServer) -> StoredRun:
    assert len(running.runs) == 1
    return next(iter(running.runs.values()))


def go_on(root: Path, attempt: int, from_step: int, to_step: int, grad_norm: float) -> None:
    """A further attempt's records, told by their gradient norm."""
    line = json.loads((root / "records" / "attempt-0001.jsonl").read_text().splitlines()[0])
    lines = [line | {"attempt": attempt, "step": s, "grad_norm": grad_norm} for s in range(from_step, to_step + 1)]
    path = root / "records" / f"attempt-{attempt:04d}.jsonl"
    path.write_text("".join(json.dumps(v) + "\n" for v in lines))


def test_a_run_requeued_three_times_offline_is_one_run_with_each_step_once(
    wandb_server: WandbServer, tmp_path: Path
) -> None:
    root = make_run(tmp_path / "run", 200, 4, 15)
    done = sync(wandb_server.url, root)
    assert done.returncode == 0, done.stderr
    assert "200 steps uploaded" in done.stdout
    stored = only(wandb_server)
    assert stored.steps() == list(range(1, 201))
    assert (stored.name, stored.commit) == ("run", "0123456789abcdef")
    assert stored.config["optim"]["lr"] == 0.002
    assert sorted(stored.figure("training/evaluated_loss")) == [40, 80, 120, 160, 200]
    assert stored.figure("throughput/mfu")[7] == pytest.approx(41)
    assert stored.alerts == ["resumed at step 35", "resumed at step 85", "resumed at step 135", "finished at step 200"]
    assert stored.summary["energy/lost_kwh"] > 0

    again = sync(wandb_server.url, root)
    assert "W&B has all of it" in again.stdout
    assert only(wandb_server).steps() == list(range(1, 201))
    assert len(only(wandb_server).alerts) == 4
    assert not [p for p in root.rglob("*") if p.is_file() and KEY.encode() in p.read_bytes()]


def test_later_steps_follow_undone_ones_are_replaced_and_verdicts_are_alerts(
    wandb_server: WandbServer, tmp_path: Path
) -> None:
    root = make_run(tmp_path / "run", 100, 1, finished=False)
    assert sync(wandb_server.url, root).returncode == 0
    go_on(root, 2, 81, 130, grad_norm=0.9)
    told = [("spike", 95, "skip"), ("spike", 95, "skip"), ("spike", 100, "rewind"), ("rewound", 80, None)]
    told += [("recomputed", 120, "accept"), ("recovered", 125, None), ("spike", 130, "stop"), ("failed", 130, None)]
    with JsonlWriter(root / "events" / "attempt-0002.jsonl") as events:
        for kind, step, act in told:
            data = {"act": act} if act else {}
            events.write(Event(time_utc=utc_now(), kind=kind, step=step, detail="because", attempt=2, data=data))
    assert "50 steps uploaded" in sync(wandb_server.url, root).stdout
    stored = only(wandb_server)
    assert stored.steps() == list(range(1, 131))
    assert [s for s, v in stored.figure("training/grad_norm").items() if v == 0.9] == list(range(81, 131))
    assert stored.alerts == [f"{kind}: {act} at step {s}" if act else f"{kind} at step {s}" for kind, s, act in told]
    assert stored.alert_levels == ["WARN"] * 5 + ["INFO", "ERROR", "ERROR"]


def test_a_server_that_cannot_rewind_keeps_each_step_once_and_this_is_told(tmp_path: Path) -> None:
    running = WandbServer(can_rewind=False)
    root = make_run(tmp_path / "run", 100, 1, finished=False)
    assert sync(running.url, root).returncode == 0
    go_on(root, 2, 81, 130, grad_norm=0.9)
    told = sync(running.url, root)
    assert "W&B keeps steps 81 to 100 as they were before they were undone" in told.stdout
    assert only(running).steps() == list(range(1, 131))
    running.close()


def test_after_a_cut_upload_the_server_says_how_far_it_is(wandb_server: WandbServer, tmp_path: Path) -> None:
    root = make_run(tmp_path / "run", 100)
    assert sync(wandb_server.url, root).returncode == 0
    stored = only(wandb_server)
    stored.history = {o: row for o, row in stored.history.items() if row["_step"] <= 60}  # what a kill left unsent
    stored.summary = {}
    path = root / "wandb.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"confirmed": False}))
    assert "40 steps uploaded" in sync(wandb_server.url, root).stdout
    assert only(wandb_server).steps() == list(range(1, 101))


def test_a_client_that_crashes_is_noticed_and_the_next_sync_mends_it(wandb_server: WandbServer, tmp_path: Path) -> None:
    root = make_run(tmp_path / "run", 50)
    wandb_server.crashes_the_client = True
    failed = sync(wandb_server.url, root)
    assert failed.returncode == 1
    assert "Nothing is lost" in failed.stderr
    wandb_server.crashes_the_client = False
    assert sync(wandb_server.url, root).returncode == 0
    assert only(wandb_server).steps() == list(range(1, 51))


def test_a_server_that_is_gone_is_told_without_a_traceback(tmp_path: Path) -> None:
    root = make_run(tmp_path / "run", 10)
    failed = sync("http://127.0.0.1:9", root)
    assert failed.returncode == 1
    assert "W&B did not take all of it" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert Progress.load(root / "wandb.json").step == 0


def test_the_mirror_follows_a_run_as_it_goes_and_ends_with_it(wandb_server: WandbServer, tmp_path: Path) -> None:
    root = make_run(tmp_path / "run", 60, 1, finished=False)
    whole = (root / "records" / "attempt-0001.jsonl").read_text().splitlines(keepends=True)
    records = root / "records" / "attempt-0001.jsonl"
    records.write_text("".join(whole[:30]))
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as training:
        words = [*COMMAND, "wandb-mirror", str(root), "--watch", str(training.pid)]
        with subprocess.Popen(words, env=environment(wandb_server.url)) as mirror:
            while not (
                wandb_server.runs and only(wandb_server).steps() == list(range(1, 30))
            ):  # the newest is held back
                assert mirror.poll() is None
                time.sleep(0.05)
            with records.open("a") as file:
                file.writelines(whole[30:])
            assert training.stdin
            training.stdin.close()
            training.wait()
            assert mirror.wait(60) == 0
    assert only(wandb_server).steps() == list(range(1, 61))
    assert Progress.load(root / "wandb.json").confirmed
    assert not [p for p in root.rglob("*") if p.is_file() and KEY.encode() in p.read_bytes()]


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "http://192.0.2.1"])
def test_a_run_goes_on_and_ends_whatever_the_mirror_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    """No server, and one that never answers: the block is entered and left, and its work is done."""
    root = make_run(tmp_path / "run", 10)
    for name, value in environment(url).items():
        monkeypatch.setenv(name, value)
    with mirroring(root):
        done = True
    assert done
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with mirroring(root):
        done = False
    assert not done


def launch(folder: Path, url: str) -> subprocess.CompletedProcess[str]:
    """A real run of 12 steps with the mirror on."""
    (folder / "conf" / "data").mkdir(parents=True)
    (folder / "a.jsonl").write_text(
        "".join(json.dumps({"text": f"llama {i} on its path. " * 30}) + "\n" for i in range(200))
    )
    (folder / "conf" / "data" / "words.yaml").write_text(
        "name: words\nheld_out_share: 0.1\ntokenizer: {vocab_size: 512}\nsources:\n  a: {path: a.jsonl, proportion: 1.0}\n"
    )
    words = ["launch", "--config-dir=conf", "model=nano", "data=words", "name=run", "steps=12", "optim.warmup_steps=2"]
    words += ["eval_every_steps=6", "checkpoint.every_steps=6", "dashboard.wandb=online"]
    return subprocess.run(
        [*COMMAND, *words],
        cwd=folder,
        env=environment(url) | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )


def test_a_launched_run_is_mirrored_whole(wandb_server: WandbServer, tmp_path: Path) -> None:
    done = launch(tmp_path, wandb_server.url)
    assert done.returncode == 0, done.stderr
    assert "page.html" in done.stdout.splitlines()[-1]
    assert sync(wandb_server.url, tmp_path / "runs" / "run").returncode == 0  # what a slow machine left, if anything
    stored = only(wandb_server)
    assert stored.steps() == list(range(1, 13))
    assert sorted(stored.figure("training/evaluated_loss")) == [6, 12]
    assert stored.system > 0
    assert not [p for p in (tmp_path / "runs").rglob("*") if p.is_file() and KEY.encode() in p.read_bytes()]


def test_a_launched_run_finishes_beside_a_server_that_never_answers(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        done = launch(tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert done.returncode == 0, done.stderr
    records = (tmp_path / "runs" / "run" / "records" / "attempt-0001.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in records] == list(range(1, 13))


@pytest.mark.skipif(
    not (os.environ.get("ARRIERO_OPENWANDB") or shutil.which("openwandb")),
    reason="openwandb is not installed (its licence is CC BY-NC, so `make test` does not install it)",
)
def test_a_wandb_compatible_server_of_somebody_else_has_each_step_once(tmp_path: Path) -> None:
    command = os.environ.get("ARRIERO_OPENWANDB") or "openwandb"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = ["--host", "127.0.0.1", "--port", str(port), "--data-dir", str(tmp_path / "server")]
    with subprocess.Popen([command, "serve", *place], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as serving:
        try:
            while socket.socket().connect_ex(("127.0.0.1", port)):
                assert serving.poll() is None
                time.sleep(0.1)
            root = make_run(tmp_path / "run", 200, 4, 15)
            for _ in range(2):
                done = sync(f"http://127.0.0.1:{port}", root)
                assert done.returncode == 0, done.stderr
            with sqlite3.connect(tmp_path / "server" / "openwandb.db") as database:
                rows = database.execute("select run_id, step from metrics where key = 'training/loss'").fetchall()
        finally:
            serving.terminate()
    assert len({run for run, _ in rows}) == 1
    assert Counter(step for _, step in rows) == Counter(range(1, 201))
