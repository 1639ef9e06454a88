"""Build an engine from an ONNX graph.

TensorRT-RTX builds ahead of time on any CPU; TensorRT builds on the GPU that will run the engine. Both take the same
graph through the same code. The graph decides the precision; the builder only gets sizes (optimisation profiles) and
targets. One file serves all targets: see docs/engines.md.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ditc.export.engine.graph_files import graph_size_bytes, inlined
from ditc.export.engine.memory import PeakMemory, estimate_build_bytes
from ditc.export.engine.plugins import has_linear_attention, with_plugin
from ditc.export.engine.targets import SM75_HINT, check_targets, check_types
from ditc.export.engine.tensorrt import Compiler, Progress, ShapeRange, load_library
from ditc.runtime.atomic import atomic_path, write_atomic
from ditc.runtime.errors import BuildError
from ditc.runtime.sessions.registry import row_of
from ditc.runtime.spec import Backend, Range, StageSpec

logger = logging.getLogger(__name__)

Profile = Mapping[str, Range]
LinearAttention = Literal["decomposed", "plugin"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineReport:
    """The engine file that a build made, and what the build took.

    Attributes:
        peak_memory_bytes: the largest resident size of the whole process during the build.
        num_layers: layers of the parsed network, before fusion.
        types: element types of the parsed network.
        tf32: the builder's TF32 flag, as read back.
        warnings: the library's warnings, oldest first.
    """

    file: Path
    size_bytes: int
    seconds: float
    peak_memory_bytes: int
    targets: tuple[str, ...]
    profiles: tuple[dict[str, Range], ...]
    library: str
    version: str
    num_layers: int
    types: tuple[str, ...]
    tf32: bool
    warnings: tuple[str, ...]


def library_version(backend: Backend) -> str:
    """The version of the installed builder.

    Raises:
        MissingExtra: it is not installed.
    """
    return str(load_library(backend).__version__)


def estimate_memory_bytes(onnx_path: Path) -> int:
    """Estimate how many bytes `build_engine` will take on top of what the process already holds.

    Raises:
        BuildError: the file is missing or not ONNX, or its external data is missing.
    """
    if not onnx_path.is_file():
        raise BuildError(f"{onnx_path} does not exist", hint="export the stage first")
    return estimate_build_bytes(graph_size_bytes(onnx_path))


def build_engine(
    onnx_path: Path,
    out: Path,
    *,
    spec: StageSpec,
    backend: Backend,
    targets: tuple[str, ...],
    profiles: Sequence[Profile] | None = None,
    timing_cache: Path | None = None,
    refit: Sequence[str] = (),
    tf32: bool = False,
    linear_attention: LinearAttention = "decomposed",
    weight_streaming: bool = False,
    progress: Progress | None = None,
) -> EngineReport:
    """Build one engine file for all targets and profiles.

    Args:
        onnx_path: the graph, with its external data beside it.
        out: the engine. It is written under a temporary name and renamed when it is complete.
        spec: the stage's inputs, and the ranges of their named dimensions.
        targets: names from `engine_targets(backend)` in engine/targets.py.
        profiles: optimisation profiles, each with the ranges that differ from spec.profile. None means one profile
            with the ranges of spec.profile.
        timing_cache: a file that builders which time kernels on the GPU read before the build and write after it.
        refit: the initializers whose values may be replaced later (REFIT_INDIVIDUAL). Without a GPU, TensorRT-RTX
            1.7.1 cannot build such engines of whole stages.
        tf32: allow TF32 in fp32 matrix products, which are exact fp32 otherwise.
        linear_attention: "decomposed" inlines the op's function; "plugin" leaves the op to ditc's plugin, if the graph
            has the op (docs/backends.md).
        weight_streaming: allow the runtime to keep weights on the host (`ditc run --low-vram`). On TensorRT-RTX such
            an engine may allocate while it runs, so capture in a CUDA graph is not promised.
        progress: called as progress(phase, step, steps). An exception in it stops the build.

    Raises:
        UsageError: the backend builds no engines, or not for a target.
        MissingExtra: the backend's library is not installed.
        BuildError: the graph cannot be built. The message names the stage, the layer and what the library says.
        OutputError: the engine cannot be written.
    """
    check_targets(backend, targets)
    _check_files(spec, onnx_path, out)
    plugin = _uses_plugin(spec, onnx_path, targets, linear_attention)
    used = tuple({**spec.profile, **profile} for profile in profiles or ({},))
    begin = time.monotonic()
    with PeakMemory() as memory:
        compiler = Compiler(backend, progress, plugins=plugin)
        _parse(compiler, spec, onnx_path, plugin=plugin)
        check_types(targets, compiler.types())
        for profile in used:
            _add_profile(compiler, spec, profile)
        compiler.set_targets(targets)
        _allow_refit(compiler, spec, refit)
        _set_flags(compiler, tf32=tf32, weight_streaming=weight_streaming)
        _compile(compiler, spec, out, timing_cache)
    return _report(compiler, out, targets, used, time.monotonic() - begin, memory.peak_bytes)


def _check_files(spec: StageSpec, onnx_path: Path, out: Path) -> None:
    """Refuse a graph that is missing and a disk that cannot hold the engine; make the engine's folder."""
    if not onnx_path.is_file():
        raise BuildError(f"{spec.name}: {onnx_path} does not exist", hint="export the stage first")
    out.parent.mkdir(parents=True, exist_ok=True)
    _check_space(spec, onnx_path, out)


