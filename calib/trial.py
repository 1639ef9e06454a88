"""Try assignments: how far a partly quantized network leads from the reference, in one step and in the picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ditc.export.graph.torch_session import TorchSession
from ditc.export.quant.layers import Layer, linear_layers
from ditc.export.quant.plan import LayerPlan
from ditc.export.quant.simulate import quantized
from ditc.parity.reference.pytorch import Twin
from ditc.runtime.metrics import psnr
from ditc.runtime.request import Request
from ditc.runtime.session import Array, ComputeDevice, Session, Tensor, to_numpy
from ditc.runtime.spec import DENOISER, StageSpec
from ditc.runtime.step_contract import BATCH, X0

FORCED_STEPS = 5  # of a trajectory, evenly spread: enough to rank layers, a quarter of the time of all 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """Of whole pictures against the reference's.

    Attributes:
        psnr_db: mean over pictures; worst_db: the smallest.
        rel_l2: of the final latents.
    """

    psnr_db: float
    worst_db: float
    rel_l2: float


class Trial:
    """A reference run over a few prompts, and the same run with some layers in 8 bits.

    Args:
        prompts: they run in batches of the network's largest.
    """

    def __init__(self, twin: Twin, prompts: Sequence[str], *, seed: int) -> None:
        stage = twin.load(DENOISER)
        self.family = twin.adapter.family
        self.layers: dict[str, Layer] = linear_layers(stage)
        self._session = TorchSession(stage.module, stage.spec)
        self._twin = twin
        self._request = Request(prompt=list(prompts), seed=seed, output_type="np", allow_uniform=True)
        recorder = _Recorder(self._session)
        self._latents, self._pictures = self._run(recorder)
        largest = stage.spec.profile[BATCH].max
        self.recorded = recorder.spread(FORCED_STEPS, batches=-(-len(prompts) // largest))

    def step_error(self, plans: Mapping[str, LayerPlan], *, per_token: bool = False) -> float:
        """Relative L2 of the predicted x0, root mean square over reference states: no error accumulates."""
        squares = []
        with quantized(self.layers, plans, per_token=per_token):
            for feeds, expected in self.recorded:
                got = to_numpy(self._session.run(feeds)[X0])
                squares.append(_squared_error(got, expected))
        return float(np.sqrt(np.mean(squares)))

    def fidelity(self, plans: Mapping[str, LayerPlan]) -> Fidelity:
        """Draw the pictures with these layers in 8 bits, from the same noise."""
        with quantized(self.layers, plans):
            latents, pictures = self._run(self._session)
        each = [psnr(picture, reference) for picture, reference in zip(pictures, self._pictures, strict=True)]
        return Fidelity(
            psnr_db=float(np.mean(each)),
            worst_db=float(np.min(each)),
            rel_l2=float(np.sqrt(_squared_error(latents, self._latents))),
        )

    def _run(self, session: Session) -> tuple[Array, Array]:
        pipeline = self._twin.pipeline.with_sessions({DENOISER: session})
        plan = pipeline.plan(self._request)
        states = list(pipeline.start(plan))
        for step in pipeline.run(states):
            states[step.chunk] = step.state
        latents = np.concatenate([to_numpy(state.latents) for state in states])
        return latents, pipeline.decode(states, plan)


class _Recorder:
    """A session that keeps what it was fed and what x0 it gave."""

    def __init__(self, session: TorchSession) -> None:
        self._session = session
        self._seen: list[tuple[dict[str, Tensor], Array]] = []

    @property
    def spec(self) -> StageSpec:
        return self._session.spec

    @property
    def device(self) -> ComputeDevice:
        return self._session.device

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        outputs = self._session.run(feeds)
        self._seen.append((dict(feeds), to_numpy(outputs[X0])))
        return outputs

    def close(self) -> None:
        """Nothing to release."""

    def spread(self, count: int, *, batches: int) -> list[tuple[dict[str, Tensor], Array]]:
        """Steps spread evenly over the schedule, the first and the last among them, each of another batch in turn."""
        length = len(self._seen) // batches
        steps = np.unique(np.linspace(0, length - 1, count).round().astype(int))
        return [self._seen[i % batches * length + step] for i, step in enumerate(steps)]


def _squared_error(value: Array, reference: Array) -> float:
    difference = value.astype(np.float64) - reference
    return float((difference**2).sum() / (reference.astype(np.float64) ** 2).sum())
