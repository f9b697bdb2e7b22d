"""Runs on a real Slurm: every way in which a start ends, and the run that comes out the same."""

import json
import queue
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from orchestrator.faults import Fault, write
from orchestrator.record import Event, read_all_steps, read_events
from slurm.lemons import excluded
from slurm.rendezvous import expand_hostlist
from slurm.virtual import VirtualCluster
from tests.integration.words_run import arriero, launch, losses, make_workplace, run_dir

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(600)]

STEPS = 150
TWO_NODES = [
    f"steps={STEPS}",
    "eval_every_steps=75",
    "checkpoint.every_steps=25",
    "cluster=slurm",
    "cluster.nodes=2",
    "cluster.gpus_per_node=1",
    "cluster.cpus_per_gpu=4",
    "layout=fsdp",
    "layout.dp_shard=2",
]
ITS_NODES = "node001,node002"  # of the run that meets time limits: what is done to other runs stays away from them
SLOW = Fault(kind="slow", seconds=0.15)  # so that what is done to a run meets it in the middle


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("slurm"))


class Runs:
    """Launches and looks at runs of one cluster."""

    def __init__(self, cluster: VirtualCluster, workplace: Path) -> None:
        self.cluster, self.workplace = cluster, workplace

    def launch(self, name: str, *more: str, faults: tuple[Fault, ...] = ()) -> str:
        """The job's id."""
        if faults:
            write(run_dir(self.workplace, name).faults, faults)
        done = launch(self.workplace, name, *TWO_NODES, *more, **self.cluster.env)
        assert done.returncode == 0, done.stdout + done.stderr
        return str(json.loads(run_dir(self.workplace, name).submission.read_text())["job_id"])

    def events(self, name: str, *kinds: str) -> list[Event]:
        return [e for e in read_events(run_dir(self.workplace, name).events) if not kinds or e.kind in kinds]

    def causes(self, name: str) -> list[str]:
        return [e.data["cause"] for e in self.events(name, "requeued")]

    def step(self, name: str) -> int:
        return max((r.step for r in read_all_steps(run_dir(self.workplace, name).records)), default=0)

    def wait(self, name: str, condition: Callable[[], bool], timeout_s: float = 240) -> None:
        until = time.monotonic() + timeout_s
        while not condition():
            failed = self.events(name, "failed")
            if failed or time.monotonic() > until:
                logs = "\n".join(p.read_text()[-3000:] for p in run_dir(self.workplace, name).logs.glob("*_0_log.out"))
                squeue = self.cluster.command("squeue").stdout
                pytest.fail(
                    f"{name}: {failed or 'too late'}\n{[(e.kind, e.detail) for e in self.events(name)]}\n{squeue}\n{logs}"
                )
            time.sleep(0.2)

    def wait_finished(self, name: str, timeout_s: float = 240) -> None:
        self.wait(name, lambda: bool(self.events(name, "finished")), timeout_s)

    def lost_steps(self, name: str) -> int:
        """Steps that were trained more than once."""
        records = read_all_steps(run_dir(self.workplace, name).records)
        return len(records) - len({r.step for r in records})


@pytest.fixture(scope="module")
def runs(slurm_cluster: VirtualCluster, workplace: Path) -> Runs:
    return Runs(slurm_cluster, workplace)


@pytest.fixture(scope="module")
def timed_out(runs: Runs) -> str:
    """Launched first and waited for last: it spends most of its time in other tests' shadow.

    slurmctld looks every 30 s and warns up to that much early: 20 to 50 s after the start, of which a slow machine needs 12
    to begin; and even the longest start does not get through a third of the steps.
    """
    limit = ["cluster.time_limit_min=1", "cluster.warn_s=10", f"cluster.nodelist='{ITS_NODES}'"]
    runs.launch("timed_out", *limit, faults=(Fault(kind="slow", seconds=1.3),))
    return "timed_out"


@pytest.fixture(scope="module")
def undisturbed(runs: Runs, timed_out: str) -> dict[int, tuple[float, float]]:
    runs.launch("undisturbed")
    runs.wait_finished("undisturbed")
    return losses(runs.workplace, "undisturbed")


