"""The layers of a stage that can be quantized: its Linears, by their paths in the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ditc.export.contract import StageModule
from ditc.runtime.session import Array

WEIGHT = ".weight"


@dataclass(frozen=True, slots=True)
class Layer:
    """One Linear. name: its path in the checkpoint. module: its path in the stage's module."""

    name: str
    module: str
    linear: nn.Linear

    @property
    def parameter(self) -> str:
        """The weight's name in the module, which is the initializer's in the graph."""
        return self.module + WEIGHT

    def weight(self) -> Array:
        """The weight, (O,I) fp32."""
        values: Array = self.linear.weight.detach().float().cpu().numpy()
        return values


def linear_layers(stage: StageModule) -> dict[str, Layer]:
    """Every Linear of the stage, in the module's order, by its path in the checkpoint."""
    names = {source.parameter: source.checkpoint for source in stage.weights}
    layers = {}
    for path, module in stage.module.named_modules():
        if isinstance(module, nn.Linear):
            name = names[path + WEIGHT].removesuffix(WEIGHT)
            layers[name] = Layer(name, path, module)
    return layers
