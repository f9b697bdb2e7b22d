"""`arriero spikes replay`: every kind of log, the table, the picture, and what a user may get wrong."""

import json
import math
import random
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from orchestrator.cli import main
from orchestrator.errors import UserError
from orchestrator.record import JsonlWriter, StepRecord, utc_now
from orchestrator.run_dir import RunDir
from orchestrator.spikes import replay
from orchestrator.spikes.finding import Finding, Kind

SPIKE_AT = 300


def rows(steps: int = 400) -> list[tuple[int, float, float]]:
    rng = random.Random(1)
    bump = [1.5 * math.exp(-(s - SPIKE_AT) / 15) if s >= SPIKE_AT else 0.0 for s in range(steps + 1)]
    return [
        (s, 2 + 8 * (1 + s / 30) ** -0.4 + rng.gauss(0, 0.03) + bump[s], math.exp(rng.gauss(0, 0.1) + 2 * bump[s]))
        for s in range(1, steps + 1)
    ]


def csv_log(path: Path, header: str = "step,loss,grad_norm") -> Path:
    path.write_text(header + "\n" + "".join(f"{s},{x},{g}\n" for s, x, g in rows()))
    return path


def run_dir(path: Path, undone: bool) -> Path:
    with JsonlWriter(RunDir(path).records / "attempt-0001.jsonl") as writer:
        for step, loss, grad_norm in rows(SPIKE_AT + 5 if undone else 400):
            writer.write(record(step, loss, grad_norm))
    if undone:  # rewound past the spike
        with JsonlWriter(RunDir(path).records / "attempt-0002.jsonl") as writer:
            for step, loss, grad_norm in rows(SPIKE_AT - 1)[-100:]:
                writer.write(record(step, loss, grad_norm))
    return path


def record(step: int, loss: float, grad_norm: float) -> StepRecord:
    return StepRecord(
        time_utc=utc_now(),
        attempt=1,
        step=step,
        tokens=step,
        loss=loss,
        grad_norm=grad_norm,
        lr=1e-3,
        step_s=1.0,
        tokens_per_s=1.0,
        mfu=None,
    )


def the_spike(path: Path) -> None:
    alarms = [a for a in replay.run_over(path, "cusum").alarms if a.stopping]
    assert [a.kind for a in alarms] == [Kind.SPIKE]
    assert SPIKE_AT <= alarms[0].first_step <= SPIKE_AT + 2
    assert SPIKE_AT - 3 <= alarms[0].onset_step <= SPIKE_AT


@pytest.mark.parametrize("header", ["step,loss,grad_norm", "_step,train/loss,train/grad_norm", "iteration,lm loss,x"])
def test_reads_csv_under_the_names_that_logs_use(tmp_path: Path, header: str) -> None:
    the_spike(csv_log(tmp_path / "log.csv", header))


def test_reads_the_chart_that_wandb_exports_and_refuses_one_of_several_runs(tmp_path: Path) -> None:
    """One column for each run, its lowest and its highest value beside it; empty where another run has a row."""
    log = tmp_path / "wandb_export.csv"
    names = ["glad-sun-3 - loss", "glad-sun-3 - loss__MIN", "glad-sun-3 - loss__MAX"]
    head = ",".join(f'"{name}"' for name in ["Step", *names])
    log.write_text(head + "\n" + "".join(f'"{s}","{x}","{x - 1}","{x + 1}"\n' for s, x, _ in rows()))
    the_spike(log)
    log.write_text(head + ',"dry-moon-4 - train/loss"\n' + "".join(f"{s},{x},,,{x}\n" for s, x, _ in rows()))
    with pytest.raises(UserError, match="glad-sun-3, dry-moon-4"):
        replay.run_over(log, "cusum")


def test_reads_json_lines_of_any_run_and_passes_over_what_is_no_loss(tmp_path: Path) -> None:
    lines = [json.dumps({"_step": s, "train/loss": x, "gradients": {"a": 1}}) for s, x, _ in rows()]
    lines += [json.dumps({"_step": 5, "eval/accuracy": 0.5}), "no json", '{"torn']
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(lines))
    the_spike(log)


def test_reads_a_run_directory_as_it_was_kept_or_with_what_was_undone(tmp_path: Path) -> None:
    the_spike(run_dir(tmp_path / "plain", undone=False))
    rewound = run_dir(tmp_path / "rewound", undone=True)
    assert not [a for a in replay.run_over(rewound, "cusum").alarms if a.stopping]
    assert [a for a in replay.run_over(rewound, "cusum", undone=True).alarms if a.stopping]


