"""Steps the pictures of a scheduler: one batch for each size of latents, with the texts of its pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from ditc.runtime import denoise
from ditc.runtime.batch import STEADY_RUN, Batch, padded_sizes
from ditc.runtime.serving.scheduling.policy import BatchKey
from ditc.runtime.session import Session
from ditc.runtime.state import DenoiseState

# How many sizes of batches and latents have a count of their runs. Clients choose the latter.
MAX_RUNS = 1024


class Batches:
    """Only the thread that steps uses it.

    Args:
        session: the denoiser.
        variants: the same denoiser with LoRAs as inputs, by the variants of keys.
    """

    def __init__(self, session: Session, variants: Mapping[str, Session] | None = None) -> None:
        self._session, self._sizes = session, padded_sizes(session)
        self._variants = {"": session, **(variants or {})}
        self._batches: dict[BatchKey, Batch] = {}
        self._runs: Counter[tuple[BatchKey, int]] = Counter()

    def step(self, key: BatchKey, states: Sequence[DenoiseState]) -> list[DenoiseState]:
        """Advance the states by one step in one run. Their statistics come on the host.

        Reading the statistics waits for the device, which gives the time of the step and finds NaN at once.
        """
        session = self._variants[key.variant]
        if len(states) == 1 and session.device.kind == "cpu":
            return denoise.step(session, states)  # reads the texts where they are
        if key not in self._batches:
            self._batches[key] = Batch(session, read_stats=True)
        return self._batches[key].step(states)

    def steady(self, key: BatchKey, count: int) -> bool:
        """Whether the step of `count` pictures that has just ended took as long as later ones will.

        To be asked after every step. It is False while the session prepares its graph for this number of pictures.
        """
        if self._session.device.kind == "cpu":
            return True
        if len(self._runs) >= MAX_RUNS:
            self._runs.clear()
        padded = next((size for size in self._sizes if size >= count), count)
        self._runs[key, padded] += 1
        return self._runs[key, padded] >= STEADY_RUN

    def keep(self, keys: Collection[BatchKey]) -> None:
        """Drop the batches of all other keys: they hold the texts of pictures that are done."""
        for key in self._batches.keys() - keys:
            del self._batches[key]