def test_a_run_goes_to_its_end_and_its_status_says_so(runs: Runs, undisturbed: dict[int, object]) -> None:
    assert list(undisturbed) == list(range(1, STEPS + 1))
    started = runs.events("undisturbed", "started")[0]
    assert started.data["ranks"] == 2
    assert started.data["host"].startswith("node0")
    status = arriero(runs.workplace, "status", "runs/undisturbed", "--json", **runs.cluster.env)
    (row,) = json.loads(status.stdout)
    assert (row["state"], row["step"], row["steps"], row["attempts"]) == ("finished", STEPS, STEPS, 1)
    logs = arriero(runs.workplace, "logs", "runs/undisturbed", "--rank=1", **runs.cluster.env)
    assert logs.returncode == 0
    code = run_dir(runs.workplace, "undisturbed").code
    assert list(code.glob("*/orchestrator/worker.py"))


def test_every_way_to_end_a_start_is_told_apart_and_the_run_comes_out_the_same(
    runs: Runs, undisturbed: dict[int, tuple[float, float]]
) -> None:
    """A signal to one rank, a killed rank, an operator's requeue, a preemption, a new slurmctld: one run, all in a row. Beside
    it a run in the partition that gives a time of grace; and the run that preempts both."""
    name, warned, rival = "disturbed", "warned", "rival"
    away = f"cluster.exclude='{ITS_NODES}'"
    job = runs.launch(
        name, away, faults=(SLOW, Fault(kind="usr2", rank=1, step=10), Fault(kind="kill", rank=1, step=30))
    )
    runs.wait(name, lambda: runs.step(name) >= 45)
    assert runs.causes(name) == ["signalled"]
    assert "(SIGUSR2)" in runs.events(name, "stopped")[0].detail  # rank 1's reason, which rank 0 tells
    (restarted,) = runs.events(name, "restarted")  # a killed rank is no requeue
    assert (restarted.data["cause"], restarted.data["rank"], restarted.data["signal"]) == ("crash", 1, "SIGKILL")
    assert restarted.data["node"] in expand_hostlist(runs.events(name, "started")[1].data["node_list"])
    assert runs.lost_steps(name) <= 30 - 25  # the killed rank's; the warned stop lost none

    lost = runs.lost_steps(name)
    runs.cluster.command("scontrol", "requeue", job)
    runs.wait(name, lambda: len(runs.events(name, "resumed")) == 3)
    assert runs.causes(name)[1:] == ["requeued"]

    runs.launch(warned, away, "cluster.partition=graceful", "steps=60", faults=(Fault(kind="slow", seconds=0.3),))
    runs.wait(name, lambda: runs.step(name) >= 75)
    runs.wait(warned, lambda: runs.step(warned) >= 5)
    everything = ["cluster.spare_nodes=4", "cluster.exclusive=true"]
    runs.launch(rival, away, "cluster.partition=urgent", "steps=10", *everything)
    runs.wait(name, lambda: len(runs.events(name, "resumed")) == 4)
    assert runs.causes(name)[2:] == ["preempted"]
    assert "SIGUSR2" in runs.events(name, "stopped")[-1].detail
    assert len(runs.events(rival, "finished")) == 1
    assert runs.causes(rival) == []

    runs.wait(name, lambda: runs.step(name) >= 100)
    runs.cluster.restart_controller(down_s=2)
    runs.wait_finished(name)
    assert losses(runs.workplace, name) == undisturbed
    assert runs.lost_steps(name) == lost  # none more: requeue and preemption were warned stops
    assert len(runs.events(name, "started")) == 5
    runs.wait_finished(warned)
    assert runs.causes(warned) == ["preempted"]
    assert "SIGUSR2" in runs.events(warned, "stopped")[0].detail
    assert runs.lost_steps(warned) == 0
    assert runs.cluster.command("sacct", "-X", "-n", f"--name={name}", "--format=JobID").stdout.split() == [job]


