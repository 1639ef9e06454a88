"""The toy family's adapter, as far as finding it goes."""

from __future__ import annotations

from ditc.export.checkpoint.open import Checkpoint
from ditc.export.contract import Adapter, BuildOptions, ModelPlan, StageModule

CLASS_NAME = "ToyTransformer"


class ToyAdapter:
    """Accepts its class's checkpoints; nothing is built of them."""

    family = "toy"

    def accepts(self, checkpoint: Checkpoint) -> bool:
        transformer = checkpoint.components.get("transformer")
        return transformer is not None and transformer.class_name == CLASS_NAME

    def plan(self, checkpoint: Checkpoint, options: BuildOptions) -> ModelPlan:
        raise AssertionError("no test builds the toy family")

    def load(self, checkpoint: Checkpoint, plan: ModelPlan, stage: str, options: BuildOptions) -> StageModule:
        raise AssertionError("no test builds the toy family")


ADAPTER: Adapter = ToyAdapter()
