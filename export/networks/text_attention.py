"""An exportable attention for text encoders: transformers' eager form, in fp32 from the scores to the softmax.

torch.export refuses the sdpa path of transformers 5.23 for T5 (a view of a non-contiguous tensor), and F.softmax(x,
dtype=torch.float32) in its eager path exports as a 16-bit Softmax (torch 2.13).
"""

# B batch, H heads, S tokens, D head dim

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

ATTENTION = "ditc_fp32_softmax"


def use_exportable_attention(config: Any) -> None:
    """Make every attention that is built from this transformers config call `fp32_softmax_attention`."""
    AttentionInterface.register(ATTENTION, fp32_softmax_attention)
    config._attn_implementation = ATTENTION


def fp32_softmax_attention(
    module: nn.Module,
    query_BHSD: Tensor,
    key_BHSD: Tensor,
    value_BHSD: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """softmax(scaling * q k^T + position_bias + mask) v, as in modeling_clip.py and modeling_t5.py (5.23)."""
    scores = (query_BHSD @ key_BHSD.transpose(2, 3)).float() * scaling
    for bias in (position_bias, attention_mask):
        if bias is not None:
            scores = scores + bias.float()
    weights = torch.softmax(scores, dim=-1).to(value_BHSD.dtype)
    return (weights @ value_BHSD).transpose(1, 2).contiguous(), None
