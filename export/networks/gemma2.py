"""Gemma-2 as a text encoder: transformers' Gemma2Model with masks and an attention that can be exported.

The layers are transformers' own. ditc replaces two things: the 4-D masks (transformers 5.23 looks at values when it
makes them, which torch.export cannot trace), and the attention function, whose softmax is fp32 in a 16-bit graph too.
"""

# B batch, S tokens, H heads, D head dim

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AttentionInterface, Gemma2Config, Gemma2Model

from ditc.export.networks.loading import Without, check_layers, contradictions_named, load_strict
from ditc.export.networks.text_config import read_text_config, refuse_setting

ATTENTION = "ditc_exportable_eager"
CAUSAL_LM_PREFIX = "model."
LM_HEAD = "lm_head.weight"  # tied to the embedding, and not read
LAYER_TYPES = {"full_attention", "sliding_attention"}


def gemma2_config(values: Mapping[str, Any]) -> Gemma2Config:
    """Read the content of config.json.

    Raises:
        CheckpointError: transformers refuses it, or a setting asks for something that the masks and the attention here
            do not compute.
    """
    config = read_text_config(Gemma2Config, values, sizes=("sliding_window", "query_pre_attn_scalar"))
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    for name, value, served in (
        ("use_bidirectional_attention", bool(config.use_bidirectional_attention), False),
        ("rope_type", rope, "default"),
        ("layer_types", sorted({*(config.layer_types or ())} - LAYER_TYPES), []),
    ):
        if value != served:
            raise refuse_setting(config, name, value, served)
    return config


def load_gemma2(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> Gemma2TextEncoder:
    """Load the encoder with the weights of a diffusers text_encoder/ directory.

    Args:
        config: the content of config.json.
        tensors: named as in Gemma2Model or Gemma2ForCausalLM.

    Raises:
        CheckpointError: gemma2_config refuses the config, or a tensor is missing, unknown, or of another shape.
    """
    parsed = gemma2_config(config)
    check_layers("num_hidden_layers", parsed.num_hidden_layers, tensors, "layers")
    with init_empty_weights(include_buffers=False), contradictions_named():
        encoder = Gemma2TextEncoder(parsed)
    if any(name.startswith(CAUSAL_LM_PREFIX) for name in tensors):
        encoder.weights_below = ""  # the parameters' paths here begin with "model." too
    load_strict({"text_encoder": encoder}, Without(tensors, LM_HEAD), dtype)
    return encoder.eval()


class Gemma2TextEncoder(nn.Module):
    """Encodes token ids to the last hidden state, without a KV cache."""

    weights_below = "model"

    def __init__(self, config: Gemma2Config) -> None:
        super().__init__()
        AttentionInterface.register(ATTENTION, eager_attention)
        config._attn_implementation = ATTENTION
        self.vocab_size = int(config.vocab_size)
        self.sliding_window = int(config.sliding_window or 0)
        self.model = Gemma2Model(config)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B,S) int64 ids and mask (1 for a token, 0 for padding on the right) -> (B,S,C) fp32."""
        masks = attention_masks(attention_mask, self.sliding_window)
        hidden: Tensor = self.model(
            input_ids=input_ids, attention_mask=masks, use_cache=False, return_dict=True
        ).last_hidden_state
        return hidden.float()  # a stage's outputs are fp32


def attention_masks(attention_mask: Tensor, sliding_window: int) -> dict[str, Tensor]:
    """Biases (B,1,S,S) in fp32 for Gemma-2's two kinds of layer: 0 for keys that a query sees, else fp32's lowest."""
    position = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    distance = position[:, None] - position[None, :]
    visible = (distance >= 0)[None, None] & (attention_mask != 0)[:, None, None, :]
    near = visible & (distance < sliding_window)[None, None]
    return {"full_attention": _bias(visible), "sliding_attention": _bias(near)}


def eager_attention(
    module: nn.Module,
    query_BHSD: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' eager attention for Gemma-2 (modeling_gemma2.py, 5.23), with fp32 from the scores to the softmax.

    The F.softmax(x, dtype=torch.float32) in transformers exports as a 16-bit Softmax (torch 2.13).
    """
    groups = module.num_key_value_groups
    key_BHSD, value_BHSD = _repeat_heads(key, groups), _repeat_heads(value, groups)
    scores = (query_BHSD @ key_BHSD.transpose(2, 3)).float() * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    weights = torch.softmax(scores + attention_mask, dim=-1).to(value.dtype)
    return (weights @ value_BHSD).transpose(1, 2).contiguous(), None


def _repeat_heads(x_BHSD: Tensor, groups: int) -> Tensor:
    if groups == 1:
        return x_BHSD
    return x_BHSD[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2)


def _bias(visible: Tensor) -> Tensor:
    return torch.where(visible, 0.0, torch.finfo(torch.float32).min)