def test_a_node_that_dies_is_told_and_the_run_goes_on_elsewhere(
    runs: Runs, undisturbed: dict[int, tuple[float, float]]
) -> None:
    name = "node_lost"
    job = runs.launch(name, f"cluster.exclude='{ITS_NODES}'", faults=(SLOW,))
    runs.wait(name, lambda: runs.step(name) >= 40)
    nodes = runs.cluster.command("squeue", "--noheader", f"--jobs={job}", "--format=%N").stdout.strip()
    lost = expand_hostlist(nodes)[-1]
    runs.cluster.kill_node(lost)
    runs.wait_finished(name)
    assert losses(runs.workplace, name) == undisturbed
    assert runs.causes(name) == ["node_failure"]
    again = runs.events(name, "started")[1]
    assert lost not in expand_hostlist(again.data["node_list"])
    runs.cluster.start_node(lost)


def test_a_lost_node_is_no_requeue_with_a_spare_or_where_fewer_are_allowed(runs: Runs, undisturbed: object) -> None:
    """Two runs, each of which loses a node."""
    names = {"spare_nodes": 2, "min_nodes": 1}  # ranks afterwards
    jobs = {
        name: runs.launch(name, f"cluster.{name}=1", "steps=80", f"cluster.exclude='{ITS_NODES}'", faults=(SLOW,))
        for name in names
    }
    lost = {}
    for name in names:
        runs.wait(name, lambda name=name: runs.step(name) >= 40)  # type: ignore[misc]
        lost[name] = expand_hostlist(runs.events(name, "started")[0].data["node_list"])[-1]
        runs.cluster.kill_node(lost[name])
    for name, ranks in names.items():
        runs.wait_finished(name)
        assert runs.causes(name) == []
        (restarted,) = runs.events(name, "restarted")
        assert (restarted.data["cause"], restarted.data["without"]) == ("node_failure", [lost[name]])
        again = runs.events(name, "started")[1].data
        assert (again["job_id"], again["restart"], again["gpus"]) == (jobs[name], 0, ranks)
        assert lost[name] not in expand_hostlist(again["node_list"])
        runs.cluster.start_node(lost[name])
        run_dir(runs.workplace, name).lemons.unlink(missing_ok=True)


def test_an_unfit_node_is_found_before_the_ranks_start_left_out_and_remembered(
    runs: Runs, undisturbed: dict[int, tuple[float, float]]
) -> None:
    name = "unfit"
    others = "nodename=node[003-006]"
    runs.cluster.command("scontrol", "update", others, "state=drain", "reason=the test wants node007 and node008")
    site = "cluster.preflight_command='test $SLURMD_NODENAME != node007'"
    runs.launch(name, site, f"cluster.exclude='{ITS_NODES}'")
    runs.wait(name, lambda: bool(runs.events(name, "unfit")))
    runs.cluster.command("scontrol", "update", others, "state=resume")
    runs.wait_finished(name)
    lemons = run_dir(runs.workplace, name).lemons
    assert excluded(lemons) == ["node007"]
    (told,) = runs.events(name, "unfit")
    assert "preflight_command" in told.detail
    (started,) = runs.events(name, "started")
    assert "node007" not in expand_hostlist(started.data["node_list"])
    assert losses(runs.workplace, name) == undisturbed
    script = launch(runs.workplace, "next", *TWO_NODES, "--dry-run").stdout
    assert "#SBATCH --exclude=node007" in script
    lemons.unlink()


def test_the_energy_of_four_ranks_on_a_node_is_counted_once(runs: Runs) -> None:
    name = "four_ranks"
    shape = ["cluster.nodes=1", "cluster.gpus_per_node=4", "cluster.cpus_per_gpu=16", "layout.dp_shard=4"]
    runs.launch(name, *shape, "steps=40", "carbon.sample_s=1", "carbon.intensity_g_per_kwh=100")
    runs.wait_finished(name)
    (ledger,) = run_dir(runs.workplace, name).energy.iterdir()
    readings = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert {device.split("/")[-1] for device in readings[-1]["joules"]} >= {"cpu", "ram"}
    assert len({r["sampler"] for r in readings}) == 1
    counted_j = sum(values[0] * values[2] for values in readings[-1]["joules"].values())  # joules x this job's share
    report = arriero(runs.workplace, "report", "carbon", f"runs/{name}", "--json", **runs.cluster.env)
    told = json.loads(report.stdout)[0]["figures"]["energy_kwh"]
    # What is told lies above the counters by no more than the ends of the run that no reading covers.
    assert counted_j <= told["value"] * 3.6e6 * 1.01
    assert told["value"] * 3.6e6 < 2 * counted_j


