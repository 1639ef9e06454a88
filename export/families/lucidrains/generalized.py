"""lucidrains/mmdit 0.3.0's transformer over any number of modalities (mmdit.mmdit_generalized_pytorch).

As in families/lucidrains/trunk.py, constructors take upstream's arguments, and modules load upstream's state_dict.

Upstream's peculiarities are reproduced: qk_rmsnorm never reaches the attention; final_norms is accepted, but the norms
are always there; mhc_kwargs reach the modules that expand and reduce the streams, but never the blocks; every block
runs every feedforward. The soft clamp exists here, but not in families/lucidrains/trunk.py.
"""

# B batch, N tokens, S streams, D channels

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ditc.export.families.lucidrains.attention import JointAttention, Masks
from ditc.export.families.lucidrains.layers import (
    AdaptiveLayerNorm,
    FeedForward,
    RMSNorm,
    condition_projection,
)
from ditc.export.families.lucidrains.streams import (
    AttentionPool,
    Expand,
    ManifoldConstrainedHyperConnections,
    Residual,
    StreamEmbed,
    Sum,
)


class GeneralizedMMDiTBlock(nn.Module):
    """Joint attention of all modalities, then a feedforward for each.

    Args:
        read: for each modality, whether its tokens are used after this block. Layers that only serve tokens that are
            not used are left out. None: all are used.
    """

    def __init__(
        self,
        *,
        dim_modalities: Sequence[int],
        dim_cond: int | None = None,
        dim_head: int = 64,
        heads: int = 8,
        qk_rmsnorm: bool = False,
        flash_attn: bool = False,
        softclamp: bool = False,
        softclamp_value: float = 50.0,
        num_residual_streams: int = 1,
        ff_kwargs: Mapping[str, Any] | None = None,
        read: Sequence[bool] | None = None,
    ) -> None:
        super().__init__()
        self.dims = tuple(dim_modalities)
        self.read = tuple(read or (True,) * len(self.dims))

        def connection(dim: int, continues: bool = True) -> nn.Module:
            if num_residual_streams == 1:
                return Residual()
            return ManifoldConstrainedHyperConnections(
                num_residual_streams, dim=dim, add_branch_out_to_residual=continues
            )

        reads = list(zip(self.dims, self.read, strict=True))
        self.attn_residual_fns = nn.ModuleList(connection(dim, read) for dim, read in reads)
        self.ff_residual_fns = nn.ModuleList(
            connection(dim) if read else nn.Identity() for dim, read in reads
        )
        self.to_post_branch_gammas = None
        if dim_cond is not None:
            self.to_post_branch_gammas = condition_projection(dim_cond, 2 * sum(self.dims))
        self.attn_layernorms = nn.ModuleList(AdaptiveLayerNorm(dim, dim_cond) for dim in self.dims)
        self.joint_attn = JointAttention(
            self.dims,
            dim_head=dim_head,
            heads=heads,
            softclamp=softclamp_value if softclamp else None,
            outputs=self.read,
        )
        self.ff_layernorms = nn.ModuleList(
            AdaptiveLayerNorm(dim, dim_cond) if read else nn.Identity() for dim, read in reads
        )
        self.feedforwards = nn.ModuleList(
            FeedForward(dim, **(ff_kwargs or {})) if read else nn.Identity() for dim, read in reads
        )

    def forward(
        self,
        modality_tokens: Sequence[Tensor],
        modality_masks: Masks | None = None,
        time_cond: Tensor | None = None,
    ) -> list[Tensor]:
        """Run the block.

        Args:
            modality_tokens: one (B,N,D) tensor per modality; with several residual streams (B,N,S,D).
            modality_masks: one (B,N) mask per modality, None where all tokens are attended to.
            time_cond: (B,dim_cond), to which the SiLU has been applied already.

        Returns:
            The tokens of every modality. Tokens that are not used afterwards are returned unchanged.
        """
        gammas = self._post_branch_gammas(time_cond)
        attention, feedforward = gammas[: len(self.dims)], gammas[len(self.dims) :]
        tokens = list(modality_tokens)
        branches = [connection.width(x) for connection, x in zip(self.attn_residual_fns, tokens, strict=True)]
        normed = [norm(x, time_cond) for norm, (x, _) in zip(self.attn_layernorms, branches, strict=True)]
        for i, out in enumerate(self.joint_attn(normed, modality_masks)):
            if self.read[i]:
                tokens[i] = self.attn_residual_fns[i].depth(_scaled(out, attention[i]), branches[i][1])
                x, kept = self.ff_residual_fns[i].width(tokens[i])
                x = self.feedforwards[i](self.ff_layernorms[i](x, time_cond))
                tokens[i] = self.ff_residual_fns[i].depth(_scaled(x, feedforward[i]), kept)
        return tokens

    def _post_branch_gammas(self, time_cond: Tensor | None) -> Sequence[Tensor | None]:
        """Scales (B,1,D) of the attention's result for each modality, then of each feedforward's result."""
        if self.to_post_branch_gammas is None or time_cond is None:
            return (None,) * (2 * len(self.dims))
        parts: Sequence[Tensor] = self.to_post_branch_gammas["2"](time_cond)[:, None].split(
            self.dims * 2, dim=-1
        )
        return parts


