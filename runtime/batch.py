"""Several requests in one run of the denoiser.

    batch = Batch(session)
    states = batch.step(states)      # between two steps, requests may join, leave or change places

While the requests stay the same, their latents and history are not copied: each run takes what the last run returned.
Text rows are large, so those of a request are copied only once, when it joins (`RowStack`). If the session works on a
device, all of these tensors stay there. They are freed with the batch.
"""

# B samples, R network rows

from __future__ import annotations

import operator
import threading
from collections.abc import Mapping, Sequence
from itertools import accumulate

import numpy as np

from ditc.runtime.errors import UsageError
from ditc.runtime.row_stack import RowStack
from ditc.runtime.session import Array, Session, Tensor, concatenate, narrow
from ditc.runtime.state import DenoiseState, Rows
from ditc.runtime.step_contract import (
    GUIDANCE_WEIGHTS,
    HISTORY,
    LATENTS,
    NEXT_HISTORY,
    NEXT_LATENTS,
    PER_ROW,
    ROW_OF,
)


class Batch:
    """Steps any number of requests together. Holds their stacked text rows and the results of the last step.

    Threads take turns. States that a step returned stay valid: no later step writes to them.

    Args:
        session: the denoiser. The batch does not close it.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._lock = threading.Lock()
        self._stack = RowStack(session)
        self._row_of: tuple[tuple[tuple[int, int, Rows], ...], Array] | None = None
        # For latents and history: the slices that the last step's states hold, in order, and the whole tensor.
        self._last: dict[str, tuple[list[Tensor], Tensor]] = {}

    def step(self, states: Sequence[DenoiseState]) -> list[DenoiseState]:
        """Advance every state by one step in one run of the denoiser.

        Raises:
            ValueError: a state is already finished.
            UsageError: latents or text rows differ in size, or a request is in the batch twice.
        """
        if any(state.done for state in states):
            raise ValueError("a finished state cannot be stepped")
        with self._lock:
            return self._unstacked(self._session.run(self._stacked(states)), states)

    def _stacked(self, states: Sequence[DenoiseState]) -> dict[str, Tensor]:
        _check_sizes(states)
        rows = [state.active_rows for state in states]
        starts = self._stack.place(rows)
        samples = [0, *accumulate(state.latents.shape[0] for state in states)]
        feeds: dict[str, Tensor] = {
            **self._stack.tensors,
            LATENTS: self._whole(LATENTS, [state.latents for state in states]),
            HISTORY: self._whole(HISTORY, [state.history for state in states]),
            ROW_OF: self._rows_of_samples(rows, starts, samples),
        }
        per_step = [state.step_feeds for state in states]
        for name in per_step[0]:
            parts = [feeds_of_one[name] for feeds_of_one in per_step]
            if name == GUIDANCE_WEIGHTS:
                feeds[name] = _placed_blocks(parts, samples, starts, self._stack.size)
            elif name in PER_ROW:
                feeds[name] = _placed(parts, starts, self._stack.size)
            else:
                feeds[name] = np.concatenate(parts)
        return feeds

    def _rows_of_samples(self, rows: Sequence[Rows], starts: Sequence[int], samples: Sequence[int]) -> Array:
        """row_of (R,) int64. It stays the same array while nothing changes, so it is sent to a device only once."""
        key = tuple(zip(starts, samples[:-1], rows, strict=True))
        if self._row_of is None or self._row_of[0] != key:
            parts = [r.row_of + first for r, first in zip(rows, samples[:-1], strict=True)]
            row_of = _placed(parts, starts, self._stack.size)
            row_of.flags.writeable = False
            self._row_of = (key, row_of)
        return self._row_of[1]

    def _whole(self, name: str, parts: list[Tensor]) -> Tensor:
        """The parts as one tensor: a slice of the last step's output if they are adjacent in it, otherwise a copy."""
        known, whole = self._last.get(name, ([], parts[0]))
        first = next((i for i, part in enumerate(known) if part is parts[0]), len(known))
        neighbours = known[first : first + len(parts)]
        if len(neighbours) == len(parts) and all(map(operator.is_, neighbours, parts)):
            start = sum(part.shape[0] for part in known[:first])
            return narrow(whole, start, start + sum(part.shape[0] for part in parts))
        return concatenate(parts, name, self._session)

    def _unstacked(self, outputs: Mapping[str, Tensor], states: Sequence[DenoiseState]) -> list[DenoiseState]:
        results, start = [], 0
        for state in states:
            stop = start + state.latents.shape[0]
            results.append(state.advanced({name: narrow(t, start, stop) for name, t in outputs.items()}))
            start = stop
        self._last = {
            LATENTS: ([state.latents for state in results], outputs[NEXT_LATENTS]),
            HISTORY: ([state.history for state in results], outputs[NEXT_HISTORY]),
        }
        return results


def _check_sizes(states: Sequence[DenoiseState]) -> None:
    sizes = [tuple(state.latents.shape[1:]) for state in states]
    other = next((i for i, size in enumerate(sizes) if size != sizes[0]), None)
    if other is not None:
        raise UsageError(
            f"requests of different latent sizes cannot be stepped together: "
            f"request 0 has latents of {sizes[0]}, request {other} of {sizes[other]}",
            hint="step each size in a separate batch",
        )


def _placed(parts: Sequence[Array], starts: Sequence[int], size: int) -> Array:
    """One array (R,) with each request's values at its rows."""
    out = np.empty(size, parts[0].dtype)
    for part, start in zip(parts, starts, strict=True):
        out[start : start + len(part)] = part
    return out


def _placed_blocks(
    blocks: Sequence[Array], samples: Sequence[int], starts: Sequence[int], size: int
) -> Array:
    """One matrix (B,R) with each request's block at its samples and rows, and zeros elsewhere."""
    out = np.zeros((samples[-1], size), blocks[0].dtype)
    for block, sample, start in zip(blocks, samples[:-1], starts, strict=True):
        out[sample : sample + block.shape[0], start : start + block.shape[1]] = block
    return out
