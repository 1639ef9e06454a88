"""SD3's conditioner, which concatenates the states of three text encoders. It has no weights and no mask.

It does what StableDiffusion3Pipeline.encode_prompt does (diffusers 0.42.1). The states of CLIP-L and CLIP-G are joined
along the channels and filled with zeros up to T5's width, and T5's tokens follow. The two pooled texts are joined along
the channels. Padding is attended to like any other token.
"""

# R rows, S tokens of CLIP, T tokens of T5, D joint width

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class JointText(nn.Module):
    """Joins the outputs of the text encoders.

    Args:
        width: D.
        zero_tokens: T if T5 is left out, so that zeros take the place of its tokens; 0 if its states are an input.
    """

    def __init__(self, width: int, zero_tokens: int = 0) -> None:
        super().__init__()
        self.width = width
        self.zero_tokens = zero_tokens

    def forward(
        self,
        states: Tensor,
        pooled: Tensor,
        states_2: Tensor,
        pooled_2: Tensor,
        states_3: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(R,S,a), (R,p), (R,S,b), (R,q), (R,T,D) -> text_embeds (R,S+T,D), pooled_projections (R,p+q); all fp32."""
        clip = torch.cat([states, states_2], dim=2)
        clip = F.pad(clip, (0, self.width - clip.shape[2]))
        zeros = (0, 0, 0, self.zero_tokens)
        joint = F.pad(clip, zeros) if states_3 is None else torch.cat([clip, states_3], dim=1)
        return joint, torch.cat([pooled, pooled_2], dim=1)