class GeneralizedMMDiT(nn.Module):
    """Expands the tokens to residual streams, runs the blocks, reduces the streams, and normalizes every modality.

    Args:
        mhc_kwargs: add_stream_embed and add_attn_pool_reduce_stream, and dim, which both need. One embedding serves
            all modalities, which must therefore have the same width.
        read: for each modality, whether the caller uses its tokens; None: all. A denoiser uses the image's alone.
        block: further arguments of GeneralizedMMDiTBlock.
    """

    def __init__(
        self,
        *,
        depth: int,
        dim_modalities: Sequence[int],
        final_norms: bool = True,
        num_residual_streams: int = 4,
        mhc_kwargs: Mapping[str, Any] | None = None,
        read: Sequence[bool] | None = None,
        **block: Any,
    ) -> None:
        super().__init__()
        self.read = tuple(read or (True,) * len(dim_modalities))
        self.expand_streams, self.reduce_streams = _streams(num_residual_streams, mhc_kwargs or {})
        self.blocks = nn.ModuleList(
            GeneralizedMMDiTBlock(
                dim_modalities=dim_modalities,
                num_residual_streams=num_residual_streams,
                read=self.read if index == depth - 1 else None,
                **block,
            )
            for index in range(depth)
        )
        self.norms = nn.ModuleList(
            RMSNorm(dim) if read else nn.Identity()
            for dim, read in zip(dim_modalities, self.read, strict=True)
        )

    def forward(
        self,
        modality_tokens: Sequence[Tensor],
        modality_masks: Masks | None = None,
        time_cond: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Run the trunk.

        Args:
            modality_tokens: one (B,N,dim) tensor per modality.
            modality_masks: one (B,N) mask per modality, None where all tokens are attended to.
            time_cond: (B,dim_cond).

        Returns:
            One (B,N,dim) tensor for each modality that is read, in the order of the inputs.
        """
        tokens = [self.expand_streams(x) for x in modality_tokens]
        time_cond = None if time_cond is None else F.silu(time_cond)
        for block in self.blocks:
            tokens = block(tokens, modality_masks, time_cond)
        finished = zip(self.norms, tokens, self.read, strict=True)
        return tuple(norm(self.reduce_streams(x)) for norm, x, read in finished if read)


def _streams(streams: int, mhc_kwargs: Mapping[str, Any]) -> tuple[nn.Module, nn.Module]:
    """The module that expands one stream to several, and the one that reduces several to one."""
    if streams == 1:
        return nn.Identity(), nn.Identity()
    dim = mhc_kwargs.get("dim", 0)
    embed = mhc_kwargs.get("add_stream_embed", False)
    pool = mhc_kwargs.get("add_attn_pool_reduce_stream", False)
    return StreamEmbed(streams, dim) if embed else Expand(streams), AttentionPool(dim) if pool else Sum()


def _scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    return x if gamma is None else x * gamma
