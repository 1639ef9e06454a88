"""`ditc build CHECKPOINT -o BUNDLE`: export every stage that is not up to date."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ditc.runtime.spec import Backend, Precision


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The user's choices; everything else comes from the checkpoint."""
    parser.add_argument("checkpoint", help="a diffusers directory")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="BUNDLE")
    parser.add_argument(
        "--precision",
        default=Precision.FP32.value,
        choices=[p.value for p in Precision],
        help="of the denoiser",
    )
    parser.add_argument(
        "--backend",
        default=Backend.ONNXRUNTIME.value,
        choices=["onnxruntime", "tensorrt-rtx", "tensorrt"],
        help="engines are built in addition to the ONNX graphs that they are made from (default: %(default)s)",
    )
    parser.add_argument(
        "--targets",
        default="",
        metavar="SM,SM",
        help="engines: comma-separated, such as sm80,sm86,sm89,sm120",
    )
    parser.add_argument(
        "--resolution", type=int, metavar="PX", help="nominal size (default: the checkpoint's)"
    )
    parser.add_argument(
        "--max-batch", type=int, default=4, metavar="N", help="most pictures in one denoiser run"
    )
    parser.add_argument(
        "--recipe", metavar="NAME", help="8 bits: a recipe's name or .json (default: sana-int8, sana-fp8)"
    )
    parser.add_argument(
        "--ranges", type=Path, metavar="FILE", help="8 bits: what `ditc calibrate` measured on this checkpoint"
    )
    parser.add_argument(
        "--base-precision",
        choices=["fp32", "fp16", "bf16"],
        help="8 bits: everything else's (default: fp32 for ONNX Runtime, fp16 for engines)",
    )
    parser.add_argument(
        "--raw", action="store_true", help="also export the network alone, without the step around it"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Build and print one line a stage to stderr and one summary line to stdout."""
    from rich.console import Console

    from ditc.export.bundle import BuildEvent, build_bundle
    from ditc.export.commands import quantization
    from ditc.export.stages import BuildOptions

    console = Console(stderr=True, highlight=False, markup=False)
    options = BuildOptions(
        precision=Precision(arguments.precision),
        backend=Backend(arguments.backend),
        resolution=arguments.resolution,
        max_batch=arguments.max_batch,
        raw=arguments.raw,
        recipe=arguments.recipe,
        ranges=arguments.ranges,
        base_precision=arguments.base_precision and Precision(arguments.base_precision),
        targets=tuple(filter(None, arguments.targets.split(","))),
    )
    with console.status("reading the checkpoint") as status:

        def on_event(event: BuildEvent) -> None:
            if event.status == "building":
                status.update(f"{event.stage}: exporting ({event.why})")
                return
            took = f"{event.seconds:.1f} s" if event.status == "built" else ""
            console.print(
                f"  {event.stage:<14}{event.status:<8}{event.size_bytes / 1e6:>9.1f} MB {took:>8}  {event.why}"
            )

        report = build_bundle(arguments.checkpoint, arguments.output, options, on_event=on_event)
        lines = []
        if options.quantized:
            status.update("measuring fidelity and speed")
            lines = quantization.report(report.bundle, report.manifest, options.precision)
    for line in lines:
        console.print(line, soft_wrap=True)
    built = sum(event.status == "built" for event in report.events)
    if arguments.json:
        stages = {
            e.stage: {"status": e.status, "why": e.why, "seconds": round(e.seconds, 3)} for e in report.events
        }
        result = {"bundle": str(report.bundle), "digest": report.manifest.digest, "stages": stages}
        sys.stdout.write(json.dumps({**result, "seconds": round(report.seconds, 3)}) + "\n")
    else:
        sys.stdout.write(
            f"{report.bundle}: {built} of {len(report.events)} stages built in {report.seconds:.1f} s, "
            f"digest {report.manifest.digest[:12]}\n"
        )
    return 0
