"""`ditc inspect BUNDLE`: shows what a bundle holds, without loading any graph, engine or weights."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ditc.runtime.commands.bundle_argument import add_bundle_argument, read_bundle_argument
from ditc.runtime.errors import BundleError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ditc.runtime.bundle.manifest import Artifact, Manifest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the bundle's argument, and the option for the output's form."""
    add_bundle_argument(parser)
    parser.add_argument(
        "--json",
        action="store_true",
        help="Print the whole manifest as JSON (default: a table of its stages).",
    )


def run(arguments: argparse.Namespace) -> int:
    """Print a table of stages, or the manifest itself."""
    from ditc.runtime.bundle.jsondata import to_json
    from ditc.runtime.bundle.manifest import load_manifest

    arguments.bundle = read_bundle_argument(arguments, whole=False)
    manifest = load_manifest(arguments.bundle)
    if arguments.json:
        sys.stdout.write(json.dumps(to_json(manifest)) + "\n")
        return 0
    from rich.table import Table

    from ditc.runtime.console import SafeConsole
    from ditc.runtime.printable import one_line

    # In a file or a pipe, the lines of the table must not be wrapped.
    width = None if sys.stdout.isatty() else 240
    console = SafeConsole(stdout=True, soft_wrap=True, width=width)
    defaults, scheduler = manifest.defaults, manifest.scheduler
    sizes = f"{len(defaults.bins)} resolution bins" if defaults.bins else "no resolution bins"
    console.print(
        one_line(
            f"{arguments.bundle}  {manifest.family}, from {manifest.checkpoint}, digest {manifest.digest[:12]}"
        )
    )
    video = f", {defaults.frames} frames at {defaults.fps} a second" if defaults.frames else ""
    console.print(
        f"defaults: {defaults.height}x{defaults.width} ({sizes}){video}, {defaults.num_inference_steps} steps of "
        f"{scheduler.kind}, guidance_scale {defaults.guidance_scale}"
    )
    if skip := defaults.skip_layer_guidance:
        layers, window = ", ".join(map(str, skip.layers)), f"from {skip.start} to {skip.stop} of the steps"
        scale = f"scale {skip.scale}, {window}" if skip.scale else "off unless a request asks for it"
        console.print(f"skip-layer guidance: layers {layers}, {scale}")
    if pag := defaults.perturbed_attention_guidance:
        layers, adaptive = ", ".join(map(str, pag.layers)), pag.adaptive_scale
        scale = f"pag_scale {pag.scale}" if pag.scale else "off unless a request asks for it"
        scale += f", pag_adaptive_scale {adaptive}" if adaptive else ""
        console.print(f"perturbed-attention guidance: layers {layers}, {scale}")
    for lora in manifest.loras:
        where = f"in the weights of {', '.join(lora.components)}"
        console.print(
            one_line(f"LoRA: {lora.file}, scale {lora.scale:g}, {where}, sha256 {lora.sha256[:12]}")
        )
    # The table fits 80 columns. The stages' inputs are longer and follow on lines of their own.
    columns = ("stage", "precision", "backend", "targets", "MB", "build time", "peak memory")
    table = Table(*columns, box=None, padding=(0, 2, 0, 0))
    for name, stage in manifest.stages.items():
        for artifact in stage.artifacts:
            size = sum(ref.size_bytes for ref in artifact.files) / 1e6
            targets = " ".join(artifact.targets) or "-"
            backend = " ".join(filter(None, (artifact.backend.value, artifact.library)))
            cost = _cost(arguments.bundle, name, artifact)
            row = (name, artifact.precision.value, backend, targets, f"{size:.1f}", *cost)
            table.add_row(*map(one_line, row))
    console.print(table)
    for line in _inputs(manifest):
        console.print(one_line(line))
    for line in (*_calibrations(arguments.bundle, manifest), *_certificates(arguments.bundle, manifest)):
        console.print(one_line(line))
    return 0


def _inputs(manifest: Manifest) -> Iterator[str]:
    """One line per stage with its inputs; more only if its artifacts differ in them."""
    for name, stage in manifest.stages.items():
        shapes = [
            ", ".join(f"{t.name}({','.join(map(str, t.shape))})" for t in artifact.spec.inputs)
            for artifact in stage.artifacts
        ]
        for inputs in dict.fromkeys(shapes):
            yield f"{name} takes {inputs}"


def _calibrations(bundle: Path, manifest: Manifest) -> Iterator[str]:
    """What the ranges of each 8-bit artifact rest on, and one line for each reason to doubt them."""
    from ditc.runtime.bundle.calibration import read_calibration

    for name, stage in manifest.stages.items():
        for artifact in stage.artifacts:
            if (calibration := read_calibration(bundle, artifact)) is None:
                continue
            yield f"calibration: {name} {artifact.precision.value}: {calibration}"
            yield from (f"  doubt: {doubt}" for doubt in calibration.doubts)


def _certificates(bundle: Path, manifest: Manifest) -> Iterator[str]:
    """One line per record of certificate.json, or why it has none that count."""
    from ditc.runtime.bundle.certificate import read_certificate
    from ditc.runtime.bundle.certification import RENEWAL, why_weak

    try:
        certificate = read_certificate(bundle)
    except BundleError as e:
        yield f"certificate: ignored, because {e}"
        return
    if certificate is None:
        yield "certificate: none yet (ditc parity BUNDLE --against CHECKPOINT writes one)"
    elif certificate.manifest != manifest.digest:
        yield f"certificate: ignored, because it is of another build, with the digest {certificate.manifest[:12]}"
    elif certificate.outdated:
        yield f"certificate: ignored, because it is {RENEWAL}"
    for entry in certificate.entries if certificate and certificate.manifest == manifest.digest else ():
        for kind, found in (("parity", entry.parity), ("self-test", entry.self_test)):
            if found is None:
                continue
            unchecked = [line.name for line in found.lines if line.passed is None]
            note = f", not checked: {', '.join(unchecked)}" if unchecked else ""
            note += ", with a signature" if found.signature else ""
            verdict = "FAIL" if found.failed else "pass" if found.passed else "not checked"
            weak = why_weak(found, manifest) if kind == "parity" and not found.failed else ""
            note += f"; it proves less than --require-certificate asks for: {weak}" if weak else ""
            yield (
                f"certificate: {kind} {verdict}, artifacts {entry.artifact_set[:12]}, {found.date}, "
                f"{entry.machine}{note}"
            )


def _cost(bundle: Path, stage: str, artifact: Artifact) -> tuple[str, str]:
    """Time and memory of the artifact's build; "-" if the bundle no longer has its build records."""
    from ditc.runtime.bundle.build_cost import read_cost

    cost = read_cost(bundle, stage, artifact)
    return ("-", "-") if cost is None else (f"{cost.seconds:.1f} s", f"{cost.peak_memory_bytes / 1e9:.1f} GB")
