"""Weights to and from the Hugging Face names of LlamaForCausalLM. The rotary pairs are the same: nothing is permuted."""

from torch import Tensor

_NAMES = [
    ("embedding.", "model.embed_tokens."),
    ("layers.", "model.layers."),
    (".attention.wq.", ".self_attn.q_proj."),
    (".attention.wk.", ".self_attn.k_proj."),
    (".attention.wv.", ".self_attn.v_proj."),
    (".attention.wo.", ".self_attn.o_proj."),
    (".ffn.w1.", ".mlp.gate_proj."),
    (".ffn.w2.", ".mlp.down_proj."),
    (".ffn.w3.", ".mlp.up_proj."),
    (".attention_norm.", ".input_layernorm."),
    (".ffn_norm.", ".post_attention_layernorm."),
    ("norm.", "model.norm."),
    ("output.", "lm_head."),
]


def to_hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under the names of transformers' LlamaForCausalLM."""
    renamed = {}
    for name, tensor in state.items():
        for ours, theirs in _NAMES:
            if ours.startswith("."):
                name = name.replace(ours, theirs)
            elif name.startswith(ours):
                name = theirs + name.removeprefix(ours)
                if ours != "layers.":
                    break
        renamed[name] = tensor
    return renamed
