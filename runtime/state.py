"""One request's position in its own schedule, as a value.

Nothing of it lives in a session, so states may be interleaved, stacked, replaced from outside (teacher forcing,
image-to-image, inpainting) or dropped at any moment.
"""

# B samples, R network rows, C latent channels, H/W latent size, K coefficient columns, P history length

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ditc.runtime.rng import Generator, randn_latents
from ditc.runtime.session import Array, Tensor, narrow
from ditc.runtime.step_contract import (
    GUIDANCE_WEIGHTS,
    HISTORY,
    LATENTS,
    NEXT_HISTORY,
    NEXT_LATENTS,
    ROW_OF,
    STATS,
    X0,
)


@dataclass(frozen=True, eq=False)
class Rows:
    """What the network's rows are conditioned on; constant over a request. Compared by identity.

    Attributes:
        row_of: (R,) int64, the sample each row belongs to.
        conditioning: named tensors with R rows.
    """

    row_of: Array
    conditioning: Mapping[str, Tensor]
    _first: dict[int, Rows] = field(default_factory=dict, repr=False)

    def first(self, count: int) -> Rows:
        """The first rows; the same object every time, so that a device is sent their tensors once."""
        if count == len(self.row_of):
            return self
        if count not in self._first:
            tensors = {name: narrow(tensor, 0, count) for name, tensor in self.conditioning.items()}
            self._first[count] = Rows(self.row_of[:count], tensors)
        return self._first[count]


@dataclass(frozen=True, kw_only=True)
class DenoiseState:
    """One request between two steps.

    Attributes:
        latents: (B,C,H,W) fp32. history: (B,P,C,H,W) fp32, newest x0 first, zeros at the start.
        schedule: per step, the small host feeds: timestep (B,), guidance_weights (B,R), coefficients (B,K) and
            whatever else the contract of the step asks for. R may differ from step to step.
        rows: the conditioning of the step with most rows; a step takes the first R of them.
        step_index: steps done. x0: of the step just done. stats: (B,2) of it, or (S,B,2) of the S steps that were
            done in one launch.
        generator: the random stream for samplers that draw noise in every step.
    """

    latents: Tensor
    history: Tensor
    schedule: tuple[Mapping[str, Array], ...]
    rows: Rows
    step_index: int = 0
    x0: Tensor | None = None
    stats: Tensor | None = None
    generator: Generator | Sequence[Generator] | None = None

    @property
    def done(self) -> bool:
        return self.step_index >= len(self.schedule)

    @property
    def step_feeds(self) -> Mapping[str, Array]:
        """What differs from step to step, for the next step."""
        return self.schedule[self.step_index]

    @property
    def active_rows(self) -> Rows:
        """The rows of the next step: the first ones, as many as it has guidance weights for."""
        return self.rows.first(self.row_count(self.step_index))

    def row_count(self, step: int) -> int:
        """How many rows a step has."""
        return int(self.schedule[step][GUIDANCE_WEIGHTS].shape[1])

    def constant_feeds(self) -> dict[str, Tensor]:
        """What the denoiser is fed for the next step and no schedule holds."""
        rows = self.active_rows
        return {LATENTS: self.latents, HISTORY: self.history, ROW_OF: rows.row_of, **rows.conditioning}

    def feeds(self) -> dict[str, Tensor]:
        """Everything that the denoiser is fed for the next step, except noise."""
        return {**self.constant_feeds(), **self.step_feeds}

    def draw_noise(self) -> Array:
        """(B,C,H,W) fp32 fresh noise from the request's own stream.

        Raises:
            ValueError: the state has no generator.
        """
        if self.generator is None:
            raise ValueError("this sampler draws noise in every step: the state needs a generator")
        return randn_latents(tuple(self.latents.shape), self.generator)

    def advanced(self, outputs: Mapping[str, Tensor], count: int = 1) -> DenoiseState:
        """The state after `count` steps, with what the last of them left behind."""
        return DenoiseState(  # not replace(): this is on the way of every step
            latents=outputs[NEXT_LATENTS],
            history=outputs[NEXT_HISTORY],
            schedule=self.schedule,
            rows=self.rows,
            step_index=self.step_index + count,
            x0=outputs[X0],
            stats=outputs[STATS],
            generator=self.generator,
        )
