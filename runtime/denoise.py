"""The denoising loop's primitive: `step(session, states) -> states`, over any number of requests at once.

A DenoiseState is one request's position in its own schedule. Nothing of it lives in the session, so states may be
interleaved, stacked, replaced from outside (teacher forcing, img2img, inpainting) or dropped at any moment.
"""

# B samples, R network rows, C latent channels, H/W latent size, K coefficient columns, P history length

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from ditc.runtime.errors import NumericsError
from ditc.runtime.rng import Generator, randn_latents
from ditc.runtime.session import Array, LoopSession, Session, Tensor, to_numpy

LATENTS = "latents"
NOISE = "noise"
HISTORY = "history"
ROW_OF = "row_of"
TIMESTEP = "timestep"
GUIDANCE_WEIGHTS = "guidance_weights"
SKIP_GATE = "skip_gate"
COEFFICIENTS = "coefficients"
NEXT_LATENTS = "next_latents"
X0 = "x0"
NEXT_HISTORY = "next_history"
STATS = "stats"


# What the denoiser's outputs are in the next step.
CARRY = {NEXT_LATENTS: LATENTS, NEXT_HISTORY: HISTORY}


def coefficient_columns(history_length: int, noise: bool) -> tuple[str, ...]:
    """Names of the K columns: input = c_in*x, x0 = a*x + b*pred, next = cx*x + c0*x0 + sum hk*history_k + cn*noise."""
    history = tuple(f"h{k + 1}" for k in range(history_length))
    return ("c_in", "a", "b", "cx", "c0", *history, *(("cn",) if noise else ()))


@dataclass(frozen=True, eq=False)
class Rows:
    """What the network's rows are conditioned on; constant over a request. Compared by identity.

    Attributes:
        row_of: (R,) int64, the sample each row belongs to.
        conditioning: named tensors with R rows.
    """

    row_of: Array
    conditioning: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class DenoiseState:
    """One request between two steps.

    Attributes:
        latents: (B,C,H,W) fp32. history: (B,P,C,H,W) fp32, newest x0 first, zeros at the start.
        schedule: per step, the small host feeds: timestep (B,), guidance_weights (B,R), coefficients (B,K) and
            whatever extra per-row inputs the stage's spec declares. R may differ from step to step.
        rows: the conditioning of the step with most rows; a step takes the first R of them.
        step_index: steps done. x0: of the step just done. stats: (B,2) of it, or (S,B,2) of the S steps that were
            done in one launch.
        generator: the random stream for samplers that draw noise on every step.
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


def step(session: Session, states: Sequence[DenoiseState]) -> list[DenoiseState]:
    """Advance every state by one step in one run of the denoiser.

    The states may differ in prompt, guidance, schedule and step index; their latents agree in size.

    Raises:
        ValueError: a state is done already, or latents differ in size.
    """
    if any(state.done for state in states):
        raise ValueError("a finished state cannot be stepped")
    if len(states) == 1:
        feeds = feeds_of(states[0])
    else:
        rows = stack_rows(tuple(map(active_rows, states)))
        feeds = _stack([feeds_of(state) for state in states], rows)
    if any(spec.name == NOISE for spec in session.spec.inputs):
        feeds[NOISE] = np.concatenate([_noise(state) for state in states])
    return _unstack(session.run(feeds), states)


def advance(session: Session, state: DenoiseState, count: int) -> DenoiseState:
    """Up to `count` steps of one request: in one launch where the session can, else one step.

    Raises:
        ValueError: the state is done already.
    """
    count = min(count, _steps_alike(state))
    if count <= 1 or not isinstance(session, LoopSession):
        return step(session, [state])[0]
    per_step: list[Mapping[str, Array]] = list(state.schedule[state.step_index : state.step_index + count])
    if any(spec.name == NOISE for spec in session.spec.inputs):
        per_step = [{**feeds, NOISE: _noise(state)} for feeds in per_step]
    outputs = session.run_loop(_constant_feeds(state), per_step, carry=CARRY, keep=(STATS,))
    return _advanced(state, outputs, count)


def _steps_alike(state: DenoiseState) -> int:
    """How many of the next steps have as many rows as the next one: a launch has one shape."""
    first = state.step_index
    rows = [_row_count(state, step) for step in range(first, len(state.schedule))]
    return next((i for i, count in enumerate(rows) if count != rows[0]), len(rows))


class Guard:
    """Watches a loop for NaN and Inf. Statistics on a device are read at the end: to read them is to wait."""

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._unread: list[DenoiseState] = []

    def watch(self, state: DenoiseState) -> None:
        """Take note of a state. Raises NumericsError, naming stage, step and sample."""
        if state.stats is None:
            return
        if isinstance(state.stats, np.ndarray) and not self._unread:
            check_stats(state, self._stage)
            return
        only_read = replace(state, latents=state.stats, history=state.stats, x0=None)
        self._unread.append(only_read)
        if state.done or isinstance(state.stats, np.ndarray):
            for seen in self._unread:
                check_stats(seen, self._stage)
            self._unread.clear()


def check_stats(state: DenoiseState, stage: str) -> None:
    """Raise NumericsError if a step just done left NaN or Inf in the predicted x0, naming stage, step and sample."""
    if state.stats is None:
        return
    stats_SB2 = to_numpy(state.stats)
    if stats_SB2.ndim == 2:
        stats_SB2 = stats_SB2[None]
    if stats_SB2[..., 0].any():  # a NaN counts as any
        launched, sample = map(int, np.argwhere(stats_SB2[..., 0])[0])
        number = state.step_index - stats_SB2.shape[0] + 1 + launched
        count, amax = stats_SB2[launched, sample]
        raise NumericsError(
            f"{stage}: step {number} of {len(state.schedule)} left {count:g} NaN or Inf values"
            f" in x0 of sample {sample}; largest finite magnitude {amax:.4g}",
            hint="fp16 overflows on some checkpoints: rebuild with --precision bf16 or fp32, "
            "or find the first bad module with ditc parity",
        )


def feeds_of(state: DenoiseState) -> dict[str, Tensor]:
    """What the denoiser is fed for the state's next step, but for noise."""
    return {**_constant_feeds(state), **state.schedule[state.step_index]}