def test_a_crash_that_comes_back_stops_for_a_person_who_can_go_on(
    runs: Runs, undisturbed: dict[int, tuple[float, float]], webhook: "queue.Queue[dict[str, object]]"
) -> None:
    name = "crashing"
    runs.launch(name, "cluster.crash_budget=1", faults=(Fault(kind="kill", step=60), Fault(kind="kill", step=60)))
    deadline = time.monotonic() + 200
    while not runs.events(name, "failed"):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert "2 crashes without a new checkpoint" in runs.events(name, "failed")[0].detail
    told = [webhook.get(timeout=20) for _ in range(2)]
    assert [(t["run"], t["kind"]) for t in told] == [(name, "restarted"), (name, "failed")]
    status = arriero(runs.workplace, "status", f"runs/{name}", **runs.cluster.env)
    assert status.returncode == 1
    assert "a person must look" in status.stdout
    resumed = arriero(runs.workplace, "resume", f"runs/{name}", **runs.cluster.env)
    assert resumed.returncode == 0, resumed.stderr
    deadline = time.monotonic() + 200
    while not runs.events(name, "finished"):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert losses(runs.workplace, name) == undisturbed


def test_launched_again_or_killed_in_the_middle_there_is_one_job_and_cancel_saves(runs: Runs) -> None:
    name = "once"
    setup = "cluster.setup=['export FROM_THE_SITE=\"a module\"']"
    expected = launch(runs.workplace, name, *TWO_NODES, setup, "--dry-run", **runs.cluster.env).stdout
    job = runs.launch(name, setup, faults=(SLOW,))
    journal = run_dir(runs.workplace, name).submission
    assert runs.launch(name, setup) == job
    changed = launch(runs.workplace, name, *TWO_NODES, setup, "seed=9", **runs.cluster.env)
    assert changed.returncode == 2
    assert "seed was 1, now 9" in changed.stderr
    later = launch(runs.workplace, name, *TWO_NODES, setup, "checkpoint.every_steps=26", **runs.cluster.env)
    assert later.returncode == 0
    assert "not for that job: checkpoint.every_steps was 25, now 26; cancel it and launch again" in later.stdout
    here = launch(runs.workplace, name, f"steps={STEPS}", "eval_every_steps=75", **runs.cluster.env)
    assert here.returncode == 2
    assert f"is in the queue of Slurm already, or runs: job {job}" in here.stderr
    nowhere = launch(runs.workplace, "refused", *TWO_NODES, "cluster.partition=nope", **runs.cluster.env)
    assert nowhere.returncode == 1
    assert "sbatch refused the job" in nowhere.stderr
    assert not run_dir(runs.workplace, "refused").root.exists()
    entry = json.loads(journal.read_text())
    submitted = (run_dir(runs.workplace, name).logs / f"{job}_submission.sh").read_text()
    assert submitted == expected.replace("set-when-it-is-submitted", entry["token"])
    assert submitted.index('export FROM_THE_SITE="a module"') < submitted.index(" srun ")
    journal.write_text(
        json.dumps({**entry, "job_id": None})
    )  # as a launch leaves it that is killed before sbatch answers
    again = launch(runs.workplace, name, *TWO_NODES, **runs.cluster.env)
    assert f"job {job}" in again.stdout, again.stdout + again.stderr
    named = runs.cluster.command("squeue", "--noheader", f"--name={name}", "--format=%i").stdout.split()
    assert named == [job]
    journal.write_text(json.dumps(entry))

    runs.wait(name, lambda: runs.step(name) >= 5)
    cancelled = arriero(runs.workplace, "cancel", f"runs/{name}", **runs.cluster.env)
    assert cancelled.returncode == 0, cancelled.stderr
    runs.wait(name, lambda: bool(runs.events(name, "stopped")))
    deadline = time.monotonic() + 60
    while runs.cluster.command("squeue", "--noheader", f"--jobs={job}", "--format=%T").stdout.strip() not in (
        "COMPLETED",
        "",
    ):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert runs.causes(name) == []
    (row,) = json.loads(arriero(runs.workplace, "status", f"runs/{name}", "--json", **runs.cluster.env).stdout)
    assert row["state"] == "cancelled"


