"""What `ditc build` prints after an 8-bit build: coverage, layers kept in high precision, fidelity and speed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ditc.export.options import BuildOptions
from ditc.export.quant.measure import Measurement, known_measurement, measure, save_measurement
from ditc.export.quant.record import QuantRecord, read_record
from ditc.runtime.bundle.manifest import Artifact, Manifest
from ditc.runtime.sessions.registry import is_graph
from ditc.runtime.spec import DENOISER, Precision

NUMBERS_ONLY = (
    "ONNX Runtime's CPU provider computes FP8 graphs in fp32: this is the fidelity of FP8, but not its speed"
)


def report(
    bundle: Path,
    manifest: Manifest,
    options: BuildOptions,
    on_progress: Callable[[str], None] = lambda _: None,
) -> list[str]:
    """Lines about the 8-bit stages that were just built. The denoiser's measurement is saved in the bundle.

    Args:
        on_progress: is told what is being done while the denoiser is measured.
    """
    lines = _denoiser(bundle, manifest, options, on_progress) if options.quantized else []
    for name, stage in manifest.stages.items():
        graphs = [a for a in stage.artifacts if is_graph(a) and a.recipe is not None]
        if name != DENOISER and options.recipes:
            for artifact in graphs:
                lines += _coverage(bundle, artifact)
                lines.append(f"  to run it: --stage-precision {name}={artifact.precision.value}")
    return lines


def _denoiser(
    bundle: Path, manifest: Manifest, options: BuildOptions, on_progress: Callable[[str], None]
) -> list[str]:
    precision = options.precision
    artifact = next(
        a for a in manifest.stages[DENOISER].artifacts if a.precision is precision and is_graph(a)
    )
    lines = _coverage(bundle, artifact)
    if any(t.dtype.value == "bfloat16" for t in artifact.spec.inputs):
        return [*lines, "fidelity and speed: not measured, because ONNX Runtime's CPU provider has no bf16"]
    known = known_measurement(bundle, manifest, artifact.key)
    if known is not None:
        return [*lines, *measured_lines(known, precision)]
    measurement = measure(bundle, manifest, precision, on_progress=on_progress)
    if measurement is None:
        hint = f"build it into this bundle with --precision {options.base.value}, then build again"
        why = f"the bundle has no {options.base.value} denoiser to compare it with"
        return [*lines, f"fidelity and speed: not measured, because {why} (hint: {hint})"]
    save_measurement(measurement, bundle)
    return [*lines, *measured_lines(measurement, precision)]


def _coverage(bundle: Path, artifact: Artifact) -> list[str]:
    assert artifact.quantization is not None
    return coverage_lines(read_record(bundle / artifact.quantization.path))


def coverage_lines(record: QuantRecord) -> list[str]:
    """Coverage, size, and the layers kept in high precision, largest first."""
    coverage = record.coverage
    lines = [
        f"{record.recipe.name}: {coverage.layers} layers in 8 bits, {coverage.gemm_share:.1%} of GEMM FLOPs "
        f"({coverage.product_share:.1%} with attention's products and convolutions), "
        f"{coverage.weight_share:.1%} of weights",
        f"weights {coverage.size_bytes / 1e6:.1f} MB, {coverage.fp16_bytes / 1e6:.1f} MB in fp16; "
        f"{len(record.smoothed)} layers smoothed",
    ]
    if record.calibration is not None:
        lines.append(f"calibration: {record.calibration}")
    lines += [
        f"  kept in high precision: {layer.name} ({layer.share:.2%}): {layer.why}" for layer in coverage.high
    ]
    return lines


def measured_lines(m: Measurement, precision: Precision) -> list[str]:
    """Fidelity and speed, with a warning if 8 bits are not faster."""
    lines = [
        f"fidelity: PSNR {m.psnr_db:.1f} dB (worst {m.worst_db:.1f}) over {m.prompts} prompts x "
        f"{m.num_inference_steps} steps, latents {m.latents_rel_l2:.4f} relative L2, against the unquantized bundle",
        f"speed: step {m.step_ms:.1f} ms, unquantized {m.base_step_ms:.1f} ms: {m.speedup:.2f} x "
        f"({m.speedup_low:.2f} to {m.speedup_high:.2f}) on {m.machine}",
    ]
    if precision is Precision.FP8:
        lines.append(f"note: {NUMBERS_ONLY}")
    elif m.speedup <= 1:
        lines.append("warning: 8 bits are not faster here than the unquantized denoiser")
    return lines
