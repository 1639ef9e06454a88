"""Checkpoints with damaged configs, tokenizers and indices: upstream's picture, or a refusal before the export."""

from __future__ import annotations

import inspect
import json
import random
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from fuzz import mutate
from fuzz.child import WrongResult
from safetensors import safe_open
from safetensors.torch import save_file

from ditc.export.build.preflight import check_options, check_weights
from ditc.parity.cases import Case, CaseRun, Settings, run_case, starting_noise
from ditc.parity.reference.pytorch import FP32, TorchModel
from ditc.parity.reference.upstream import Upstream
from ditc.runtime.metrics import psnr
from ditc.runtime.session import Array

CASE = Case("a red cat", 3)
STEPS, SIZE = 2, 64
SAME_DB = 45.0
PREFIX = "diffusion_pytorch_model"


class Checkpoints:
    """Undamaged checkpoints, and what upstream draws with them."""

    def __init__(self, subjects: dict[str, Path], folder: Path) -> None:
        torch.set_num_threads(1)
        self.checkpoints = subjects
        self.pictures: dict[str, Array] = {}
        for name, path in subjects.items():
            ours, theirs = both_pictures(self.prepared(path, folder / "home" / name))
            assert isinstance(theirs, np.ndarray), theirs
            check_same(ours, theirs, name)
            self.pictures[name] = theirs

    def prepared(self, source: Path, target: Path) -> Path:
        """A copy of a checkpoint that can be damaged."""
        return Path(shutil.copytree(source, target))

    def files(self, checkpoint: Path) -> list[Path]:
        """The files to damage."""
        raise NotImplementedError

    def attempt(self, chooser: random.Random, work: Path) -> str:
        name = chooser.choice(list(self.checkpoints))
        checkpoint = self.prepared(self.checkpoints[name], work / "checkpoint")
        most = 2 if chooser.random() < 0.2 else 1
        damaged = sorted(set(mutate.pick_some(self.files(checkpoint), chooser, most)))
        for path in damaged:
            damage_file(path, chooser)
        ours, theirs = both_pictures(checkpoint)
        what = ", ".join(str(path.relative_to(work)) for path in damaged)
        if isinstance(theirs, Exception):
            check_same(ours, self.pictures[name], f"{what}, where upstream says {theirs!r:.200}")
            return "drawn as before"
        check_same(ours, theirs, what)
        return "drawn as upstream does"


class Configs(Checkpoints):
    """The configs of networks, schedulers and the pipeline, and the defaults."""

    def files(self, checkpoint: Path) -> list[Path]:
        found = checkpoint.rglob("*.json")
        return sorted(
            path for path in found if "tokenizer" not in path.parent.name and "index" not in path.suffixes
        )


class Tokenizers(Checkpoints):
    """The tokenizers and their settings."""

    def files(self, checkpoint: Path) -> list[Path]:
        return sorted(checkpoint.glob("tokenizer*/*"))


class WeightIndices(Checkpoints):
    """The index of weights in two files, and the headers of these files."""

    def prepared(self, source: Path, target: Path) -> Path:
        checkpoint = super().prepared(source, target)
        shard(checkpoint / "transformer")
        return checkpoint

    def files(self, checkpoint: Path) -> list[Path]:
        folder = checkpoint / "transformer"
        return [folder / f"{PREFIX}.safetensors.index.json"] * 3 + sorted(folder.glob("*.safetensors"))


def both_pictures(checkpoint: Path) -> tuple[Array, Array | Exception]:
    """What our networks draw after the checks that come before an export, and what upstream draws, or its error."""
    check_options(FP32)
    model = TorchModel(str(checkpoint))
    check_weights(
        model.checkpoint,
        model.adapter,
        model.plan,
        FP32,
        checkpoint.parent,
        list(model.plan.stages),
        lambda *_: None,
    )
    settings = Settings(
        cases=(CASE,),
        num_inference_steps=STEPS,
        guidance_scale=model.plan.defaults.guidance_scale,
        height=SIZE,
        width=SIZE,
    )
    noise = starting_noise(model.pipeline, CASE, settings)
    ours = picture_of(run_case(model.pipeline, CASE, settings, noise))
    try:
        theirs = picture_of(Upstream(model.checkpoint).draw(CASE, settings, noise))
    except Exception as error:  # whatever upstream says about what it cannot load or draw
        return ours, error
    return ours, theirs


def picture_of(run: CaseRun) -> Array:
    """The picture of a run that did not fail."""
    if run.picture is None:
        raise WrongResult(run.problem)
    return run.picture


def check_same(ours: Array, theirs: Array, what: str) -> None:
    """Raise WrongResult unless the pictures are nearly the same."""
    if ours.shape != theirs.shape:
        raise WrongResult(f"{what}: our picture is {ours.shape}, upstream's {theirs.shape}")
    found = psnr(ours, theirs)
    if not found >= SAME_DB:
        raise WrongResult(f"{what}: {found:.1f} dB to upstream's picture")


def damage_file(path: Path, chooser: random.Random) -> None:
    """Damage what a JSON file says, a few bytes, or the header of a safetensors file."""
    data = path.read_bytes()
    if path.suffix == ".json" and chooser.random() < 0.9:
        content = json.loads(data)
        changed, _ = mutate.damage(content, chooser, names=setting_names(content) or mutate.TEXTS)
        path.write_text(json.dumps(changed))
        return
    length = min(len(data), 1000)  # the header, whose damage is seen
    path.write_bytes(mutate.damage_bytes(data[:length], chooser) + data[length:])


def setting_names(content: Any) -> list[str]:
    """The settings that upstream's class of a config has."""
    if not isinstance(content, dict):
        return []
    return list(_names(str(content.get("_class_name")), str(content.get("model_type"))))


@cache
def _names(class_name: str, model_type: str) -> tuple[str, ...]:
    kind = getattr(diffusers, class_name, None)
    if kind is not None:
        return tuple(inspect.signature(kind.__init__).parameters)[1:]
    if model_type in transformers.CONFIG_MAPPING:
        return tuple(transformers.CONFIG_MAPPING[model_type]().to_dict())
    return ()


def shard(folder: Path) -> None:
    """Save the weights again as two files with an index."""
    whole = folder / f"{PREFIX}.safetensors"
    with safe_open(whole, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    whole.unlink()
    names = sorted(tensors)
    index: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file_name = f"{PREFIX}-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file_name, {"format": "pt"})
        index |= dict.fromkeys(part, file_name)
    size = sum(tensor.nbytes for tensor in tensors.values())
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": index})
    (folder / f"{PREFIX}.safetensors.index.json").write_text(text)
