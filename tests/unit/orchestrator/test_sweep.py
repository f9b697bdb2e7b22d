"""Which points a sweep has, where each lives, and how one that fails or is stopped leaves the others."""

import json
import re
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

from orchestrator import launch, sweep, sweep_slurm
from orchestrator import spec as specs
from orchestrator.energy.carbon import Start
from orchestrator.errors import Failure, StoppedUnsaved, UserError
from orchestrator.record import Event, JsonlWriter, StepRecord, utc_now
from orchestrator.run_dir import RunDir
from orchestrator.spec import RunSpec, to_yaml
from slurm import lemons, queue
from slurm.request import JobRequest


def by_id(*overrides: str) -> dict[str, str]:
    return {p.id: p.directory for p in sweep.expand(overrides)[1]}


def test_hydras_grammar_makes_the_points() -> None:
    _, points = sweep.expand(["model=nano,tiny", "optim.lr=choice(1e-3,3e-4)", "steps=range(100,300,100)", "seed=3"])
    assert len(points) == 8
    assert ["model=nano", "optim.lr=0.001", "steps=100", "seed=3"] in [p.overrides for p in points]
    assert points[0].directory.startswith("model=nano,lr=0.001,steps=100-")


def test_glob_chooses_among_the_packages_groups_and_the_users(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "llama_mine.yaml").write_text("name: mine\n")
    chosen = [p.overrides[0] for p in sweep.expand(["model=glob(llama*)"], tmp_path)[1]]
    assert "model=llama_7b" in chosen
    assert "model=llama_mine" in chosen
    assert "model=nano" not in chosen


def test_many_points_are_checked_together_and_told_together() -> None:
    with pytest.raises(UserError, match="20 of 40 points cannot run") as told:
        sweep.launch_sweep(["model=nano", "steps=range(101,121)", "model.n_heads=4,3"])
    assert "and 15 more points" in str(told.value)


def test_a_point_is_the_same_whatever_its_position_spelling_and_neighbours() -> None:
    one = by_id("model=nano,tiny", "optim.lr=1e-3", "steps=10")
    assert by_id("steps=10", "optim.lr=0.001", "model=tiny,nano").keys() == one.keys()
    assert one.keys() < by_id("model=nano,tiny,small", "optim.lr=1e-3,2e-3", "steps=10").keys()
    assert one.keys() == by_id("model=nano,tiny", "optim.lr=1e-3", "steps=10", "dashboard.wandb=online").keys()
    assert not one.keys() & by_id("model=nano,tiny", "optim.lr=1e-3", "steps=11").keys()


def test_a_point_that_is_named_twice_runs_once() -> None:
    assert len(by_id("optim.lr=1e-3,0.001,3e-4")) == 2


def test_more_values_extend_the_sweep_and_other_fixed_values_make_another() -> None:
    name = sweep.expand(["optim.lr=1e-3", "steps=10,20"])[0]
    assert sweep.expand(["steps=10,20,30", "optim.lr=0.001"])[0] == name
    assert sweep.expand(["optim.lr=2e-3", "steps=10,20"])[0] != name
    assert sweep.expand(["optim.lr=2e-3", "steps=10,20", "name=mine"])[0] == "mine"


