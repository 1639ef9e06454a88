"""Several requests in one run of the denoiser. The stack of a batch is an object that its owner holds and drops.

    batch = Batch(session)
    states = batch.step(states)      # between two steps, requests may join, leave or change places

Latents and history of a batch that stays together are not copied: the next run takes what the last run returned. Text
rows are large, so each request's are copied once, when it joins (`RowStack`). Where the session works on a device, all
of this stays there.
"""

# B samples, R network rows

from __future__ import annotations

import operator
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
    NOISE,
    PER_ROW,
    ROW_OF,
)


class Batch:
    """Steps any number of requests together; holds the stack of their text rows and the results of the last step.

    Args:
        session: the denoiser. It is not closed with the batch.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._noise = any(spec.name == NOISE for spec in session.spec.inputs)
        self._stack = RowStack(session)
        self._row_of: tuple[tuple[tuple[int, int, Rows], ...], Array] | None = None
        # By input: the parts of it that the last step's states hold, in order, and the whole.
        self._last: dict[str, tuple[list[Tensor], Tensor]] = {}

    def step(self, states: Sequence[DenoiseState]) -> list[DenoiseState]:
        """Advance every state by one step in one run of the denoiser.

        Raises:
            ValueError: a state is done already. UsageError: latents or text rows that differ in size.
        """
        if any(state.done for state in states):
            raise ValueError("a finished state cannot be stepped")
        feeds = self._stacked(states)
        if self._noise:
            feeds[NOISE] = np.concatenate([state.draw_noise() for state in states])
        return self._unstacked(self._session.run(feeds), states)

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
        """(R,) int64; the same array as long as nothing changes, which a session on a device sends once."""
        key = tuple(zip(starts, samples[:-1], rows, strict=True))
        if self._row_of is None or self._row_of[0] != key:
            parts = [r.row_of + first for r, first in zip(rows, samples[:-1], strict=True)]
            row_of = _placed(parts, starts, self._stack.size)
            row_of.flags.writeable = False
            self._row_of = (key, row_of)
        return self._row_of[1]

    def _whole(self, name: str, parts: list[Tensor]) -> Tensor:
        """The parts as one tensor: the last step's own where they are neighbours in it, else a copy."""
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
            hint="step each size in a batch of its own",
        )


def _placed(parts: Sequence[Array], starts: Sequence[int], size: int) -> Array:
    """(R,): each request's values at its rows."""
    out = np.empty(size, parts[0].dtype)
    for part, start in zip(parts, starts, strict=True):
        out[start : start + len(part)] = part
    return out


def _placed_blocks(
    blocks: Sequence[Array], samples: Sequence[int], starts: Sequence[int], size: int
) -> Array:
    """(B,R): each request's block at its samples and rows, zero elsewhere."""
    out = np.zeros((samples[-1], size), blocks[0].dtype)
    for block, sample, start in zip(blocks, samples[:-1], starts, strict=True):
        out[sample : sample + block.shape[0], start : start + block.shape[1]] = block
    return out
