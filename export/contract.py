"""What an adapter hands to the exporter: a plan without weights, and a stage with them."""

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
    """One stage before its weights are read.

    Attributes:
        components: names of the checkpoint's components whose weights and config it is made from.
        facts: what else decides the graph and is not in the spec, such as layers that a gate skips; JSON.
    """

    spec: StageSpec
    precision: Precision
    components: tuple[str, ...]
    facts: Mapping[str, JsonValue] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ModelPlan:
    """Everything about a bundle that is known from configs alone."""

    family: str
    stages: dict[str, StagePlan]
    text: tuple[TextSpec, ...]
    scheduler: SchedulerParams
    latents: LatentSpec
    defaults: Defaults
    step: StepContract


@dataclass(frozen=True, kw_only=True)
class StageModule:
    """A stage ready for export: `module(*inputs in the order of spec.inputs) -> outputs in order`.

    Attributes:
        weights: where each parameter of the module comes from.
        integers: exclusive upper bounds of integer inputs, for example values (input_ids: the vocabulary).
    """

    spec: StageSpec
    precision: Precision
    module: nn.Module
    weights: tuple[WeightSource, ...]
    integers: Mapping[str, int] = field(default_factory=dict)


class Adapter(Protocol):
    """What a family plans and loads: `ADAPTER` in its adapter.py."""

    family: str

    def accepts(self, checkpoint: Checkpoint) -> bool:
        """Whether this family's networks are in the checkpoint, told from configs alone."""
        ...

    def plan(self, checkpoint: Checkpoint, options: BuildOptions) -> ModelPlan:
        """Everything that can be said, and refused, before weights are read."""
        ...

    def load(self, checkpoint: Checkpoint, plan: ModelPlan, stage: str, options: BuildOptions) -> StageModule:
        """The stage's module with its weights, in the deployment dtype."""
        ...
