"""Checkpoints as users bring them: edited, damaged, mixed up. ditc draws what upstream draws, or says why it does not.

The outcome of a build must be one of two: upstream's picture, or one error with a hint and exit code 2 before the
first export. Where upstream itself cannot load or draw the edited checkpoint, the picture of the unedited one counts,
or, of two edits, that of the checkpoint with the edit that upstream can load: weights may be rounded by it.
`make test` tries a few edits; `make test-slow` tries each of them on each family, and random pairs.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_edits import EDITS, Edit
from diffusers import DiffusionPipeline
from pictures import PICTURE_DB

from ditc.export.build import graph_artifact
from ditc.export.checkpoint.open import open_checkpoint
from ditc.parity.reference.lucidrains import open_pipeline
from ditc.runtime.cli import USAGE, main
from ditc.runtime.metrics import psnr
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.session import Array

PROMPT, SEED, SIZE = "a red cat", 3, 64
FAMILIES = ("sana", "sd3", "mmdit")
PAIRS = 200
IN_MAKE_TEST = 20


@dataclass(frozen=True)
class Subject:
    """An unedited checkpoint, its bundle, and the picture that both upstream and ditc draw of it."""

    checkpoint: Path
    bundle: Path
    picture: Array


def their_picture(checkpoint: Path) -> Array:
    """The picture (H,W,3) in [0,1] of unmodified upstream code, with the settings in the checkpoint's ditc.json."""
    defaults = json.loads((checkpoint / "ditc.json").read_text())
    shared = {
        "num_inference_steps": defaults["num_inference_steps"],
        "guidance_scale": defaults["guidance_scale"],
        "max_sequence_length": defaults["max_sequence_length"],
        "output_type": "np",
    }
    generator = torch.Generator().manual_seed(SEED)
    if "Lucidrains" in (checkpoint / "model_index.json").read_text():
        mmdit = open_pipeline(open_checkpoint(str(checkpoint)))
        channels = mmdit.transformer.patch_embed["proj"].in_channels
        latents = torch.randn(1, channels, SIZE // 2, SIZE // 2, generator=generator)
        with torch.no_grad():
            return mmdit(prompt=PROMPT, latents=latents, **shared).images[0]
    pipeline = DiffusionPipeline.from_pretrained(checkpoint, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if "complex_human_instruction" in defaults:  # Sana's
        shared |= {"complex_human_instruction": None, "use_resolution_binning": False}
    else:
        shared |= {name: value for name, value in defaults.items() if name.startswith("skip_")}
    return pipeline(PROMPT, height=SIZE, width=SIZE, generator=generator, **shared).images[0]


def our_picture(bundle: Path) -> Array:
    """The picture (H,W,3) in [0,1] of the bundle."""
    with Pipeline.load(bundle, threads=1) as pipeline:
        return pipeline(PROMPT, height=SIZE, width=SIZE, seed=SEED, output_type="np").images[0]


@pytest.fixture(scope="module")
def subjects(request: pytest.FixtureRequest) -> Callable[[str], Subject]:
    """The unedited checkpoint of a family. Its two pictures are compared first."""
    known: dict[str, Subject] = {}

    def subject(family: str) -> Subject:
        if family not in known:
            prefix = "tiny" if family == "sana" else family
            checkpoint = request.getfixturevalue(f"{prefix}_checkpoint")
            bundle = request.getfixturevalue(f"{prefix}_bundle")
            known[family] = Subject(checkpoint, bundle, their_picture(checkpoint))
            assert psnr(our_picture(bundle), known[family].picture) >= PICTURE_DB
        return known[family]

    return subject


def check_outcome(
    edits: list[Edit],
    subject: Subject,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> str:
    """Edit a copy of the checkpoint, build it, and check the outcome, which is also returned in words."""
    checkpoint = Path(shutil.copytree(subject.checkpoint, folder / "checkpoint"))
    if not all(edit.apply(checkpoint) for edit in edits):
        return "unchanged"
    exported: list[str] = []
    to_onnx = graph_artifact.to_onnx

    def watch(stage, *arguments, **options):
        exported.append(stage.spec.name)
        return to_onnx(stage, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(graph_artifact, "to_onnx", watch)
        bundle = shutil.copytree(subject.bundle, folder / "bundle")  # what did not change is not built again
        capsys.readouterr()
        code = main(["build", str(checkpoint), "-o", str(bundle)])
    if code == USAGE:
        error, hint = capsys.readouterr().err.splitlines()[-2:]
        assert error.startswith("error: ") and hint.startswith("hint: ") and len(hint) > 10, (error, hint)
        assert not exported, f"refused only after the export of {exported} had begun: {error}"
        assert not all(edit.harmless for edit in edits), f"refused without need: {error} {hint}"
        return f"refused: {error} | {hint}"
    assert code == 0, capsys.readouterr().err
    ours = our_picture(bundle)
    theirs, source = right_picture(checkpoint, edits, subject, folder)
    assert np.isfinite(ours).all()
    assert psnr(ours, theirs) >= PICTURE_DB, f"{psnr(ours, theirs):.1f} dB to {source}"
    return f"served, equal to {source}"


def right_picture(checkpoint: Path, edits: list[Edit], subject: Subject, folder: Path) -> tuple[Array, str]:
    """The picture that an edited checkpoint must draw, and whose it is."""
    try:
        return their_picture(checkpoint), "upstream"
    except Exception as error:  # whatever upstream says about a checkpoint that it cannot load
        problem = error
    for number, edit in enumerate(edits if len(edits) > 1 else []):
        alone = Path(shutil.copytree(subject.checkpoint, folder / f"only-{number}"))
        edit.apply(alone)
        try:
            return their_picture(alone), f"upstream with {edit.name} alone, as with both it fails: {problem}"
        except Exception:
            continue
    return subject.picture, f"the unedited checkpoint, as upstream fails: {problem}"


def sample_of_edits() -> list[tuple[str, Edit]]:
    """The edits of `make test`: each family in turn, always the same ones."""
    chooser = random.Random(16)
    return [(FAMILIES[i % len(FAMILIES)], edit) for i, edit in enumerate(chooser.sample(EDITS, IN_MAKE_TEST))]


def pairs_of_edits() -> list[tuple[str, Edit, Edit]]:
    """Random pairs of edits over the families, always the same ones."""
    chooser = random.Random(17)
    return [(chooser.choice(FAMILIES), *chooser.sample(EDITS, 2)) for _ in range(PAIRS)]


@pytest.mark.parametrize(
    ("family", "edit"),
    [pytest.param(family, edit, id=f"{family}: {edit.name}") for family, edit in sample_of_edits()],
)
def test_an_edited_checkpoint_is_served_as_upstream_does_or_refused(
    family, edit, subjects, tmp_path, monkeypatch, capsys, record_property
) -> None:
    record_property("outcome", check_outcome([edit], subjects(family), tmp_path, monkeypatch, capsys))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("edit", [pytest.param(edit, id=edit.name) for edit in EDITS])
def test_every_edit_of_every_family_is_served_or_refused(
    family, edit, subjects, tmp_path, monkeypatch, capsys, record_property
) -> None:
    outcome = check_outcome([edit], subjects(family), tmp_path, monkeypatch, capsys)
    if outcome == "unchanged":
        pytest.skip("this family has no such part")
    record_property("outcome", outcome)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "first", "second"),
    [pytest.param(*pair, id=f"{pair[0]}: {pair[1].name}, {pair[2].name}") for pair in pairs_of_edits()],
)
def test_pairs_of_edits_are_served_or_refused(
    family, first, second, subjects, tmp_path, monkeypatch, capsys, record_property
) -> None:
    outcome = check_outcome([first, second], subjects(family), tmp_path, monkeypatch, capsys)
    if outcome == "unchanged":
        pytest.skip("an edit finds nothing to change")
    record_property("outcome", outcome)