def _uses_plugin(
    spec: StageSpec, onnx_path: Path, targets: tuple[str, ...], linear_attention: LinearAttention
) -> bool:
    """Whether ditc's plugin is asked for, and the graph has linear attention that it can compute."""
    plugin = linear_attention == "plugin" and has_linear_attention(onnx_path)
    if plugin and "sm75" in targets:
        raise BuildError(
            f"{spec.name}: sm75 cannot run the linear-attention plugin, because its kernels are compiled for sm80",
            hint="leave sm75 out of --targets, or build with --linear-attention decomposed",
        )
    return plugin


def _allow_refit(compiler: Compiler, spec: StageSpec, names: Sequence[str]) -> None:
    lacking = compiler.allow_refit(names) if names else []
    if lacking:
        raise BuildError(
            f"{spec.name}: {compiler.backend} cannot keep {lacking[0]} replaceable, because its network has no "
            f"weight of this name ({len(lacking)} of {len(names)} are missing)",
            hint="build without --refit, and put LoRAs into the weights with --lora",
        )


def _set_flags(compiler: Compiler, *, tf32: bool, weight_streaming: bool) -> None:
    """Set the builder's flags.

    REQUIRE_USER_ALLOCATION, which TensorRT-RTX's notes ask for under stream capture, stays unset: with a profile of
    more than one size, an engine that has it ends the process at its first run (1.4 to 1.7.1).
    """
    compiler.allow_tf32(tf32)
    if weight_streaming:
        compiler.allow_weight_streaming()


def _compile(compiler: Compiler, spec: StageSpec, out: Path, timing_cache: Path | None) -> None:
    """Write the engine to `out`. A builder that times kernels starts from the timing cache and updates it."""
    if timing_cache is None or not row_of(compiler.backend).built_on_gpu:
        _write(compiler, spec, out)
        return
    compiler.use_timing_cache(timing_cache.read_bytes() if timing_cache.is_file() else b"")
    _write(compiler, spec, out)
    write_atomic(timing_cache, compiler.timing_cache(), durable=False)


def _report(
    compiler: Compiler,
    out: Path,
    targets: tuple[str, ...],
    profiles: tuple[dict[str, Range], ...],
    seconds: float,
    peak_memory_bytes: int,
) -> EngineReport:
    return EngineReport(
        file=out,
        size_bytes=out.stat().st_size,
        seconds=seconds,
        peak_memory_bytes=peak_memory_bytes,
        targets=targets,
        profiles=profiles,
        library=compiler.backend.value,
        version=compiler.version,
        num_layers=compiler.num_layers,
        types=tuple(sorted(compiler.types())),
        tf32=compiler.tf32_allowed,
        warnings=tuple(compiler.warnings()),
    )