@pytest.mark.parametrize(
    ("override", "message"),
    [("name=a,b", "name cannot be swept"), ("steps=interval(1,2)", "interval"), ("steps=choice(1", "choice")],
)
def test_what_cannot_be_swept_is_told(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sweep.expand([override])


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Launches that train nothing: each writes that it finished, fails for lr 0.5 and is stopped for lr 0.25."""
    monkeypatch.chdir(tmp_path)
    names: list[str] = []

    def pretend(spec: RunSpec, overrides: Sequence[str]) -> int:
        names.append(spec.name)
        journal = json.loads((Path(spec.run_root) / "sweep.json").read_text())
        assert spec.name in [p["directory"] for p in journal["points"]]  # written before anything is launched
        if spec.optim.lr == 0.5 and names.count(spec.name) == 1:
            raise Failure("the run failed: the node burnt")
        if spec.optim.lr == 0.25 and names.count(spec.name) == 1:
            return 0  # stopped and saved
        with JsonlWriter(RunDir(spec.run_dir).events / "attempt-0001.jsonl") as events:
            events.write(Event(time_utc=utc_now(), kind="finished", step=spec.steps, detail="done", attempt=1))
        return 0

    monkeypatch.setattr(launch, "launch", pretend)
    return names


def test_a_failing_point_takes_no_other_down_and_is_all_that_runs_again(
    ran: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["model=nano", "name=lrs", "optim.lr=1e-3,0.5,2e-3"]
    assert sweep.launch_sweep(words) == 1
    assert len(ran) == 3
    assert "failed after" in (told := capsys.readouterr().out)
    assert "the node burnt" in told
    assert "2 of 3 finished" in told
    from orchestrator.sweep_report import status

    assert [r["state"] for r in status(Path("runs/lrs"))] == ["finished", "failed", "finished"]
    assert sweep.launch_sweep(words) == 0
    assert len(ran) == 4
    assert ran[3].startswith("lr=0.5-")
    assert sweep.launch_sweep(words) == 0
    assert len(ran) == 4


def test_added_values_run_alone_and_the_others_keep_their_directories(ran: list[str]) -> None:
    sweep.launch_sweep(["model=nano", "name=lrs", "optim.lr=1e-3,2e-3"])
    before = sweep.Journal.read(Path("runs/lrs")).points
    sweep.launch_sweep(["name=lrs", "optim.lr=3e-3,2e-3,1e-3", "model=nano,tiny"])
    assert len(ran) == len(set(ran)) == 6
    assert sweep.Journal.read(Path("runs/lrs")).points[:2] == before


def test_a_sweep_that_is_stopped_goes_on_with_the_same_command(
    ran: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["model=nano", "name=lrs", "optim.lr=1e-3,0.25,2e-3"]
    assert sweep.launch_sweep(words) == 0  # a stop that saved, as of a single run
    assert "run the same command again" in capsys.readouterr().out
    assert len(ran) == 2
    from orchestrator import sweep_report

    assert [r["state"] for r in sweep_report.status(Path("runs/lrs"))][::2] == ["finished", "waiting"]
    with monkeypatch.context() as mute:
        mute.setattr(sweep_report, "live_points", lambda root: None)  # squeue does not answer
        assert [r["state"] for r in sweep_report.status(Path("runs/lrs"))] == ["finished", "unknown", "unknown"]
    assert sweep.launch_sweep(words) == 0
    assert [name.split("-")[0] for name in ran[2:]] == ["lr=0.25", "lr=0.002"]


def test_nothing_is_launched_when_one_point_cannot_be(ran: list[str]) -> None:
    with pytest.raises(UserError, match="1 of 2 points cannot run; nothing was launched"):
        sweep.launch_sweep(["model=nano", "model.n_heads=4,3"])
    assert not ran
    assert not Path("runs").exists()


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, int]]:
    """Launches that write the records of a training, up to the step where they are told to pause: low rates learn slower."""
    monkeypatch.chdir(tmp_path)
    launches: list[tuple[str, int]] = []

    def pretend(spec: RunSpec, overrides: Sequence[str]) -> int:
        run_dir = RunDir(spec.run_dir)
        run_dir.spec.write_text(to_yaml(spec))
        last = launch.last_record(run_dir)
        until = run_dir.pause_step() or spec.steps
        attempt = run_dir.take_attempt()
        launches.append((spec.name.split("-")[0], until))
        with JsonlWriter(run_dir.attempt_file(run_dir.records, attempt)) as records:
            for step in range(last.step + 1 if last else 1, until + 1):
                fields = dict.fromkeys(("grad_norm", "lr", "step_s", "tokens_per_s"), 1.0)
                loss = 5 - 100 * spec.optim.lr * step / spec.steps
                records.write(
                    StepRecord(
                        time_utc=utc_now(), attempt=attempt, step=step, tokens=step, loss=loss, mfu=None, **fields
                    )
                )
        with JsonlWriter(run_dir.attempt_file(run_dir.events, attempt)) as events:
            kind = "finished" if until == spec.steps else "stopped"
            events.write(Event(time_utc=utc_now(), kind="started", step=0, detail="", attempt=attempt))
            events.write(Event(time_utc=utc_now(), kind=kind, step=until, detail="", attempt=attempt))
        return 0

    monkeypatch.setattr(launch, "launch", pretend)
    return launches


def test_halving_trains_the_better_half_on_and_reports_what_it_saved(
    trained: list[tuple[str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["model=nano", "name=lrs", "steps=80", "optim.lr=1e-3,2e-3,3e-3,4e-3"]
    assert sweep.launch_sweep(words, halving=20) == 0
    first = [(f"lr={lr}", 20) for lr in ("0.001", "0.002", "0.003", "0.004")]
    assert trained == [*first, ("lr=0.003", 40), ("lr=0.004", 40), ("lr=0.004", 80)]
    # 60 + 60 + 40 of 320 steps were not trained
    assert "3 of 4 points dropped, 50% of all steps saved" in capsys.readouterr().out
    from orchestrator.sweep_report import report, status

    assert [r["state"] for r in status(Path("runs/lrs"))] == ["dropped", "dropped", "dropped", "finished"]
    assert report(Path("runs/lrs")).steps_saved_share == 0.5
    for override, message in (("steps=3", "overrides of carbon alone"), ("carbon.zon=FRA", "Key 'zon'")):
        with pytest.raises(UserError, match=message):
            report(Path("runs/lrs"), [override])

    assert sweep.launch_sweep(words, halving=20) == 0  # what was dropped stays so
    assert len(trained) == 7
    assert sweep.launch_sweep(words) == 0  # but for a command that wants all
    assert [until for _, until in trained[7:]] == [80, 80, 80]


def test_points_of_other_tokens_are_ranked_apart(trained: list[tuple[str, int]]) -> None:
    from orchestrator.sweep_report import markdown, report, write_page

    sweep.launch_sweep(["model=nano", "name=apart", "steps=40", "model.vocab_size=512,4096", "optim.lr=1e-3,2e-3"])
    found = report(Path("runs/apart"))
    corpora = [p.corpus for p in found.points]
    assert [c.partition(",")[0] for c in corpora] == ["vocabulary of 512"] * 2 + ["vocabulary of 4"] * 2
    assert len(set(corpora)) == 2
    assert "does not compare" in markdown(found)
    assert markdown(found).count("| optim.lr |") == 2
    assert "does not compare" in write_page(found, Path("apart.html")).read_text()

    sweep.launch_sweep(["model=nano", "name=alike", "steps=40", "optim.lr=1e-3,2e-3"])
    assert "does not compare" not in markdown(report(Path("runs/alike")))


def test_halving_goes_on_where_it_was_cut_off(trained: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["model=nano", "name=lrs", "steps=80", "optim.lr=1e-3,2e-3,3e-3,4e-3"]
    pretend, left = launch.launch, [5]

    def cut(spec: RunSpec, overrides: Sequence[str]) -> int:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return pretend(spec, overrides)

    monkeypatch.setattr(launch, "launch", cut)
    with pytest.raises(KeyboardInterrupt):
        sweep.launch_sweep(words, halving=20)
    assert sweep.launch_sweep(words, halving=20) == 0
    assert len(trained) == len(set(trained)) == 7


@pytest.mark.parametrize(
    ("swept", "message"),
    [("steps=80,90", "differ in steps"), ("optim.batch_sequences=8,16", "differ in tokens in a step")],
)
def test_halving_refuses_points_whose_steps_are_not_alike(ran: list[str], swept: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sweep.launch_sweep(["model=nano", "name=x", swept], halving=20)
    assert not ran


def test_more_points_than_an_array_takes_are_split_and_share_the_limit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arrays: list[tuple[int, int, int | None]] = []

    def submit(root: Path, runs: Sequence[RunSpec], start: Start | None, code: str, limit: int | None) -> str:
        arrays.append((len(runs), runs[0].cluster.cpus_per_gpu, limit))
        return "1"

    monkeypatch.setattr(sweep_slurm, "_submit", submit)
    monkeypatch.setattr(sweep_slurm, "snapshot", lambda folder: folder)
    monkeypatch.setattr(queue, "max_array_size", lambda: 4)
    (tmp_path / "tokenizer.json").touch()
    monkeypatch.setattr(launch, "_prepare", lambda console, spec: SimpleNamespace(root=tmp_path))
    words = ["model=nano", "name=many", "cluster=slurm", "cluster.gpus_per_node=1"]
    assert sweep.launch_sweep([*words, "seed=range(10)", "cluster.cpus_per_gpu=1,2"], limit_parallel=12) == 0
    assert "computes on        CPUs" in capsys.readouterr().out
    assert arrays == [(4, 1, 2), (4, 1, 2), (2, 1, 2), (4, 2, 2), (4, 2, 2), (2, 2, 2)]


def test_points_on_slurm_whose_data_are_refused_leave_their_names_free(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(queue, "queued", dict)
    (tmp_path / "conf" / "data").mkdir(parents=True)
    source = f"{{path: {tmp_path / 'nowhere'}, proportion: 1.0, format: text}}"
    (tmp_path / "conf" / "data" / "mine.yaml").write_text(f"name: mine\nsources:\n  only: {source}\n")
    with pytest.raises(UserError, match="nowhere does not exist"):
        sweep.launch_sweep(
            [
                "model=nano",
                "data=mine",
                "cluster=slurm",
                "layout=fsdp",
                "optim.batch_sequences=16",
                "name=s",
                "seed=1,2",
            ],
            tmp_path / "conf",
        )
    assert not list((tmp_path / "runs" / "s").glob("*/spec.yaml"))


def test_a_stop_that_could_not_save_ends_the_sweep(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    asked: list[str] = []

    def stopped(spec: RunSpec, overrides: list[str]) -> int:
        asked.append(spec.name)
        raise StoppedUnsaved("stopped at step 3 of 9, and not saved")

    monkeypatch.setattr(launch, "launch", stopped)
    assert sweep.launch_sweep(["model=nano", "name=s", "seed=1,2", "steps=9", "optim.warmup_steps=1"]) == 1
    assert len(asked) == 1
    assert "and not saved" in capsys.readouterr().out


def test_each_point_has_a_place_of_its_own_for_its_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    places: dict[str, str | None] = {}

    def run(spec: RunSpec, overrides: Sequence[str]) -> int:
        places[spec.name] = spec.checkpoint.url
        raise KeyboardInterrupt if len(places) == 2 else Failure("enough is seen")

    monkeypatch.setattr(launch, "launch", run)
    with pytest.raises(KeyboardInterrupt):
        sweep.launch_sweep(["model=nano", "name=lr", "checkpoint.url=s3://bucket/x/", "optim.lr=1e-3,2e-3,3e-3"])
    assert places == {name: f"s3://bucket/x/lr/{name}" for name in places}
    assert len(places) == 2

    first = next(iter(places))
    run_dir = RunDir(tmp_path / "runs" / "lr" / first)
    begun = specs.compose(["model=nano", "name=lr", "checkpoint.url=s3://bucket/before"])
    run_dir.spec.write_text(to_yaml(begun))  # of a sweep begun before, or under another name: it stays where it is
    places.clear()
    with pytest.raises(KeyboardInterrupt):
        sweep.launch_sweep(["model=nano", "name=lr", "checkpoint.url=s3://bucket/x", "optim.lr=1e-3,2e-3,3e-3"])
    assert places[first] == "s3://bucket/before"


def test_a_sweep_whose_point_has_spent_its_budget_has_not_gone_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def spent(spec: RunSpec, overrides: Sequence[str]) -> int:
        with JsonlWriter(RunDir(spec.run_dir).events / "attempt-0001.jsonl") as events:
            data = {"why": "1 kWh used of carbon.budget_kwh=1: raise it to go on"}
            events.write(Event(time_utc=utc_now(), kind="stopped", step=3, detail="", data=data))
        return 0

    monkeypatch.setattr(launch, "launch", spent)
    assert sweep.launch_sweep(["model=nano", "name=lr", "optim.lr=1e-3,2e-3"]) == 1
    assert "saved: 1 kWh used of carbon.budget_kwh=1" in capsys.readouterr().out


@pytest.mark.parametrize(("error", "code"), [(None, 0), (StoppedUnsaved("no room"), 1)])
def test_a_sweep_that_was_stopped_ends_as_its_point_did(
    error: Exception | None,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)

    def stopped(spec: RunSpec, overrides: Sequence[str]) -> int:
        if error:
            raise error
        return 0  # and is not finished: it was stopped, and saved

    monkeypatch.setattr(launch, "launch", stopped)
    assert sweep.launch_sweep(["model=nano", "name=lr", "optim.lr=1e-3,2e-3"]) == code
    assert re.search(r"stopped in lr=0?.001\S*[,:] .*To go on, run the same command again", capsys.readouterr().out)


def test_points_on_slurm_are_forecast_begin_when_it_is_greenest_and_keep_off_lemons(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    asked: list[JobRequest] = []
    monkeypatch.setattr(sweep_slurm, "submit_array", lambda request, lock: str(asked.append(request)))
    monkeypatch.setattr(sweep_slurm, "snapshot", lambda folder: folder)
    monkeypatch.setattr(queue, "max_array_size", lambda: 100)
    monkeypatch.setattr(queue, "queued", dict)
    (tmp_path / "tokenizer.json").touch()
    monkeypatch.setattr(launch, "_prepare", lambda console, spec: SimpleNamespace(root=tmp_path))
    words = ["model=nano", "layout=fsdp", "cluster=slurm", "gpu=h100", "optim.batch_sequences=16", "seed=1,2"]
    with pytest.raises(UserError, match=r"seed=1-\w+: each rank needs [\d.]+ GB and gpu=h100 has 1 GB"):
        sweep.launch_sweep([*words, "name=small", "gpu.memory_gb=1"])
    assert not asked
    assert not list((tmp_path / "runs" / "small").glob("*/spec.yaml"))

    hours = [datetime.now(UTC) + timedelta(hours=h) for h in range(-1, 60)]
    rows = [f"{at:%Y-%m-%dT%H:00:00Z},{100 if number >= 25 else 400}" for number, at in enumerate(hours)]
    (tmp_path / "grid.csv").write_text("time_utc,g_per_kwh\n" + "\n".join(rows) + "\n")
    green = ["carbon.start=greenest", "carbon.series=grid.csv", f"carbon.deadline={hours[-2]:%Y-%m-%dT%H:00:00Z}"]
    folder = tmp_path / "runs" / "green"
    folder.mkdir()
    lemons.add(folder / ".lemons.jsonl", "node007", "preflight")
    assert sweep.launch_sweep([*words, "name=green", *green]) == 0
    (request,) = list(asked)
    assert request.array is not None
    assert request.array.count == 2
    assert request.exclude == ("node007",)
    assert request.begin is not None
    assert 22 * 3600 < int(request.begin.removeprefix("now+").removesuffix("seconds")) < 26 * 3600
    flat = "time_utc,g_per_kwh\n" + "".join(f"{row.split(',')[0]},300\n" for row in rows)
    (tmp_path / "grid.csv").write_text(flat)  # it begins now, and all points together
    assert sweep.launch_sweep([*words, "name=now", *green]) == 0
    assert len(asked) == 2
    plans = [json.loads(path.read_text()) for path in sorted(folder.glob("*/plan.json"))]
    assert len(plans) == 2
    assert all(plan["tokens_per_s"]["central"] > 0 for plan in plans)


@pytest.mark.parametrize(
    ("name", "said"), [("mine", "runs/mine is the directory of a run"), ("", "name=''"), ("../out", "name='../out'")]
)
def test_a_sweep_takes_a_name_that_is_one_and_no_runs(ran: list[str], name: str, said: str) -> None:
    (run := RunDir(Path("runs/mine"))).root.mkdir(parents=True)
    run.spec.write_text("name: mine\n")
    for more in ([], ["hydra/sweeper=optuna"]):
        with pytest.raises(UserError, match=said):
            sweep.launch_sweep(["model=nano", f"name={name}", "optim.lr=1e-3,2e-3", *more])
    assert sorted(p.name for p in Path().iterdir()) == ["runs"]
    assert [p.name for p in Path("runs/mine").iterdir()] == ["spec.yaml"]


def test_two_commands_cannot_lead_one_sweep(ran: list[str], tmp_path: Path) -> None:
    (tmp_path / "runs" / "lrs").mkdir(parents=True)
    with sweep._alone(tmp_path / "runs" / "lrs"), pytest.raises(UserError, match="led by another"):
        sweep.launch_sweep(["model=nano", "name=lrs", "optim.lr=1e-3,2e-3"])


def test_the_commands_of_the_documentation_are_valid() -> None:
    """Each `launch -m` line has points that compose, with losses that compare; each other line is a command."""
    from orchestrator.cli import _parser
    from orchestrator.spec import compose_many
    from orchestrator.sweep_report import corpus

    root = Path(__file__).resolve().parents[3]
    pages = [root / page for page in ("README.md", "docs/sweeps.md", "docs/scaling.md")]
    lines = [line.removeprefix(".venv/bin/") for page in pages for line in page.read_text().splitlines()]
    lines = [shlex.split(line)[1:] for line in lines if line.startswith(("arriero launch -m", "arriero sweep"))]
    assert len(lines) >= 5
    for words in lines:
        args = _parser().parse_args(words)
        if words[0] == "launch":
            config_dir = root / args.config_dir if args.config_dir else None
            if "hydra/sweeper=optuna" in words:  # whose points are not known yet
                continue
            points = sweep.expand(args.overrides, config_dir)[1]
            assert len(points) > 1
            specs = compose_many([p.overrides for p in points], config_dir)
            assert len({corpus(s) for s in specs if not isinstance(s, str)}) == 1, words
            assert not [s for s in specs if isinstance(s, str)]


def test_what_is_no_sweep_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no sweep"):
        sweep.Journal.read(tmp_path)
