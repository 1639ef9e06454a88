"""Does the memory of decoding a video depend on its length? Chunk by chunk, and as diffusers does it.

    python -m benchmarks.video_decode

An AutoencoderKLWan with seeded weights decodes 9 and 81 frames, each in a process of its own. "streaming" is the
network that ditc exports (export/networks/wan_vae.py), run in PyTorch, and its frames are given away when they are
decoded. "diffusers" is AutoencoderKLWan.decode, which returns the whole video. What counts is the memory above what the
process had before decoding, because libraries and weights would hide a growth. The goal is at most 1.3 times that of 9
frames.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from time import perf_counter
from typing import Any

from benchmarks.machine import write
from ditc.runtime.bench.memory import peak_bytes

GOAL = 1.3
FRAMES = (9, 81)
FORMS = ("streaming", "diffusers")


def decode(form: str, frames: int, base_dim: int, side: int) -> dict[str, float]:
    """Decode one video in this process. Returns its seconds, and the peak of its memory above what was there before."""
    import torch
    from diffusers import AutoencoderKLWan

    from ditc.export.networks.wan_vae import WanVaeConfig, load_wan_decoder

    torch.manual_seed(0)
    module = AutoencoderKLWan(base_dim=base_dim).eval()
    config = WanVaeConfig.from_json(module.config)
    decoder = load_wan_decoder(config, module.state_dict(), torch.float32)
    cells = side // config.pixels_per_latent
    latents = torch.randn(1, config.z_dim, 1 + (frames - 1) // config.frames_per_latent, cells, cells)
    before, start, decoded = peak_bytes() or 0, perf_counter(), 0
    with torch.no_grad():
        if form == "diffusers":
            decoded = module.decode(latents).sample.shape[2]
        else:
            kept: list[torch.Tensor] = []
            for chunk in latents.split(1, dim=2):
                some, *kept = decoder(chunk, *kept)
                decoded += some.shape[2]
    assert decoded == frames
    return {"seconds": perf_counter() - start, "bytes": (peak_bytes() or 0) - before}


def measure(form: str, base_dim: int, side: int) -> dict[str, Any]:
    """Decode videos of both lengths, each in a process of its own."""
    found = {}
    for frames in FRAMES:
        worker = ["--worker", form, str(frames), "--base-dim", str(base_dim), "--side", str(side)]
        command = [sys.executable, "-m", "benchmarks.video_decode", *worker]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[frames] = json.loads(done.stdout)
    few, many = (found[frames]["bytes"] for frames in FRAMES)
    return {**{f"{frames} frames": found[frames] for frames in FRAMES}, "ratio": many / few}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-dim", type=int, default=96, help="Width of the first stage; Wan 2.1 has 96.")
    parser.add_argument("--side", type=int, default=256, help="Side of the square frames, in pixels.")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS, help="What is measured.")
    parser.add_argument("--no-write", action="store_true")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    size = (arguments.base_dim, arguments.side)
    if arguments.worker:
        form, frames = arguments.worker
        print(json.dumps(decode(form, int(frames), *size)))
        return
    results = {form: measure(form, *size) for form in arguments.forms}
    for form, found in results.items():
        few, many = (found[f"{frames} frames"]["bytes"] / 1e6 for frames in FRAMES)
        print(f"{form}: {few:.0f} MB for 9 frames, {many:.0f} MB for 81, {found['ratio']:.2f} times as much")
    if "streaming" in results:
        verdict = "within" if results["streaming"]["ratio"] <= GOAL else "above"
        print(f"streaming is {verdict} the goal of {GOAL} times")
    if not arguments.no_write:
        print(write("video_decode", {"base_dim": size[0], "side": size[1], **results}))


if __name__ == "__main__":
    main()
