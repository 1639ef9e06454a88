"""A denoiser engine is a whole step: row gather, network, guidance and solver update in one graph.

`wrap(network, ...)` works for every family. Everything that belongs to one request is per sample, so a server can
batch requests that differ in prompt, guidance, step and schedule.
"""

# B samples, R network rows, C latent channels, H/W latent size, K coefficient columns, P history length. The latents of
# a video are (B,C,F,H,W) wherever (B,C,H,W) is written.

from __future__ import annotations

import torch
from torch import Tensor, nn

from ditc.runtime import step_contract
from ditc.runtime.step_contract import StepContract


class DenoiserStep(nn.Module):
    """One solver step around a network that predicts from (rows, timestep, [guidance], *conditioning).

    Args:
        network: called as network(latents_RCHW, timestep_R, [guidance_R], *conditioning) -> prediction_RCHW, in any
            float type. guidance_R is passed if the contract embeds guidance. If the contract holds frames, the latents
            are those of a video, and the network takes timestep_RF.
        dtype: the type that the network's latents are cast to; everything outside the network stays fp32.
        contract: how many earlier x0 the update reads, whether it adds noise, whether the network takes guidance, and
            whether frames may be held.
    """

    def __init__(self, network: nn.Module, *, dtype: torch.dtype, contract: StepContract) -> None:
        super().__init__()
        self.network = network
        self.dtype = dtype
        self.contract = contract

    def forward(
        self,
        latents: Tensor,
        row_of: Tensor,
        timestep: Tensor,
        guidance_weights: Tensor,
        coefficients: Tensor,
        history: Tensor,
        *rest: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Advance every sample by one step.

        Args:
            latents: (B,C,H,W) fp32.
            row_of: (R,) int64, the sample that each row belongs to.
            timestep: (B,) fp32.
            guidance_weights: (B,R) fp32; pred[b] = sum_r w[b,r] * out[r].
            coefficients: (B,K) fp32, in the order of the contract's columns.
            history: (B,P,C,H,W) fp32, newest x0 first.
            rest: the noise (B,C,H,W), the guidance (B,) and which frames are held (B,F), each if the contract has it,
                then the conditioning.

        Returns:
            next_latents (B,C,H,W), x0 (B,C,H,W), next_history (B,P,C,H,W), stats (B,2), all fp32.
        """
        contract, remaining = self.contract, list(rest)
        noise = remaining.pop(0) if contract.noise else None
        embedded = [remaining.pop(0)[row_of]] if contract.embeds_guidance else []
        held = remaining.pop(0) if contract.holds_frames else None

        def column(name: str) -> Tensor:
            index = contract.columns.index(name)
            return coefficients[:, index].reshape(-1, *(1 for _ in latents.shape[1:]))

        scaled = column(step_contract.C_IN) * latents
        timesteps = timestep if held is None else timestep[:, None] * (1 - held)
        rows = self.network(scaled[row_of].to(self.dtype), timesteps[row_of], *embedded, *remaining)
        pred = guide(guidance_weights, rows.float())
        if (
            pred.shape[1] != latents.shape[1]
        ):  # learned sigma: the prediction, then a variance that no solver reads
            pred = pred[:, : latents.shape[1]]
        x0 = column(step_contract.A) * latents + column(step_contract.B) * pred
        x0 = hold(held, latents, x0)
        following = column(step_contract.CX) * latents + column(step_contract.C0) * x0
        for k in range(contract.history_length):
            following = following + column(step_contract.history_column(k + 1)) * history[:, k]
        if noise is not None:
            following = following + column(step_contract.CN) * noise
        following = hold(held, latents, following)
        next_history = (
            torch.cat([x0[:, None], history[:, :-1]], dim=1) if contract.history_length > 1 else x0[:, None]
        )
        return following, x0, next_history, statistics(x0)


def guide(weights_BR: Tensor, rows_RCHW: Tensor) -> Tensor:
    """sum_r weights[b,r] * rows[r] in fp32, where a weight of zero also removes a NaN.

    The sum is not a matrix product, for two reasons. 0 * NaN is NaN, and one request that overflows must not spoil
    the others in its batch. And guidance must not be computed by TF32 or 16-bit GEMMs.
    """
    weights = weights_BR[(..., *(None for _ in rows_RCHW.shape[1:]))]
    terms = torch.where(weights == 0, torch.zeros((), dtype=rows_RCHW.dtype), weights * rows_RCHW[None])
    return terms.sum(dim=1)


def hold(held_BF: Tensor | None, latents: Tensor, changed: Tensor) -> Tensor:
    """The changed latents (B,C,F,H,W), with the held frames as they were; all of them without `held_BF`."""
    if held_BF is None:
        return changed
    return torch.where((held_BF > 0)[:, None, :, None, None], latents, changed)


def statistics(x0_BCHW: Tensor) -> Tensor:
    """(B,2) fp32: the number of values that are not finite, and the largest finite magnitude."""
    flat = x0_BCHW.flatten(1)
    finite = flat.abs() <= torch.finfo(torch.float32).max  # False for NaN and Inf; exports as one LessOrEqual
    bad = (~finite).float().sum(dim=1)
    amax = torch.where(finite, flat.abs(), torch.zeros((), dtype=flat.dtype)).amax(dim=1)
    return torch.stack([bad, amax], dim=1)


def wrap(network: nn.Module, *, dtype: torch.dtype, contract: StepContract) -> DenoiserStep:
    """Wrap the network as a whole-step denoiser, in evaluation mode."""
    return DenoiserStep(network, dtype=dtype, contract=contract).eval()
