"""`ditc convert`: turn a checkpoint in its family's own layout into a diffusers directory, and back."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    parser.add_argument(
        "source", help="native .pth or .safetensors file; with --to-native a diffusers directory"
    )
    parser.add_argument("out", type=Path, help="directory to make; with --to-native a .safetensors file")
    parser.add_argument("--to-native", action="store_true", help="write diffusers weights under native names")
    parser.add_argument("--base", help="diffusers checkpoint to copy text encoder, tokenizer and VAE from")
    parser.add_argument(
        "--variant",
        metavar="NAME",
        help="of a diffusers checkpoint's weight files, such as fp16 (default: none)",
    )
    parser.add_argument("--ema", action="store_true", help="take state_dict_ema of a training file")
    group = parser.add_argument_group("what a native checkpoint's keys cannot tell")
    group.add_argument("--resolution", type=int, help="pixels of a side it was trained for, say 1024")
    group.add_argument("--flow-shift", type=float, help="of the sampler, if it has one")
    group.add_argument("--position-embedding", choices=("none", "sincos"))
    group.add_argument("--interpolation-scale", type=float, help="of the sincos position embedding")
    group.add_argument(
        "--dtype",
        choices=("fp32", "fp16", "bf16"),
        help="element type to write (default: the file's, where the family allows it)",
    )
    group.add_argument("--attention-head-dim", type=int, help="for a hidden size that no release has")
    group.add_argument("--cross-attention-head-dim", type=int, help="for a hidden size that no release has")


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
