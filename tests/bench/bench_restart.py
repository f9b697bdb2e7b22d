"""From SIGKILL of a rank to the first step of the restarted ranks: 8 gloo ranks on this machine."""

import statistics
from datetime import datetime
from pathlib import Path

from orchestrator.faults import Fault, write
from orchestrator.record import read_all_steps, read_events
from tests.integration.words_run import launch, make_workplace, run_dir

RANKS, KILLS = 8, 5


def _time_s(time_utc: str) -> float:
    return datetime.fromisoformat(time_utc).timestamp()


def test_bench_restart(tmp_path: Path) -> None:
    workplace = make_workplace(tmp_path)
    run = run_dir(workplace, "bench")
    write(run.faults, [Fault(kind="kill", rank=n, step=4 + 5 * n) for n in range(KILLS)])
    done = launch(
        workplace, "bench", f"cluster.gpus_per_node={RANKS}", "layout=fsdp", f"layout.dp_shard={RANKS}", "steps=30",
        "optim.batch_sequences=16", "checkpoint.every_steps=2", "carbon.measure=false",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    steps, events = read_all_steps(run.records), read_events(run.events)
    first_s = {r.attempt: _time_s(r.time_utc) for r in reversed(steps)}
    struck_s = [(run.faults.with_suffix("") / str(n)).stat().st_mtime for n in range(KILLS)]
    again_s = [first_s[n + 2] - struck for n, struck in enumerate(struck_s)]
    forked_s = [e.data["seconds"] for e in events if e.kind == "restarted"]
    print(
        f"\n{RANKS} gloo ranks: SIGKILL of one to the first step of all: median {statistics.median(again_s):.2f} s, "
        f"longest {max(again_s):.2f} s of {KILLS}; of which ending and forking {statistics.median(forked_s):.2f} s"
    )
