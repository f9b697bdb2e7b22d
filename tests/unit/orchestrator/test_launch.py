"""What a launch writes before anything is submitted."""

import json
import multiprocessing
import re
import shlex
import shutil
from dataclasses import replace
from multiprocessing.synchronize import Barrier
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from model.data.config import SourceConfig
from model.data.prepare import prepare
from orchestrator import launch
from orchestrator import spec as specs
from orchestrator.cli import _parser
from orchestrator.console import plain_console
from orchestrator.errors import Failure, UserError
from orchestrator.record import Event, JsonlWriter, utc_now
from orchestrator.run_dir import SWEEP, RunDir
from slurm.request import CannotSubmit, Refused


def test_a_run_is_graded_by_what_was_expected_at_its_first_start(tmp_path: Path) -> None:
    spec = specs.compose(["experiment=llama_7b"])
    slower = replace(spec, gpu=replace(spec.gpu, matmul_fraction=0.3))
    run_dir = RunDir(tmp_path)

    def written() -> float:
        return float(json.loads(run_dir.plan.read_text())["tokens_per_s"]["central"])

    launch.write_plan(run_dir, launch.forecast_of(slower, 0.0))
    refused = written()
    launch.write_plan(run_dir, launch.forecast_of(spec, 0.0))  # it never started: what was expected then is gone
    first = written()
    assert first > refused
    launch.write_plan(run_dir, None)
    assert not run_dir.plan.exists()

    launch.write_plan(run_dir, launch.forecast_of(spec, 0.0))
    run_dir.events.mkdir()
    with JsonlWriter(run_dir.events / "rank0.jsonl") as events:
        events.write(Event(time_utc=utc_now(), kind="started", step=0, detail=""))
    launch.write_plan(run_dir, launch.forecast_of(slower, 0.0))
    launch.write_plan(run_dir, None)
    assert written() == first


