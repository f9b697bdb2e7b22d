"""Submission latency, seconds until all ranks of a job run, and the latency of `status` with 1,000 runs in the registry."""

import json
import statistics
import time
from pathlib import Path

from orchestrator import registry
from orchestrator.record import Event, JsonlWriter, StepRecord, utc_now
from orchestrator.run_dir import RunDir
from slurm.request import ClusterConfig, JobRequest
from slurm.submit import submit_once
from slurm.virtual import VirtualCluster, in_environment


def test_bench_slurm(tmp_path: Path) -> None:
    for number in range(1000):
        run = RunDir(tmp_path / "runs" / f"run{number:04d}")
        run.root.mkdir(parents=True)
        run.spec.write_text("steps: 300\ncluster:\n  name: slurm\n  kind: slurm\n")
        run.submission.write_text(json.dumps({"job_id": str(number + 1), "token": "x", "time_s": 0}))
        with JsonlWriter(run.attempt_file(run.records, 1)) as steps:
            for step in range(1, 101):
                steps.write(
                    StepRecord(
                        time_utc=utc_now(), attempt=1, step=step, tokens=step, loss=2.0, grad_norm=1.0, lr=0.0, step_s=1.0,
                        tokens_per_s=1.0, mfu=0.5,
                    )
                )  # fmt: skip
        with JsonlWriter(run.attempt_file(run.events, 1)) as events:
            events.write(Event(time_utc=utc_now(), kind="started", step=0, detail="attempt 1", attempt=1))
    with VirtualCluster.up(nodes=8, gpus_per_node=4, name="bench") as cluster, in_environment(cluster):
        submissions = []
        for number in range(5):
            folder = tmp_path / f"job{number}"
            folder.mkdir()
            request = JobRequest(
                name="bench", entry="orchestrator.rehearse_rank:main", run_dir=str(folder),
                cluster=ClusterConfig(name="bench", kind="slurm", time_limit_min=10, cpus_per_gpu=1),
            )  # fmt: skip
            started = time.monotonic()
            submit_once(request, folder / "submission.json")
            submissions.append(time.monotonic() - started)
        print(f"\nsubmission, with its journal: median {statistics.median(submissions):.2f} s of {len(submissions)}")
        started = time.monotonic()
        registry.queue.queued()
        squeue_s = time.monotonic() - started
        waited = []
        for _ in range(5):
            started = time.monotonic()
            rows = registry.rows([tmp_path / "runs"])
            waited.append(time.monotonic() - started)
        print(
            f"status of {len(rows)} runs: median {statistics.median(waited):.2f} s, of which one squeue alone {squeue_s:.2f} s"
        )
