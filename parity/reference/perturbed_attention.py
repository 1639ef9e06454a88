"""diffusers' pipelines with perturbed-attention guidance (PAG), for checkpoints that have layers for it.

The layers are those of ditc.json. Pipeline, guidance and attention processors are diffusers' own, with one correction:
where a network normalizes queries and keys, the PAG processors of diffusers 0.42.1 leave the norms out of the perturbed
layers, in all rows. Then they get the normalized queries and keys here.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from ditc.export.checkpoint.open import Checkpoint


def with_perturbed_attention(pipeline: Any, checkpoint: Checkpoint) -> Any:
    """The pipeline with perturbed-attention guidance, if the checkpoint has layers for it; else the pipeline itself."""
    from diffusers import AutoPipelineForText2Image
    from diffusers.pipelines.pag.pag_utils import PAGMixin

    named = checkpoint.defaults.get("pag_applied_layers")
    if named is None and not isinstance(pipeline, PAGMixin):
        return pipeline
    layers = [_pattern(name) for name in ([named] if isinstance(named, str) else named or ())]
    if not isinstance(pipeline, PAGMixin):
        if not layers:
            return pipeline
        pipeline = AutoPipelineForText2Image.from_pipe(pipeline, enable_pag=True, pag_applied_layers=layers)
    processors = tuple(map(NormedProcessor, pipeline._pag_attn_processors))
    wanted = pipeline.pag_applied_layers if named is None else layers
    pipeline.set_pag_applied_layers(wanted, pag_attn_processors=processors)
    return pipeline


def _pattern(name: str | int) -> str:
    """The pattern that matches one block alone. diffusers would find "blocks.1" in blocks.10, too."""
    number = re.search(r"\d+", str(name))
    assert number is not None, name
    return rf"blocks\.{number[0]}\."


class NormedProcessor:
    """An attention processor of diffusers that sees normalized queries and keys.

    Without norms in the attention, it is that processor unchanged.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        if getattr(attn, "norm_q", None) is not None:
            attn = _Normed(attn)
        result: Tensor = self.processor(attn, hidden_states, encoder_hidden_states, attention_mask)
        return result


class _Normed:
    """An attention module in which the projections of queries and keys include their norms."""

    def __init__(self, attn: Any) -> None:
        self._attn = attn

    def to_q(self, states: Tensor) -> Tensor:
        normed: Tensor = self._attn.norm_q(self._attn.to_q(states))
        return normed

    def to_k(self, states: Tensor) -> Tensor:
        normed: Tensor = self._attn.norm_k(self._attn.to_k(states))
        return normed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attn, name)
