"""How long does a denoising step take outside the session? Measured with one that returns at once.

Goal: at most 100 microseconds a step: `python -m benchmarks.host_overhead`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping

import numpy as np

from benchmarks.machine import spread, times_s, write
from ditc.runtime import denoise
from ditc.runtime.denoise import DenoiseState, Guard, Rows, coefficient_columns, step
from ditc.runtime.session import ComputeDevice, Tensor
from ditc.runtime.spec import DENOISER, DType, StageSpec, TensorSpec

GOAL_S = 100e-6
STEPS = 20
SIDE, CHANNELS, TOKENS, LAYERS, WIDTH = 32, 32, 300, 20, 2240  # Sana 1.6B at 1024 px


class NullSession:
    """Returns the same outputs for every run."""

    def __init__(self, samples: int) -> None:
        image = ("batch", CHANNELS, "height", "width")
        names = (
            denoise.LATENTS,
            denoise.ROW_OF,
            denoise.TIMESTEP,
            denoise.GUIDANCE_WEIGHTS,
            "cross_kv",
            "text_bias",
        )
        self.spec = StageSpec(
            DENOISER, tuple(TensorSpec(name, DType.FLOAT32, image) for name in names), (), {}
        )
        self.device = ComputeDevice(kind="cpu", name="nothing")
        latents = np.zeros((samples, CHANNELS, SIDE, SIDE), np.float32)
        self._outputs: dict[str, Tensor] = {
            denoise.NEXT_LATENTS: latents,
            denoise.X0: latents,
            denoise.NEXT_HISTORY: latents[:, None],
            denoise.STATS: np.zeros((samples, 2), np.float32),
        }

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._outputs

    def close(self) -> None:
        pass


def state(samples: int, steps: int) -> DenoiseState:
    """A guided request of `samples` pictures; conditioning of zeros in its real size."""
    rows = 2 * samples
    feeds = {
        denoise.TIMESTEP: np.zeros(samples, np.float32),
        denoise.COEFFICIENTS: np.zeros((samples, len(coefficient_columns(1, False))), np.float32),
        denoise.GUIDANCE_WEIGHTS: np.zeros((samples, rows), np.float32),
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
    """Step the states through their schedule over and over, as a server would, one step an item."""
    while True:
        states, guards = start, [Guard(DENOISER) for _ in start]
        for _ in range(STEPS):
            states = step(session, states)
            for guard, advanced in zip(guards, states, strict=True):
                guard.watch(advanced)
            yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=2000)
    parser.add_argument("--no-write", action="store_true")
    arguments = parser.parse_args()
    results = {}
    for requests in (1, 4):
        session = NullSession(requests)
        loop = endless([state(1, STEPS) for _ in range(requests)], session)

        def one_step(loop: Iterator[None] = loop) -> None:
            next(loop)

        measured = spread(times_s(one_step, warmup=100, repeats=arguments.repeats))
        results[f"{requests} request{'s' * (requests > 1)} a step"] = measured
        verdict = "within" if measured["median"] <= GOAL_S else "above"
        print(
            f"{requests} request(s): median {measured['median'] * 1e6:.0f} us, quartiles "
            f"{measured['quartile_1'] * 1e6:.0f} to {measured['quartile_3'] * 1e6:.0f} us, {verdict} the goal of 100 us"
        )
    if not arguments.no_write:
        print(write("host_overhead", {"unit": "seconds a step, outside the session", **results}))


if __name__ == "__main__":
    main()
