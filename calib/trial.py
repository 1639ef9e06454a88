"""Try assignments of formats to layers: how far are steps and pictures of the quantized network from the reference?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ditc.calib.control_pattern import PATTERN, outlines
from ditc.calib.journal import Journal
from ditc.export.build.build_key import digest
from ditc.export.build.source_hash import graph_source
from ditc.export.graph.torch_session import TorchSession
from ditc.export.quant.layers import Layer, quantizable_layers
from ditc.export.quant.plan import LayerPlan
from ditc.export.quant.ranges import checkpoint_identity
from ditc.export.quant.simulate import quantized
from ditc.parity.reference.pytorch import TorchModel
from ditc.runtime.metrics import psnr
from ditc.runtime.request import Request
from ditc.runtime.session import Array, ComputeDevice, Session, Tensor, to_numpy
from ditc.runtime.spec import CONTROLNET, DENOISER, StageSpec
from ditc.runtime.step_contract import BATCH, X0

# Steps whose error is measured, evenly spread over a trajectory. They are enough to rank layers, in a quarter of the
# time of all 20 steps.
FORCED_STEPS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """How close pictures are to the reference's.

    Attributes:
        psnr_db: mean PSNR of the pictures in dB.
        worst_db: the smallest PSNR in dB.
        rel_l2: relative L2 error of all final latents together.
    """

    psnr_db: float
    worst_db: float
    rel_l2: float


class Trial:
    """A reference run over a few prompts, to be repeated with some layers in 8 bits.

    Args:
        prompts: they run in batches of the network's largest size.
        seed: of the starting noise.
        journal: a file with what an earlier search with the same weights and prompts measured; None for none.

    Attributes:
        network: the class of the network, for another stage than the denoiser.
        layers: the layers that may become 8-bit.
        reference_steps: feeds and x0 of some steps of the reference run.
    """

    network: str | None = None

    def __init__(
        self, reference: TorchModel, prompts: Sequence[str], *, seed: int, journal: Path | None = None
    ) -> None:
        stage = reference.load(DENOISER)
        self.family = reference.adapter.family
        self.layers: dict[str, Layer] = quantizable_layers(stage)
        self.journal = open_journal(journal, reference, DENOISER, prompts, seed)
        self._session = TorchSession(stage.module, stage.spec)
        self._reference = reference
        self._request = trial_request(reference, prompts, seed)
        recorder = _Recorder(self._session)
        self._latents, self._pictures = self._run(recorder)
        largest = stage.spec.profile[BATCH].max
        self.reference_steps = recorder.spread(FORCED_STEPS, batches=-(-len(prompts) // largest))

    def step_error(self, plans: Mapping[str, LayerPlan]) -> float:
        """Relative L2 error of the predicted x0 with these layers in 8 bits: root mean square over `reference_steps`.

        Every step starts from the reference's state, so that no error accumulates.
        """
        return self.journal.get("step", plans, lambda: self._step_error(plans))[0]

    def fidelity(self, plans: Mapping[str, LayerPlan]) -> Fidelity:
        """Draw the pictures with these layers in 8 bits from the same noise, and compare them with the reference's."""
        mean, worst, rel_l2 = self.journal.get("pictures", plans, lambda: self._fidelity(plans))
        return Fidelity(psnr_db=mean, worst_db=worst, rel_l2=rel_l2)

    def _step_error(self, plans: Mapping[str, LayerPlan]) -> list[float]:
        squares = []
        with quantized(self.layers, plans):
            for feeds, expected in self.reference_steps:
                got = to_numpy(self._session.run(feeds)[X0])
                squares.append(relative_squares(got, expected))
        return [float(np.sqrt(np.mean(squares)))]

    def _fidelity(self, plans: Mapping[str, LayerPlan]) -> list[float]:
        with quantized(self.layers, plans):
            latents, pictures = self._run(self._session)
        each = [psnr(a, b) for a, b in zip(pictures, self._pictures, strict=True)]
        rel_l2 = float(np.sqrt(relative_squares(latents, self._latents)))
        return [float(np.mean(each)), float(np.min(each)), rel_l2]

    def _run(self, session: Session) -> tuple[Array, Array]:
        pipeline = self._reference.pipeline.with_sessions({DENOISER: session})
        plan = pipeline.plan(self._request)
        states = list(pipeline.start(plan))
        for step in pipeline.run(states):
            states[step.chunk] = step.state
        latents = np.concatenate([to_numpy(state.latents) for state in states])
        return latents, pipeline.decode(states, plan)


class _Recorder:
    """A session that keeps the feeds and the x0 of every run."""

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
        """Do nothing: the trial owns the session."""

    def spread(self, count: int, *, batches: int) -> list[tuple[dict[str, Tensor], Array]]:
        """`count` steps spread evenly over the schedule, first and last included. They take turns over the batches."""
        length = len(self._seen) // batches
        steps = np.unique(np.linspace(0, length - 1, count).round().astype(int))
        return [self._seen[i % batches * length + step] for i, step in enumerate(steps)]


def trial_request(reference: TorchModel, prompts: Sequence[str], seed: int) -> Request:
    """The request of a trial. A checkpoint with a ControlNet draws all its pictures with control."""
    controls = None
    if CONTROLNET in reference.plan.stages:
        controls = [outlines(seed + number) for number in range(len(prompts))]
    return Request(
        prompt=list(prompts), seed=seed, output_type="np", allow_uniform=True, control_image=controls
    )


def open_journal(
    path: Path | None, reference: TorchModel, stage: str, prompts: Sequence[str], seed: int
) -> Journal:
    """The journal of a trial: its numbers depend on the stage's weights, the prompts, the seed and ditc's source."""
    component = reference.plan.stages[stage].components[0]
    identity = checkpoint_identity(reference.checkpoint, component)
    control = [PATTERN] if CONTROLNET in reference.plan.stages else []
    return Journal(path, digest([identity, stage, list(prompts), seed, graph_source(), *control]))


def relative_squares(value: Array, reference: Array) -> float:
    """The sum of squared differences, relative to the reference's sum of squares."""
    difference = value.astype(np.float64) - reference
    return float((difference**2).sum() / (reference.astype(np.float64) ** 2).sum())
