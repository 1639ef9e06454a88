"""`ditc build CHECKPOINT -o BUNDLE`: export every stage that is not up to date."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ditc.runtime.sessions.registry import GRAPH_BACKEND, build_backends
from ditc.runtime.spec import Backend, Precision

if TYPE_CHECKING:
    from ditc.export.build.events import BuildEvent, BuildReport
    from ditc.export.options import BuildOptions

# The event that says how much memory the build will take. It is printed, and not only shown in the progress line.
MEMORY = "memory"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a build. Everything else comes from the checkpoint."""
    parser.add_argument("checkpoint", help="a diffusers directory")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="BUNDLE")
    parser.add_argument(
        "--variant",
        metavar="NAME",
        help="of the checkpoint's weight files, such as fp16 (default: those without one)",
    )
    parser.add_argument(
        "--precision",
        default=Precision.FP32.value,
        choices=[p.value for p in Precision],
        help="of the denoiser",
    )
    parser.add_argument(
        "--backend",
        default=GRAPH_BACKEND,
        choices=build_backends(),
        help="engines are built in addition to the ONNX graphs that they are made from (default: %(default)s)",
    )
    parser.add_argument(
        "--targets",
        default="",
        metavar="SM,SM",
        help="engines: comma-separated, such as sm80,sm86,sm89,sm120",
    )
    parser.add_argument(
        "--linear-attention",
        default="decomposed",
        choices=["decomposed", "plugin"],
        help="engines: from standard ops, or by ditc's plugin, which needs the extra `plugin` (default: %(default)s)",
    )
    parser.add_argument(
        "--weight-streaming",
        action="store_true",
        help="engines: let the weights stay in host memory when run with --low-vram",
    )
    parser.add_argument(
        "--resolution", type=int, metavar="PX", help="nominal size (default: the checkpoint's)"
    )
    parser.add_argument(
        "--max-batch", type=int, default=4, metavar="N", help="most pictures in one denoiser run"
    )
    parser.add_argument(
        "--recipe", metavar="NAME", help="8 bits: a recipe's name or .json (default: FAMILY-int8, FAMILY-fp8)"
    )
    parser.add_argument(
        "--ranges",
        type=Path,
        metavar="FILE",
        help="8 bits: what `ditc calibrate` measured on this checkpoint",
    )
    parser.add_argument(
        "--base-precision",
        choices=["fp32", "fp16", "bf16"],
        help="8 bits: everything else's (default: fp32 for ONNX Runtime, fp16 for engines)",
    )
    parser.add_argument(
        "--opset",
        type=int,
        default=20,
        choices=[20, 23],
        help="of the ONNX graphs: 23 writes attention and RMS norms as single operations, for ONNX Runtime; engines "
        "are built from 20; bf16 stages are 22 at least (default: %(default)s)",
    )
    parser.add_argument(
        "--raw", action="store_true", help="also export the network alone, without the step around it"
    )
    parser.add_argument(
        "--sign", type=Path, metavar="KEY.pem", help="sign the bundle with this ed25519 private key"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Build, then print one line per stage to stderr and one summary line to stdout."""
    from ditc.export.build.noop import up_to_date

    options = build_options(arguments)
    if arguments.sign is not None:
        from ditc.runtime.bundle.signature import load_private_key

        load_private_key(arguments.sign)  # an unusable key is refused before the build, not after it
    report = up_to_date(arguments.checkpoint, arguments.output, options)
    if report is not None:  # nothing to do: torch, whose import takes seconds, is not needed
        for event in report.events:
            sys.stderr.write(_line(event) + "\n")
    else:
        report = _build(arguments.checkpoint, arguments.output, options)
    if options.quantized:
        from ditc.export.commands import quantization

        for line in quantization.report(report.bundle, report.manifest, options.precision):
            sys.stderr.write(line + "\n")
    _print(report, as_json=arguments.json)
    if arguments.sign is not None:
        from ditc.runtime.bundle.signature import sign

        sign(report.bundle, arguments.sign)
    return 0


def build_options(arguments: argparse.Namespace) -> BuildOptions:
    """The options of the build that the arguments ask for."""
    from ditc.export.options import BuildOptions

    return BuildOptions(
        precision=Precision(arguments.precision),
        backend=Backend(arguments.backend),
        variant=arguments.variant,
        resolution=arguments.resolution,
        max_batch=arguments.max_batch,
        targets=tuple(filter(None, map(str.strip, arguments.targets.split(",")))),
        raw=arguments.raw,
        recipe=arguments.recipe,
        ranges=arguments.ranges,
        base_precision=arguments.base_precision and Precision(arguments.base_precision),
        opset=arguments.opset,
        linear_attention=arguments.linear_attention,
        weight_streaming=arguments.weight_streaming,
    )


def _build(checkpoint: str, output: Path, options: BuildOptions) -> BuildReport:
    from rich.console import Console

    from ditc.export.build.builder import build_bundle

    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    with console.status("reading the checkpoint") as status:

        def on_event(event: BuildEvent) -> None:
            if event.stage == MEMORY:
                console.print(event.why)
            elif event.status == "building":
                status.update(f"{event.stage} ({event.why})")
            elif event.status == "working":
                status.update(f"{event.stage}: {event.why}")
            else:
                console.print(_line(event))

        return build_bundle(checkpoint, output, options, on_event=on_event)


def _line(event: BuildEvent) -> str:
    line = f"  {event.stage:<22}{event.status:<7}{event.size_bytes / 1e6:>9.1f} MB"
    if event.status != "built":
        return f"{line}  {event.why}"
    memory = f"{event.peak_memory_bytes / 1e9:.1f} GB, {event.estimated_memory_bytes / 1e9:.1f} estimated"
    return f"{line} {event.seconds:>7.1f} s  {event.why}; peak memory {memory}"


def _print(report: BuildReport, *, as_json: bool) -> None:
    built = [event for event in report.events if event.status == "built"]
    if as_json:
        stages = {
            e.stage: {
                "status": e.status,
                "why": e.why,
                "seconds": round(e.seconds, 3),
                "peak_memory_bytes": e.peak_memory_bytes,
                "estimated_memory_bytes": e.estimated_memory_bytes,
            }
            for e in report.events
        }
        result = {"bundle": str(report.bundle), "digest": report.manifest.digest, "stages": stages}
        seconds = round(report.seconds, 3)
        sys.stdout.write(json.dumps({**result, "seconds": seconds, "dropped": report.dropped}) + "\n")
        return
    peak = max((event.peak_memory_bytes for event in built), default=0)
    took = f" in {report.seconds:.1f} s" + (f", peak memory {peak / 1e9:.1f} GB" if peak else "")
    summary = f"{len(built)} of {len(report.events)} stages built{took}"
    sys.stdout.write(f"{report.bundle}: {summary}, digest {report.manifest.digest[:12]}\n")
    if report.dropped:
        sys.stdout.write(
            f"removed, because they were made from other weights, shapes or source of ditc: "
            f"{', '.join(report.dropped)}\n"
            "hint: if you still need them, build again in that precision and backend\n"
        )
