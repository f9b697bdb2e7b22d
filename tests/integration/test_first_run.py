"""The whole path from the command to a trained model: real processes, real ranks, real signals."""

import gzip
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from orchestrator.faults import Fault, write
from orchestrator.record import read_all_steps, read_events
from tests.integration.words_run import STEPS, arriero, environment, launch, losses, make_workplace, run_dir, words


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("workplace"))


@pytest.fixture(scope="module")
def undisturbed(workplace: Path) -> dict[int, tuple[float, float]]:
    done = launch(workplace, "undisturbed")
    assert done.returncode == 0, done.stderr
    return losses(workplace, "undisturbed")


@pytest.mark.slow
def test_a_run_trains_and_leaves_everything_in_its_directory(workplace: Path, undisturbed: dict[int, object]) -> None:
    there = run_dir(workplace, "undisturbed")
    assert list(undisturbed) == list(range(1, STEPS + 1))
    for path in (there.spec, there.overrides, there.environment, there.data, there.code / "commit.txt"):
        assert path.read_text().strip()
    events = read_events(there.events)
    assert [e.step for e in events if e.kind == "evaluated"] == [10, 20, 30]
    assert {s for e in events if e.kind == "evaluated" for s in e.data["loss_by_source"]} == {"a", "b"}
    assert events[-1].kind == "finished"
    if not {"GLIBC_TUNABLES", "LD_PRELOAD"} & os.environ.keys():  # what the user set stays
        assert "without thread caches" in next(e.detail for e in events if e.kind == "started")
    first, last = undisturbed[1], undisturbed[STEPS]
    assert last[0] < first[0] - 2  # type: ignore[index]
    assert list(there.samples.glob("*.txt"))


@pytest.mark.slow
def test_the_same_command_again_says_that_it_is_finished(workplace: Path, undisturbed: object) -> None:
    again = launch(workplace, "undisturbed")
    assert again.returncode == 0
    assert "undisturbed is finished: all 30 steps" in again.stdout
    assert len(list(run_dir(workplace, "undisturbed").records.iterdir())) == 1


@pytest.mark.slow
def test_a_run_that_ended_between_its_last_save_and_its_last_word_is_finished_by_the_same_command(
    workplace: Path,
) -> None:
    assert launch(workplace, "unsaid").returncode == 0
    for path in run_dir(workplace, "unsaid").events.glob("*.jsonl"):
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if '"kind":"finished"' not in line))
    again = launch(workplace, "unsaid")
    assert again.returncode == 0, again.stdout + again.stderr
    events = read_events(run_dir(workplace, "unsaid").events)
    assert [e.step for e in events if e.kind in ("resumed", "finished")] == [STEPS, STEPS]


