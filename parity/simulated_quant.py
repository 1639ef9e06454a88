"""8-bit denoisers in PyTorch, by the plan that calibration recorded: what the codes cost when a graph is right."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace

from ditc.export.graph.torch_session import TorchSession
from ditc.export.quant.layers import linear_layers
from ditc.export.quant.plan import LayerPlan
from ditc.export.quant.simulate import quantized
from ditc.parity.reference.pytorch import Twin, TwinSession
from ditc.runtime.spec import DENOISER, Precision


class SimulatedSession(TwinSession):
    """The denoiser with the plan's codes and scales for its weights and inputs."""

    def __init__(self, twin: Twin, plans: Mapping[str, LayerPlan]) -> None:
        super().__init__(twin, DENOISER)
        self._plans = plans
        self._rounding = ExitStack()

    def close(self) -> None:
        """Forget the weights; the next run reads them again."""
        self._rounding.close()
        super().close()

    def _loaded(self) -> TorchSession:
        if self._session is None:
            stage = self._twin.load(DENOISER)
            self._rounding.enter_context(quantized(linear_layers(stage), self._plans))
            self._session = TorchSession(stage.module, self.spec)
        return self._session


def simulated_twin(twin: Twin, plans: Mapping[str, LayerPlan], base: Precision) -> Twin:
    """The checkpoint in PyTorch with an 8-bit denoiser; everything else in the base precision."""
    other = Twin(twin.checkpoint, options=replace(twin.options, precision=base))
    session = SimulatedSession(other, plans)
    other.sessions[DENOISER] = session
    other.pipeline = other.pipeline.with_sessions(
        {DENOISER: session}, chosen=f"{other.pipeline.chosen}, 8 bits simulated"
    )
    return other
