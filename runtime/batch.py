"""Several requests in one run of the denoiser.

    batch = Batch(session)
    states = batch.step(states)      # between two steps, requests may join, leave or change places

While the requests stay the same, their latents and history are not copied: each run takes what the last run returned.
Text rows are large, so those of a request are copied only once, when it joins (`RowStack`). If the session works on a
device, all of these tensors stay there. They are freed with the batch.

A session that captures graphs (`LoopSession`) needs one for every shape. So batches are padded to few sizes there, and
each run is one launch. A sample that pads has latents and coefficients of 0, and its latents stay 0. A row that pads
has the texts of another row, and no weight.
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
from ditc.runtime.session import Array, LoopSession, Session, Tensor, concatenate, narrow, to_numpy, zeros
from ditc.runtime.state import DenoiseState, Rows
from ditc.runtime.step_contract import (
    BATCH,
    CARRY,
    COEFFICIENTS,
    CONTROL_SCALE,
    GUIDANCE_WEIGHTS,
    HISTORY,
    LATENTS,
    NEXT_HISTORY,
    NEXT_LATENTS,
    NOISE,
    PER_ROW,
    ROW_OF,
    ROWS,
    STATS,
)

# The inputs that are 0 for a sample that pads, so that its latents stay 0. Other inputs get the value of the last
# sample, because the network may not be made for 0.
_ZERO = frozenset({COEFFICIENTS, NOISE, CONTROL_SCALE})


# The run of a padded size from which on all take as long: the first runs plainly, and the second captures the graph.
STEADY_RUN = 3


def padded_sizes(session: Session) -> tuple[int, ...]:
    """The numbers of samples that batches are padded to, ascending; () if the session takes any number equally well."""
    if not isinstance(session, LoopSession) or BATCH not in session.spec.profile:
        return ()
    sizes, most = [1], session.spec.profile[BATCH].max
    while sizes[-1] < most:
        sizes.append(min(2 * sizes[-1], most))
    return tuple(sizes)


class Batch:
    """Steps any number of requests together. Holds their stacked text rows and the results of the last step.

    Threads take turns. States that a step returned stay valid: no later step writes to them.

    Args:
        session: the denoiser. The batch does not close it.
        read_stats: whether the states get their statistics on the host. They are read once for the whole batch, which
            waits for the device.
    """

    def __init__(self, session: Session, *, read_stats: bool = False) -> None:
        self._session, self._read_stats = session, read_stats
        self._sizes = padded_sizes(session)
        self._lock = threading.Lock()
        self._stack = RowStack(session)
        self._row_of: tuple[tuple[object, ...], Array] | None = None
        # For latents and history: the slices that the last step's states hold, in order, and the whole tensor. What the
        # slices leave of it is padding.
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
            return self._unstacked(self._run(states), states)

    def _run(self, states: Sequence[DenoiseState]) -> Mapping[str, Tensor]:
        _check_sizes(states)
        rows = [state.active_rows for state in states]
        samples = [0, *accumulate(state.latents.shape[0] for state in states)]
        size = next((size for size in self._sizes if size >= samples[-1]), samples[-1])
        starts = self._stack.place(rows, self._rows_of(size, samples[-1], rows))
        constant: dict[str, Tensor] = {
            **self._stack.tensors,
            LATENTS: self._whole(LATENTS, [state.latents for state in states], size),
            HISTORY: self._whole(HISTORY, [state.history for state in states], size),
            ROW_OF: self._samples_of_rows(rows, starts, samples, size),
        }
        per_step = self._step_feeds([state.step_feeds for state in states], starts, samples, size)
        if self._sizes:
            assert isinstance(self._session, LoopSession)
            return self._session.run_loop(constant, [per_step], carry=CARRY, keep=())
        return self._session.run({**constant, **per_step})

    def _rows_of(self, size: int, samples: int, rows: Sequence[Rows]) -> int:
        """The number of rows of a run: as many for each sample that pads as the others have at most on average."""
        count = sum(len(each.row_of) for each in rows)
        if not self._sizes:
            return count
        padded = size * -(-count // samples)
        most = self._session.spec.profile[ROWS].max if ROWS in self._session.spec.profile else padded
        return max(count, min(padded, most))

    def _step_feeds(
        self,
        per_state: Sequence[Mapping[str, Array]],
        starts: Sequence[int],
        samples: Sequence[int],
        size: int,
    ) -> dict[str, Array]:
        feeds = {}
        for name in per_state[0]:
            parts = [feeds_of_one[name] for feeds_of_one in per_state]
            if name == GUIDANCE_WEIGHTS:
                feeds[name] = _placed_blocks(parts, samples, starts, (size, self._stack.size))
            elif name in PER_ROW:
                feeds[name] = _placed(parts, starts, np.zeros(self._stack.size, parts[0].dtype))
            elif missing := size - samples[-1]:
                one = np.zeros_like(parts[-1][-1:]) if name in _ZERO else parts[-1][-1:]
                feeds[name] = np.concatenate([*parts, *[one] * missing])
            else:
                feeds[name] = np.concatenate(parts)
        return feeds

    def _samples_of_rows(
        self, rows: Sequence[Rows], starts: Sequence[int], samples: Sequence[int], size: int
    ) -> Array:
        """row_of (R,) int64. It stays the same array while nothing changes, so it is sent to a device only once.

        Rows that pad belong to the last sample.
        """
        key = (size, self._stack.size, *zip(starts, samples[:-1], rows, strict=True))
        if self._row_of is None or self._row_of[0] != key:
            parts = [r.row_of + first for r, first in zip(rows, samples[:-1], strict=True)]
            row_of = _placed(parts, starts, np.full(self._stack.size, size - 1, parts[0].dtype))
            row_of.flags.writeable = False
            self._row_of = (key, row_of)
        return self._row_of[1]

    def _whole(self, name: str, parts: list[Tensor], size: int) -> Tensor:
        """The parts as one tensor: a slice of the last step's output if they are adjacent in it, otherwise a copy.

        Args:
            size: the number of samples, of which those after the parts are 0.
        """
        known, whole = self._last.get(name, ([], parts[0]))
        first = next((i for i, part in enumerate(known) if part is parts[0]), len(known))
        neighbours = known[first : first + len(parts)]
        if len(neighbours) == len(parts) and all(map(operator.is_, neighbours, parts)):
            start = sum(part.shape[0] for part in known[:first])
            stop = start + sum(part.shape[0] for part in parts)
            pads = first + len(parts) == len(known)  # whether only padding follows
            if stop - start == size or (pads and start + size <= whole.shape[0]):
                return narrow(whole, start, start + size)
        missing = size - sum(part.shape[0] for part in parts)
        if not missing:
            return concatenate(parts, name, self._session)
        padding = zeros((missing, *parts[0].shape[1:]), self._session.spec.input(name).dtype)
        return concatenate([*parts, padding], name, self._session)

    def _unstacked(self, outputs: Mapping[str, Tensor], states: Sequence[DenoiseState]) -> list[DenoiseState]:
        if self._read_stats:
            outputs = {**outputs, STATS: to_numpy(outputs[STATS])}
        results, start = [], 0
        for state in states:
            stop = start + state.latents.shape[0]
            results.append(state.advanced({name: narrow(t, start, stop) for name, t in outputs.items()}))
            start = stop
        self._last = {HISTORY: ([state.history for state in results], outputs[NEXT_HISTORY])}
        if all(state.kept is None for state in states):  # inpainting replaces the latents that were returned
            self._last[LATENTS] = ([state.latents for state in results], outputs[NEXT_LATENTS])
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


def _placed(parts: Sequence[Array], starts: Sequence[int], out: Array) -> Array:
    """`out` (R,) with each request's values at its rows."""
    for part, start in zip(parts, starts, strict=True):
        out[start : start + len(part)] = part
    return out


def _placed_blocks(
    blocks: Sequence[Array], samples: Sequence[int], starts: Sequence[int], shape: tuple[int, int]
) -> Array:
    """One matrix (B,R) with each request's block at its samples and rows, and zeros elsewhere."""
    out = np.zeros(shape, blocks[0].dtype)
    for block, sample, start in zip(blocks, samples[:-1], starts, strict=True):
        out[sample : sample + block.shape[0], start : start + block.shape[1]] = block
    return out