def text_at(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for number in range(40):
        (folder / f"{number}.txt").write_text(
            f"document {number}: the llama carries {number * 7} loads over the pass.\n" * 9
        )
    return folder


def test_what_was_refused_leaves_the_name_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No step was trained: the corrected command is another run's first launch."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "submit", lambda request: (_ for _ in ()).throw(Failure("submitted")))
    (tmp_path / "conf" / "data").mkdir(parents=True)
    for name, path in (("wrong", tmp_path / "nowhere"), ("right", text_at(tmp_path / "texts"))):
        source = f"{{path: {path}, proportion: 1.0, format: text}}"
        (tmp_path / "conf" / "data" / f"{name}.yaml").write_text(f"name: {name}\nsources:\n  only: {source}\n")
    wrong, right = (
        specs.compose(["model=nano", "name=x1", f"data={d}"], tmp_path / "conf") for d in ("wrong", "right")
    )
    with pytest.raises(UserError, match="nowhere does not exist"):
        launch.launch(wrong, [])
    assert not wrong.run_dir.exists()
    with pytest.raises(UserError, match="less than one row of 1000000"):
        launch.launch(replace(right, model=replace(right.model, sequence_length=1_000_000)), [])
    assert not wrong.run_dir.exists()
    with pytest.raises(Failure, match="submitted"):
        launch.launch(right, [])
    assert specs.load(RunDir(right.run_dir).spec) == right
    with pytest.raises(UserError, match="another configuration") as told:
        launch.launch(specs.compose(["name=x1"]), [])
    assert re.search(r"\.\.\. and \d+ more", str(told.value))
    assert len(str(told.value).splitlines()) < 18


def _claim(barrier: Barrier, folder: Path, seed: int, won: "multiprocessing.Queue[tuple[int, int]]") -> None:
    spec = specs.compose(["model=nano", f"seed={seed}"])
    prepared: Any = SimpleNamespace(root=folder)
    for number in range(25):
        barrier.wait()
        try:
            launch.write_run_dir(spec, RunDir(folder / str(number)), [], prepared)
            won.put((number, seed))
        except UserError:
            won.put((number, 0))


def test_of_two_first_launches_at_one_moment_one_has_the_name(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").touch()
    context = multiprocessing.get_context("spawn")
    won: multiprocessing.Queue[tuple[int, int]] = context.Queue()
    barrier = context.Barrier(2, timeout=120)
    both = [context.Process(target=_claim, args=(barrier, tmp_path, seed, won)) for seed in (1, 2)]
    for process in both:
        process.start()
    told = [won.get(timeout=120) for _ in range(50)]
    for process in both:
        process.join()
    for number in range(25):
        (winner,) = [seed for n, seed in told if n == number and seed]
        assert specs.load(tmp_path / str(number) / "spec.yaml").seed == winner


def test_a_run_is_not_made_in_the_directory_of_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "ladder").mkdir(parents=True)
    (tmp_path / "runs" / "ladder" / SWEEP).write_text("{}")
    with pytest.raises(UserError, match="runs/ladder is the directory of a sweep"):
        launch.launch(specs.compose(["name=ladder"]), [])


def test_a_job_that_asks_for_gpus_and_computes_on_cpus_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    slurm = ["cluster=slurm", "layout=fsdp", "layout.dp_shard=8"]
    assert launch.launch(specs.compose(slurm), [], dry_run=True) == 0
    told = capsys.readouterr()
    assert "--gres=gpu:8" in told.out
    assert "computes on        CPUs (gpu=cpu), though 8 GPUs a node are asked for" in told.err
    assert "computes on" not in told.out  # which is the script
    for quiet in ([*slurm, "gpu=h100"], [*slurm, "cluster.gres=null"], []):
        assert launch.on_cpus(specs.compose(quiet)) == ""
    assert launch.on_cpus(specs.compose([*slurm, "cluster.gres=null", "+cluster.sbatch.gpus-per-node=8"]))


def test_gpus_that_are_not_there_are_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # torch finds none, also on a machine that has some
    with pytest.raises(
        UserError, match=r"gpu=h100 needs a GPU .* cluster\.gpus_per_node=1 rank.*torch finds 0.*gpu=cpu"
    ):
        launch.launch(specs.compose(["experiment=first_run", "gpu=h100"]), [])
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(Failure, match=r"data\.cache=file/cache: .*Not a directory"):
        launch.launch(specs.compose(["model=nano", "data.cache=file/cache"]), [])


def test_the_recipe_of_the_documentation_makes_ids_that_its_model_knows(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "data.md").read_text()
    recipe, command = re.findall(r"```(?:yaml)?\n(.*?)```", page, re.DOTALL)[:2]
    conf = tmp_path / "my_conf" / "data" / "mine.yaml"
    conf.parent.mkdir(parents=True)
    conf.write_text(recipe)
    args = _parser().parse_args(shlex.split(command)[1:])
    spec = specs.compose(args.overrides, tmp_path / args.config_dir)
    assert spec.name == spec.data.name == "mine"
    jsonl = tmp_path / "web.jsonl"
    jsonl.write_text("".join(json.dumps({"text": f"line {n} of the web"}) + "\n" for n in range(50)))
    spec.data.sources["web"].path, spec.data.sources["books"].path = str(jsonl), str(text_at(tmp_path / "books"))
    spec.data.cache = str(tmp_path / "cache")
    prepared = prepare(spec.data)
    assert prepared.vocab_size == spec.model.vocab_size


def test_a_store_of_checkpoints_without_credentials_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "nowhere"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(Failure, match=r"checkpoint\.url=s3://bucket/x takes no file: Unable to locate credentials"):
        launch.launch(specs.compose(["model=nano", "checkpoint.url=s3://bucket/x"]), [])
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_takes_no_file_is_refused_before_a_first_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Failure, match="/proc/here takes no file"):
        launch.launch(specs.compose(["model=nano", "name=x", "checkpoint.url=file:///proc/here"]), [])
    assert not (tmp_path / "runs" / "x").exists()
    url = (tmp_path / "there").as_uri()
    spec = specs.compose(["model=nano", "name=x", f"checkpoint.url={url}"])
    launch._ask_store(spec, RunDir(spec.run_dir))
    assert list((tmp_path / "there").iterdir()) == []
    (tmp_path / "README.md").touch()
    with pytest.raises(Failure, match=r"README\.md takes no file"):  # a path, too
        launch.launch(specs.compose(["model=nano", "name=x", "checkpoint.url=README.md"]), [])


def test_the_checkpoints_of_another_run_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "place").mkdir()
    (tmp_path / "place" / "run.txt").write_text("mine-123")
    spec = specs.compose(["model=nano", "name=x", "checkpoint.url=place"])
    with pytest.raises(UserError, match=r"place holds the checkpoints of another run, mine-123, .*x \(new\).*run\.txt"):
        launch.launch(spec, [])
    run_dir = RunDir(tmp_path / "runs" / "x")
    assert not run_dir.root.exists()
    run_dir.root.mkdir(parents=True)
    run_dir.run_id.write_text("mine-123\n/as/before/its/directory/was/called/x\n")
    launch._ask_store(spec, run_dir)


