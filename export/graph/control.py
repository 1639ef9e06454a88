"""A ControlNet as a stage: rows are gathered as in the denoiser's step, and the residuals get their scales."""

# B samples, R network rows, C latent channels, H/W latent size, K coefficient columns, N tokens, D width, p patch size

from __future__ import annotations

import torch
from torch import Tensor, nn

from ditc.runtime import step_contract
from ditc.runtime.step_contract import StepContract


class ControlStep(nn.Module):
    """The residuals of one step, from the inputs of the denoiser's step and a control picture per sample.

    Args:
        network: called as network(latents_RCHW, timestep_R, control_latents_RCHW, *conditioning) -> a list of tokens
            (R,N,D), one for each residual.
        dtype: the type that the network's latents are cast to.
        contract: of the denoiser's step.
        offset: what is added to the encoded control picture, for networks that take it without the VAE's shift.
    """

    def __init__(
        self, network: nn.Module, *, dtype: torch.dtype, contract: StepContract, offset: float = 0.0
    ) -> None:
        super().__init__()
        self.offset = offset
        self.network = network
        self.dtype = dtype
        self.contract = contract

    def forward(
        self,
        latents: Tensor,
        row_of: Tensor,
        timestep: Tensor,
        coefficients: Tensor,
        control_latents: Tensor,
        control_scale: Tensor,
        *conditioning: Tensor,
    ) -> tuple[Tensor, ...]:
        """Compute the residuals that the denoiser adds.

        Args:
            latents, control_latents: (B,C,H,W) fp32.
            row_of: (R,) int64, the sample that each row belongs to.
            timestep, control_scale: (B,) fp32.
            coefficients: (B,K) fp32, of which c_in is used.

        Returns:
            For each residual, its tokens times the scale of their sample, as (R,H,W,D/p^2) in dtype.
        """
        index = self.contract.columns.index(step_contract.C_IN)
        scaled = coefficients[:, index].reshape(-1, 1, 1, 1) * latents
        control = control_latents[row_of]
        if self.offset:
            control = control + self.offset
        residuals = self.network(
            scaled[row_of].to(self.dtype),
            timestep[row_of],
            control.to(self.dtype),
            *conditioning,
        )
        scale_R111 = control_scale[row_of].reshape(-1, 1, 1, 1)
        height, width = latents.shape[2], latents.shape[3]
        return tuple(
            _scaled(scale_R111, as_cells(tokens_RND, height, width)).to(self.dtype)
            for tokens_RND in residuals
        )


def as_cells(tokens_RND: Tensor, height: int, width: int) -> Tensor:
    """Tokens (R,N,D) as (R,H,W,D/p^2): the same values in the same order, whose shape names the latents' sides."""
    return tokens_RND.reshape(tokens_RND.shape[0], height, width, -1)


def _scaled(scale_R111: Tensor, residual: Tensor) -> Tensor:
    """The product in fp32. A scale of 0 also removes a NaN, which must not reach a sample without control."""
    product = scale_R111 * residual.float()
    return torch.where(scale_R111 == 0, torch.zeros((), dtype=product.dtype), product)


def wrap_control(
    network: nn.Module, *, dtype: torch.dtype, contract: StepContract, offset: float = 0.0
) -> ControlStep:
    """Wrap a ControlNet as a stage, in evaluation mode."""
    return ControlStep(network, dtype=dtype, contract=contract, offset=offset).eval()
