"""What a person types and reads."""

import signal
import subprocess
import sys
from pathlib import Path

COMMAND = [sys.executable, "-c", "import sys; from orchestrator.cli import main; sys.exit(main())"]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *words], capture_output=True, text=True, check=False)


def test_help_names_every_command_and_imports_neither_torch_nor_hydra() -> None:
    code = (
        "import sys; from orchestrator.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'hydra', 'submitit', 'wandb', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    for command in ("launch", "config"):
        assert command in done.stdout


def test_configuring_imports_no_torch() -> None:
    code = "import sys; from orchestrator.cli import main; main(['config', 'carbon.zone=FRA']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_a_users_mistake_is_text_and_exit_code_2() -> None:
    done = run("launch", "model.n_heads=3")
    assert done.returncode == 2
    assert "set model.n_heads=2" in done.stderr
    assert "Traceback" not in done.stderr
    assert not Path("runs/tiny").exists()


def test_an_unknown_command_is_exit_code_2() -> None:
    done = run("lunch")
    assert done.returncode == 2
    assert "launch" in done.stderr
    assert "energy-sample" not in done.stderr  # that ranks start
    assert "wandb-mirror" not in done.stderr
    assert run("energy-sample", "--help").returncode == run("wandb-mirror", "--help").returncode == 0


def test_overrides_may_stand_on_both_sides_of_an_option() -> None:
    done = run("config", "model=nano", "--config-dir", ".", "seed=7")
    assert done.returncode == 0, done.stderr
    assert "seed: 7" in done.stdout
    assert run("config", "model=nano", "--nonsense", "seed=7").returncode == 2


def test_runs_and_overrides_may_follow_an_option() -> None:
    done = run("report", "carbon", "nowhere", "--json", "carbon.zone=FRA")
    assert "unrecognized" not in done.stderr
    assert "nowhere" in done.stderr
    assert "also_nowhere" in run("status", "--json", "also_nowhere").stderr


def test_a_picture_goes_to_a_file_in_a_folder_that_exists(tmp_path: Path) -> None:
    for picture, said in (
        (tmp_path, "is a folder: give a file in it"),
        (tmp_path / "no" / "x.svg", "does not exist"),
        (tmp_path / "x.png", "name it"),
    ):
        done = run("simulate", "experiment=llama_7b", "--seeds", "10", "--picture", str(picture))
        assert done.returncode == 2
        assert said in done.stderr
        assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_the_system_refuses_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    (tmp_path / "loss.csv").write_text("step,loss\n" + "".join(f"{n},{9 - n / 100}\n" for n in range(200)))
    (tmp_path / "file").write_text("no folder")
    done = run("spikes", "replay", str(tmp_path / "loss.csv"), "--picture", str(tmp_path / "file" / "folder"))
    assert done.returncode == 1
    assert done.stderr == f"arriero: {tmp_path}/file/folder: Not a directory\n"


def test_ctrl_c_is_one_line_and_exit_code_130(tmp_path: Path) -> None:
    words = [
        *COMMAND,
        "launch",
        "model=nano",
        "model.vocab_size=30000",
        f"data.cache={tmp_path}",
        f"run_root={tmp_path}",
    ]
    with subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    ) as process:
        assert process.stdout
        assert process.stderr
        assert any("training the tokenizer" in line for line in process.stdout)
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
    assert process.returncode == 130
    assert said == "arriero: stopped by Ctrl-C\n"
    assert not list(tmp_path.glob("*.building"))
    assert not (tmp_path / "nano").exists()


def test_a_folder_of_groups_that_is_not_there_is_exit_code_2(tmp_path: Path) -> None:
    for command in (["config"], ["plan"], ["launch"], ["launch", "-m", "seed=1,2"]):
        done = run(*command, "--config-dir", str(tmp_path / "nope"))
        assert done.returncode == 2
        assert "is no folder" in done.stderr
