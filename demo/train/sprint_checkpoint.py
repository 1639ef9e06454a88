"""Write the distilled transformer and its scheduler in diffusers' layout, without the parts that it shares."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
from diffusers import SanaTransformer2DModel, SCMScheduler

from demo.concepts import CHECKPOINT_DIR, SPRINT_DIR
from demo.errors import DemoError, explained
from demo.train import sprint
from demo.train.checkpoint import halve
from demo.train.loop import load_averaged
from ditc.runtime.atomic import atomic_folder

MAX_BYTES = 8 * 2**20
_CHANGED_DEFAULTS = {"num_inference_steps": 2, "guidance_scale": 4.5}  # those of SanaSprintPipeline


def run(cache: Path, destination: Path = SPRINT_DIR, checkpoint: Path = CHECKPOINT_DIR) -> None:
    """Write the averaged weights in the cache to the destination.

    Raises:
        DemoError: the transformer is not distilled yet, the disk is full, or the result is over the size limit.
    """
    teacher = SanaTransformer2DModel.from_pretrained(checkpoint / "transformer")
    student = load_averaged(cache, sprint.NAME, sprint.student_of(teacher))
    with explained(), atomic_folder(destination, replace=True) as folder:
        student.save_pretrained(folder / "transformer")
        SCMScheduler().save_pretrained(folder / "scheduler")
        halve(folder)
        _write_json(folder / "model_index.json", _model_index(checkpoint))
        defaults = json.loads((checkpoint / "ditc.json").read_text(encoding="utf-8"))
        _write_json(folder / "ditc.json", {**defaults, **_CHANGED_DEFAULTS})
        size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
        if size > MAX_BYTES:
            raise DemoError(f"{destination} would have {size} bytes, more than {MAX_BYTES}.", "narrow it.")


def _model_index(checkpoint: Path) -> dict[str, object]:
    index = json.loads((checkpoint / "model_index.json").read_text(encoding="utf-8"))
    return {
        **index,
        "_class_name": "SanaSprintPipeline",
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", "SCMScheduler"],
    }


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
