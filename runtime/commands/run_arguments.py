"""The options of `ditc run`. Those of the request have diffusers' names where it has them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Literal

from ditc.runtime.commands.bundle_argument import add_bundle_argument
from ditc.runtime.load_options import add_load_arguments
from ditc.runtime.lora.choice import add_lora_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for bundle, request and output. Those of the request have diffusers' names where it has them."""
    add_bundle_argument(parser)
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="The text that says what to draw.")
    parser.add_argument(
        "--prompt", metavar="TEXT", dest="prompt_option", help="The same as PROMPT (default: PROMPT)."
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="Read one prompt per line from this file, or from stdin if it is - (default: PROMPT alone).",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="PNG file to write; several pictures get -0, -1 and so on before the .png. Of a video: an .mp4 file, for "
        "which ditc[video] must be installed, an animated .webp file, or a new folder, for one PNG file per frame "
        "(default: out.png, and out.mp4 for a video).",
    )
    _add_request_arguments(parser)
    add_lora_argument(parser, "Draw with this LoRA, with all its changes multiplied by SCALE.")
    add_load_arguments(parser)
    parser.add_argument(
        "--preview",
        type=Path,
        metavar="DIR",
        help="After every step, write a rough picture of the current state into this folder (default: none).",
    )
    parser.add_argument(
        "--allow-uniform",
        action="store_true",
        help="Keep a picture that has only one colour (default: such a picture has failed).",
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="End at the first picture that fails, because it has NaN, Inf or one colour only, and write nothing that "
        "was drawn together with it or later (default: write the others, name those that failed, and exit with 1).",
    )
    parser.add_argument("--json", action="store_true", help="Print the result as JSON (default: as text).")


def _add_request_arguments(parser: argparse.ArgumentParser) -> None:
    _add_texts(parser)
    _add_schedule(parser)
    _add_guidance(parser)
    _add_sizes(parser)
    _add_pictures(parser)
    _add_noise(parser)


def _add_texts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--negative-prompt",
        default="",
        metavar="TEXT",
        help="The text that says what the picture should not look like; used with --guidance-scale above 1 "
        "(default: an empty text).",
    )
    for number, nth in ((2, "second"), (3, "third")):
        parser.add_argument(
            f"--prompt-{number}",
            metavar="TEXT",
            help=f"Another text for the bundle's {nth} text encoder, if it has one (default: PROMPT).",
        )
        parser.add_argument(
            f"--negative-prompt-{number}",
            metavar="TEXT",
            help=f"Another negative text for the {nth} text encoder (default: that of --negative-prompt).",
        )


def _add_schedule(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--steps",
        "--num-inference-steps",
        type=int,
        metavar="STEPS",
        dest="num_inference_steps",
        help="Number of denoising steps (default: the bundle's).",
    )
    for name, first in (("sigmas", "1"), ("timesteps", "1000 (SCM: 1.5708, and one number more than steps)")):
        parser.add_argument(
            f"--{name}",
            type=_numbers,
            metavar="NUMBERS",
            help=f"Your own schedule instead of a number of steps: falling {name} before the scheduler's shift, with "
            f"commas, from about {first} on. Not every scheduler takes them (default: the scheduler's).",
        )
    parser.add_argument(
        "--max-timesteps",
        type=float,
        metavar="RADIANS",
        help="The first angle of SCM's schedule, which few-step models have, in radians (default: the bundle's).",
    )
    parser.add_argument(
        "--intermediate-timesteps",
        type=_number_or_none,
        metavar="RADIANS",
        help="The second angle of SCM's schedule of two steps, in radians, or none to space them evenly (default: the "
        "bundle's).",
    )
    parser.add_argument(
        "--mu",
        type=float,
        metavar="SHIFT",
        help="The shift of the noise schedule, without a unit, for a scheduler with dynamic shifting (default: that of "
        "the picture's size).",
    )


