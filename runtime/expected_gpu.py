"""Says loudly that the CPU draws where a GPU was expected, and why. A CPU is up to a hundred times slower."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from ditc.runtime.bundle.manifest import Artifact, Manifest
from ditc.runtime.errors import SessionError, UsageError
from ditc.runtime.gpu import Gpu, find_gpus, may_have_gpu
from ditc.runtime.load_options import LoadOptions
from ditc.runtime.sessions.opening import check_artifact, check_engine, check_runs
from ditc.runtime.sessions.registry import AUTO, find_row, library_version
from ditc.runtime.spec import DENOISER

log = logging.getLogger(__name__)

ADVICE = "ditc doctor says what a GPU needs; --provider cpu asks for the CPU"


def check_cpu_is_meant(manifest: Manifest, options: LoadOptions) -> None:
    """Warn if the CPU was not asked for, and this machine has a GPU or the bundle has engines for one.

    On a machine that cannot have a GPU, nobody expects its engines to run, so the line is logged as information and not
    as a warning. The caller has found that the denoiser computes on the CPU.

    Raises:
        UsageError: the options name a GPU.
    """
    gpus, reasons = find_gpus(), list(_reasons(manifest))
    if options.gpu:
        raise UsageError(
            f"GPU {options.gpu} is named, but the denoiser would run on the CPU{_because(reasons)}",
            hint="see ditc doctor for what a GPU needs, or leave out --device",
        )
    if options.named_backend == AUTO and (gpus or reasons):
        has = f"this machine has {gpus[0].name}" if gpus else "the bundle has engines"
        level = logging.WARNING if gpus or may_have_gpu() else logging.INFO
        log.log(level, "the denoiser runs on the CPU, although %s%s (%s)", has, _because(reasons), ADVICE)


def _because(reasons: list[str]) -> str:
    return "".join(f"; {reason}" for reason in dict.fromkeys(reasons))


def _reasons(manifest: Manifest) -> Iterator[str]:
    """Why each engine of the denoiser is not used, and the number of a GPU that it would run on."""
    for artifact in manifest.stages[DENOISER].artifacts:
        row = find_row(artifact.backend)
        if row is None or not row.same_gpu:
            continue
        try:
            check_runs(artifact)
            check_artifact(artifact)
        except SessionError as e:
            yield f"{e}{_elsewhere(artifact)}"


def _elsewhere(artifact: Artifact) -> str:
    """The other GPUs of this machine that an engine would run on."""
    fitting = []
    for number, gpu in enumerate(find_gpus()[1:], start=1):
        try:
            check_engine(artifact, gpu=Gpu(gpu.name, gpu.sm), library=library_version(artifact.backend))
        except SessionError:
            continue
        fitting.append(f"; it fits {gpu.name}: --device {number}")
    return "".join(fitting)
