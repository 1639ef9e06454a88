"""The attentions of lucidrains/mmdit 0.3.0: a joint one over all modalities, and one that mixes several weight sets.

Upstream's softmax, F.softmax(x, dtype=torch.float32), exports as a 16-bit softmax (torch 2.13); here it is fp32 in
every graph. Flash attention computes the same function, so upstream's `flash` changes nothing. The mask is added to the
scores, with the value that x-transformers' Attend fills in. The soft clamp (Gemma 2's, arXiv 2408.00118, section 2) is
applied before the mask.
"""

# B batch, N tokens, S keys (tokens of all modalities), H heads, D head dim, W weight sets, E width

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ditc.export.families.lucidrains.layers import MultiHeadRMSNorm
from ditc.export.graph.ops.attention.torch_op import MASKED, attention

Masks = Sequence[Tensor | None]


class JointAttention(nn.Module):
    """Attention of all tokens to all tokens, in which every modality has its own projections.

    Args:
        qk_rmsnorm: normalise q and k, with one gamma per head and modality.
        softclamp: bound of the scores; None for no bound.
        outputs: for each modality, whether its result is wanted; one that is not wanted has no to_out. None: all are.
    """

    def __init__(
        self,
        dim_inputs: Sequence[int],
        *,
        dim_head: int = 64,
        heads: int = 8,
        qk_rmsnorm: bool = False,
        softclamp: float | None = None,
        outputs: Sequence[bool] | None = None,
    ) -> None:
        super().__init__()
        inner = dim_head * heads
        self.heads, self.dim_head, self.softclamp = heads, dim_head, softclamp
        self.to_qkv = nn.ModuleList(nn.Linear(dim, 3 * inner, bias=False) for dim in dim_inputs)
        wanted = outputs or (True,) * len(dim_inputs)
        self.to_out = nn.ModuleList(
            nn.Linear(inner, dim, bias=False) if want else nn.Identity()
            for dim, want in zip(dim_inputs, wanted, strict=True)
        )
        self.q_rmsnorms = self.k_rmsnorms = None
        if qk_rmsnorm:
            self.q_rmsnorms = nn.ModuleList(MultiHeadRMSNorm(dim_head, heads) for _ in dim_inputs)
            self.k_rmsnorms = nn.ModuleList(MultiHeadRMSNorm(dim_head, heads) for _ in dim_inputs)

    def forward(self, inputs: Sequence[Tensor], masks: Masks | None = None) -> tuple[Tensor, ...]:
        """Let all tokens attend to all tokens.

        Args:
            inputs: one (B,n,dim) tensor per modality.
            masks: one (B,n) mask per modality, true or 1 for the tokens that are attended to; None where all are.

        Returns:
            One (B,n,dim) tensor per modality. A sample whose tokens are all masked gives zeros.
        """
        q, k, v = self._qkv(inputs)
        bias_B11S, keep_B1 = key_bias(inputs, masks)
        out = attention(q, k, v, self.dim_head**-0.5, bias_B11S, self.softclamp or 0.0)
        out_BSE = out.flatten(2)
        if keep_B1 is not None:
            out_BSE = out_BSE * keep_B1[..., None].to(out_BSE.dtype)
        parts = out_BSE.split([x.shape[1] for x in inputs], dim=1)
        return tuple(to_out(part) for to_out, part in zip(self.to_out, parts, strict=True))

    def _qkv(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """q, k and v (B,S,H,D)."""
        projected = [to_qkv(x) for to_qkv, x in zip(self.to_qkv, inputs, strict=True)]
        if self.q_rmsnorms is None or self.k_rmsnorms is None:
            return self._heads(torch.cat(projected, dim=1))
        parts = [self._heads(x) for x in projected]
        q = [norm(part[0]) for norm, part in zip(self.q_rmsnorms, parts, strict=True)]
        k = [norm(part[1]) for norm, part in zip(self.k_rmsnorms, parts, strict=True)]
        return [torch.cat(x, dim=1) for x in (q, k, [part[2] for part in parts])]

    def _heads(self, qkv: Tensor) -> Sequence[Tensor]:
        return [x.unflatten(2, (self.heads, self.dim_head)) for x in qkv.chunk(3, dim=-1)]


def key_bias(inputs: Sequence[Tensor], masks: Masks | None) -> tuple[Tensor | None, Tensor | None]:
    """The bias that is added to each key's scores (B,1,1,S), and 1 for samples with an unmasked key, else 0 (B,1).

    Both are None where nothing is masked. The second is also None where a modality has no mask, because then every
    sample has an unmasked key.
    """
    masks = masks or (None,) * len(inputs)
    given = [mask for mask in masks if mask is not None]
    if not given:
        return None, None
    biases = [
        x.new_zeros(x.shape[:2], dtype=torch.float32) if mask is None else (1.0 - mask.float()) * MASKED
        for x, mask in zip(inputs, masks, strict=True)
    ]
    keep = None
    if len(given) == len(masks):
        keep = torch.cat([mask.float() for mask in given], dim=1).amax(1, keepdim=True)
    return torch.cat(biases, dim=1)[:, None, None], keep


class AdaptiveAttention(nn.Module):
    """Self-attention in which each token mixes its projections from several weight sets (GigaGAN, arXiv 2303.05511).

    Upstream never sums over heads, so the result is (B,H,N,dim) with several sets and (B,N,H*dim) with one. This is
    reproduced: to_out_weights is not one output projection but one per head.
    """

    def __init__(
        self,
        *,
        dim: int,
        dim_head: int = 64,
        heads: int = 8,
        num_adaptive_weights: int = 1,
        softclamp: bool = False,
        softclamp_value: float = 50.0,
    ) -> None:
        super().__init__()
        self.heads, self.dim_head, self.sets = heads, dim_head, num_adaptive_weights
        self.softclamp = softclamp_value if softclamp else None
        self.to_qkv = nn.Sequential(nn.Linear(dim, 3 * heads * dim_head * num_adaptive_weights, bias=False))
        self.to_gates = None
        if num_adaptive_weights > 1:
            self.to_gates = nn.Sequential(nn.Linear(dim, num_adaptive_weights * heads, bias=False))
        self.to_out_weights = nn.Parameter(torch.randn(heads, dim_head, dim * num_adaptive_weights))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B,N,dim), mask (B,N) as in JointAttention -> (B,H,N,dim), or (B,N,H*dim) with one weight set."""
        sets = (self.heads, self.dim_head, self.sets)
        q, k, v = (part.unflatten(2, sets) for part in self.to_qkv(x).chunk(3, dim=-1))  # B N H D W
        gates = None
        if self.to_gates is None:
            q, k, v = (part.squeeze(-1) for part in (q, k, v))
        else:
            logits_BNHW = self.to_gates(x).unflatten(2, (self.heads, self.sets))
            gates = torch.softmax(logits_BNHW.float(), dim=-1).to(x.dtype)[..., None, :]
            q, k, v = ((part * gates).sum(-1) for part in (q, k, v))
        bias, _ = key_bias((x,), (mask,))
        out = attention(q, k, v, self.dim_head**-0.5, bias, self.softclamp or 0.0)
        # B H N D @ H D E: one projection per head, and no sum over heads.
        out_BHNE = out.transpose(1, 2) @ self.to_out_weights
        if gates is None:
            return out_BHNE.transpose(1, 2).flatten(2)
        return (out_BHNE.unflatten(3, (-1, self.sets)) * gates.transpose(1, 2)).sum(-1)