def active_rows(state: DenoiseState) -> Rows:
    """The rows of the next step: the first ones, as many as it has guidance weights for."""
    count = _row_count(state, state.step_index)
    return state.rows if count == len(state.rows.row_of) else _first_rows(state.rows, count)


def _row_count(state: DenoiseState, step: int) -> int:
    return int(state.schedule[step][GUIDANCE_WEIGHTS].shape[1])


@lru_cache(maxsize=4)
def _first_rows(rows: Rows, count: int) -> Rows:
    """Kept, so that steps with equally many rows have the same object."""
    first = {name: to_numpy(tensor)[:count] for name, tensor in rows.conditioning.items()}
    return Rows(row_of=rows.row_of[:count], conditioning=first)


def _constant_feeds(state: DenoiseState) -> dict[str, Tensor]:
    rows = active_rows(state)
    return {LATENTS: state.latents, HISTORY: state.history, ROW_OF: rows.row_of, **rows.conditioning}


def _noise(state: DenoiseState) -> Array:
    if state.generator is None:
        raise ValueError("this sampler draws noise on every step: the state needs a generator")
    return randn_latents(tuple(state.latents.shape), state.generator)


@lru_cache(maxsize=4)
def stack_rows(rows: tuple[Rows, ...]) -> Rows:
    """The rows of several requests as one; kept for the few combinations in use, for a loop re-stacks every step."""
    names = rows[0].conditioning.keys()
    stacked = {name: np.concatenate([to_numpy(r.conditioning[name]) for r in rows]) for name in names}
    offsets = np.cumsum([0, *(int(r.row_of.max()) + 1 for r in rows[:-1])])
    row_of = np.concatenate([r.row_of + offset for r, offset in zip(rows, offsets, strict=True)])
    for array in (row_of, *stacked.values()):
        array.flags.writeable = False  # a session on a device sends what cannot change once, not once a step
    return Rows(row_of=row_of, conditioning=stacked)


def _stack(feeds: Sequence[Mapping[str, Tensor]], rows: Rows) -> dict[str, Tensor]:
    stacked: dict[str, Tensor] = {ROW_OF: rows.row_of, **rows.conditioning}
    for name in feeds[0]:
        if name in stacked:
            continue
        parts = [to_numpy(feed[name]) for feed in feeds]
        stacked[name] = _block_diagonal(parts) if name == GUIDANCE_WEIGHTS else _joined(parts)
    return stacked


def _joined(parts: Sequence[Array]) -> Array:
    """The parts along their first axis; without a copy where they lie one behind the other in one array.

    That is the case from the second step of a batch on: its states hold slices of what the last run returned.
    """
    owner = parts[0].base
    if isinstance(owner, np.ndarray) and owner.flags.c_contiguous and all(p.base is owner for p in parts):
        end = start = _address(parts[0])
        for part in parts:
            if not part.flags.c_contiguous or _address(part) != end:
                break
            end += part.nbytes
        else:
            shape = (sum(map(len, parts)), *parts[0].shape[1:])
            return np.ndarray(shape, parts[0].dtype, owner, start - _address(owner))
    return np.concatenate(parts)


def _address(array: Array) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def _block_diagonal(blocks: Sequence[Array]) -> Array:
    out = np.zeros((sum(b.shape[0] for b in blocks), sum(b.shape[1] for b in blocks)), blocks[0].dtype)
    row = column = 0
    for block in blocks:
        out[row : row + block.shape[0], column : column + block.shape[1]] = block
        row, column = row + block.shape[0], column + block.shape[1]
    return out


def _unstack(outputs: Mapping[str, Tensor], states: Sequence[DenoiseState]) -> list[DenoiseState]:
    if len(states) == 1:
        return [_advanced(states[0], outputs)]
    results, start = [], 0
    host = {name: to_numpy(tensor) for name, tensor in outputs.items()}
    for state in states:
        stop = start + state.latents.shape[0]
        results.append(_advanced(state, {name: tensor[start:stop] for name, tensor in host.items()}))
        start = stop
    return results


def _advanced(state: DenoiseState, outputs: Mapping[str, Tensor], count: int = 1) -> DenoiseState:
    return DenoiseState(  # not replace(): this is on the way of every step
        latents=outputs[NEXT_LATENTS],
        history=outputs[NEXT_HISTORY],
        schedule=state.schedule,
        rows=state.rows,
        step_index=state.step_index + count,
        x0=outputs[X0],
        stats=outputs[STATS],
        generator=state.generator,
    )
