"""`arriero scaling` as a person uses it."""

import json
import shlex
from pathlib import Path
from xml.etree import ElementTree

import pytest

from orchestrator.cli import main
from orchestrator.scaling.law import PUBLISHED, best_for_training
from tests.unit.orchestrator.scaling.test_fit import points

ROOT = Path(__file__).resolve().parents[4]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    some = points(PUBLISHED["besiroglu"], 0.005, seed=1)
    lines = [f"{n},{6 * n * d},{y}" for n, d, y in zip(some.parameters, some.tokens, some.loss, strict=True)]
    path = tmp_path / "points.csv"
    path.write_text("\n".join(["Model Size,Training FLOP,loss", *lines]) + "\n")
    return path


def test_a_csv_is_fitted_drawn_and_asked_again(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["scaling", "fit", "--csv", str(table), "--bootstrap", "50", "--output", str(tmp_path / "fit"), "--json"])
        == 0
    )
    told = json.loads(capsys.readouterr().out)
    assert told["alpha"]["low"] < 0.3478 < told["alpha"]["high"]
    assert "replicates" not in told
    picture = ElementTree.fromstring((tmp_path / "fit" / "fit.svg").read_text())
    assert "IsoFLOP" in ElementTree.tostring(picture, encoding="unicode")
    assert "| alpha |" in (tmp_path / "fit" / "fit.md").read_text()

    assert main(["scaling", "recommend", "--fit", str(tmp_path / "fit" / "fit.json"), "--flops", "1e22", "--json"]) == 0
    advice = json.loads(capsys.readouterr().out)
    true = best_for_training(PUBLISHED["besiroglu"], 1e22)
    assert advice["parameters"]["low"] < true.parameters < advice["parameters"]["high"]
    assert advice["parameters"]["low"] < advice["parameters"]["value"] < advice["parameters"]["high"]


def test_advice_beyond_what_was_trained_says_so(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scaling", "recommend", "--csv", str(table), "--bootstrap", "20", "--flops", "1e25"]) == 0
    assert "an extrapolation" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fit"], "give the runs to fit"),
        (["fit", "--csv", "nowhere.csv"], "nowhere.csv"),
        (["fit", "nowhere"], "nowhere is no run directory"),
        (["recommend", "--law", "kaplan", "--flops", "1e20"], "none of hoffmann, besiroglu"),
        (["recommend", "--law", "hoffmann"], "give either --flops"),
        (["recommend", "--law", "hoffmann", "--flops", "-1"], "--flops -1 must be above 0"),
        (["recommend", "--law", "hoffmann", "--loss", "1.6"], "1.6 is not above E"),
        (["recommend", "--flops", "1e20"], "give one source"),
        (["recommend", "--fit", "pyproject.toml", "--flops", "1e20"], "is no fit.json"),
    ],
)
def test_mistakes_are_text_and_exit_code_2(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scaling", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_csv_with_a_word_for_a_number_names_the_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.csv"
    bad.write_text("parameters,tokens,loss\n1e6,1e8,4.0\n2e6,much,3.9\n")
    assert main(["scaling", "fit", "--csv", str(bad)]) == 2
    assert "line 3: tokens is 'much', not a number" in capsys.readouterr().err


def test_the_commands_of_the_documentation_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    monkeypatch.chdir(tmp_path)
    lines = [x for x in (ROOT / "docs/scaling.md").read_text().splitlines() if x.startswith("arriero scaling")]
    assert lines
    for line in lines:
        assert main(shlex.split(line)[1:]) == 0, line
    capsys.readouterr()
