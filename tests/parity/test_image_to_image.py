"""Parity of image-to-image and inpainting: bundles pass against upstream, and planted defects are caught and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planted import SETTINGS, context_of, failures, patch_pipeline, torch_candidate

from ditc.parity.cases import Case, edit_cases
from ditc.parity.context import Context
from ditc.parity.edits import OF_PICTURES, STEPS
from ditc.parity.levels import LEVELS
from ditc.parity.results import Result, Verdict
from ditc.runtime import image_states, prepare
from ditc.runtime.cli import main
from ditc.runtime.image_start import Kept
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.session import Array
from ditc.runtime.spec import VAE_ENCODER
from ditc.runtime.state import DenoiseState
from ditc.runtime.tolerances import Level

EDITS = replace(SETTINGS, cases=edit_cases(SETTINGS.cases))
TO_IMAGE, INPAINTED = (replace(EDITS, cases=(case,)) for case in EDITS.cases)


@pytest.mark.parametrize(
    ("checkpoint", "against"),
    [
        ("sd3_checkpoint", ["diffusers", "diffusers"]),
        ("sprint_checkpoint", ["diffusers", "diffusers, masked by parity"]),
        ("pag_checkpoint", ["diffusers, started by parity"] * 2),
        ("control_checkpoint", ["diffusers, started by parity"] * 2),
    ],
)
def test_both_edits_agree_with_upstream(
    checkpoint: str, against: list[str], request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(checkpoint)
    context = context_of(path, torch_candidate(path), EDITS, with_upstream=True)
    for level in (Level.TRAJECTORY, Level.PICTURE):
        results = list(LEVELS[level](context))
        assert not [result for result in results if result.verdict is Verdict.FAIL]
        found = [r.against for r in results if r.verdict is Verdict.PASS and "diffusers" in r.against]
        assert list(dict.fromkeys(found)) == list(dict.fromkeys(against))


def test_a_bundle_is_checked_with_both_edits_and_its_encoder(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, saved = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle")), tmp_path / "saved.safetensors"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cat\n")
    levels = [word for level in ("stage", "trajectory") for word in ("--level", level)]
    shared = [*levels, "--threads", "1", "--json"]
    drawn = ["--against", str(tiny_checkpoint), "--prompts", str(prompts), "--seeds", "3", "--steps", "2"]
    assert main(["parity", str(bundle), *drawn, *shared, "--save-reference", str(saved)]) == 0
    from_checkpoint = _results(capsys.readouterr().out)
    assert main(["parity", str(bundle), "--reference", str(saved), *shared]) == 0
    from_file = _results(capsys.readouterr().out)
    for results in (from_checkpoint, from_file):
        assert any(r["stage"] == VAE_ENCODER and "example picture" in r["what"] for r in results)
        for edit in OF_PICTURES:
            against = {r["against"] for r in results if str(edit) in r["what"] and r["verdict"] == "pass"}
            assert against == {"PyTorch fp32", "diffusers, started by parity"}
    assert main(["parity", str(bundle), *drawn, *shared[2:], "--no-edits"]) == 0
    left_out = _results(capsys.readouterr().out)
    assert [r["detail"] for r in left_out if r["stage"] == VAE_ENCODER] == ["they were left out (--no-edits)"]
    assert not any(str(edit) in r["what"] for r in left_out for edit in OF_PICTURES)


def _results(printed: str) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = json.loads(printed)["levels"]
    return results


class WeakerStrength(Pipeline):
    """A pipeline that leaves out one step more than the strength says."""

    def plan(self, request: Any) -> Any:
        return super().plan(replace(request, strength=request.strength - 1 / STEPS))


class StrongerStrength(Pipeline):
    """A pipeline that leaves out one step less than the strength says."""

    def plan(self, request: Any) -> Any:
        return super().plan(replace(request, strength=request.strength + 1 / STEPS))


class NoiseOfTheNextStep(Pipeline):
    """A pipeline that does the right steps, but starts from the noise level of the second one."""

    def plan(self, request: Any) -> Any:
        plan = super().plan(request)
        levels = plan.table.levels[[*range(1, len(plan.table.levels)), -1]]
        return replace(plan, table=replace(plan.table, levels=levels))


class InvertedMask(Pipeline):
    """A pipeline whose masks are black where the picture is drawn anew."""

    def states(self, plan: Any) -> Iterator[DenoiseState]:
        for state in super().states(plan):
            assert state.kept is not None
            yield replace(state, kept=replace(state.kept, mask=1 - state.kept.mask))


class KeptInside(Kept):
    """Inpainting whose mask is right, but which keeps the picture inside of it."""

    def _outside(self, kept: Array, drawn: Array) -> Array:
        return super()._outside(drawn, kept)


class InvertedUse(Pipeline):
    """A pipeline that puts the picture back inside of the mask."""

    def states(self, plan: Any) -> Iterator[DenoiseState]:
        for state in super().states(plan):
            kept = state.kept
            assert kept is not None
            inside = KeptInside(
                mask=kept.mask, image_latents=kept.image_latents, noise=kept.noise, levels=kept.levels
            )
            yield replace(state, kept=inside)


def planted(checkpoint: Path, kind: type[Pipeline], case: Case, *, with_upstream: bool = False) -> Context:
    candidate = torch_candidate(checkpoint, lambda model: patch_pipeline(model, kind))
    return context_of(checkpoint, candidate, replace(EDITS, cases=(case,)), with_upstream=with_upstream)


@pytest.mark.parametrize("level", [Level.STEP, Level.TRAJECTORY])
@pytest.mark.parametrize(
    ("kind", "case", "cause"),
    [
        (WeakerStrength, TO_IMAGE, "strength is off by one step: the loop does 2 steps"),
        (StrongerStrength, INPAINTED, "strength is off by one step: the loop does 4 steps"),
        (InvertedMask, INPAINTED, "mask inverted"),
        (InvertedUse, INPAINTED, "mask inverted"),
    ],
)
def test_a_planted_defect_is_caught_and_named(
    sd3_checkpoint: Path, kind: type[Pipeline], case: Any, cause: str, level: Level
) -> None:
    found = failures(planted(sd3_checkpoint, kind, case.cases[0]), level)
    assert found and all(cause in " ".join(result.causes) for result in found), found
    assert {result.stage for result in found} == {"pipeline"}


def test_a_start_with_the_noise_of_another_step_is_caught_and_named(sd3_checkpoint: Path) -> None:
    (found,) = failures(planted(sd3_checkpoint, NoiseOfTheNextStep, EDITS.cases[0]), Level.TRAJECTORY)
    assert found.stage == "pipeline"
    assert "the loop starts from other latents" in " ".join(found.causes), found.causes


def _inverted(mask: Callable[..., Array]) -> Callable[..., Array]:
    return lambda *arguments: np.float32(1) - mask(*arguments)


def _one_late(begin_index: Callable[..., int]) -> Callable[..., int]:
    return lambda strength, steps: 0 if strength is None else begin_index(strength, steps) + 1


@pytest.mark.parametrize("checkpoint", ["sprint_checkpoint", "sd3_checkpoint"])
@pytest.mark.parametrize(
    ("module", "function", "broken", "case", "cause"),
    [
        (prepare, "_begin_index", _one_late, TO_IMAGE, "strength is off by one step"),
        (image_states, "cell_mask", _inverted, INPAINTED, "mask inverted"),
    ],
    ids=["strength", "mask"],
)
def test_a_mistake_of_the_runtime_itself_is_caught_by_upstream_and_named(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: str,
    module: Any,
    function: str,
    broken: Callable[..., Any],
    case: Any,
    cause: str,
) -> None:
    """Both the bundle and its PyTorch reference then have it, because both run through the runtime."""
    path: Path = request.getfixturevalue(checkpoint)
    monkeypatch.setattr(module, function, broken(getattr(module, function)))
    context = context_of(path, torch_candidate(path), case, with_upstream=True)
    found: list[Result] = failures(context, Level.TRAJECTORY)
    assert found and not any(result.against == "PyTorch fp32" for result in found)
    assert all(cause in " ".join(result.causes) for result in found), found
