"""T5's encoder as a text encoder: transformers' layers, with the buckets of the position bias held as a table.

fp16 is refused, because activations exceed 65504 in the real checkpoints (transformers keeps `wo` in fp32 and clamps
for that reason, modeling_t5.py 5.23; NVIDIA's demoDiffusion notes "accuracy issues with FP16").
"""

# B batch, S tokens, C channels, H heads

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel
from transformers.models.t5.modeling_t5 import T5Attention

from ditc.export.graph.ops.attention.torch_op import MASKED
from ditc.export.networks.loading import Without, check_layers, contradictions_named, load_strict
from ditc.export.networks.text_attention import use_exportable_attention
from ditc.export.networks.text_config import read_text_config, refuse_setting
from ditc.runtime.errors import UsageError

EMBED_TOKENS = "encoder.embed_tokens.weight"  # tied to shared.weight; some files hold both


def t5_config(values: Mapping[str, Any]) -> T5Config:
    """Read the content of config.json. Raises CheckpointError if transformers refuses it, or it is a decoder's."""
    config = read_text_config(T5Config, values)
    if config.is_decoder:
        raise refuse_setting(config, "is_decoder", True, False)
    return config


def load_t5(config: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype) -> T5TextEncoder:
    """Load the encoder with the weights of a diffusers text_encoder_3/ directory, whatever type they are stored in.

    Raises:
        UsageError: dtype is fp16.
        CheckpointError: t5_config refuses the config, or a tensor is missing, unknown, or of another shape.
    """
    if dtype is torch.float16:
        raise UsageError(
            "T5 cannot be built in fp16: its activations exceed fp16's largest number, 65504",
            hint="build this stage in bf16 or fp32",
        )
    parsed = t5_config(config)
    check_layers("num_layers", parsed.num_layers, tensors, "encoder.block")
    with init_empty_weights(include_buffers=False), contradictions_named():
        encoder = T5TextEncoder(parsed)
    load_strict({"text_encoder": encoder}, Without(tensors, EMBED_TOKENS), dtype)
    return encoder.eval()


class T5TextEncoder(nn.Module):
    """Encodes token ids to the last hidden state.

    Without a mask, padding is attended to, as in diffusers' SD3 pipeline.
    """

    weights_below = ""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        use_exportable_attention(config)
        self.vocab_size = int(config.vocab_size)
        model = T5EncoderModel(config)
        self.shared = model.shared
        self.encoder = model.encoder
        del self.encoder.embed_tokens
        self.buckets: Tensor
        self.register_buffer("buckets", distance_buckets(config), persistent=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B,S) int64 ids and mask (1 for a token, 0 for padding) -> (B,S,C) fp32."""
        hidden = self.shared(input_ids)
        bias = self._position_bias(input_ids.shape[1])
        if attention_mask is not None:
            bias = bias.float() + (1.0 - attention_mask.float())[:, None, None] * MASKED
        for block in self.encoder.block:
            hidden = block(hidden, position_bias=bias)[0]
        result: Tensor = self.encoder.final_layer_norm(hidden)
        return result.float()

    def _position_bias(self, length: int) -> Tensor:
        """The position bias (1,H,S,S) of the first layer, which all layers use."""
        position = torch.arange(length, device=self.buckets.device)
        offset = position[None, :] - position[:, None]  # the key's position minus the query's
        bucket = self.buckets[offset.abs().clamp(max=len(self.buckets) - 1), (offset > 0).long()]
        first = self.encoder.block[0].layer[0].SelfAttention
        bias: Tensor = first.relative_attention_bias(bucket)
        return bias.permute(2, 0, 1)[None]


def distance_buckets(config: T5Config) -> Tensor:
    """(max_distance + 1, 2) int64: for each distance, the bucket of a key before the query and of a key after it.

    transformers truncates a logarithm instead, so at the border between two buckets the last bit of a backend's Log
    would decide. All distances from max_distance on share the last bucket.
    """
    distance = torch.arange(config.relative_attention_max_distance + 1)
    signed = torch.stack([-distance, distance], dim=1)
    buckets: Tensor = T5Attention._relative_position_bucket(
        signed,
        bidirectional=True,
        num_buckets=config.relative_attention_num_buckets,
        max_distance=config.relative_attention_max_distance,
    )
    return buckets
