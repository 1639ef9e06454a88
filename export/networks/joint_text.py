"""SD3's conditioner: the states of three text encoders side by side, without weights and without a mask.

diffusers 0.42.1, StableDiffusion3Pipeline.encode_prompt: CLIP-L and CLIP-G along the channels, zeros up to T5's width,
then T5's tokens behind CLIP's; the two pooled texts along the channels. Padding is seen like any other token.
"""

# R rows, S tokens of CLIP, T tokens of T5, D joint width

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class JointText(nn.Module):
    """Joins what the text encoders give.

    Args:
        width: D. zero_tokens: T, where T5 is left out and its tokens are zeros; 0 where its states come in.
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
