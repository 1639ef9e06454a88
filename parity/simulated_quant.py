"""Simulate 8-bit stages in PyTorch by their recorded plans: this shows what a correct quantized graph loses."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace

from ditc.export.checkpoint.open import Checkpoint
from ditc.export.graph.torch_session import TorchSession
from ditc.export.options import BuildOptions
from ditc.export.quant.layers import quantizable_layers
from ditc.export.quant.plan import LayerPlan
from ditc.export.quant.simulate import quantized
from ditc.parity.reference.pytorch import LazyTorchSession, TorchModel
from ditc.runtime.spec import Precision


class SimulatedSession(LazyTorchSession):
    """A stage with weights and inputs of its layers quantized and dequantized by the plan."""

    def __init__(self, model: TorchModel, stage: str, plans: Mapping[str, LayerPlan]) -> None:
        super().__init__(model, stage)
        self._plans = plans
        self._rounding = ExitStack()

    def close(self) -> None:
        """Release the weights. The next run reads and quantizes them again."""
        self._rounding.close()
        super().close()

    def _load(self) -> TorchSession:
        if self._session is None:
            stage = self._model.load(self._stage)
            self._rounding.enter_context(quantized(quantizable_layers(stage), self._plans))
            self._session = TorchSession(stage.module, self.spec)
        return self._session


def simulated_baseline(
    checkpoint: Checkpoint,
    options: BuildOptions,
    plans: Mapping[str, Mapping[str, LayerPlan]],
    bases: Mapping[str, Precision],
) -> TorchModel:
    """The checkpoint in PyTorch with simulated 8-bit stages. All else is as the options say.

    Args:
        plans: the plan of each 8-bit stage.
        bases: the precision of such stages outside their 8-bit layers, where it is recorded.
    """
    other = TorchModel(checkpoint, options=options)
    stages = {
        name: replace(stage, precision=bases.get(name, stage.precision))
        for name, stage in other.plan.stages.items()
    }
    other.plan = replace(other.plan, stages=stages)
    sessions = {name: SimulatedSession(other, name, plan) for name, plan in plans.items()}
    other.sessions |= sessions
    other.pipeline = other.pipeline.with_sessions(
        dict(sessions), chosen=f"{other.pipeline.chosen}, 8-bit {' and '.join(sessions)} simulated"
    )
    return other
