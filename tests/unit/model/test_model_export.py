"""What `export` tells others of the tokenizer, from a real checkpoint and real prepared tokens."""

import json
from pathlib import Path

from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import models

from model.checkpoint.policy import CheckpointConfig
from model.checkpoint.store import CheckpointStore
from model.config import ModelConfig
from model.data.config import DataConfig, SourceConfig, TokenizerConfig
from model.data.prepare import prepare
from model.export import export
from model.transformer import Transformer


def test_the_marks_of_a_tokenizer_of_ones_own_are_exported(tmp_path: Path) -> None:
    theirs = HuggingFaceTokenizer(models.BPE(vocab={c: i for i, c in enumerate("abc ")}, merges=[]))
    theirs.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>"])
    theirs.save(str(tmp_path / "t.json"))
    (tmp_path / "a.jsonl").write_text('{"text": "a b c"}\n')
    data = DataConfig(
        name="test",
        sources={"only": SourceConfig(path=str(tmp_path / "a.jsonl"), proportion=1)},
        tokenizer=TokenizerConfig(path=str(tmp_path / "t.json"), vocab_size=8),
        cache=str(tmp_path / "cache"),
    )
    model = ModelConfig(name="test", dim=8, n_layers=1, n_heads=2, ffn_dim=16, vocab_size=8, sequence_length=4)
    config = CheckpointConfig(name="test")
    store = CheckpointStore(str(tmp_path / "checkpoints"), config, on_event=lambda *_: None)
    weights = {f"model.{name}": p.detach() for name, p in Transformer(model).named_parameters()}
    store.load_latest(weights)
    store.save(1, weights, {}, wait=True)
    folder = tmp_path / "out"
    folder.mkdir()
    export(model, str(tmp_path / "checkpoints"), config, str(prepare(data).root), "", folder, None, "fp32")
    for file in ("config.json", "generation_config.json"):
        told = json.loads((folder / file).read_text())
        assert (told["bos_token_id"], told["eos_token_id"]) == (4, 5)
    told = json.loads((folder / "tokenizer_config.json").read_text())
    assert (told["bos_token"], told["eos_token"], "unk_token" in told) == (
        "<|begin_of_text|>",
        "<|end_of_text|>",
        False,
    )
