"""`ditc parity BUNDLE --against CHECKPOINT`: prove that a bundle computes what PyTorch computes."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ditc.export.commands.controlnet_argument import add_controlnet_argument
from ditc.runtime.commands.bundle_argument import add_bundle_argument, read_bundle_argument
from ditc.runtime.errors import UsageError
from ditc.runtime.files import check_writable
from ditc.runtime.load_options import add_load_arguments, load_options
from ditc.runtime.lora.choice import LoraChoice, add_lora_argument, parse_loras
from ditc.runtime.tolerances import Level

if TYPE_CHECKING:
    from ditc.parity.candidate import Candidate
    from ditc.parity.cases import SavedReference, Settings
    from ditc.parity.context import Context
    from ditc.parity.reference.pytorch import TorchModel
    from ditc.runtime.bundle.manifest import Manifest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for the two sides, for what they draw, and for the report."""
    add_bundle_argument(parser)
    parser.add_argument(
        "--against",
        metavar="CHECKPOINT",
        help="The checkpoint that the bundle was built from (default: none; either this or --reference is needed).",
    )
    parser.add_argument(
        "--variant",
        metavar="NAME",
        help="Variant of the checkpoint's weight files, such as fp16, as in the build (default: files without one).",
    )
    add_controlnet_argument(
        parser, "Compare with the checkpoint with this ControlNet, as the bundle was built."
    )
    add_lora_argument(
        parser,
        "Compare with the checkpoint with this LoRA, which the bundle was built with. A bundle that was built with "
        "--lora-inputs gets it as an input, and the result is not written into the certificate.",
    )
    parser.add_argument(
        "--level",
        action="append",
        choices=[level.value for level in Level],
        help="Run only this level; may be repeated (default: all levels).",
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="File with one prompt per line (default: two built-in prompts).",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        metavar="SEED",
        help="Seeds to draw every prompt with, whole numbers (default: 0 1).",
    )
    parser.add_argument(
        "--steps",
        type=int,
        metavar="STEPS",
        dest="num_inference_steps",
        help="Number of denoising steps (default: the bundle's).",
    )
    parser.add_argument(
        "--guidance-scale",
        type=float,
        metavar="SCALE",
        help="Scale of the guidance, without a unit (default: the bundle's).",
    )
    parser.add_argument(
        "--height", type=int, metavar="PX", help="Picture height in pixels (default: the bundle's)."
    )
    parser.add_argument(
        "--width", type=int, metavar="PX", help="Picture width in pixels (default: the bundle's)."
    )
    # Without --provider, as in `ditc verify`: the certificate would count for another provider too.
    add_load_arguments(
        parser,
        "backend",
        "precision",
        "stage_precision",
        "threads",
        "device",
        "low_vram",
        "require_signature",
    )
    _add_reference_arguments(parser)
    parser.add_argument(
        "--budget",
        type=float,
        metavar="REL_L2",
        help="Relative L2 error, without a unit, that 8-bit stages may have at the levels stage, step and trajectory "
        "(default: a multiple of the error of PyTorch with the recorded plan). A result with a budget that allows more "
        "is not enough for --require-certificate.",
    )
    parser.add_argument(
        "--sign",
        type=Path,
        metavar="KEY.pem",
        help="Sign the result in certificate.json with the ed25519 private key in this file (default: no signature).",
    )
    parser.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="Write the report as a page with pictures, curves and modules (default: no page).",
    )
    parser.add_argument("--json", action="store_true", help="Print the report as JSON (default: as text).")


