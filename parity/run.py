"""One parity run: check the requested levels in order, and gather the results in a Report."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

from ditc.parity.context import Context
from ditc.parity.levels import LEVELS
from ditc.parity.results import Report, Result, not_checked
from ditc.runtime.bundle.jsondata import to_json
from ditc.runtime.machine import library_versions, this_machine
from ditc.runtime.tolerances import Level

NEED_CHECKPOINT = (Level.GRAPH, Level.MODULE)


def run_parity(context: Context, levels: Sequence[Level] = tuple(Level)) -> Report:
    """Run the levels on a context. The context stays open.

    Raises:
        NumericsError: the reference is not usable: it has NaN or Inf, or a picture of one colour.
        CheckpointError: the checkpoint cannot be read.
    """
    results: list[Result] = []
    seconds: dict[str, float] = {}
    for level in Level:
        if level not in levels:
            continue
        started = perf_counter()
        if context.saved_reference is not None and level in NEED_CHECKPOINT:
            why = "a reference file has neither weights nor modules: give --against CHECKPOINT"
            results.append(not_checked(level, "all", level.value, why))
            continue
        # Empty evidence is not evidence: a reference file may hold no cases of a stage.
        nothing = not_checked(level, "all", level.value, "there was nothing to compare")
        results += list(LEVELS[level](context)) or [nothing]
        seconds[level.value] = perf_counter() - started
    return Report(
        results=results,
        evidence=context.evidence,
        subject=describe(context),
        machine=to_json(this_machine()),
        tools=library_versions(),
        seconds=seconds,
    )


def describe(context: Context) -> dict[str, object]:
    """What was compared with what: settings, and the hashes of all files."""
    candidate, settings = context.candidate, context.settings
    return {
        "bundle": candidate.manifest.digest,
        "candidate": candidate.pipeline.chosen,
        "artifacts": {stage: a.file.sha256 for stage, a in sorted(candidate.artifacts.items())},
        "precisions": {stage: p.value for stage, p in sorted(candidate.precisions.items())},
        "calibration": [
            line
            for stage, c in sorted(candidate.calibrations.items())
            for line in (f"{stage}: {c}", *c.doubts)
        ],
        **origin_of(context),
        **({"loras": loras} if (loras := [f"{c.file.name}:{c.scale:g}" for c in candidate.given]) else {}),
        "prompts": list(dict.fromkeys(case.prompt for case in settings.cases)),
        "seeds": list(dict.fromkeys(case.seed for case in settings.cases)),
        "num_inference_steps": settings.num_inference_steps,
        "guidance_scale": settings.guidance_scale,
        "height": settings.height,
        "width": settings.width,
    }


def origin_of(context: Context) -> dict[str, object]:
    """Where the reference comes from: a checkpoint on this machine, or a file."""
    if context.saved_reference is not None:
        names = ["PyTorch fp32", *([context.upstream_name] if context.saved_reference.upstream else [])]
        return {**context.saved_reference.origin, "references": [f"{name}, from a file" for name in names]}
    return {
        "checkpoint": context.reference.checkpoint.path.name,
        "weights": context.reference.weights_digest(),
        "references": ["PyTorch fp32", *([] if context.why_no_upstream else [context.upstream_name])],
    }
