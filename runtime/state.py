"""The state of one request between two denoising steps, as a value.

Sessions keep nothing of a request. Its state can therefore be interleaved or stacked with others, replaced from outside
(teacher forcing, image-to-image, inpainting) or dropped at any moment.
"""

# B samples, R network rows, C latent channels, H/W latent size, K coefficient columns, P history length

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ditc.runtime.failure import Failure
from ditc.runtime.image_start import Kept
from ditc.runtime.padding import Padding, lengthened, text_length
from ditc.runtime.session import Array, Tensor, narrow, to_numpy
from ditc.runtime.step_contract import (
    CONTROL_SCALE,
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
    """The conditioning of the network's rows, which is constant over a request. Instances are compared by identity.

    Attributes:
        row_of: (R,) int64, the sample to which each row belongs.
        conditioning: named tensors with R rows.
        conditional: how many unconditional rows come before the conditional ones.
        padding: how rows of other lengths are filled up, by name; {} if they must not be.
    """

    row_of: Array
    conditioning: Mapping[str, Tensor]
    conditional: int = 0
    padding: Mapping[str, Padding] = field(default_factory=dict)
    _longer: dict[int, Rows] = field(default_factory=dict, init=False, repr=False)
    _parts: dict[tuple[int, int], Rows] = field(default_factory=dict, init=False, repr=False)

    def part(self, start: int, stop: int) -> Rows:
        """The rows from start up to stop, in which the conditional ones come first if start is not 0.

        The object is the same every time, so that its tensors are sent to a device once.
        """
        if (start, stop) == (0, len(self.row_of)):
            return self
        if (start, stop) not in self._parts:
            tensors = {name: narrow(tensor, start, stop) for name, tensor in self.conditioning.items()}
            conditional = max(self.conditional - start, 0)
            self._parts[start, stop] = Rows(self.row_of[start:stop], tensors, conditional, self.padding)
        return self._parts[start, stop]

    @property
    def text_length(self) -> int:
        """The number of tokens of each row; 0 if rows of other lengths cannot be filled up."""
        return text_length(self.conditioning, self.padding) if self.padding and self.conditioning else 0

    def made_before(self, length: int) -> Rows | None:
        """The rows with `length` tokens if they need not be made: these, or those of the last `with_length`."""
        return self if length == self.text_length else self._longer.get(length)

    def with_length(self, length: int) -> Rows:
        """The rows filled up to `length` tokens. The object is the same as long as the length stays the same."""
        known = self.made_before(length)
        if known is None:
            filled = lengthened(self.conditioning, self.padding, length)
            known = Rows(self.row_of, filled, self.conditional, self.padding)
            self._longer.clear()  # one copy is enough
            self._longer[length] = known
        return known


@dataclass(frozen=True, kw_only=True)
class DenoiseState:
    """One request between two steps.

    Attributes:
        latents: (B,C,H,W) fp32.
        history: (B,P,C,H,W) fp32, newest x0 first, zeros at the start.
        schedule: the inputs that differ from step to step, on the host: timestep (B,), guidance_weights (B,R),
            coefficients (B,K) and whatever else the step contract requires, such as noise. R may differ between steps.
        rows: the conditioning for the step with the most rows. A step with R rows takes the first R of them, or the
            conditional ones if it has one row per sample.
        step_index: how many steps are done.
        x0: (B,C,H,W) fp32, what the last step predicted.
        stats: (B,2), the statistics of x0, or (S,B,2) when the last launch ran S steps.
        decodes_x0: whether the picture is the last x0 instead of the last latents.
        failures: at most one per sample. A sample that has failed is stepped along, as it does not affect the others.
        kept: what inpainting puts back into the latents after every step, on the host; None without a mask.
    """

    latents: Tensor
    history: Tensor
    schedule: tuple[Mapping[str, Array], ...]
    rows: Rows
    step_index: int = 0
    x0: Tensor | None = None
    stats: Tensor | None = None
    failures: tuple[Failure, ...] = ()
    kept: Kept | None = None
    decodes_x0: bool = False

    @property
    def result(self) -> Tensor:
        """What is decoded if the state is finished, or if the loop ends here."""
        if not self.decodes_x0 or self.x0 is None:
            return self.latents
        return self.x0 if self.kept is None else self.kept.put_back_x0(to_numpy(self.x0))

    @property
    def lost(self) -> bool:
        """Whether every sample has failed, so that further steps would be for nothing."""
        return len(self.failures) == self.latents.shape[0]

    @property
    def done(self) -> bool:
        return self.step_index >= len(self.schedule)

    @property
    def step_feeds(self) -> Mapping[str, Array]:
        """The inputs of the next step that differ from step to step."""
        return self.schedule[self.step_index]

    @property
    def active_rows(self) -> Rows:
        """The rows of the next step, one for each of its guidance weights."""
        count = self.row_count(self.step_index)
        start = self.rows.conditional if count == self.latents.shape[0] else 0
        return self.rows.part(start, start + count)

    @property
    def controlled(self) -> bool:
        """Whether a control picture acts in the next step."""
        scale = self.step_feeds.get(CONTROL_SCALE)
        return scale is not None and bool(scale.any())

    def row_count(self, step: int) -> int:
        """The number of rows of a step."""
        return int(self.schedule[step][GUIDANCE_WEIGHTS].shape[1])

    def constant_feeds(self) -> dict[str, Tensor]:
        """The inputs of the next step that the schedule does not hold."""
        rows = self.active_rows
        return {LATENTS: self.latents, HISTORY: self.history, ROW_OF: rows.row_of, **rows.conditioning}

    def feeds(self) -> dict[str, Tensor]:
        """All inputs of the next step."""
        return {**self.constant_feeds(), **self.step_feeds}

    def advanced(self, outputs: Mapping[str, Tensor], count: int = 1) -> DenoiseState:
        """The state after `count` steps, whose last one returned `outputs`."""
        latents = outputs[NEXT_LATENTS]
        if self.kept is not None:
            latents = self.kept.put_back(to_numpy(latents), self.step_index + count)
        return DenoiseState(  # not replace(), which is slower, and every step comes through here
            latents=latents,
            history=outputs[NEXT_HISTORY],
            schedule=self.schedule,
            rows=self.rows,
            step_index=self.step_index + count,
            x0=outputs[X0],
            stats=outputs[STATS],
            failures=self.failures,
            decodes_x0=self.decodes_x0,
            kept=self.kept,
        )