@pytest.mark.slow
def test_another_configuration_under_the_same_name_is_refused(workplace: Path, undisturbed: object) -> None:
    refused = launch(workplace, "undisturbed", "optim.lr=1e-5")
    assert refused.returncode == 2
    assert "optim.lr was 0.002, now 1e-05" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_and_resumed_gives_bitwise_the_same_losses(
    workplace: Path, undisturbed: dict[int, tuple[float, float]], number: signal.Signals
) -> None:
    """Ctrl-C reaches the command and all of its children, as a terminal sends it; TERM reaches the command alone."""
    name = f"stopped_by_{number.name.lower()}"
    with subprocess.Popen(
        words(name), cwd=workplace, env=environment(), stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout
        for line in process.stdout:
            if "step     10  held-out" in line:
                os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
                break
        rest = process.stdout.read()
    assert process.returncode == 0, rest
    stopped_at = max(losses(workplace, name))
    assert 10 <= stopped_at < STEPS
    assert f"Stopped and saved at step {stopped_at}" in rest
    assert "run the same command again" in rest

    resumed = launch(workplace, name)
    assert resumed.returncode == 0, resumed.stderr
    assert losses(workplace, name) == undisturbed
    second = [r.step for r in read_all_steps(run_dir(workplace, name).records) if r.attempt == 2]
    assert second == list(range(stopped_at + 1, STEPS + 1))  # nothing was trained twice


@pytest.mark.slow
def test_a_killed_run_resumes_from_its_checkpoint_bitwise(
    workplace: Path, undisturbed: dict[int, tuple[float, float]]
) -> None:
    with subprocess.Popen(
        words("killed"), cwd=workplace, env=environment(), stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout
        for line in process.stdout:
            if "step     20  held-out" in line:
                os.killpg(process.pid, signal.SIGKILL)
                break
    resumed = launch(workplace, "killed")
    assert resumed.returncode == 0, resumed.stderr
    assert losses(workplace, "killed") == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("layout", [["layout.dp_shard=2"], ["layout.dp_replicate=2"]])
def test_two_ranks_train_the_same_model_as_one(
    workplace: Path, undisturbed: dict[int, tuple[float, float]], layout: list[str]
) -> None:
    name = layout[0].replace("=", "").replace(".", "_")
    done = launch(workplace, name, "cluster.gpus_per_node=2", "precision=fp32", *layout)
    assert done.returncode == 0, done.stderr
    alone = launch(workplace, "fp32", "precision=fp32")
    assert alone.returncode == 0, alone.stderr
    for step, (loss, norm) in losses(workplace, "fp32").items():
        assert losses(workplace, name)[step] == (pytest.approx(loss, rel=1e-5), pytest.approx(norm, rel=1e-3))


@pytest.mark.slow
def test_a_rank_that_fails_is_told_with_its_error_and_exit_code_1(workplace: Path) -> None:
    write(run_dir(workplace, "raises").faults, [Fault(kind="raise", step=3)])
    failed = launch(workplace, "raises", "cluster.crash_budget=0")
    assert failed.returncode == 1
    assert "RuntimeError: [/a/file.cc:1] as PyTorch words it" in failed.stderr
    assert "logs" in failed.stderr


@pytest.mark.slow
def test_damaged_checkpoints_are_told_as_they_are_and_nothing_is_overwritten(workplace: Path) -> None:
    assert launch(workplace, "damaged", "steps=10").returncode == 0
    there = run_dir(workplace, "damaged")
    for shard in there.checkpoints.glob("step-*/rank-*"):
        shard.write_bytes(shard.read_bytes()[:-64])
    for event in there.events.iterdir():  # as if it had been killed just before its end
        event.unlink()
    failed = launch(workplace, "damaged", "steps=10")
    assert failed.returncode == 1
    assert "none of the 1 checkpoints" in failed.stderr
    assert "Traceback" not in failed.stdout + failed.stderr
    assert list(there.checkpoints.glob("step-000000010-*"))


@pytest.mark.slow
def test_a_run_that_is_at_work_is_not_started_a_second_time(workplace: Path) -> None:
    with subprocess.Popen(
        words("twice", "steps=2000"), cwd=workplace, env=environment(), stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout
        next(line for line in first.stdout if "step     10  held-out" in line)
        second = launch(workplace, "twice", "steps=2000")
        first.send_signal(signal.SIGTERM)
        rest = first.stdout.read()
    assert second.returncode == 2
    assert "is at work already" in second.stderr
    assert "Stopped and saved" in rest


@pytest.mark.slow
def test_a_run_whose_energy_budget_is_spent_saves_and_stops(workplace: Path) -> None:
    settings = ["steps=2000", "carbon.sample_s=0.5", "carbon.budget_kwh=1e-7"]
    warned = launch(workplace, "warned", *settings, "steps=60")
    assert "budget_kwh=1e-07" in warned.stdout
    assert warned.returncode == 0
    stopped = launch(workplace, "spent", *settings, "carbon.on_budget=stop")
    assert stopped.returncode == 0, stopped.stderr
    assert "Stopped and saved at step" in stopped.stdout
    assert "carbon.budget_kwh=1e-07: raise it to go on." in stopped.stdout
    assert "run the same command again" not in stopped.stdout
    assert max(losses(workplace, "spent")) < 2000


@pytest.mark.slow
def test_a_run_whose_checkpoints_are_gone_does_not_start_over(workplace: Path) -> None:
    place = workplace / "place"
    assert launch(workplace, "owner", "steps=10", f"checkpoint.url={place}").returncode == 0
    there = run_dir(workplace, "owner")
    for path in there.events.glob("attempt-*"):  # as if it had been killed just before its end
        path.write_text("".join(ln for ln in path.read_text().splitlines(True) if '"kind":"finished"' not in ln))
    epochs = sorted(p.name for p in (place / "epochs").iterdir())

    other = launch(workplace, "other", "steps=10", f"checkpoint.url={place}")
    assert other.returncode == 2
    assert "holds the checkpoints of another run, owner-" in other.stderr
    assert not run_dir(workplace, "other").root.exists()
    assert sorted(p.name for p in (place / "epochs").iterdir()) == epochs  # nobody was fenced

    gone = launch(workplace, "owner", "steps=10", f"checkpoint.url={workplace}/elsewhere")
    assert gone.returncode == 1
    assert f"this run has saved step 10, and {workplace}/elsewhere holds no checkpoint" in gone.stderr.replace("\n", "")
    there.root.rename(there.root.with_name("renamed"))  # a run is who it was under another name
    back = launch(workplace, "renamed", "steps=10", f"checkpoint.url={place}")
    assert back.returncode == 0, back.stderr
    assert "finished" in arriero(workplace, "resume", "runs/renamed").stdout


@pytest.mark.slow
def test_a_stop_on_a_full_disk_is_not_told_as_saved(workplace: Path, small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(1_900_000))
    command = words("unsaved", f"checkpoint.url={small_disk}/there", "steps=100000", "checkpoint.every_steps=20")
    with subprocess.Popen(
        command, cwd=workplace, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stderr
        said = ""
        while "No space left" not in said:
            line = process.stdout.readline()
            assert line, said
            said += line
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
        errors = process.stderr.read()
    assert process.returncode == 1, rest
    assert "NOT saved at step" in rest
    assert "Stopped and saved" not in rest
    assert "not saved: the newest checkpoint is none" in errors
    assert "NOT saved" in arriero(workplace, "status", "runs/unsaved").stdout


@pytest.mark.slow
@pytest.mark.parametrize("small_disk", ["24m"], indirect=True)
def test_a_run_whose_last_save_failed_fails_without_training_again_and_is_finished_once_there_is_room(
    workplace: Path, small_disk: Path
) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(24_000_000))
    full = launch(workplace, "full", f"checkpoint.url={small_disk}/there")
    assert full.returncode == 1
    assert f"all {STEPS} steps are trained, but the newest checkpoint is none" in full.stderr
    events = read_events(run_dir(workplace, "full").events)
    assert [e.kind for e in events if e.kind in ("started", "finished", "failed")] == ["started", "failed"]
    ballast.unlink()
    assert launch(workplace, "full", f"checkpoint.url={small_disk}/there").returncode == 0


@pytest.mark.slow
def test_a_sample_that_cannot_be_written_loses_no_model(workplace: Path) -> None:
    there = run_dir(workplace, "sampleless")
    there.root.mkdir(parents=True)
    there.samples.write_text("a file in the way of a folder")
    done = launch(workplace, "sampleless")
    assert done.returncode == 0, done.stderr
    assert "its sample could not be written" in read_events(there.events)[-1].detail


@pytest.mark.slow
def test_the_ranks_that_were_asked_trace_their_steps(workplace: Path) -> None:
    done = launch(
        workplace, "profiled", "cluster.gpus_per_node=2", "layout=fsdp", "layout.dp_shard=2", "steps=8",
        "profile.first_step=4", "profile.steps=2", "profile.ranks=[0,1]",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    there = run_dir(workplace, "profiled")
    assert sorted(p.name[13:] for p in there.profiles.iterdir()) == [
        "rank-0000-step-000000004.json.gz",
        "rank-0001-step-000000004.json.gz",
    ]
    for path in there.profiles.iterdir():
        names = {e["name"] for e in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]}
        assert {"step 4", "step 5"} <= names
        assert "step 6" not in names
        assert any("reduce_scatter" in name for name in names)
    (told,) = [e for e in read_events(there.events) if e.kind == "profiled"]
    assert told.detail in done.stdout.replace("\n", "")
    (log,) = there.logs.glob("*_1_log.out")
    assert "profiled: steps 4 to 5: " in log.read_text()