def test_reads_what_wandb_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = wandb.init(project="spikes", dir=tmp_path)
    for step, loss, grad_norm in rows():
        run.log({"train/loss": loss, "train/grad_norm": grad_norm}, step=step)
    run.finish()
    (log,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    the_spike(log)


def test_a_loss_that_is_not_finite_is_read_and_drawn(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    log.write_text("step,loss\n" + "".join(f"{s},{x}\n" for s, x, _ in rows(200)) + "201,nan\n202,NaN\n")
    result = replay.run_over(log, "cusum")
    assert [(a.kind, a.first_step, a.last_step) for a in result.alarms] == [(Kind.NONFINITE, 201, 202)]
    ET.fromstring(replay.picture(result))
    log.write_text("step,loss\n1,nan\n")
    ET.fromstring(replay.picture(replay.run_over(log, "cusum")))


def test_warns_of_a_log_of_running_means(tmp_path: Path) -> None:
    losses = [x for _, x, _ in rows()]
    means = [sum(losses[max(0, i - 9) : i + 1]) / len(losses[max(0, i - 9) : i + 1]) for i in range(len(losses))]
    log = tmp_path / "log.csv"
    log.write_text("step,loss\n" + "".join(f"{i},{x}\n" for i, x in enumerate(means)))
    assert "running means" in replay.table(replay.run_over(log, "cusum"))
    assert "running means" not in replay.table(replay.run_over(csv_log(tmp_path / "plain.csv"), "cusum"))


def test_the_picture_stands_by_itself_and_marks_the_spike(tmp_path: Path) -> None:
    log = csv_log(tmp_path / "a<b&.csv")
    drawn = replay.picture(replay.run_over(log, "cusum"))
    root = ET.fromstring(drawn)
    titles = [t.text or "" for t in root.iter("{http://www.w3.org/2000/svg}title")]
    assert any(t.startswith(f"step {SPIKE_AT + 1}, spike") for t in titles)
    assert drawn.count("http") == 1  # the namespace: nothing is fetched


def noisy(path: Path, steps: list[int], spike_at: int = 0) -> Path:
    """The steps in this order; a spike that a run trains through."""
    rng = random.Random(3)
    bump = {s: 2 * math.exp(-(s - spike_at) / 8) if 0 < spike_at <= s else 0.0 for s in steps}
    losses = [f"{s},{2.5 + 8 * (1 + s / 30) ** -0.5 + rng.gauss(0, 0.03) + bump[s]}" for s in steps]
    path.write_text("\n".join(["step,loss", *losses]) + "\n")
    return path


@pytest.mark.parametrize(
    ("rule", "count", "judged"),
    [
        ("cusum", 1, 0),
        ("cusum", 30, 0),
        ("cusum", 40, 9),
        ("zscore", 40, 8),
        ("olmo_skip_step", 70, 6),
        ("kill_loss_spike", 105, 5),
        ("zclip", 40, 0),
    ],
)
def test_says_how_many_steps_were_judged(tmp_path: Path, rule: str, count: int, judged: int) -> None:
    result = replay.run_over(noisy(tmp_path / "log.csv", list(range(1, count + 1))), rule)
    assert result.judged == result.summary()["judged"] == judged
    assert f"{judged} of {count} judged" in replay.table(result)
    assert ("nothing was judged" in replay.table(result)) == (judged == 0)


def test_zclip_judges_after_its_warmup_where_there_are_gradient_norms(tmp_path: Path) -> None:
    assert replay.run_over(csv_log(tmp_path / "log.csv"), "zclip").judged == 400 - 25


def test_rows_that_are_no_observation_are_counted(tmp_path: Path) -> None:
    log = noisy(tmp_path / "log.csv", list(range(1, 101)))
    log.write_text(log.read_text() + "101,abc\n102,\n103,3,5\n")
    result = replay.run_over(log, "cusum")
    assert (len(result.observations), result.log.unreadable, result.log.without_loss) == (100, 2, 1)
    assert "2 rows were not read, the first: row 101 has loss abc" in replay.table(result)
    assert "1 row was passed over" in replay.table(result)
    lines = tmp_path / "log.jsonl"
    lines.write_text('{"step": 1, "loss": 3}\n{"torn')
    assert replay.run_over(lines, "cusum").summary()["unreadable_rows"] == 1


def test_a_step_that_is_there_again_undoes_the_earlier_rows_and_the_table_says_so(tmp_path: Path) -> None:
    again = noisy(tmp_path / "again.csv", [*range(1, 1001), *range(701, 2001)], spike_at=1201)
    result = replay.run_over(again, "cusum")
    assert [o.step for o in result.observations] == list(range(1, 2001))
    assert (result.log.undone, result.log.returns) == (300, 1)
    assert "300 rows were undone: the log goes back to an earlier step once" in replay.table(result)
    assert "sort it" not in replay.table(result)
    (alarm,) = [a for a in result.alarms if a.stopping]
    assert (alarm.kind, alarm.onset_step) == (Kind.SPIKE, 1201)
    both = replay.run_over(again, "cusum", undone=True)
    assert len(both.observations) == 2300
    assert "all are judged" in replay.table(both)
    unsorted = noisy(tmp_path / "unsorted.csv", [*range(100, 0, -1)])
    assert "99 rows were undone" in replay.table(replay.run_over(unsorted, "cusum"))
    assert "sort it by its steps" in replay.table(replay.run_over(unsorted, "cusum"))


def test_an_alarm_tells_kind_step_and_reason_of_one_finding_and_what_followed_with_its_step() -> None:
    seen = [
        Finding(Kind.SHIFT, 10, 9, 1.0, "calm"),
        Finding(Kind.SPIKE, 12, 11, 1.0, "loss 4.48"),
        Finding(Kind.OK, 13, 13, 0.0, ""),
        Finding(Kind.SLOW_DIVERGENCE, 30, 2, 1.0, "loss 3.006"),
        Finding(Kind.SPIKE, 31, 11, 1.0, "loss 5"),
        Finding(Kind.SPIKE, 20, 19, 1.0, "trained again"),
    ]
    one, again = replay.alarms(seen)
    assert (one.kind, one.first_step, one.last_step, one.onset_step) == (Kind.SPIKE, 12, 31, 11)
    assert one.reason == "loss 4.48; then slow divergence at step 30: loss 3.006"
    assert (again.first_step, again.reason) == (20, "trained again")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "it has no rows"),
        ("step,loss\n", "it has a header line (step, loss) and no rows"),
        ("a,loss\n1,2\n", "it has no step column (step, _step, global_step, iteration); what it has: a, loss"),
        ("step;loss\n1;3,5\n", "separate the columns by commas, not by ';'"),
        ('step,loss\n1,"3,5"\n', "row 1 has loss 3,5, which is no number (a decimal comma?)"),
        ("step,loss\n1,3,5\n", "row 1 has more cells than columns (a decimal comma?)"),
    ],
)
def test_a_log_without_a_loss_is_told_what_is_wrong_with_it(tmp_path: Path, content: str, said: str) -> None:
    log = tmp_path / "log.csv"
    log.write_text(content)
    with pytest.raises(UserError) as error:
        replay.run_over(log, "cusum")
    assert said in str(error.value)


