"""The steps of the recipe in order, with the numbers of optimizer steps that the shipped weights were trained for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from demo.concepts import CHECKPOINT_DIR
from demo.train import (
    autoencoder,
    checkpoint,
    data,
    lora,
    restore,
    sheet,
    sprint,
    sprint_checkpoint,
    text,
    transformer,
    variants,
)

TRAINING = {  # name: (the step, its length in optimizer steps). The last two begin from the checkpoint.
    "text": (text.run, 2500),
    "autoencoder": (autoencoder.run, 1050),
    "transformer": (transformer.run, 3450),
    "sprint": (sprint.run, 330),
    "lora": (lora.run, 120),
}


def run_step(step: str, cache: Path, log: Path, steps: int | None) -> None:
    """Run one step. Each step reads the results of the steps before it from the cache."""
    if step in TRAINING:
        run, length = TRAINING[step]
        run(cache, log, steps or length)
    else:
        OTHER[step](cache)


def _evaluate(cache: Path) -> None:
    from demo.evaluate import as_text, evaluate

    print(as_text(evaluate(CHECKPOINT_DIR, cache, quick=False, art=True)))


OTHER: dict[str, Callable[[Path], None]] = {
    "data": data.run,
    "checkpoint": checkpoint.run,
    "sprint-checkpoint": sprint_checkpoint.run,
    "lora-file": lora.write,
    "sheet": sheet.run,
    "variants": variants.run,
    "evaluate": _evaluate,
    "restore": restore.run,
}
STEPS = (
    *("data", "text", "autoencoder", "transformer", "checkpoint"),
    *("sprint", "sprint-checkpoint", "lora", "lora-file", "sheet", "variants", "evaluate"),
)
