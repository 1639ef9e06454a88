"""`ditc build CHECKPOINT -o BUNDLE`: export every stage that is not up to date."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditc.export.commands.controlnet_argument import add_controlnet_argument
from ditc.runtime.gpu import check_device, select_gpu
from ditc.runtime.load_options import add_load_arguments
from ditc.runtime.lora.choice import add_lora_argument, parse_loras
from ditc.runtime.printable import one_line
from ditc.runtime.sessions.registry import GRAPH_BACKEND, build_backends
from ditc.runtime.spec import Backend, Precision

if TYPE_CHECKING:
    from ditc.export.build.events import BuildEvent, BuildReport
    from ditc.export.options import BuildOptions

# The event that says how much memory the build will take. It is printed, and not only shown in the progress line.
MEMORY = "memory"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for the user's choices. Everything else follows from the checkpoint."""
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="A diffusers directory, or the id of one on the Hugging Face hub.",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="BUNDLE",
        help="Directory to write the bundle to. If it is a bundle already, only what has changed is built.",
    )
    parser.add_argument(
        "--variant",
        metavar="NAME",
        help="Variant of the checkpoint's weight files, such as fp16 (default: files without one).",
    )
    parser.add_argument(
        "--precision",
        default=Precision.FP32.value,
        choices=[p.value for p in Precision],
        help="Precision of the denoiser's weights and matrix products. For 8 bits on a CPU, int8-dynamic is closer to "
        "fp32 than int8 and needs no calibration. The precision of the other stages follows from the model (default: "
        "%(default)s).",
    )
    _add_engine_arguments(parser)
    add_load_arguments(parser, "device", when="For engines that are tuned on a GPU.")
    parser.add_argument(
        "--resolution",
        type=int,
        metavar="PX",
        help="Nominal side of a square picture in pixels, from which default and allowed sizes follow (default: the "
        "checkpoint's).",
    )
    parser.add_argument(
        "--max-batch",
        type=int,
        default=4,
        metavar="PICTURES",
        help="Largest number of pictures in one run of the denoiser (default: %(default)s).",
    )
    _add_quantization_arguments(parser)
    parser.add_argument(
        "--opset",
        type=int,
        default=20,
        choices=[20, 23],
        help="Version of ONNX's operator set in the graphs. 23 writes attention and RMS norms as single operations, "
        "for ONNX Runtime; engines and OpenVINO need 20; bf16 stages have at least 22 (default: %(default)s).",
    )
    add_controlnet_argument(parser, "Build with this ControlNet, which is not part of the checkpoint.")
    add_lora_argument(parser, "Add this LoRA to the weights, with all its changes multiplied by SCALE.")
    parser.add_argument(
        "--raw",
        action="store_true",
        help="Also export the network alone, without the solver step around it (default: only with the step).",
    )
    parser.add_argument(
        "--sign",
        type=Path,
        metavar="KEY.pem",
        help="Sign the bundle with the ed25519 private key in this file. Of earlier builds, only what this key has "
        "signed is then reused (default: no signature).",
    )
    parser.add_argument("--json", action="store_true", help="Print the result as JSON (default: as text).")


def _add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend",
        default=GRAPH_BACKEND,
        choices=build_backends(),
        help="Library to build for. Every build makes ONNX graphs for ONNX Runtime; the other backends add what is "
        "built from them: engines for NVIDIA's GPUs, or OpenVINO's form of the graphs, for CPUs, and Intel's GPUs and "
        "NPUs (default: %(default)s).",
    )
    parser.add_argument(
        "--targets",
        default="",
        metavar="SM,SM",
        help="For engines: what to build for. TensorRT-RTX takes compute capabilities, separated by commas (default: "
        "those of sm80,sm86,sm89,sm120 that have the precision); TensorRT takes this-gpu, same-compute-capability or "
        "ampere-plus (default: this-gpu).",
    )
    parser.add_argument(
        "--linear-attention",
        default="decomposed",
        choices=["decomposed", "plugin"],
        help="For engines: compute linear attention with standard operations or with ditc's plugin, which needs the "
        "extra `plugin` (default: %(default)s).",
    )
    parser.add_argument(
        "--weight-streaming",
        action="store_true",
        help="For engines: let the weights stay in host memory when the bundle is run with --low-vram (default: all "
        "weights are in GPU memory).",
    )
    parser.add_argument(
        "--lora-inputs",
        action="store_true",
        help="For ONNX Runtime and OpenVINO: let the graphs take LoRAs as inputs, so that an open bundle changes to "
        "another --lora without opening its stages again (default: LoRAs are added to the weights).",
    )
    parser.add_argument(
        "--refit",
        action="store_true",
        help="For engines: keep the weights replaceable, so that the bundle can be run with a --lora (default: they "
        "are fixed). TensorRT-RTX then needs a GPU to build.",
    )


