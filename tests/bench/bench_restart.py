"""From SIGKILL of a rank to the first step of the restarted ranks: 8 gloo ranks on this machine."""

import asyncio
import json
import statistics
import threading
from pathlib import Path

from orchestrator.faults import Fault, write
from orchestrator.record import read_all_steps, read_events, unix_s
from slurm.lead import Incident, Lead, Slow
from tests.integration.words_run import launch, make_workplace, run_dir

RANKS, KILLS = 8, 5


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
    first_s = {r.attempt: unix_s(r.time_utc) for r in reversed(steps)}
    struck_s = [(run.faults.with_suffix("") / str(n)).stat().st_mtime for n in range(KILLS)]
    again_s = [first_s[n + 2] - struck for n, struck in enumerate(struck_s)]
    forked_s = [e.data["seconds"] for e in events if e.kind == "restarted"]
    print(
        f"\n{RANKS} gloo ranks: SIGKILL of one to the first step of all: median {statistics.median(again_s):.2f} s, "
        f"longest {max(again_s):.2f} s of {KILLS}; of which ending and forking {statistics.median(forked_s):.2f} s"
    )


class _Kept:
    """Restarts whatever happens, and notes how long it took."""

    def __init__(self) -> None:
        self.took_s: list[float] = []

    def may_restart(self, incident: Incident) -> bool:
        return incident.cause == "crash" and len(self.took_s) < KILLS

    def restarted(self, incident: Incident, generation: int, seconds: float) -> None:
        self.took_s.append(seconds)

    def straggles(self, slow: Slow) -> None: ...


async def _keeper(rank: int, address: str, token: str) -> None:
    """What the lead sees of a keeper; the rank after the generation's number dies in it."""
    reader, writer = await asyncio.open_connection(*address.split(":"))

    def say(**message: object) -> None:
        writer.write(json.dumps(message).encode() + b"\n")

    say(token=token, rank=rank, node=f"node{rank // 8}", pid=rank)
    say(ready=True, port=20_000)
    generation = 0
    while line := await reader.readline():
        order = json.loads(line)
        if order["do"] == "start":
            generation = order["generation"]
            if rank == generation:
                say(gone=generation, code=-9, words="", steps=3, port=20_000 + generation)
        elif order["do"] == "kill":
            say(gone=generation, code=-9, words="", steps=3, port=20_000 + generation)
        else:
            break
    writer.close()


def test_bench_the_lead_alone() -> None:
    """2,048 connections, with keepers that do nothing: what the lead itself takes."""
    run = _Kept()
    lead = Lead(2048, "127.0.0.1", run, None, 60.0, 1.5, "127.0.0.1")

    async def keepers() -> None:
        await asyncio.gather(*(_keeper(r, *lead.environment.values()) for r in range(2048)))

    thread = threading.Thread(target=lead.serve)
    thread.start()
    asyncio.run(keepers())
    thread.join()
    print(
        f"\n2,048 keepers: all told to end their ranks, and to fork again: median {statistics.median(run.took_s):.2f} s"
    )
