"""CLIP's text model as a text encoder: the penultimate hidden states and the projected end of text.

The layers are transformers' own (CLIPTextModelWithProjection, 5.23). ditc replaces four things: the causal mask, the
attention, the norms, which it computes in fp32, and the search for the end of text, which must not depend on how a
backend breaks ties.
"""

# B batch, S tokens, C channels, P channels of the projection

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from ditc.export.networks.layers import LayerNorm
from ditc.export.networks.loading import Without, check_layers, contradictions_named, load_strict
from ditc.export.networks.text_attention import use_exportable_attention
from ditc.export.networks.text_config import read_text_config

# transformers < 4.31 saved this buffer; it holds 0, 1, 2, ... and is not read.
POSITION_IDS = "text_model.embeddings.position_ids"
# The eos_token_id of configs from before transformers 4.31, whatever the tokenizer's end of text is.
LEGACY_EOS = 2


def clip_config(values: Mapping[str, Any]) -> CLIPTextConfig:
    """Read the content of config.json. Raises CheckpointError if transformers refuses it, or a number is missing."""
    return read_text_config(
        CLIPTextConfig, values, sizes=("projection_dim",), numbers=("eos_token_id", "layer_norm_eps")
    )


def load_clip(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> ClipTextEncoder:
    """Load the encoder with the weights of a diffusers text_encoder/ or text_encoder_2/ directory.

    Raises:
        CheckpointError: clip_config refuses the config, or a tensor is missing, unknown, or of another shape.
    """
    parsed = clip_config(config)
    check_layers("num_hidden_layers", parsed.num_hidden_layers, tensors, "encoder.layers")
    with init_empty_weights(include_buffers=False), contradictions_named():
        encoder = ClipTextEncoder(parsed)
    load_strict({"text_encoder": encoder}, Without(tensors, POSITION_IDS), dtype)
    return encoder.eval()


class ClipTextEncoder(nn.Module):
    """Encodes token ids to the hidden states before the last layer, and to the projected state at the end of text."""

    weights_below = ""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        use_exportable_attention(config)
        self.vocab_size = int(config.vocab_size)
        self.eos_token_id = int(config.eos_token_id)
        model = CLIPTextModelWithProjection(config)
        self.text_model = model.text_model
        self.text_projection = model.text_projection
        _norms_in_fp32(self.text_model)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(B,S) int64 -> penultimate hidden states (B,S,C), without the final norm, and pooled (B,P); both fp32."""
        hidden = self.text_model.embeddings(input_ids=input_ids)
        mask = causal_mask(input_ids)
        *layers, last = self.text_model.encoder.layers
        for layer in layers:
            hidden = layer(hidden, mask)
        final = self.text_model.final_layer_norm(last(hidden, mask))
        position = end_of_text(input_ids, self.eos_token_id)
        at_end = final.gather(1, position[:, None, None].expand(-1, 1, final.shape[2]))[:, 0]
        return hidden.float(), self.text_projection(at_end).float()


def causal_mask(input_ids: Tensor) -> Tensor:
    """(1,1,S,S) fp32: 0 for keys that a query sees, else fp32's lowest number. As in training, padding is seen."""
    position = torch.arange(input_ids.shape[1], device=input_ids.device)
    visible = position[:, None] >= position[None, :]
    return torch.where(visible, 0.0, torch.finfo(torch.float32).min)[None, None]


def end_of_text(input_ids: Tensor, eos_token_id: int) -> Tensor:
    """(B,) int64: position of each row's first end-of-text token; 0 where there is none.

    transformers takes an argmax over ids == eos, which has many equal maxima where eos also pads. ONNX's ArgMax takes
    the first of them, and TensorRT's TopK promises nothing. The smallest position has no ties. With the eos_token_id of
    old configs, the first of the largest ids is the end of text (modeling_clip.py, 5.23).
    """
    ids = input_ids.float()  # exact: vocabularies are far below 2**24
    end = ids.amax(dim=1, keepdim=True) if eos_token_id == LEGACY_EOS else float(eos_token_id)
    length = input_ids.shape[1]
    position = torch.arange(length, device=input_ids.device).float()
    first = torch.where(ids == end, position, float(length)).amin(dim=1)
    return torch.where(first < length, first, torch.zeros(())).long()


def _norms_in_fp32(module: nn.Module) -> None:
    for path, norm in list(module.named_modules()):
        if isinstance(norm, nn.LayerNorm):
            parent, _, name = path.rpartition(".")
            setattr(
                module.get_submodule(parent), name, LayerNorm(norm.normalized_shape[0], norm.eps, affine=True)
            )