def _add_quantization_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--recipe",
        action="append",
        metavar="NAME",
        help="The name of a recipe, or a .json file with one: which layers of a stage are in 8 bits. May be given once "
        "per stage, such as FAMILY-int8, dc-ae-int8 and gemma2-int8-weights (default: for an 8-bit denoiser the "
        "checkpoint's own file recipe.PRECISION.json, else FAMILY-int8 or FAMILY-fp8; none for the other stages).",
    )
    parser.add_argument(
        "--ranges",
        action="append",
        type=Path,
        metavar="FILE",
        help="The ranges that `ditc calibrate` measured on a stage of this checkpoint. May be given once per stage "
        "(default: none; most recipes need them).",
    )
    parser.add_argument(
        "--base-precision",
        choices=["fp32", "fp16", "bf16"],
        help="With 8 bits: the precision of everything in the stage that is not in 8 bits (default: fp32 for ONNX "
        "Runtime and with int8-dynamic, fp16 for engines, bf16 for OpenVINO).",
    )


def run(arguments: argparse.Namespace) -> int:
    """Build, then print one line per stage to stderr and one summary line to stdout."""
    from ditc.export.build.noop import up_to_date

    options = build_options(arguments)
    check_device(arguments.device)
    select_gpu(arguments.device)
    key = None
    if arguments.sign is not None:
        from ditc.runtime.bundle.signature import load_private_key

        key = load_private_key(arguments.sign)  # an unusable key is refused before the build, not after it
    report = up_to_date(arguments.checkpoint, arguments.output, options, key=key)
    if report is not None:  # nothing to do: torch, whose import takes seconds, is not needed
        for event in report.events:
            sys.stderr.write(one_line(_line(event)) + "\n")
    else:
        report = _build(arguments.checkpoint, arguments.output, options, key)
    if options.quantized or options.recipes:
        _report_quantization(report, options)
    _print(report, as_json=arguments.json)
    if arguments.sign is not None:
        from ditc.runtime.bundle.integrity import check_bundle
        from ditc.runtime.bundle.signature import sign

        check_bundle(report.bundle, report.manifest)  # what is signed is what is on the disk
        sign(report.bundle, arguments.sign, report.manifest)
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
        recipes=tuple(arguments.recipe or ()),
        ranges=tuple(arguments.ranges or ()),
        base_precision=arguments.base_precision and Precision(arguments.base_precision),
        opset=arguments.opset,
        linear_attention=arguments.linear_attention,
        weight_streaming=arguments.weight_streaming,
        lora_inputs=arguments.lora_inputs,
        refit=arguments.refit,
        loras=parse_loras(arguments.lora),
        controlnet=arguments.controlnet,
    )


def _build(checkpoint: str, output: Path, options: BuildOptions, key: Any) -> BuildReport:
    from rich.text import Text

    from ditc.export.build.builder import build_bundle
    from ditc.runtime.console import SafeConsole

    console = SafeConsole(soft_wrap=True)
    with console.status("reading the checkpoint") as status:

        def on_event(event: BuildEvent) -> None:
            if event.stage == MEMORY:
                console.print(event.why)
            elif event.status == "building":
                status.update(Text(f"{event.stage} ({event.why})"))
            elif event.status == "working":
                status.update(Text(f"{event.stage}: {event.why}"))
            else:
                console.print(one_line(_line(event)))

        return build_bundle(checkpoint, output, options, key=key, on_event=on_event)


def _report_quantization(report: BuildReport, options: BuildOptions) -> None:
    """Print what 8 bits cost and gain. Pictures are drawn for it, which takes minutes for a large network on a CPU."""
    from rich.text import Text

    from ditc.export.commands import quantization
    from ditc.runtime.console import SafeConsole

    with SafeConsole(soft_wrap=True).status("comparing pictures") as status:
        lines = quantization.report(
            report.bundle, report.manifest, options, lambda text: status.update(Text(text))
        )
    for line in lines:
        sys.stderr.write(one_line(line) + "\n")


def _line(event: BuildEvent) -> str:
    line = f"  {event.stage:<26} {event.status:<7}{event.size_bytes / 1e6:>9.1f} MB"
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
            f"{one_line(', '.join(report.dropped))}\n"
            "hint: if you still need them, build again in that precision and backend\n"
        )
