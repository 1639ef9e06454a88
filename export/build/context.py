"""What all steps of one build share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ditc.export.build.events import EventLog
from ditc.export.build.journal import Journal
from ditc.export.checkpoint.open import Checkpoint
from ditc.export.contract import Adapter, BuildOptions, ModelPlan
from ditc.export.quant.apply import Quantization
from ditc.runtime.bundle.manifest import Manifest
from ditc.runtime.weight_map import NativeName


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildContext:
    """One build.

    Attributes:
        out: the bundle's folder.
        old: the bundle's manifest before this build; None for a new bundle.
        targets: the GPUs that engines are built for; empty where no engines are built.
        native_names: where the family's own files hold the transformer's tensors, by their names in the checkpoint.
        quantizations: how each stage in 8 bits is quantized, by the stage's name.
    """

    checkpoint: Checkpoint
    adapter: Adapter
    native_names: Mapping[str, NativeName]
    plan: ModelPlan
    options: BuildOptions
    out: Path
    old: Manifest | None
    targets: tuple[str, ...]
    quantizations: Mapping[str, Quantization]
    journal: Journal
    events: EventLog

    def files_of(self, stage: str) -> list[Path]:
        """The files of the checkpoint that hold the stage's weights."""
        components = map(self.checkpoint.component, self.plan.stages[stage].components)
        return [path for component in components for path in component.files]
