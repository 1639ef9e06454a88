"""Checks a denoising loop for NaN and Inf, from the statistics that every step returns."""

# S steps in one launch, B samples

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ditc.runtime.failure import Failure
from ditc.runtime.session import to_numpy
from ditc.runtime.state import DenoiseState

HINT = (
    "fp16 overflows on some checkpoints: rebuild with --precision bf16 or fp32, "
    "or find the first wrong module with ditc parity"
)


class Guard:
    """Checks one request. Statistics on a device are read at the end, because reading them waits for the device."""

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._unread: list[DenoiseState] = []

    def watch(self, state: DenoiseState) -> DenoiseState:
        """Check a state: at once if its statistics are on the host, otherwise when the request is done.

        Returns:
            The state, with a failure for each sample in whose x0 NaN or Inf was found. Nothing is raised, because the
            other samples, and the other requests of a batch, are not affected.
        """
        if state.stats is None:
            return state
        if isinstance(state.stats, np.ndarray) and not self._unread:
            return _with_failures(state, spoiled_samples(state, self._stage))
        only_read = replace(state, latents=state.stats, history=state.stats, x0=None)  # keep no large tensors
        self._unread.append(only_read)
        if state.done or isinstance(state.stats, np.ndarray):
            for seen in self._unread:
                state = _with_failures(state, spoiled_samples(seen, self._stage))
            self._unread.clear()
        return state


def spoiled_samples(state: DenoiseState, stage: str) -> list[Failure]:
    """A failure, which names stage and step, for each sample in whose x0 the last launch left NaN or Inf."""
    if state.stats is None:
        return []
    stats = to_numpy(state.stats)
    if not stats[..., 0].any():  # any() is true for a count that is NaN
        return []
    stats_SB2 = stats[None] if stats.ndim == 2 else stats
    launches, samples = stats_SB2.shape[:2]
    failures = []
    for sample in range(samples):
        bad = np.flatnonzero(stats_SB2[:, sample, 0])
        if not len(bad):
            continue
        number = state.step_index - launches + 1 + int(bad[0])
        count, amax = stats_SB2[bad[0], sample]
        reason = (
            f"{stage}: step {number} of {len(state.schedule)} left {count:g} NaN or Inf values in x0; "
            f"the largest finite magnitude is {amax:.4g}"
        )
        failures.append(Failure(index=sample, step=number, reason=reason, hint=HINT))
    return failures


def _with_failures(state: DenoiseState, found: list[Failure]) -> DenoiseState:
    """The state with what was found. The first failure of a sample stays: later ones follow from it."""
    known = {failure.index for failure in state.failures}
    new = [failure for failure in found if failure.index not in known]
    return replace(state, failures=(*state.failures, *new)) if new else state
