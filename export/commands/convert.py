"""`ditc convert`: turn a checkpoint in its family's own layout into a diffusers directory, and back."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the paths, and options for what the file does not say about its network."""
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="A .pth or .safetensors file in the family's own layout; with --to-native, a diffusers directory.",
    )
    parser.add_argument(
        "out",
        type=Path,
        metavar="OUT",
        help="Diffusers directory to make; with --to-native, .safetensors file to write.",
    )
    parser.add_argument(
        "--to-native",
        action="store_true",
        help="Convert from diffusers to the family's own layout (default: to diffusers).",
    )
    parser.add_argument(
        "--base",
        metavar="CHECKPOINT",
        help="Diffusers checkpoint that provides the components which SOURCE does not hold, such as the text encoder "
        "(default: they are left out).",
    )
    parser.add_argument(
        "--variant",
        metavar="NAME",
        help="Variant of the diffusers checkpoint's weight files, such as fp16 (default: files without one).",
    )
    parser.add_argument(
        "--ema",
        action="store_true",
        help="Convert the averaged weights of a training file, state_dict_ema (default: state_dict).",
    )
    group = parser.add_argument_group("settings that the tensors of a native file do not show")
    group.add_argument(
        "--resolution",
        type=int,
        metavar="PX",
        help="Side in pixels of the square pictures that the network was trained for, such as 1024 (default: none; an "
        "error says when it is needed).",
    )
    group.add_argument(
        "--flow-shift",
        type=float,
        metavar="SHIFT",
        help="Shift of the sampler's noise schedule, without a unit, such as 3 (default: none; an error says when "
        "it is needed).",
    )
    group.add_argument(
        "--position-embedding",
        choices=("none", "sincos"),
        help="Kind of the network's position embedding (default: none; an error says when it is needed).",
    )
    group.add_argument(
        "--interpolation-scale",
        type=float,
        metavar="SCALE",
        help="Scale of the positions in the sincos position embedding, without a unit (default: none; sincos needs "
        "one).",
    )
    group.add_argument(
        "--dtype",
        choices=("fp32", "fp16", "bf16"),
        help="Element type to write (default: the file's, if the family allows it; else an error says that it is "
        "needed).",
    )
    for option, what in (
        ("attention-head-dim", "self-attention"),
        ("cross-attention-head-dim", "cross-attention"),
    ):
        group.add_argument(
            f"--{option}",
            type=int,
            metavar="CHANNELS",
            help=f"Number of channels of each {what} head (default: that of the release with this hidden size).",
        )


def run(arguments: argparse.Namespace) -> int:
    """Convert the checkpoint, and print the path of the result."""
    from ditc.export.convert.layout import NativeOptions
    from ditc.export.convert.native import convert, convert_to_native

    if arguments.to_native:
        written = convert_to_native(arguments.source, arguments.out, variant=arguments.variant)
    else:
        names = (field.name for field in fields(NativeOptions))
        options = NativeOptions(**{name: getattr(arguments, name) for name in names})
        written = convert(
            Path(arguments.source),
            arguments.out,
            options=options,
            base=arguments.base,
            variant=arguments.variant,
            ema=arguments.ema,
        )
    sys.stdout.write(f"{written}\n")
    return 0
