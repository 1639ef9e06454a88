"""GPU targets of an engine: which there are, and which element types each can run."""

from __future__ import annotations

from collections.abc import Collection

from ditc.runtime.errors import BuildError, UsageError
from ditc.runtime.sessions.registry import RTX_TARGETS
from ditc.runtime.spec import Backend, Precision

# Enterprise TensorRT has no cross compiler: it builds on the GPU that will run the engine. These name its
# HardwareCompatibilityLevel: this GPU model, any GPU of its compute capability, any GPU since Ampere.
TENSORRT_TARGETS = ("this-gpu", "same-compute-capability", "ampere-plus")

# First compute capability with the type in hardware. The builder of TensorRT-RTX 1.7.1 refuses older ones:
# "Cannot compile for target(s) sm86, because the model contains HW-specific datatypes: fp8_e4m3".
# fp4: TensorRT-RTX support matrix 1.5.
FIRST_SM = {"bf16": 80, "fp8": 89, "fp4": 120}

# "Cannot compile operation ... for Turing (SM75): FP32 GEMM is not supported", TensorRT-RTX 1.7.1.
SM75_HINT = "leave sm75 out: fp32 networks, and the fp32 parts that 16-bit networks keep, need sm80"


def engine_targets(backend: Backend) -> tuple[str, ...]:
    """Every target that the backend can build for; () for a backend that builds no engines."""
    if backend is Backend.TENSORRT_RTX:
        return RTX_TARGETS
    return TENSORRT_TARGETS if backend is Backend.TENSORRT else ()


def default_targets(backend: Backend, precision: Precision) -> tuple[str, ...]:
    """What a build serves when the user names nothing: every generation that has bf16 and the precision's type."""
    if backend is not Backend.TENSORRT_RTX:
        return engine_targets(backend)[:1]
    return tuple(
        target
        for target in ("sm80", "sm86", "sm89", "sm120")
        if _sm(target) >= FIRST_SM.get(precision.value, 0)
    )


def check_targets(backend: Backend, targets: Collection[str], precision: Precision | None = None) -> None:
    """Refuse targets that the backend cannot build for, in that precision if one is given.

    Raises:
        UsageError: no target, an unknown one, several for enterprise TensorRT, or a backend without engines.
        BuildError: a target whose hardware lacks the precision's element type.
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
            hint="ampere-plus gives one engine for several GPU classes",
        )
    if precision is None:
        return
    check_types(targets, {precision.value})
    if "sm75" in targets and precision in (Precision.FP32, Precision.TF32):
        raise BuildError("sm75 cannot run fp32: TensorRT-RTX has no fp32 GEMM for it", hint=SM75_HINT)


def check_types(targets: Collection[str], types: Collection[str]) -> None:
    """Refuse element types that a target's hardware does not have.

    Args:
        targets: "sm86" and the like; other names are not judged.
        types: "bf16", "fp8", "fp4" and others, which every target has.

    Raises:
        BuildError: with the type, the targets that lack it and those that have it.
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