def _add_reference_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--reference",
        type=Path,
        metavar="FILE",
        help="Compare with a file from --save-reference instead of a checkpoint (default: none; see --against).",
    )
    parser.add_argument(
        "--no-diffusers",
        action="store_true",
        help="Leave out the second reference, unmodified diffusers or the family's own upstream package (default: "
        "compare with it too).",
    )
    parser.add_argument(
        "--no-edits",
        action="store_true",
        help="Leave out the cases that start from a picture: image-to-image and inpainting, or of a bundle that draws "
        "videos image-to-video (default: draw one of each if the bundle has the VAE's encoder).",
    )
    parser.add_argument(
        "--save-reference",
        type=Path,
        metavar="FILE",
        help="Write what PyTorch computed to this file, for --reference on another machine (default: not written).",
    )
    parser.add_argument(
        "--save-polygraphy",
        type=Path,
        metavar="DIR",
        help="Write the stages' inputs, PyTorch's results and a script that compares them with `polygraphy run` "
        "(default: not written).",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run parity, and print or write the report.

    Returns:
        0 if every bound holds and something was checked, else 1.

    Raises:
        DitcError: the input is bad; the exit code is then 2.
    """
    from ditc.parity.candidate import check_bundle
    from ditc.parity.certify import certify
    from ditc.parity.folded_loras import loras_to_give
    from ditc.parity.polygraphy_files import SCRIPT, save_polygraphy
    from ditc.parity.progress import progress_bar
    from ditc.parity.reference.saved import read_reference, save_reference
    from ditc.parity.report.page import write_page
    from ditc.parity.report.text import to_json, to_text
    from ditc.parity.run import run_parity
    from ditc.runtime.bundle.signature import load_private_key

    if (arguments.against is None) == (arguments.reference is None):
        raise UsageError(
            "parity needs exactly one reference: a checkpoint or a saved file",
            hint="use ditc parity BUNDLE --against CHECKPOINT, or --reference FILE",
        )
    _check_judging(arguments)
    private_key = None if arguments.sign is None else load_private_key(arguments.sign)
    folder = arguments.save_polygraphy
    script = None if folder is None else folder / SCRIPT
    places = {
        "--html": arguments.html,
        "--save-reference": arguments.save_reference,
        "--save-polygraphy": script,
    }
    for argument, place in places.items():
        if place is not None:
            check_writable(place, argument)
    arguments.bundle = read_bundle_argument(arguments)
    manifest = check_bundle(arguments.bundle)
    loras = parse_loras(arguments.lora)
    saved = None if arguments.reference is None else read_reference(arguments.reference, manifest)
    given = loras_to_give(arguments.bundle, manifest, loras) if saved is None else ()
    _check_files_of_given(arguments, given)
    if saved is not None and loras:
        raise UsageError(
            "--lora is given with --reference", hint="the file was made with its LoRAs: leave --lora out"
        )
    if saved is not None and arguments.controlnet is not None:
        raise UsageError(
            "--controlnet is given with --reference",
            hint="the file was made with its ControlNet: leave --controlnet out",
        )
    if saved is None:
        settings = _settings(arguments, manifest)
    else:
        settings = saved.settings
        _check_agrees(arguments, settings)
    levels = [Level(name) for name in arguments.level] if arguments.level else list(Level)
    with progress_bar(settings, levels) as tick:
        context = _open(arguments, loras, given, settings, saved, tick)
        report = run_parity(context, levels)
    # The result of hours is shown first: a file that cannot be written must not take it along.
    if arguments.json:
        sys.stdout.write(json.dumps(to_json(report)) + "\n")
    else:
        sys.stdout.write(to_text(report))
    if arguments.html is not None:
        write_page(arguments.html, report)
        if not arguments.json:
            sys.stdout.write(f"the page is {arguments.html}\n")
    # A run without some levels does not prove the bundle, and one with LoRAs as inputs is about something else.
    if not arguments.level and context.candidate.certified and not given:
        certify(arguments.bundle, context, report, private_key)
    if arguments.save_reference is not None:
        save_reference(arguments.save_reference, context)
    if folder is not None:
        save_polygraphy(folder, context)
    context.close()
    return 0 if report.passed else 1


def _check_judging(arguments: argparse.Namespace) -> None:
    """Raise UsageError if an option that decides about the verdict or the certificate has no meaning."""
    budget = arguments.budget
    if budget is not None and not 0 < budget < math.inf:
        raise UsageError(f"--budget is {budget}", hint="use a relative L2 error above 0, such as 0.05")
    if arguments.sign is not None and arguments.level:
        raise UsageError(
            "a run of some levels is not written into the certificate, so there is nothing to sign",
            hint="leave out --level or --sign",
        )


def _check_files_of_given(arguments: argparse.Namespace, given: tuple[LoraChoice, ...]) -> None:
    """Raise UsageError if LoRAs are inputs, and an option asks for a file about the bundle without them."""
    options = {"--sign": arguments.sign, "--save-polygraphy": arguments.save_polygraphy}
    if given and (asked := [name for name, value in options.items() if value is not None]):
        raise UsageError(
            f"{asked[0]} is given, and the bundle gets the LoRAs as inputs: its files are those without a LoRA",
            hint=f"leave {asked[0]} out, or leave --lora out",
        )


def _settings(arguments: argparse.Namespace, manifest: Manifest) -> Settings:
    from ditc.parity.cases import DEFAULT_PROMPTS, DEFAULT_SEEDS, Case, Settings, edit_cases
    from ditc.runtime.prompts import read_prompts
    from ditc.runtime.spec import VAE_ENCODER

    prompts = read_prompts(arguments.prompts) if arguments.prompts else list(DEFAULT_PROMPTS)
    seeds = arguments.seeds if arguments.seeds is not None else list(DEFAULT_SEEDS)
    defaults = manifest.defaults
    guidance = defaults.guidance_scale if arguments.guidance_scale is None else arguments.guidance_scale
    if arguments.num_inference_steps is not None and arguments.num_inference_steps < 1:
        raise UsageError(f"--steps is {arguments.num_inference_steps}", hint="use at least 1 step")
    cases = tuple(Case(prompt, seed) for prompt in prompts for seed in seeds)
    if VAE_ENCODER in manifest.stages and cases:
        cases += edit_cases(cases, videos=manifest.latents.has_frames)
    return Settings(
        cases=cases,
        num_inference_steps=arguments.num_inference_steps or defaults.num_inference_steps,
        guidance_scale=guidance,
        height=arguments.height or defaults.height,
        width=arguments.width or defaults.width,
    )


def _check_agrees(arguments: argparse.Namespace, settings: Settings) -> None:
    """Raise UsageError if an option contradicts the settings that the reference file was made with."""
    from ditc.runtime.prompts import read_prompts

    given = {
        "--steps": (arguments.num_inference_steps, settings.num_inference_steps),
        "--guidance-scale": (arguments.guidance_scale, settings.guidance_scale),
        "--height": (arguments.height, settings.height),
        "--width": (arguments.width, settings.width),
        "--seeds": (arguments.seeds, list(dict.fromkeys(case.seed for case in settings.cases))),
        "--prompts": (
            read_prompts(arguments.prompts) if arguments.prompts else None,
            list(dict.fromkeys(case.prompt for case in settings.cases)),
        ),
    }
    for name, (asked, held) in given.items():
        if asked is not None and asked != held:
            raise UsageError(
                f"{name} is {asked}, but the reference file was made with {held}",
                hint="leave the option out, or save a new reference with it",
            )


def _open(
    arguments: argparse.Namespace,
    loras: tuple[LoraChoice, ...],
    given: tuple[LoraChoice, ...],
    settings: Settings,
    saved: SavedReference | None,
    tick: Callable[[str], None],
) -> Context:
    from ditc.export.options import BuildOptions
    from ditc.parity.candidate import open_candidate
    from ditc.parity.context import Context
    from ditc.parity.reference.pytorch import TorchModel

    candidate = open_candidate(arguments.bundle, load_options(arguments), given)
    why_no_edits = _why_no_edits(arguments, candidate)
    if why_no_edits:
        cases = tuple(case for case in settings.cases if case.edit is None)
        settings = replace(settings, cases=cases)
    options = BuildOptions(variant=arguments.variant, loras=loras, controlnet=arguments.controlnet)
    reference = None
    if saved is None:
        reference = TorchModel(arguments.against, options=options, like=candidate.manifest)
        _check_same_controlnet(candidate.manifest, reference)
    return Context(
        reference_or_none=reference,
        candidate=candidate,
        settings=settings,
        with_upstream=not arguments.no_diffusers,
        saved_reference=saved,
        eight_bit_budget=arguments.budget,
        why_no_edits=why_no_edits,
        tick=tick,
    )


def _check_same_controlnet(manifest: Manifest, reference: TorchModel) -> None:
    """Raise UsageError if only one side has a ControlNet."""
    from ditc.runtime.spec import CONTROLNET

    bundle, checkpoint = CONTROLNET in manifest.stages, CONTROLNET in reference.plan.stages
    if bundle and not checkpoint:
        raise UsageError(
            f"the bundle has a ControlNet, and {reference.checkpoint.path} has none",
            hint="name the folder that the bundle was built with: --controlnet DIR",
        )
    if checkpoint and not bundle:
        raise UsageError(
            f"{reference.checkpoint.controlnet or reference.checkpoint.path} has a ControlNet, and the bundle has none",
            hint="compare with the checkpoint without it, or build the bundle with it",
        )


def _why_no_edits(arguments: argparse.Namespace, candidate: Candidate) -> str:
    """Why cases that start from a picture are not drawn, although the bundle has the VAE's encoder; "" if they are."""
    from ditc.runtime.spec import VAE_ENCODER

    if VAE_ENCODER not in candidate.manifest.stages:
        return ""
    if arguments.no_edits:
        return "they were left out (--no-edits)"
    if VAE_ENCODER not in candidate.sessions:
        return "the bundle's vae_encoder cannot run here"
    drawable = candidate.pipeline.drawable
    if candidate.manifest.latents.has_frames and not drawable.contract.holds_frames:
        return "the bundle was built for videos from texts alone"
    return ""