def _add_guidance(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--guidance-scale",
        type=float,
        metavar="SCALE",
        help="Scale of the guidance, without a unit: how strongly the picture follows the prompt. Up to 1, "
        "classifier-free guidance is off (default: the bundle's).",
    )
    parser.add_argument(
        "--skip-layer-guidance-scale",
        type=float,
        metavar="SCALE",
        help="Scale of the skip-layer guidance, without a unit: how strongly to guide the picture away from what the "
        "network draws without some of its layers. 0 turns it off; not every bundle has it (default: the bundle's).",
    )
    for end, verb in (("start", "begins"), ("stop", "ends")):
        parser.add_argument(
            f"--skip-layer-guidance-{end}",
            type=float,
            metavar="FRACTION",
            help=f"Where skip-layer guidance {verb}, as a fraction of the steps from 0 to 1 (default: the bundle's).",
        )
    parser.add_argument(
        "--pag-scale",
        type=float,
        metavar="SCALE",
        help="Scale of the perturbed-attention guidance, without a unit: how strongly to guide the picture away from "
        "what the network draws if patches do not see each other in some of its layers. 0 turns it off; not every "
        "bundle has it (default: the bundle's).",
    )
    parser.add_argument(
        "--pag-adaptive-scale",
        type=float,
        metavar="SCALE",
        help="How much the scale of the perturbed-attention guidance falls per timestep below 1000, without a unit; 0 "
        "keeps it constant (default: the bundle's).",
    )
    parser.add_argument(
        "--guidance-interval",
        type=_numbers,
        metavar="START,STOP",
        help="Where all guidance begins and ends, as fractions of the steps from 0 to 1. Other steps take less time "
        "(default: 0,1).",
    )


def _add_sizes(parser: argparse.ArgumentParser) -> None:
    for side in ("height", "width"):
        parser.add_argument(
            f"--{side}",
            type=int,
            metavar="PX",
            help=f"The picture's {side} in pixels (default: the bundle's; with --image or --control-image, that of the "
            "trained size whose shape is nearest to the image's).",
        )
    parser.add_argument(
        "--frames",
        type=int,
        metavar="FRAMES",
        help="Number of frames of a video, for bundles that draw videos: 1 more than a multiple of 4, or of what the "
        "bundle's model has in a latent frame (default: the bundle's).",
    )
    parser.add_argument(
        "--fps",
        type=int,
        metavar="FRAMES",
        help="How many frames a second of the written video has; it does not change the frames (default: the "
        "bundle's).",
    )
    parser.add_argument(
        "--motion-score",
        type=int,
        metavar="SCORE",
        help="How much moves in a video, a whole number without a unit, such as 30: words that the model was trained "
        "with are put after the prompt (default: none).",
    )


def _add_pictures(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--image",
        type=Path,
        metavar="FILE",
        help="Start from this picture (PNG, JPEG or WebP) instead of noise alone. It is the first frame of a video "
        "(default: none).",
    )
    parser.add_argument(
        "--mask",
        type=Path,
        metavar="FILE",
        dest="mask_image",
        help="Where to draw: white is drawn anew, black keeps the --image (default: everywhere).",
    )
    parser.add_argument(
        "--strength",
        type=float,
        metavar="FRACTION",
        help="How much of the --image is replaced: the fraction of the steps from 0 to 1 that are done, for pictures "
        "(default: 0.6).",
    )
    parser.add_argument(
        "--control-image",
        type=Path,
        metavar="FILE",
        help="The picture that the bundle's ControlNet reads, such as edges, as PNG, JPEG or WebP (default: none, and "
        "the bundle draws as if it had no ControlNet).",
    )
    parser.add_argument(
        "--controlnet-conditioning-scale",
        type=float,
        metavar="SCALE",
        help="How strongly the --control-image acts, without a unit; 0 turns it off (default: 1).",
    )
    for end, verb, default in (("start", "begins", 0), ("end", "ceases", 1)):
        parser.add_argument(
            f"--control-guidance-{end}",
            type=float,
            metavar="FRACTION",
            help=f"Where the --control-image {verb} to act, as a fraction of the steps from 0 to 1 "
            f"(default: {default}).",
        )


def _add_noise(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seed",
        type=int,
        metavar="SEED",
        help="Seed of the noise that the pictures start from, a whole number (default: a random seed, which is "
        "printed).",
    )
    parser.add_argument(
        "-n",
        "--num-images-per-prompt",
        type=int,
        default=1,
        metavar="PICTURES",
        help="Number of pictures per prompt (default: %(default)s).",
    )


def _numbers(text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError as e:
        raise argparse.ArgumentTypeError(f"{text!r} must be numbers with commas between them") from e


def _number_or_none(text: str) -> float | Literal[False]:
    try:
        return False if text == "none" else float(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number or none") from e
