"""What an adapter hands to the exporter: a plan made without weights, then each stage as a module with its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import nn

from ditc.export.checkpoint.open import Checkpoint
from ditc.export.networks.loading import WeightSource
from ditc.export.options import BuildOptions as BuildOptions
from ditc.runtime.bundle.manifest import Defaults, LatentSpec
from ditc.runtime.schedulers import SchedulerParams
from ditc.runtime.spec import Precision, StageSpec
from ditc.runtime.step_contract import StepContract
from ditc.runtime.text import TextSpec

JsonValue = str | int | float | bool | None | Sequence["JsonValue"]


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One stage as it is known before its weights are read.

    Attributes:
        components: names of the checkpoint's components whose weights and config the stage is made from.
        facts: JSON values that shape the graph but are not in the spec, such as the layers that a gate skips.
    """

    spec: StageSpec
    precision: Precision
    components: tuple[str, ...]
    facts: Mapping[str, JsonValue] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ModelPlan:
    """Everything about a bundle that follows from the checkpoint's configs and the build's options.

    Attributes:
        recipes: what the names of the model's default recipes begin with; "" for the family.
    """

    family: str
    stages: dict[str, StagePlan]
    text: tuple[TextSpec, ...]
    scheduler: SchedulerParams
    latents: LatentSpec
    defaults: Defaults
    step: StepContract
    recipes: str = ""


@dataclass(frozen=True, kw_only=True)
class StageModule:
    """A stage ready for export: `module(*inputs in the order of spec.inputs) -> outputs in order`.

    Attributes:
        weights: for each parameter of the module, the checkpoint's tensor that it comes from.
        integers: for each integer input, the exclusive upper bound of its example values; for input_ids it is the
            vocabulary's size.
    """

    spec: StageSpec
    precision: Precision
    module: nn.Module
    weights: tuple[WeightSource, ...]
    integers: Mapping[str, int] = field(default_factory=dict)


class Adapter(Protocol):
    """The interface of a family's `ADAPTER`, which is in its adapter.py."""

    family: str

    def accepts(self, checkpoint: Checkpoint) -> bool:
        """Whether the checkpoint's networks belong to this family. Only configs are read."""
        ...

    def plan(self, checkpoint: Checkpoint, options: BuildOptions) -> ModelPlan:
        """Plan the bundle from configs, and refuse here what can be refused before weights are read."""
        ...

    def load(self, checkpoint: Checkpoint, plan: ModelPlan, stage: str, options: BuildOptions) -> StageModule:
        """Load the stage's module with its weights, in the dtype that it is deployed in."""
        ...