def test_a_run_keeps_the_tokens_of_its_first_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    spec = specs.compose(["model=nano", "name=x"])
    source = SourceConfig(path=str(text_at(tmp_path / "texts")), proportion=1.0, format="text")
    spec.data = replace(spec.data, sources={"only": source}, cache=str(tmp_path / "cache"))
    console, run_dir = plain_console(), RunDir(spec.run_dir)
    first = launch.prepared_for(console, spec, run_dir)
    launch.write_run_dir(spec, run_dir, [], first)
    assert run_dir.tokenizer.read_bytes() == (first.root / "tokenizer.json").read_bytes()
    (tmp_path / "texts" / "more.txt").write_text("another document")
    assert launch.prepared_for(console, spec, run_dir).root == first.root
    (tmp_path / "texts").rename(tmp_path / "away")
    assert launch.prepared_for(console, spec, run_dir).root == first.root

    (tmp_path / "away").rename(tmp_path / "texts")
    shutil.rmtree(first.root)
    with pytest.raises(
        UserError,
        match=f"trains on the tokens of .*{first.root.name}, which is neither there .*its texts would give others",
    ):
        launch.prepared_for(console, spec, run_dir)
    (tmp_path / "texts" / "more.txt").unlink()
    anew = launch.prepared_for(console, spec, run_dir)
    assert anew.root.name == first.root.name
    (tmp_path / "texts").rename(tmp_path / "away")
    (tmp_path / "cache").rename(tmp_path / "moved")  # the whole project
    spec.data = replace(spec.data, cache="moved")
    assert launch.prepared_for(console, spec, run_dir).root == Path("moved") / first.root.name


def test_a_moved_run_is_who_it_was_and_a_copy_is_not(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").touch()
    prepared: Any = SimpleNamespace(root=tmp_path)

    def launched(name: str) -> str:
        run_dir = RunDir(tmp_path / name)
        spec = replace(specs.compose(["model=nano"]), name=name, run_root=str(tmp_path))
        launch.write_run_dir(spec, run_dir, [], prepared)
        assert run_dir.identity()
        return str(run_dir.identity())

    first = launched("a")
    assert launched("a") == first
    (tmp_path / "a").rename(tmp_path / "b")
    assert RunDir(tmp_path / "b").identity() == first
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    assert launched("b") == first
    assert RunDir(tmp_path / "c").identity() == first  # until it is told apart, by where b is now
    shutil.copytree(tmp_path / "b", tmp_path / "d")
    assert RunDir(tmp_path / "d").identity() is None
    assert launched("d") != first
    assert launched("b") == first


def test_a_run_is_not_made_inside_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "spec.yaml").write_text("")
    with pytest.raises(UserError, match="name=a/b lies in the directory of the run a"):
        launch.launch(specs.compose(["model=nano", "name=a/b"]), [])


def test_a_submission_that_slurm_refuses_leaves_the_name_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    spec = specs.compose(["model=nano", "name=x", "cluster=slurm", "cluster.nodes=1", "cluster.gpus_per_node=1"])
    source = SourceConfig(path=str(text_at(tmp_path / "texts")), proportion=1.0, format="text")
    spec.data = replace(spec.data, sources={"only": source}, cache=str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))  # no sbatch; no git either, which is no reason to fail
    launch._code_version.cache_clear()
    with pytest.raises(Refused, match="this machine has no sbatch"):
        launch.launch(spec, [])
    assert not spec.run_dir.exists()
    launch._code_version.cache_clear()

    def sbatch(says: str, queued: str = "") -> None:
        for name, code, text in (("sbatch", 1, says), ("squeue", 0, queued), ("scontrol", 1, "")):
            # of a job that was taken all the same squeue knows the comment, which is in the journal
            lines = f"#!/bin/sh\n/usr/bin/printf '%s' '{text}' >&{2 if name == 'sbatch' else 1}\nexit {code}\n"
            (tmp_path / name).write_text(lines)
            (tmp_path / name).chmod(0o755)

    sbatch("sbatch: error: Batch job submission failed: Invalid partition name specified")
    with pytest.raises(Refused, match="Invalid partition"):
        launch.launch(spec, [])
    assert not spec.run_dir.exists()
    sbatch("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation")
    with pytest.raises(CannotSubmit, match=r"nobody can tell whether Slurm has taken the job.*same command again"):
        launch.launch(spec, [])
    assert json.loads(RunDir(spec.run_dir).submission.read_text())["token"]  # by which the same command finds it


def test_a_run_of_slurms_starts_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    run_dir = RunDir(tmp_path / "x")
    run_dir.root.mkdir()
    run_dir.submission.write_text(
        json.dumps({"token": "t", "job_id": "7", "cluster": None, "run_dir": str(run_dir.root)})
    )
    console = plain_console()
    with console.capture() as said:
        assert launch._live_job(console, specs.compose(["name=x"]), run_dir) is None
    assert "this machine has no squeue" in said.get()
    with pytest.raises(CannotSubmit):
        launch._live_job(console, specs.compose(["name=x", "cluster=slurm", "layout=fsdp"]), run_dir)
