"""Sana's 2K and 4K configurations at the full size of picture and latents, with narrow networks and random weights.

It compares ditc with diffusers' unmodified SanaPipeline: latents after every step, the picture, time and peak memory,
each side in a process of its own. The settings that make these models different are those of the releases: position
embedding and its interpolation, the shift of the schedule, the table of bins, six stages of DC-AE, and tiles at 4K
(Efficient-Large-Model/Sana_1600M_2Kpx_BF16 and _4Kpx_BF16, NVlabs/Sana's configs).
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks.machine import write

# Latent side, interpolation of the position embedding, shift of the schedule.
SIZES: dict[int, tuple[int, float, float]] = {2048: (64, 1.0, 3.0), 4096: (128, 2.0, 6.0)}
TEXT = {"max_sequence_length": 12, "complex_human_instruction": None}
SETTINGS: dict[str, Any] = {"prompt": "a red heart", "num_inference_steps": 2, "guidance_scale": 3.0}
CHANNELS = (8, 8, 16, 16, 32, 32)


def make_checkpoint(directory: Path, side: int) -> None:
    """Save a seeded checkpoint for pictures of side x side pixels in diffusers' layout."""
    import torch
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
    from transformers import AutoTokenizer, Gemma2Config, Gemma2Model

    from benchmarks.full_size import DC_AE, TOKENIZER

    sample_size, interpolation, shift = SIZES[side]
    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=24,
        sample_size=sample_size,
        interpolation_scale=interpolation,
    )
    narrow = {f"{half}_block_out_channels": CHANNELS for half in ("encoder", "decoder")}
    form = {name: value for name, value in DC_AE.items() if name != "_class_name"}
    vae = AutoencoderDC(**form | narrow | {"attention_head_dim": 8, "latent_channels": 32})
    text_encoder = Gemma2Model(
        Gemma2Config(
            vocab_size=4096,
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=12,
            query_pre_attn_scalar=12,
        )
    )
    SanaPipeline(
        tokenizer=AutoTokenizer.from_pretrained(TOKENIZER),
        text_encoder=text_encoder.eval(),
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
        ),
    ).save_pretrained(directory)
    (directory / "ditc.json").write_text(json.dumps(TEXT))


def draw_with_ditc(bundle: Path) -> tuple[list[Any], Any]:
    """The latents after each step and the picture, from a bundle."""
    from ditc.runtime import Pipeline

    latents: list[Any] = []
    with Pipeline.load(bundle) as pipeline:
        output = pipeline(
            **SETTINGS,
            seed=0,
            output_type="np",
            callback_on_step_end=lambda p, i, t, k: (latents.append(k["latents"].copy()), k)[1],
        )
    return latents, output.images


def draw_with_diffusers(checkpoint: Path, side: int) -> tuple[list[Any], Any]:
    """The same from diffusers, with the size given, and decoded in tiles at 4K, as its documentation asks for."""
    import torch
    from diffusers import SanaPipeline

    pipeline = SanaPipeline.from_pretrained(checkpoint, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if side >= 4096:
        pipeline.vae.enable_tiling()
    latents: list[Any] = []
    images = pipeline(
        **SETTINGS,
        **TEXT,
        height=side,
        width=side,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
        callback_on_step_end=lambda p, i, t, k: (latents.append(k["latents"].numpy().copy()), k)[1],
    ).images
    return latents, images


def compare(side: int, work: Path) -> dict[str, Any]:
    """Build the bundle, draw on both sides, and compare."""
    checkpoint, bundle = work / f"checkpoint-{side}", work / f"bundle-{side}"
    make_checkpoint(checkpoint, side)
    build = _in_a_process("build", checkpoint, bundle, side)
    ditc = _in_a_process("ditc", bundle, work / f"ditc-{side}.npz", side)
    diffusers = _in_a_process("diffusers", checkpoint, work / f"diffusers-{side}.npz", side)
    ours, theirs = np.load(work / f"ditc-{side}.npz"), np.load(work / f"diffusers-{side}.npz")
    steps = [name for name in ours.files if name != "picture"]
    errors = [float(np.linalg.norm(ours[n] - theirs[n]) / np.linalg.norm(theirs[n])) for n in steps]
    square = (ours["picture"].astype(np.float64) - theirs["picture"]) ** 2
    return {
        "size": list(ours["picture"].shape[1:3]),
        "latents": list(ours[steps[0]].shape[2:]),
        "relative_l2_after_each_step": errors,
        "psnr_db": float(-10 * np.log10(square.mean())),
        "build": build,
        "ditc": ditc,
        "diffusers": diffusers,
    }


def _in_a_process(what: str, source: Path, target: Path, side: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.large_pictures", "--worker", what, str(source), str(target)]
    ran = subprocess.run([*command, str(side)], capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"{what} at {side} px failed:\n{ran.stderr[-2000:]}")
    found: dict[str, float] = json.loads(ran.stdout.splitlines()[-1])
    return found


def _work(what: str, source: Path, target: Path, side: int) -> None:
    before = perf_counter()
    if what == "build":
        from ditc.export.build.builder import build_bundle
        from ditc.export.contract import BuildOptions

        build_bundle(source, target, BuildOptions())
    else:
        draw = draw_with_ditc(source) if what == "ditc" else draw_with_diffusers(source, side)
        latents, picture = draw
        np.savez(target, picture=picture, **{f"step_{i}": x for i, x in enumerate(latents)})
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": perf_counter() - before, "peak_bytes": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sides", type=int, nargs="+", choices=SIZES, default=list(SIZES), help="in pixels")
    parser.add_argument("--no-write", action="store_true")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        what, source, target, side = arguments.worker
        _work(what, Path(source), Path(target), int(side))
        return
    with tempfile.TemporaryDirectory() as work:
        results = {f"{side} px": compare(side, Path(work)) for side in arguments.sides}
    print(json.dumps(results, indent=1))
    if not arguments.no_write:
        print(write("large_pictures", results))


if __name__ == "__main__":
    main()
