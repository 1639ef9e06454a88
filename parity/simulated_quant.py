"""Simulate an 8-bit denoiser in PyTorch by its recorded plan: this shows what a correct quantized graph loses."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

from ditc.export.checkpoint.open import Checkpoint
from ditc.export.graph.torch_session import TorchSession
from ditc.export.options import BuildOptions
from ditc.export.quant.layers import linear_layers
from ditc.export.quant.plan import LayerPlan
from ditc.export.quant.simulate import quantized
from ditc.parity.reference.pytorch import LazyTorchSession, TorchModel
from ditc.runtime.spec import DENOISER


class SimulatedSession(LazyTorchSession):
    """The denoiser with weights and inputs of its layers quantized and dequantized by the plan."""

    def __init__(self, model: TorchModel, plans: Mapping[str, LayerPlan]) -> None:
        super().__init__(model, DENOISER)
        self._plans = plans
        self._rounding = ExitStack()

    def close(self) -> None:
        """Release the weights. The next run reads and quantizes them again."""
        self._rounding.close()
        super().close()

    def _load(self) -> TorchSession:
        if self._session is None:
            stage = self._model.load(DENOISER)
            self._rounding.enter_context(quantized(linear_layers(stage), self._plans))
            self._session = TorchSession(stage.module, self.spec)
        return self._session


def simulated_baseline(
    checkpoint: Checkpoint, options: BuildOptions, plans: Mapping[str, LayerPlan]
) -> TorchModel:
    """The checkpoint in PyTorch with a simulated 8-bit denoiser. All else is as the options say."""
    other = TorchModel(checkpoint, options=options)
    session = SimulatedSession(other, plans)
    other.sessions[DENOISER] = session
    other.pipeline = other.pipeline.with_sessions(
        {DENOISER: session}, chosen=f"{other.pipeline.chosen}, 8-bit denoiser simulated"
    )
    return other
