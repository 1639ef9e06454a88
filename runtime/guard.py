"""Checks a denoising loop for NaN and Inf, from the statistics that every step returns."""

# S steps in one launch, B samples

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ditc.runtime.errors import NumericsError
from ditc.runtime.session import to_numpy
from ditc.runtime.state import DenoiseState


class Guard:
    """Checks one request. Statistics on a device are read at the end, because reading them waits for the device."""

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._unread: list[DenoiseState] = []

    def watch(self, state: DenoiseState) -> None:
        """Check a state: at once if its statistics are on the host, otherwise when the request is done.

        Raises:
            NumericsError: NaN or Inf in x0; the message names stage, step and sample.
        """
        if state.stats is None:
            return
        if isinstance(state.stats, np.ndarray) and not self._unread:
            check_stats(state, self._stage)
            return
        only_read = replace(state, latents=state.stats, history=state.stats, x0=None)  # keep no large tensors
        self._unread.append(only_read)
        if state.done or isinstance(state.stats, np.ndarray):
            for seen in self._unread:
                check_stats(seen, self._stage)
            self._unread.clear()


def check_stats(state: DenoiseState, stage: str) -> None:
    """Raise NumericsError, which names stage, step and sample, if the last launch left NaN or Inf in x0."""
    if state.stats is None:
        return
    stats = to_numpy(state.stats)
    if not stats[..., 0].any():  # any() is true for a count that is NaN
        return
    stats_SB2 = stats[None] if stats.ndim == 2 else stats
    launched, sample = map(int, np.argwhere(stats_SB2[..., 0])[0])
    number = state.step_index - stats_SB2.shape[0] + 1 + launched
    count, amax = stats_SB2[launched, sample]
    raise NumericsError(
        f"{stage}: step {number} of {len(state.schedule)} left {count:g} NaN or Inf values"
        f" in x0 of sample {sample}; the largest finite magnitude is {amax:.4g}",
        hint="fp16 overflows on some checkpoints: rebuild with --precision bf16 or fp32, "
        "or find the first wrong module with ditc parity",
    )
