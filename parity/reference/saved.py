"""Reference results as one safetensors file: save it where the checkpoint is, compare with it on another machine.

stage.I.in.NAME, stage.I.out.NAME            one case of the stage level
case.I.latents, .x0, .picture, .upstream.*   one case of the loop; .mask of inpainting
case.I.schedule.STEP.NAME, case.I.rows.NAME  what the denoiser was fed: in each step, and in all steps
metadata "ditc.reference"                    JSON: settings, stages, origin, errors of the precision baseline ("losses")
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ditc.export.checkpoint.safetensors_file import safetensors_path
from ditc.parity.cases import BaselineErrors, Case, CaseRun, SavedReference, Settings, StageCase
from ditc.parity.context import Context
from ditc.parity.levels.picture import baseline_psnr
from ditc.parity.levels.stage import stage_cases
from ditc.parity.levels.step import baseline_step_errors
from ditc.parity.levels.trajectory import baseline_trajectory_error
from ditc.runtime import step_contract
from ditc.runtime.bundle.jsondata import from_json, to_json
from ditc.runtime.bundle.manifest import Manifest
from ditc.runtime.errors import UsageError
from ditc.runtime.machine import this_machine
from ditc.runtime.session import Array, to_numpy
from ditc.runtime.spec import DENOISER
from ditc.runtime.state import DenoiseState, Rows

METADATA = "ditc.reference"
VERSION = 2
HINT = "make a reference file with: ditc parity BUNDLE --against CHECKPOINT --save-reference FILE"


def save_reference(path: Path, context: Context) -> Path:
    """Write all reference results of a context as one file.

    Raises:
        OutputError: the file cannot be written.
    """
    tensors: dict[str, Array] = {}
    stages: list[dict[str, Any]] = []
    for stage in context.candidate.sessions:
        for case in stage_cases(context, stage):
            index = len(stages)
            stages.append({"stage": stage, "what": case.what, "pytorch": case.baseline_errors})
            tensors |= {f"stage.{index}.in.{name}": array for name, array in case.feeds.items()}
            tensors |= {f"stage.{index}.out.{name}": array for name, array in case.outputs.items()}
    losses = [_baseline_errors(context, case) for case in context.settings.cases]
    for index, one in enumerate(context.settings.cases):
        tensors |= {f"case.{index}.{name}": array for name, array in _case_tensors(context, one)}
    described = {
        "version": VERSION,
        "settings": to_json(context.settings),
        "stages": stages,
        "losses": losses,
        "precision": context.candidate.precision(DENOISER).value,
        "origin": {
            "checkpoint": context.reference.checkpoint.path.name,
            "weights": context.reference.weights_digest(),
            "saved_on": str(this_machine()),
            "upstream": context.upstream_name,
            **{
                f"upstream, {case.edit}": context.name_of_upstream(case)
                for case in context.settings.cases
                if case.edit
            },
        },
    }
    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    with safetensors_path(path, hint="choose another --save-reference") as partial:
        save_file(contiguous, partial, metadata={METADATA: json.dumps(described)})
    return path


def read_reference(path: Path, manifest: Manifest) -> SavedReference:
    """Read a reference file, and check that it fits the bundle to compare with.

    Raises:
        UsageError: the file is missing, damaged, not a reference file, or made for a model with other stages or shapes.
    """
    if not path.is_file():
        raise UsageError(f"there is no reference file {path}", hint=HINT)
    try:
        with safe_open(path, "np") as file:
            described = json.loads((file.metadata() or {})[METADATA])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
        saved = _parse(described, tensors)
    except (SafetensorError, KeyError, ValueError, TypeError) as e:
        raise UsageError(f"{path} is not a reference file: {e}", hint=HINT) from e
    _check_fits(path, saved, manifest)
    return saved


def _parse(described: Mapping[str, Any], tensors: Mapping[str, Array]) -> SavedReference:
    if described["version"] != VERSION:
        raise ValueError(f"its version is {described['version']}, and this ditc reads version {VERSION}")
    settings = from_json(Settings, described["settings"])
    groups = [_below(tensors, f"case.{index}.") for index in range(len(settings.cases))]
    runs = {case: _run(case, group) for case, group in zip(settings.cases, groups, strict=True)}
    upstream = {
        case: CaseRun(
            case=case,
            noise=_noise(group),
            latents=group["upstream.latents"],
            picture=group.get("upstream.picture"),
            mask=group.get("upstream.mask"),
        )
        for case, group in zip(settings.cases, groups, strict=True)
        if "upstream.latents" in group
    }
    losses = zip(settings.cases, described["losses"], strict=True)
    return SavedReference(
        settings=settings,
        origin={str(key): str(value) for key, value in described["origin"].items()},
        runs=runs,
        upstream=upstream,
        stages=[
            StageCase(
                str(one["stage"]),
                str(one["what"]),
                _below(tensors, f"stage.{index}.in."),
                _below(tensors, f"stage.{index}.out."),
                one["pytorch"],
            )
            for index, one in enumerate(described["stages"])
        ],
        baseline_errors={case: from_json(BaselineErrors, one) for case, one in losses if one is not None},
        precision=str(described["precision"]),
    )


def _run(case: Case, group: Mapping[str, Array]) -> CaseRun:
    schedule, rows = _below(group, "schedule."), _below(group, "rows.")
    steps = len(group["latents"]) - 1
    start = DenoiseState(
        latents=group["latents"][0],
        history=group["history"],
        schedule=tuple(_below(schedule, f"{step}.") for step in range(steps)),
        rows=Rows(row_of=rows.pop(step_contract.ROW_OF), conditioning=rows),
    )
    return CaseRun(
        case=case,
        noise=_noise(group),
        latents=group["latents"],
        x0=group["x0"],
        start=start,
        picture=group.get("picture"),
        mask=group.get("mask"),
    )


def _noise(group: Mapping[str, Array]) -> Array:
    """The noise of a case. Files that lack it are of samplers that start from the noise as it is."""
    return group["noise"] if "noise" in group else group["latents"][0]


def _case_tensors(context: Context, case: Case) -> Iterator[tuple[str, Array]]:
    run, upstream = context.reference_run(case), context.upstream_run(case)
    assert run.x0 is not None and run.start is not None
    yield "noise", run.noise
    yield "latents", run.latents
    yield "x0", run.x0
    yield "history", to_numpy(run.start.history)
    for index, step in enumerate(run.start.schedule):  # not stacked: steps may differ in their number of rows
        yield from ((f"schedule.{index}.{name}", array) for name, array in step.items())
    yield f"rows.{step_contract.ROW_OF}", run.start.rows.row_of
    for name, tensor in run.start.rows.conditioning.items():
        yield f"rows.{name}", to_numpy(tensor)
    if run.picture is not None:
        yield "picture", run.picture
    if run.mask is not None:
        yield "mask", run.mask
    if upstream is not None:
        yield "upstream.latents", upstream.latents
        if upstream.picture is not None:
            yield "upstream.picture", upstream.picture
        if upstream.mask is not None:
            yield "upstream.mask", upstream.mask


def _baseline_errors(context: Context, case: Case) -> dict[str, Any] | None:
    """The fields of BaselineErrors; None for an fp32 bundle, and if PyTorch itself overflows in the precision."""
    run = context.reference_run(case)
    steps, end = baseline_step_errors(context, case, run), baseline_trajectory_error(context, case)
    reference = context.upstream_run(case) or run
    psnr = baseline_psnr(context, case, reference.picture) if reference.picture is not None else None
    if steps is None or end is None or psnr is None or not np.isfinite([*steps, end, psnr]).all():
        return None
    return {"steps": steps, "trajectory": end, "psnr": psnr}


def _check_fits(path: Path, saved: SavedReference, manifest: Manifest) -> None:
    for case in saved.stages:
        stage = manifest.stages.get(case.stage)
        if stage is None:
            raise UsageError(
                f"{path} has results of a stage {case.stage}, but the bundle has no such stage",
                hint="the reference file was made for another model",
            )
        for tensor in stage.artifacts[0].spec.inputs:
            held = case.feeds.get(tensor.name)
            fixed = (
                None
                if held is None or held.ndim != len(tensor.shape)
                else [
                    (size, known)
                    for size, known in zip(held.shape, tensor.shape, strict=True)
                    if isinstance(known, int)
                ]
            )
            if fixed is None or any(size != known for size, known in fixed):
                found = "nothing" if held is None else f"an array of shape {held.shape}"
                raise UsageError(
                    f"{path} has {found} for input {tensor.name} of {case.stage}, but the bundle takes {tensor.shape}",
                    hint="the reference file was made for another model",
                )


def _below(tensors: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    return {name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)}