def _parse(compiler: Compiler, spec: StageSpec, onnx_path: Path, *, plugin: bool) -> None:
    with ExitStack() as stack:
        if plugin:
            onnx_path = stack.enter_context(with_plugin(onnx_path, compiler.backend))
        complaint = compiler.parse(stack.enter_context(inlined(onnx_path)))
    if complaint is not None:
        raise BuildError(
            f"{spec.name}: {compiler.backend} cannot read {onnx_path}: {complaint}",
            hint=_parse_hint(complaint),
        )
    found, wanted = compiler.inputs(), {tensor.name: tensor.shape for tensor in spec.inputs}
    if set(found) != set(wanted):
        raise BuildError(
            f"{spec.name}: {onnx_path} has inputs {sorted(found)}, but the stage's spec has {sorted(wanted)}",
            hint="the graph and the spec are from different exports: export the stage again",
        )
    for name, shape in found.items():
        fits = len(shape) == len(wanted[name]) and all(
            size in (-1, dim) for size, dim in zip(shape, wanted[name], strict=True)
        )
        if not fits:
            raise BuildError(
                f"{spec.name}: {onnx_path} has {name} {list(shape)}, but the stage's spec has {list(wanted[name])}",
                hint="-1 is a dynamic dimension; the graph and the spec are from different exports: "
                "export the stage again",
            )


def _add_profile(compiler: Compiler, spec: StageSpec, profile: Profile) -> None:
    shapes: dict[str, ShapeRange] = {}
    for tensor in spec.inputs:
        if -1 not in compiler.inputs()[tensor.name]:
            continue
        unknown = [dim for dim in tensor.shape if isinstance(dim, str) and dim not in profile]
        if unknown:
            raise BuildError(
                f"{spec.name}: input {tensor.name} has dimension {unknown[0]!r} without a range",
                hint=f"add a range for it to the profile, which has {', '.join(sorted(profile))}",
            )
        ranges = [Range(dim, dim, dim) if isinstance(dim, int) else profile[dim] for dim in tensor.shape]
        shapes[tensor.name] = (
            tuple(range_.min for range_ in ranges),
            tuple(range_.opt for range_ in ranges),
            tuple(range_.max for range_ in ranges),
        )
    if shapes and not compiler.add_profile(shapes):
        raise BuildError(
            f"{spec.name}: {compiler.backend} refuses the sizes {shapes}: {_last(compiler)}",
            hint="make sure that every range has min <= opt <= max",
        )


def _write(compiler: Compiler, spec: StageSpec, out: Path) -> None:
    with atomic_path(out, hint="build elsewhere") as partial, partial.open("wb") as file:
        if not compiler.build(file):
            raise _failure(compiler, spec)


def _failure(compiler: Compiler, spec: StageSpec) -> BuildError:
    text = "; ".join(compiler.errors()) or "the library gave no message"
    return BuildError(f"{spec.name}: {compiler.backend} {compiler.version} failed: {text}", hint=_hint(text))


# Substrings of the libraries' messages, and a hint for each.
HINTS = (
    ("for Turing (SM75)", SM75_HINT),
    ("HW-specific datatypes", "a target lacks an element type of the graph: build for fewer targets"),
    # TensorRT-RTX 1.7.1 compiles kernels at build time if weights stay refittable, so it needs a device.
    (
        "graph_jit.cpp",
        "weights that can be replaced need a GPU at build time: leave --refit out, or build on a machine with a GPU",
    ),
    ("CUDA driver version is insufficient", "build on a machine with a GPU and its driver"),
    ("out of memory", "make the largest sizes of the profile smaller, or decode in tiles"),
    ("OutOfMemory", "make the largest sizes of the profile smaller, or decode in tiles"),
    ("Could not find any implementation", "make the maximum of the profile smaller, or split it in several"),
    ("optimization profile", "a dynamic input has no range: check the stage's profile"),
)


def _hint(text: str) -> str:
    for part, hint in HINTS:
        if part in text:
            return hint
    return "run the stage with --backend onnxruntime: if that works, the graph is sound and the library has a limit"


def _parse_hint(complaint: str) -> str:
    if "Plugin not found" in complaint or "plugin" in complaint.lower():
        return "the graph has an op that the library lacks: export custom ops with their function bodies"
    return (
        "check the graph with onnx.checker.check_model: it is invalid, or uses an op that the library lacks"
    )


def _last(compiler: Compiler) -> str:
    return (compiler.errors() or ["the library gave no message"])[-1]


def _check_space(spec: StageSpec, onnx_path: Path, out: Path) -> None:
    """Refuse a disk with less free space than the engine needs, which is about the size of the graph and its data."""
    needed_bytes = graph_size_bytes(onnx_path)
    free_bytes = shutil.disk_usage(out.parent).free
    if free_bytes < needed_bytes:
        raise BuildError(
            f"{spec.name}: {out.parent} has {free_bytes / 2**20:.0f} MiB free, but the engine needs about "
            f"{needed_bytes / 2**20:.0f} MiB",
            hint="free some space, or build into a directory on another disk",
        )
