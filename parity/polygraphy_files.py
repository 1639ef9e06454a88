"""Write the stage level's inputs and PyTorch's results as Polygraphy files, and a script that compares with them.

This is for users who want to continue with NVIDIA's tools: to mark layers of an engine as outputs, to try other builder
settings, or to compare on another machine. The bounds are those of ditc: Polygraphy's SNR,
10 log10(|reference|^2 / |error|^2), is -20 log10 of the relative L2 error (polygraphy/comparator/compare.py,
SnrCompareFunc).
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ditc.parity.candidate import fit_feeds
from ditc.parity.cases import StageCase
from ditc.parity.context import Context
from ditc.parity.levels.stage import judged_outputs, stage_bound, stage_cases
from ditc.runtime.atomic import atomic_path, write_atomic
from ditc.runtime.errors import MissingExtra
from ditc.runtime.session import Array, numpy_dtype
from ditc.runtime.sessions.registry import row_of
from ditc.runtime.spec import DType

SCRIPT = "compare.sh"
HINT = "choose another --save-polygraphy"


def save_polygraphy(folder: Path, context: Context) -> Path:
    """Write STAGE-inputs.json and STAGE-pytorch.json per stage, and a script with one `polygraphy run` per stage.

    Two kinds of stages are left out: those of backends that Polygraphy does not run, and those in bf16, because the
    files hold NumPy arrays, which have no bf16. The script has a comment in their place.

    Raises:
        MissingExtra: Polygraphy is not installed. OutputError: the folder cannot be written to.
    """
    try:
        from polygraphy.comparator import RunResults
    except ImportError as e:
        raise MissingExtra("polygraphy", "parity") from e
    lines = [
        "#!/bin/sh",
        "# Compares each stage, as it is deployed, with what PyTorch computed in fp32.",
        'cd "$(dirname "$0")" || exit 2',
        "failed=0",
    ]
    for stage, session in context.candidate.sessions.items():
        if any(tensor.dtype is DType.BFLOAT16 for tensor in (*session.spec.inputs, *session.spec.outputs)):
            lines.append(f"# {stage} is left out: Polygraphy's files have no bf16")
            continue
        backend = row_of(context.candidate.artifacts[stage].backend)
        if not backend.polygraphy:
            lines.append(f"# {stage} is left out: Polygraphy does not run {backend.title}")
            continue
        cases = list(stage_cases(context, stage))
        results = RunResults()
        results.add([_judged(context, case) for case in cases], runner_name="PyTorch fp32")
        kinds = {tensor.name: numpy_dtype(tensor.dtype) for tensor in session.spec.inputs}
        feeds = [
            {name: array.astype(kinds[name]) for name, array in fit_feeds(case.feeds, session.spec).items()}
            for case in cases
        ]
        _save(feeds, folder / f"{stage}-inputs.json")
        _save(results, folder / f"{stage}-pytorch.json")
        lines.append(f"{_command(context, stage, _floors(context, cases))} || failed=1")
    write_atomic(folder / SCRIPT, "\n".join([*lines, "exit $failed"]) + "\n", hint=HINT)
    return folder


def _judged(context: Context, case: StageCase) -> dict[str, Array]:
    """The outputs that have a bound. All-zero outputs are left out, because they have no SNR."""
    return {
        name: array
        for name, array in judged_outputs(context, case).items()
        if array.any() and stage_bound(context, case, name) is not None
    }


def _floors(context: Context, cases: list[StageCase]) -> Mapping[str, float]:
    """The lowest allowed SNR of each output in dB. Polygraphy takes one for all cases, so the loosest bound counts."""
    bounds: dict[str, float] = {}
    for case in cases:
        for name in _judged(context, case):
            limit = stage_bound(context, case, name)
            assert limit is not None
            bounds[name] = max(bounds.get(name, 0.0), limit.bound)
    return {name: -20 * math.log10(bound) for name, bound in bounds.items()}


def _command(context: Context, stage: str, floors: Mapping[str, float]) -> str:
    artifact = context.candidate.artifacts[stage]
    assert context.candidate.bundle is not None
    model = str((context.candidate.bundle / artifact.file.path).absolute())
    words = ["--load-inputs", f"{stage}-inputs.json", "--load-outputs", f"{stage}-pytorch.json"]
    words += ["--compare", "snr", "--snr-threshold"]
    words += [f"{name}:{floor:.1f}" for name, floor in floors.items()]
    return f"{row_of(artifact.backend).polygraphy.format(model=shlex.quote(model))} {shlex.join(words)}"


def _save(data: Any, path: Path) -> None:
    from polygraphy.json import save_json

    with atomic_path(path, hint=HINT) as partial:
        save_json(data, str(partial))
