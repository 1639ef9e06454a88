"""Model families. An adapter is the only place that knows one; a new family is one file here and one row below."""

from __future__ import annotations

from ditc.export.checkpoint.open import Checkpoint
from ditc.export.contract import Adapter
from ditc.runtime.errors import CheckpointError


def find_adapter(checkpoint: Checkpoint) -> Adapter:
    """The adapter whose family the checkpoint belongs to.

    Raises:
        CheckpointError: none; names the classes found and the families known.
    """
    from ditc.export.families.lucidrains.adapter import LucidrainsMMDiTAdapter
    from ditc.export.families.sana.adapter import SanaAdapter
    from ditc.export.families.sd3.adapter import Sd3Adapter

    adapters: tuple[Adapter, ...] = (SanaAdapter(), Sd3Adapter(), LucidrainsMMDiTAdapter())
    for adapter in adapters:
        if adapter.accepts(checkpoint):
            return adapter
    classes = [str(c.config.get("_class_name", "?")) for c in checkpoint.components.values()]
    raise CheckpointError(
        f"{checkpoint.path} holds {checkpoint.model_index.get('_class_name', 'an unnamed pipeline')} "
        f"({', '.join(classes)}), which no adapter knows",
        hint=f"known families: {', '.join(adapter.family for adapter in adapters)}",
    )
