"""A run's model in other people's hands: transformers loads what `arriero export` wrote, and finds what the run recorded."""

import json
import shutil
import stat
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from model.data.prepare import PreparedData
from orchestrator import spec as specs
from orchestrator.record import read_events
from orchestrator.run_dir import RunDir
from tests.integration.words_run import STEPS, arriero, launch, make_workplace, run_dir

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_workplace(tmp_path_factory.mktemp("workplace"))
    done = launch(folder, "run", "precision=fp32", "checkpoint.keep_last=2", "model.n_kv_heads=2")
    assert done.returncode == 0, done.stderr
    return folder


def test_transformers_finds_the_held_out_loss_that_the_run_recorded(workplace: Path) -> None:
    done = arriero(workplace, "export", "runs/run", "--to", "out/model", "--dtype", "fp32", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["step"], told["dtype"], told["passed_over"]) == (STEPS, "fp32", [])
    folder, run = workplace / "out" / "model", run_dir(workplace, "run")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) == told["parameters"]
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (4, 2)
    spec, prepared = specs.load(run.spec), PreparedData.load(run.data.read_text().strip())
    loader = spec.loader(prepared)
    recorded = [e for e in read_events(run.events) if e.kind == "evaluated"][-1].data["loss_by_source"]
    assert len(recorded) == 2
    for source, loss in recorded.items():
        rows = torch.as_tensor(loader.held_out_rows(source, spec.eval_rows_per_source), dtype=torch.int64)
        with torch.no_grad():
            logits = model(rows[:, :-1]).logits
        found = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        assert found.item() == pytest.approx(loss, rel=1e-4)
    text = "12 llamas climb; they're <s> not tired.\n\n  So?"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert ids == prepared.tokenizer().encode(text)
    assert tokenizer.decode(ids) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert f"# {run.root.name}" in (folder / "README.md").read_text()
    assert all(path.stat().st_mode & stat.S_IRGRP for path in folder.iterdir())


def test_another_step_in_bf16_beside_what_is_refused(workplace: Path) -> None:
    tokens = Path(run_dir(workplace, "run").data.read_text().strip())
    tokens.rename(tokens.with_name("away"))  # the run directory and its checkpoints are enough
    done = arriero(workplace, "export", "runs/run", "--to", "earlier", "--step", "20")
    tokens.with_name("away").rename(tokens)
    assert done.returncode == 0, done.stderr
    assert "the model of step 20 " in done.stdout
    card = (workplace / "earlier" / "README.md").read_text()
    assert "library_name: transformers" in card
    assert f"the weights of step 20 of {STEPS}, after {20 * 8 * 128:,} tokens" in card
    evaluated = {e.step: e.data["loss"] for e in read_events(run_dir(workplace, "run").events) if e.kind == "evaluated"}
    assert f"value: {evaluated[20]:.6g}" in card
    assert AutoModelForCausalLM.from_pretrained(workplace / "earlier", dtype="auto").dtype == torch.bfloat16
    for words, said in (
        (["--to", "earlier"], "is there already, and not an empty folder"),
        (["--to", "other", "--step", "7"], "--step 7: there is no checkpoint of it; kept are 20, 30"),
    ):
        refused = arriero(workplace, "export", "runs/run", *words)
        assert refused.returncode == 2
        assert said in refused.stderr
    assert arriero(workplace, "export", "runs/nobody", "--to", "other").returncode == 2
    assert not list(workplace.glob("*other*"))


def test_a_damaged_checkpoint_is_passed_over_aloud_and_costs_no_run(workplace: Path) -> None:
    run = RunDir(workplace / "runs" / "damaged")
    shutil.copytree(workplace / "runs" / "run", run.root)
    before = sorted(path.name for path in (run.checkpoints / "epochs").iterdir())
    newest = max(path for path in run.checkpoints.iterdir() if path.name.startswith("step-"))
    shard = next(newest.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    done = arriero(workplace, "export", "runs/damaged", "--to", "mended")
    assert done.returncode == 0, done.stderr
    assert f"passed over   {newest.name}" in done.stdout
    assert "the model of step 20 " in done.stdout
    refused = arriero(workplace, "export", "runs/damaged", "--to", "broken", "--step", str(STEPS))
    assert refused.returncode == 2
    assert "--step 20 is valid" in refused.stderr
    assert sorted(path.name for path in (run.checkpoints / "epochs").iterdir()) == before  # no writer was fenced
