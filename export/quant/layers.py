"""The layers of a stage that can be quantized, by their paths in the checkpoint: Linears, and a VAE's convolutions."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ditc.export.contract import StageModule
from ditc.runtime.session import Array
from ditc.runtime.spec import VAE_DECODER

WEIGHT = ".weight"


@dataclass(frozen=True, slots=True)
class Layer:
    """One Linear or convolution. name: its path in the checkpoint. module: its path in the stage's module."""

    name: str
    module: str
    linear: nn.Linear | nn.Conv2d

    @property
    def is_convolution(self) -> bool:
        """Whether the layer is a convolution, whose input is (B,C,H,W) and not (...,C)."""
        return isinstance(self.linear, nn.Conv2d)

    @property
    def channels(self) -> int:
        """The number of channels of the layer's input."""
        return self.linear.in_channels if isinstance(self.linear, nn.Conv2d) else self.linear.in_features

    @property
    def parameter(self) -> str:
        """The weight's name in the module, which is the initializer's in the graph."""
        return self.module + WEIGHT

    def weight(self) -> Array:
        """The weight in fp32, (O,I) or (O,I/groups,kH,kW)."""
        values: Array = self.linear.weight.detach().float().cpu().numpy()
        return values


def quantizable_layers(stage: StageModule) -> dict[str, Layer]:
    """Every Linear of the stage, and in a VAE every convolution, in the module's order, by its path in the checkpoint.

    The convolutions of other stages are a small part of their work, and sensitive: patch embeddings and depthwise ones.
    """
    kinds = (nn.Linear, nn.Conv2d) if stage.spec.name == VAE_DECODER else (nn.Linear,)
    names = {source.parameter: source.checkpoint for source in stage.weights}
    layers = {}
    for path, module in stage.module.named_modules():
        if isinstance(module, kinds):
            name = names[path + WEIGHT].removesuffix(WEIGHT)
            layers[name] = Layer(name, path, module)
    return layers