def heights(drawn: str) -> tuple[list[float], float]:
    """Of the curve, and of the highest level that the axis names."""
    root = ET.fromstring(drawn)
    (line,) = root.iter("{http://www.w3.org/2000/svg}polyline")
    levels = [float(e.attrib["y1"]) for e in root.iter("{http://www.w3.org/2000/svg}line")]
    return [float(p.split(",")[1]) for p in line.attrib["points"].split()], min(levels)


def test_the_picture_shows_the_first_losses_or_says_that_it_does_not(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    log.write_text("step,loss\n" + "".join(f"{s},{8.4 - 4 * s / (s + 60)}\n" for s in range(300)))
    drawn = replay.picture(replay.run_over(log, "cusum"))
    curve, top = heights(drawn)
    assert min(curve) > top
    assert "above the frame" not in drawn
    step = re.search(r'y="(\d+)"[^>]*>step<', drawn)
    assert step
    assert int(step[1]) <= 420 - 4  # room for the p

    log.write_text("step,loss\n" + "".join(f"{s},{2 + 9 * math.exp(-s / 15)}\n" for s in range(4000)))
    drawn = replay.picture(replay.run_over(log, "cusum"))
    curve, top = heights(drawn)
    assert min(curve) < top  # goes out of the frame, and does not lie flat along its edge
    assert 'clip-path="url(#frame)"' in drawn
    assert re.search(r"losses above the frame: \d+, the highest 11 at step 0", drawn)


def test_prints_a_table_and_writes_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = csv_log(tmp_path / "log.csv")
    assert main(["spikes", "replay", "--declared", "200", str(log), "--picture", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "1 alarm that would call for the policy" in printed
    assert main(["spikes", "replay", str(log), "--param", "threshold=1e6", "--no-picture"]) == 0
    assert "0 alarms that would call for the policy" in capsys.readouterr().out
    assert (tmp_path / "out" / "spikes-log-cusum.svg").exists()


def test_prints_json_and_draws_nothing_where_told_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    log = csv_log(tmp_path / "log.csv")
    assert main(["spikes", "replay", str(log), str(log), "--rule", "zscore", "--json", "--no-picture"]) == 0
    one, two = json.loads(capsys.readouterr().out)
    assert one == two
    assert (one["rule"], one["observations"], one["has_grad_norm"], one["picture"]) == ("zscore", 400, True, None)
    assert not list(tmp_path.glob("*.svg"))


@pytest.mark.parametrize("content", ["", "step,loss\n", "a,b\n1,2\n", "\x00\x01", "[1, 2"])
def test_a_file_that_is_no_log_is_a_user_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    log = tmp_path / "log.csv"
    log.write_text(content)
    assert main(["spikes", "replay", str(log), "--no-picture"]) == 2
    assert "holds no loss" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["missing.csv"], "does not exist"),
        (["."], "is no run directory"),
        (["log.csv", "--rule", "magic"], "olmo_skip_step"),
        (["log.csv", "--param", "threshold"], "give NAME=NUMBER"),
        (["log.csv", "--param", "sigmas=3"], "threshold, drift"),
        (["log.csv", "--picture", "log.csv"], "give a folder"),
        (["log.wandb"], "wandb could not read"),
    ],
)
def test_mistakes_are_told_in_words(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    csv_log(tmp_path / "log.csv")
    (tmp_path / "log.wandb").write_text("this is none")
    assert main(["spikes", "replay", *arguments]) == 2
    assert said in capsys.readouterr().err
