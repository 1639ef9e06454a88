"""The GPU targets that an engine can be built for, and the element types that each can run."""

from __future__ import annotations

from collections.abc import Collection

from ditc.runtime.errors import BuildError, UsageError
from ditc.runtime.sessions.registry import RTX_TARGETS
from ditc.runtime.spec import Backend, Precision

# Enterprise TensorRT has no cross compiler: it builds on the GPU that will run the engine. Its targets stand for its
# HardwareCompatibilityLevel: this GPU model, any GPU of the same compute capability, any GPU since Ampere.
TENSORRT_TARGETS = ("this-gpu", "same-compute-capability", "ampere-plus")

# The first compute capability whose hardware has the type. For older ones, TensorRT-RTX 1.7.1 refuses to build:
# "Cannot compile for target(s) sm86, because the model contains HW-specific datatypes: fp8_e4m3".
# The value for fp4 is from the TensorRT-RTX support matrix 1.5.
FIRST_SM = {"bf16": 80, "fp8": 89, "fp4": 120}

# TensorRT-RTX 1.7.1 says: "Cannot compile operation ... for Turing (SM75): FP32 GEMM is not supported".
SM75_HINT = "leave sm75 out: fp32 networks, and the fp32 parts that 16-bit networks keep, need sm80"


def engine_targets(backend: Backend) -> tuple[str, ...]:
    """All targets that the backend can build for; () for a backend that builds no engines."""
    if backend is Backend.TENSORRT_RTX:
        return RTX_TARGETS
    return TENSORRT_TARGETS if backend is Backend.TENSORRT else ()


def default_targets(backend: Backend, precision: Precision) -> tuple[str, ...]:
    """The targets of a build for which the user names none: every GPU generation with bf16 and the precision's type."""
    if backend is not Backend.TENSORRT_RTX:
        return engine_targets(backend)[:1]
    return tuple(
        target
        for target in ("sm80", "sm86", "sm89", "sm120")
        if _sm(target) >= FIRST_SM.get(precision.value, 0)
    )


def check_targets(backend: Backend, targets: Collection[str], precision: Precision | None = None) -> None:
    """Refuse targets that the backend cannot build for. If a precision is given, each target must be able to run it.

    Raises:
        UsageError: there is no target, a target is unknown, there are several for enterprise TensorRT, or the backend
            builds no engines.
        BuildError: the hardware of a target lacks the precision's element type.
    """
    known = engine_targets(backend)
    if not known:
        raise UsageError(f"backend {backend} builds no engines", hint="use tensorrt-rtx or tensorrt")
    if not targets:
        raise UsageError(f"no target for {backend}", hint=f"known targets: {', '.join(known)}")
    unknown = [target for target in targets if target not in known]
    if unknown:
        raise UsageError(f"{backend} cannot build for {', '.join(unknown)}", hint=_hint(backend, known))
    if backend is Backend.TENSORRT and len(targets) > 1:
        raise UsageError(
            f"{backend} builds for one target at a time, not {', '.join(targets)}",
            hint="use ampere-plus for one engine that runs on several GPU classes",
        )
    if precision is None:
        return
    check_types(targets, {precision.value})
    if "sm75" in targets and precision in (Precision.FP32, Precision.TF32):
        raise BuildError("sm75 cannot run fp32: TensorRT-RTX has no fp32 GEMM for it", hint=SM75_HINT)


def check_types(targets: Collection[str], types: Collection[str]) -> None:
    """Refuse element types that a target's hardware does not have.

    Args:
        targets: names such as "sm86". Other names are not checked.
        types: names such as "bf16", "fp8" and "fp4". Types without an entry in FIRST_SM run on every target.

    Raises:
        BuildError: a target lacks a type. The hint names the targets that have it.
    """
    for name in sorted(set(types) & set(FIRST_SM)):
        lacking = [target for target in targets if target.startswith("sm") and _sm(target) < FIRST_SM[name]]
        if lacking:
            having = [target for target in RTX_TARGETS if _sm(target) >= FIRST_SM[name]]
            raise BuildError(
                f"{', '.join(lacking)} cannot run {name}: its hardware begins at sm{FIRST_SM[name]}",
                hint=f"build {name} for {', '.join(having)} and another precision for {', '.join(lacking)}",
            )


def _sm(target: str) -> int:
    return int(target.removeprefix("sm"))


def _hint(backend: Backend, known: tuple[str, ...]) -> str:
    other = f"known targets: {', '.join(known)}"
    if backend is Backend.TENSORRT_RTX:
        return f"{other}; datacentre GPUs (sm90, sm100, sm103) need --backend tensorrt, built on that GPU"
    return f"{other}; build on the GPU that will run the engine, or use --backend tensorrt-rtx for sm targets"
