"""A run's model as a folder that transformers, vLLM and llama.cpp read: config.json, safetensors, the tokenizer.

Reads a checkpoint without becoming its writer, beside a run that goes on. In a process of its own (`main`), so that the command
imports no torch. Takes the memory of the weights in the type that is asked for.
"""

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict

from model.checkpoint.policy import CheckpointConfig
from model.checkpoint.store import CheckpointError, CheckpointStore
from model.config import ModelConfig
from model.data.prepare import PreparedData
from model.data.tokenizer import Tokenizer
from model.hf import to_hugging_face
from model.transformer import Transformer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHARD_SIZE = "5GB"


@dataclass(frozen=True, kw_only=True)
class Exported:
    step: int
    checkpoint: str
    parameters: int
    weights_bytes: int
    dtype: str
    passed_over: list[str]  # newer checkpoints that are not valid, and why


def export(
    model: ModelConfig,
    checkpoints: str,
    config: CheckpointConfig,
    data: str,
    tokenizer_copy: str,
    folder: Path,
    step: int | None,
    dtype: str,
) -> Exported:
    """Writes the checkpoint of `step`, or the newest, into `folder`, which is there and empty.

    Raises CheckpointError where there is none, or none is valid, and ValueError where there is none of `step`.
    """
    passed_over: list[str] = []

    def on_event(kind: str, _step: int, detail: str) -> None:
        if kind == "passed_over":
            passed_over.append(detail)

    try:  # before hours of reading
        tokenizer = PreparedData.load(data).tokenizer()
    except ValueError:  # gone or damaged: the run has a copy
        if not Path(tokenizer_copy).exists():
            raise
        tokenizer = Tokenizer.load(tokenizer_copy)
    store = CheckpointStore(checkpoints, config, on_event=on_event, read_only=True)
    there = store.history_steps()
    if step is not None and step not in there:
        kept = ", ".join(f"{s:,}" for s in sorted(there)) or "none"
        raise ValueError(f"--step {step}: there is no checkpoint of it; kept are {kept}")
    with torch.device("meta"):
        shapes = Transformer(model)
    weights = {f"model.{name}": torch.empty(p.shape, dtype=DTYPES[dtype]) for name, p in shapes.named_parameters()}
    loaded = store.load_latest(weights, max_step=step)
    if loaded is None:
        raise CheckpointError(f"there is no checkpoint in {checkpoints}")
    if step is not None and loaded.step != step:
        raise CheckpointError(f"{passed_over[0]}; --step {loaded.step} is valid")
    renamed = to_hugging_face({name.removeprefix("model."): tensor for name, tensor in weights.items()})
    save_torch_state_dict(renamed, folder, max_shard_size=SHARD_SIZE)
    ids: dict[str, object] = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    _write(folder / "config.json", _config(model, dtype) | ids)
    _write(folder / "generation_config.json", ids)
    (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    _write(folder / "tokenizer_config.json", _TOKENIZER | tokenizer.special_tokens())
    umask = os.umask(0)
    os.umask(umask)
    for file in folder.iterdir():  # safetensors writes what its owner alone may read
        file.chmod(0o666 & ~umask)
    return Exported(
        step=loaded.step,
        checkpoint=loaded.name,
        parameters=sum(t.numel() for t in renamed.values()),
        weights_bytes=sum(t.nbytes for t in renamed.values()),
        dtype=dtype,
        passed_over=passed_over,
    )


def _config(model: ModelConfig, dtype: str) -> dict[str, object]:
    """transformers' LlamaConfig, without the ids of the tokenizer."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": model.dim,
        "intermediate_size": model.ffn_dim,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.n_kv_heads or model.n_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.sequence_length,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": str(DTYPES[dtype]).removeprefix("torch."),
    }


_TOKENIZER: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}


def _write(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """JSON of what to export on stdin, of what was exported on stdout; a mistake of the user's is a line on stderr, and 2."""
    asked = json.load(sys.stdin)
    try:
        found = export(
            ModelConfig(**asked["model"]),
            asked["checkpoints"],
            CheckpointConfig(**asked["checkpoint"]),
            asked["data"],
            asked["tokenizer_copy"],
            Path(asked["folder"]),
            asked["step"],
            asked["dtype"],
        )
    except (CheckpointError, ValueError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        sys.exit(str(error))
    print(json.dumps(asdict(found)))
