"""How long does a denoising step take outside the session? It is measured with a session that returns at once.

    python -m benchmarks.host_overhead

The goal is at most 100 microseconds per step.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping

import numpy as np

from benchmarks.machine import spread, times_s, write
from ditc.runtime.batch import Batch
from ditc.runtime.denoise import step
from ditc.runtime.guard import Guard
from ditc.runtime.session import ComputeDevice, Tensor
from ditc.runtime.spec import DENOISER, DType, Range, StageSpec, TensorSpec
from ditc.runtime.state import DenoiseState, Rows
from ditc.runtime.step_contract import (
    COEFFICIENTS,
    GUIDANCE_WEIGHTS,
    NEXT_HISTORY,
    NEXT_LATENTS,
    ROWS,
    STATS,
    TIMESTEP,
    X0,
    StepContract,
)

GOAL_S = 100e-6
STEPS = 20
SIDE, CHANNELS, TOKENS, LAYERS, WIDTH = 32, 32, 300, 20, 2240  # Sana 1.6B at 1024 px


class NullSession:
    """Returns the same outputs for every run."""

    def __init__(self, samples: int) -> None:
        conditioning = (
            TensorSpec("cross_kv", DType.FLOAT32, (ROWS, LAYERS, 2, TOKENS, WIDTH // 16)),
            TensorSpec("text_bias", DType.FLOAT32, (ROWS, TOKENS)),
        )
        contract = StepContract()
        inputs, outputs = contract.inputs(CHANNELS, conditioning), contract.outputs(CHANNELS)
        self.spec = StageSpec(DENOISER, inputs, outputs, {ROWS: Range(1, 2, 2 * samples)})
        self.device = ComputeDevice(kind="cpu", name="nothing")
        latents = np.zeros((samples, CHANNELS, SIDE, SIDE), np.float32)
        self._outputs: dict[str, Tensor] = {
            NEXT_LATENTS: latents,
            X0: latents,
            NEXT_HISTORY: latents[:, None],
            STATS: np.zeros((samples, 2), np.float32),
        }

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._outputs

    def close(self) -> None:
        pass


def state(samples: int, steps: int) -> DenoiseState:
    """A guided request of `samples` pictures. Its conditioning has real sizes, filled with zeros."""
    rows = 2 * samples
    feeds = {
        TIMESTEP: np.zeros(samples, np.float32),
        COEFFICIENTS: np.zeros((samples, len(StepContract().columns)), np.float32),
        GUIDANCE_WEIGHTS: np.zeros((samples, rows), np.float32),
    }
    conditioning: dict[str, Tensor] = {
        "cross_kv": np.zeros((rows, LAYERS, 2, TOKENS, WIDTH // 16), np.float32),
        "text_bias": np.zeros((rows, TOKENS), np.float32),
    }
    latents = np.zeros((samples, CHANNELS, SIDE, SIDE), np.float32)
    return DenoiseState(
        latents=latents,
        history=latents[:, None],
        schedule=(feeds,) * steps,
        rows=Rows(np.tile(np.arange(samples), 2), conditioning),
    )


def endless(start: list[DenoiseState], session: NullSession) -> Iterator[None]:
    """Run the states through their schedule again and again, as a server would. Yields after each step."""
    batch = Batch(session)
    while True:
        states, guards = start, [Guard(DENOISER) for _ in start]
        for _ in range(STEPS):
            states = batch.step(states) if len(states) > 1 else step(session, states)
            states = [guard.watch(advanced) for guard, advanced in zip(guards, states, strict=True)]
            yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=2000)
    parser.add_argument("--no-write", action="store_true")
    arguments = parser.parse_args()
    results = {}
    for requests in (1, 4, 8):
        session = NullSession(requests)
        loop = endless([state(1, STEPS) for _ in range(requests)], session)

        def one_step(loop: Iterator[None] = loop) -> None:
            next(loop)

        measured = spread(times_s(one_step, warmup=100, repeats=arguments.repeats))
        results[f"{requests} request{'s' * (requests > 1)} per step"] = measured
        verdict = "within" if measured["median"] <= GOAL_S else "above"
        print(
            f"{requests} request(s): median {measured['median'] * 1e6:.0f} us, quartiles "
            f"{measured['quartile_1'] * 1e6:.0f} to {measured['quartile_3'] * 1e6:.0f} us, {verdict} the goal of 100 us"
        )
    if not arguments.no_write:
        print(write("host_overhead", {"unit": "seconds per step, outside the session", **results}))


if __name__ == "__main__":
    main()
