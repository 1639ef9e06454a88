"""lucidrains/mmdit 0.3.0's text and image transformer (mmdit.mmdit_pytorch), export-grade, with the same names.

Constructors take upstream's arguments, and modules load upstream's state_dict. Two choices that are fixed at export are
constructor arguments here: whether the last block has a text feedforward, and whether its text tokens are used.

Upstream's peculiarities are reproduced: a block accepts qk_rmsnorm but never passes it to its attention, and a block
that is used alone skips the text feedforward unless told otherwise. flash_attn is accepted and changes no result.
"""

# B batch, N tokens, S streams, D channels

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditc.export.families.lucidrains.attention import JointAttention
from ditc.export.families.lucidrains.layers import LAYER_NORM_EPS, FeedForward, RMSNorm, condition_projection
from ditc.export.families.lucidrains.streams import Expand, HyperConnections, Residual, Sum
from ditc.export.networks.layers import LayerNorm


class MMDiTBlock(nn.Module):
    """Joint attention of text and image, then a feedforward for each.

    Args:
        skip_feedforward_text_tokens: leave the text feedforward out, as a model's last block does.
        return_text: False where this block's text tokens are not used. Layers that only serve them are left out too.
    """

    def __init__(
        self,
        *,
        dim_text: int,
        dim_image: int,
        dim_cond: int | None = None,
        dim_head: int = 64,
        heads: int = 8,
        qk_rmsnorm: bool = False,
        flash_attn: bool = False,
        num_residual_streams: int = 1,
        ff_kwargs: Mapping[str, Any] | None = None,
        skip_feedforward_text_tokens: bool = True,
        return_text: bool = True,
    ) -> None:
        super().__init__()
        self.has_text_ff = return_text and not skip_feedforward_text_tokens
        self.returns_text = return_text

        def connection(dim: int, continues: bool = True) -> nn.Module:
            if num_residual_streams == 1:
                return Residual()
            return HyperConnections(num_residual_streams, dim=dim, add_branch_out_to_residual=continues)

        def norm(dim: int) -> nn.Module:
            return LayerNorm(dim, LAYER_NORM_EPS, affine=dim_cond is None)

        self.text_attn_residual_fn = connection(dim_text, return_text)
        self.image_attn_residual_fn = connection(dim_image)
        self.image_ff_residual_fn = connection(dim_image)
        self.cond_dims = (*(dim_text,) * 4, *(dim_image,) * 4, *(dim_text,) * 2, *(dim_image,) * 2)
        self.to_cond = None if dim_cond is None else condition_projection(dim_cond, sum(self.cond_dims))
        self.text_attn_layernorm = norm(dim_text)
        self.image_attn_layernorm = norm(dim_image)
        self.image_ff_layernorm = norm(dim_image)
        self.joint_attn = JointAttention(
            (dim_text, dim_image), dim_head=dim_head, heads=heads, outputs=(return_text, True)
        )
        self.image_ff = FeedForward(dim_image, **(ff_kwargs or {}))
        if self.has_text_ff:
            self.text_ff_residual_fn = connection(dim_text)
            self.text_ff_layernorm = norm(dim_text)
            self.text_ff = FeedForward(dim_text, **(ff_kwargs or {}))

    def forward(
        self,
        text_tokens: Tensor,
        image_tokens: Tensor,
        text_mask: Tensor | None = None,
        time_cond: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the block.

        Args:
            text_tokens, image_tokens: (B,N,D); with several residual streams (B,N,S,D).
            text_mask: (B,N), 1 for a token that is attended to.
            time_cond: (B,dim_cond), to which the SiLU has been applied; None for a block without dim_cond.

        Returns:
            Text and image tokens. With return_text=False the text tokens are returned unchanged.
        """
        text_gammas, image_gammas, text_betas, image_betas = self._conditions(time_cond)
        text, kept_text = self.text_attn_residual_fn.width(text_tokens)
        image, kept_image = self.image_attn_residual_fn.width(image_tokens)
        text = _modulated(self.text_attn_layernorm(text), text_gammas[0], text_betas[0])
        image = _modulated(self.image_attn_layernorm(image), image_gammas[0], image_betas[0])
        text, image = self.joint_attn((text, image), (text_mask, None))
        image_tokens = self.image_attn_residual_fn.depth(_scaled(image, image_gammas[1]), kept_image)
        if self.returns_text:
            text_tokens = self.text_attn_residual_fn.depth(_scaled(text, text_gammas[1]), kept_text)

        image, kept_image = self.image_ff_residual_fn.width(image_tokens)
        image = self.image_ff(_modulated(self.image_ff_layernorm(image), image_gammas[2], image_betas[1]))
        image_tokens = self.image_ff_residual_fn.depth(_scaled(image, image_gammas[3]), kept_image)
        if self.has_text_ff:
            text, kept_text = self.text_ff_residual_fn.width(text_tokens)
            text = self.text_ff(_modulated(self.text_ff_layernorm(text), text_gammas[2], text_betas[1]))
            text_tokens = self.text_ff_residual_fn.depth(_scaled(text, text_gammas[3]), kept_text)
        return text_tokens, image_tokens

    def _conditions(self, time_cond: Tensor | None) -> list[tuple[Tensor | None, ...]]:
        """The gammas of the text, those of the image, then the betas of the text and those of the image.

        The four gammas apply before and after the attention, and before and after the feedforward. The two betas apply
        before the attention and before the feedforward.
        """
        if self.to_cond is None or time_cond is None:
            return [(None,) * 4, (None,) * 4, (None,) * 2, (None,) * 2]
        parts = self.to_cond["2"](time_cond)[:, None].split(self.cond_dims, dim=-1)
        return [parts[:4], parts[4:8], parts[8:10], parts[10:]]


class MMDiT(nn.Module):
    """Expands the tokens to residual streams, runs the blocks, sums the streams, and normalizes the image tokens.

    Args:
        should_skip_last_feedforward: the last block has no text feedforward (upstream's default).
        return_text: False for a denoiser, which uses the image tokens alone.
        block: further arguments of MMDiTBlock.
    """

    def __init__(
        self,
        *,
        depth: int,
        dim_image: int,
        num_register_tokens: int = 0,
        final_norm: bool = True,
        num_residual_streams: int = 4,
        should_skip_last_feedforward: bool = True,
        return_text: bool = True,
        **block: Any,
    ) -> None:
        super().__init__()
        single = num_residual_streams == 1
        self.expand_streams = nn.Identity() if single else Expand(num_residual_streams)
        self.reduce_streams = nn.Identity() if single else Sum()
        self.num_register_tokens = num_register_tokens
        registers = nn.Parameter(torch.zeros(num_register_tokens, dim_image))
        # Without registers, upstream saves an empty (0,dim_image) tensor.
        self.register_parameter("register_tokens", registers if num_register_tokens else None)
        self.blocks = nn.ModuleList(
            MMDiTBlock(
                dim_image=dim_image,
                num_residual_streams=num_residual_streams,
                skip_feedforward_text_tokens=last and should_skip_last_feedforward,
                return_text=return_text or not last,
                **block,
            )
            for last in (index == depth - 1 for index in range(depth))
        )
        self.norm: nn.Module = RMSNorm(dim_image) if final_norm else nn.Identity()
        self.returns_text = return_text

    def forward(
        self,
        text_tokens: Tensor,
        image_tokens: Tensor,
        text_mask: Tensor | None = None,
        time_cond: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the trunk.

        Args:
            text_tokens: (B,n,dim_text). image_tokens: (B,N,dim_image).
            text_mask: (B,n), 1 for a token that is attended to.
            time_cond: (B,dim_cond).

        Returns:
            Text and image tokens in the shapes of the inputs. With return_text=False the text must not be used.
        """
        if self.num_register_tokens:
            registers = self.register_tokens.expand(image_tokens.shape[0], -1, -1)
            image_tokens = torch.cat([registers, image_tokens], dim=1)
        text, image = self.expand_streams(text_tokens), self.expand_streams(image_tokens)
        time_cond = None if time_cond is None else F.silu(time_cond)
        for block in self.blocks:
            text, image = block(text, image, text_mask, time_cond)
        if self.returns_text:
            text = self.reduce_streams(text)
        image = self.reduce_streams(image[:, self.num_register_tokens :])
        return text, self.norm(image)


def _modulated(x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    return x if gamma is None or beta is None else x * gamma + beta


def _scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    return x if gamma is None else x * gamma