def test_without_an_answer_nobody_is_declared_dead(runs: Runs, undisturbed: object) -> None:
    nowhere = {"SLURM_CONF": "/nonexistent/slurm.conf"}
    journal = json.loads(run_dir(runs.workplace, "once").submission.read_text())
    assert journal["job_id"]
    run_dir(runs.workplace, "once").cancelled.unlink()
    (row,) = json.loads(arriero(runs.workplace, "status", "runs/once", "--json", **nowhere).stdout)
    assert row["state"] in ("unknown", "stopped", "cancelled")
    refused = launch(runs.workplace, "once", *TWO_NODES, **nowhere)
    assert refused.returncode == 1
    assert "squeue does not answer" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_the_greenest_start_is_slurms_begin_time(runs: Runs) -> None:
    now = datetime.now(UTC)
    rows = [(-1, 500), (2, 90), (3, 400), (9, 500)]  # hours from now, g/kWh
    series = runs.workplace / "grid.csv"
    lines = [f"{(now + timedelta(hours=h)).isoformat(timespec='seconds')},{g}\n" for h, g in rows]
    series.write_text("time_utc,g_per_kwh\n" + "".join(lines))
    deadline = (now + timedelta(hours=6)).isoformat(timespec="seconds")
    carbon = ["carbon.start=greenest", f"carbon.series={series}", f"carbon.deadline='{deadline}'"]
    unknown = launch(runs.workplace, "green", *TWO_NODES, *carbon, **runs.cluster.env)
    assert unknown.returncode == 2
    assert "carbon.duration_h" in unknown.stderr
    job = runs.launch("green", *carbon, "carbon.duration_h=0.9")
    begin = runs.cluster.command("squeue", "--noheader", f"--jobs={job}", "--format=%S").stdout.strip()
    local = (now + timedelta(hours=2)).astimezone().replace(tzinfo=None)
    assert abs((datetime.fromisoformat(begin) - local).total_seconds()) < 120
    assert arriero(runs.workplace, "cancel", "runs/green", **runs.cluster.env).returncode == 0


def test_a_dry_run_prints_the_script_and_leaves_nothing(runs: Runs) -> None:
    printed = launch(
        runs.workplace, "dry", *TWO_NODES, "cluster.partition=urgent", "cluster.account=me", "cluster.reservation=r",
        "+cluster.sbatch.mail-type=END", "--dry-run",
    )  # fmt: skip
    assert printed.returncode == 0, printed.stderr
    for line in (
        "--partition=urgent",
        "--account=me",
        "--reservation=r",
        "--mail-type=END",
        "--requeue",
        "--signal=USR2@180",
    ):
        assert f"#SBATCH {line}\n" in printed.stdout
    assert "--kill-on-bad-exit=1" in printed.stdout
    assert not run_dir(runs.workplace, "dry").root.exists()
    assert "wckey" not in printed.stdout


@pytest.mark.timeout(1000)
def test_time_limits_requeue_more_than_three_times_and_lose_nothing(
    runs: Runs, timed_out: str, undisturbed: dict[int, tuple[float, float]]
) -> None:
    runs.wait_finished(timed_out, timeout_s=900)
    causes = runs.causes(timed_out)
    assert causes == ["timeout"] * len(causes)
    assert len(causes) > 3
    assert runs.lost_steps(timed_out) == 0
    assert losses(runs.workplace, timed_out) == undisturbed
