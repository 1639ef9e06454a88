"""Does the memory of decoding a video depend on its length? Chunk by chunk, and as diffusers does it.

    python -m benchmarks.video_decode

An AutoencoderKLWan with seeded weights decodes 9 and 81 frames, each in a process of its own:

    onnxruntime   the two stages that ditc builds, in fp32, called as the runtime calls them (runtime/video.py)
    openvino      the same stages in OpenVINO's form
    streaming     the network that ditc exports (export/networks/wan_vae.py), run in PyTorch chunk by chunk
    diffusers     AutoencoderKLWan.decode, which returns the whole video

Decoded frames are given away. What counts is the memory above what the process had before decoding, because libraries
and weights would hide a growth. The goal is at most 1.3 times that of 9 frames.

glibc's malloc serves large blocks with mmap, and returns them when they are freed, but it raises the limit of "large"
to the largest block that was freed so far (up to 32 MB; mallopt(3), M_MMAP_THRESHOLD). PyTorch's intermediates, which
are smaller, then come from the heap, whose holes add up from chunk to chunk. The processes of the two forms in PyTorch
therefore run with a fixed limit, MALLOC_MMAP_THRESHOLD_; --heap leaves it out.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from benchmarks.full_size import WAN_VAE
from benchmarks.machine import reset_peak, write
from ditc.runtime.bench.memory import peak_bytes

GOAL = 1.3
FRAMES = (9, 81)
IN_PYTORCH = ("streaming", "diffusers")
FORMS = ("onnxruntime", "openvino", *IN_PYTORCH)
ORDINARY_LIMIT = {"MALLOC_MMAP_THRESHOLD_": "131072"}  # glibc's first limit, which setting it keeps


def upstream(base_dim: int) -> Any:
    """diffusers' autoencoder with its own random initialisation from seed 0."""
    import torch
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    return AutoencoderKLWan(base_dim=base_dim).eval()


def specs(base_dim: int, side: int) -> tuple[Any, dict[str, Any]]:
    """The decoder's settings, and the specs of its two stages for frames of this size, as a build plans them."""
    from ditc.export.families.common.video_vae import video_vae_specs
    from ditc.export.networks.wan_vae import WanVaeConfig, WanVaeDecoder, kept_frames
    from ditc.runtime.bundle.manifest import LatentSpec
    from ditc.runtime.spec import VAE_DECODER, VAE_DECODER_NEXT, DType, Range
    from ditc.runtime.step_contract import HEIGHT, WIDTH

    config = WanVaeConfig.from_json({**WAN_VAE, "base_dim": base_dim})
    scale, cells = config.pixels_per_latent, side // config.pixels_per_latent
    latents = LatentSpec(config.z_dim, scale, frames_per_cell=config.frames_per_latent)
    sizes = {HEIGHT: Range(2, cells, 2 * cells), WIDTH: Range(2, cells, 2 * cells)}
    kept = kept_frames(config, WanVaeDecoder)
    planned = video_vae_specs(latents, sizes, kept, dtype=DType.FLOAT32, max_batch=1)
    return config, {name: planned[name] for name in (VAE_DECODER, VAE_DECODER_NEXT)}


def stages(base_dim: int, side: int) -> dict[str, Any]:
    """The two stages with their modules, ready for export."""
    import torch

    from ditc.export.contract import StageModule
    from ditc.export.families.common.video_vae import FirstChunkDecoder, NextChunkDecoder
    from ditc.export.networks.loading import weight_map
    from ditc.export.networks.wan_vae import load_wan_decoder
    from ditc.runtime.spec import VAE_DECODER, VAE_DECODER_NEXT, Precision

    config, planned = specs(base_dim, side)
    tensors = upstream(base_dim).state_dict()
    decoder = load_wan_decoder(config, tensors, torch.float32)
    modules = {VAE_DECODER: FirstChunkDecoder(decoder), VAE_DECODER_NEXT: NextChunkDecoder(decoder)}
    return {
        name: StageModule(
            spec=planned[name],
            precision=Precision.FP32,
            module=module,
            weights=tuple(weight_map({name: module}, tensors)),
        )
        for name, module in modules.items()
    }


def export(folder: Path, base_dim: int, side: int) -> None:
    """Write what the two backends run into the folder."""
    import onnx_ir as ir

    from ditc.export.engine.ir import write_ir
    from ditc.export.graph.onnx import to_model

    for name, stage in stages(base_dim, side).items():
        graph = folder / f"{name}.onnx"
        ir.save(to_model(stage), graph, external_data=f"{name}.onnx.data")
        write_ir(graph, folder / f"{name}.xml", spec=stage.spec)


def onnxruntime_session(folder: Path, spec: Any) -> Any:
    """A stage's session, as the runtime opens it."""
    from ditc.runtime.sessions.onnxruntime import CPU, OnnxRuntimeSession

    return OnnxRuntimeSession(folder / f"{spec.name}.onnx", spec, provider=CPU)


def openvino_session(folder: Path, spec: Any) -> Any:
    """The same stage in OpenVINO's form."""
    from ditc.runtime.sessions.openvino import OpenvinoSession

    return OpenvinoSession(folder / f"{spec.name}.xml", spec)


SESSIONS = {"onnxruntime": onnxruntime_session, "openvino": openvino_session}


def decoder_of(form: str, folder: Path, base_dim: int, side: int) -> Callable[[Any], Iterator[int]]:
    """A call that decodes latents (1,C,F,h,w), and gives the number of frames of each chunk when it is decoded."""
    if form not in IN_PYTORCH:
        from ditc.runtime.video import decoded_chunks

        first, following = (SESSIONS[form](folder, spec) for spec in specs(base_dim, side)[1].values())
        return lambda latents: (len(frames) for frames in decoded_chunks(first, following, latents))
    import torch

    from ditc.export.networks.wan_vae import WanVaeConfig, load_wan_decoder

    module = upstream(base_dim)
    if form == "diffusers":
        return lambda latents: iter([module.decode(torch.from_numpy(latents)).sample.shape[2]])
    network = load_wan_decoder(WanVaeConfig.from_json(module.config), module.state_dict(), torch.float32)

    def chunks(latents: Any) -> Iterator[int]:
        kept: list[torch.Tensor] = []
        for chunk in torch.from_numpy(latents).split(1, dim=2):
            frames, *kept = network(chunk, *kept)
            yield frames.shape[2]

    return chunks


def decode(form: str, folder: Path, frames: int, base_dim: int, side: int) -> dict[str, float]:
    """Decode one video in this process. Returns its seconds, and the peak of its memory above what was there before."""
    import contextlib

    import numpy as np

    channels, cells, latent_frames = WAN_VAE["z_dim"], side // 8, 1 + (frames - 1) // 4
    latents = np.random.default_rng(0).standard_normal((1, channels, latent_frames, cells, cells))
    decoder, quiet = decoder_of(form, folder, base_dim, side), contextlib.nullcontext()
    if form in IN_PYTORCH:
        import torch

        quiet = torch.no_grad()
    gc.collect()
    reset_peak()
    before, start = peak_bytes() or 0, perf_counter()
    with quiet:
        decoded = sum(decoder(latents.astype(np.float32)))
    assert decoded == frames
    peak = peak_bytes() or 0
    return {"seconds": perf_counter() - start, "bytes": peak - before, "process_bytes": peak}


def measure(form: str, folder: Path, base_dim: int, side: int, *, heap: bool) -> dict[str, Any]:
    """Decode videos of both lengths, each in a process of its own."""
    found = {}
    limit = ORDINARY_LIMIT if form in IN_PYTORCH and not heap else {}
    for frames in FRAMES:
        sys.stderr.write(f"{form}: {frames} frames\n")
        worker = ["--worker", form, str(frames), "--folder", folder]
        command = [sys.executable, "-m", "benchmarks.video_decode", *worker]
        command += ["--base-dim", base_dim, "--side", side]
        done = subprocess.run(
            [str(word) for word in command], stdout=subprocess.PIPE, check=True, env={**os.environ, **limit}
        )
        found[frames] = json.loads(done.stdout)
    few, many = (found[frames]["bytes"] for frames in FRAMES)
    return {**{f"{frames} frames": found[frames] for frames in FRAMES}, "ratio": many / few}


def main() -> None:
    """Measure each form, print how much more memory the longer video takes, and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base-dim", type=int, default=96, help="Width of the first stage; Wan 2.1 has 96.")
    parser.add_argument("--side", type=int, default=256, help="Side of the square frames, in pixels.")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS, help="What is measured.")
    parser.add_argument(
        "--heap", action="store_true", help="Leave malloc as it is in PyTorch's processes, too."
    )
    parser.add_argument("--no-write", action="store_true")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    size = (arguments.base_dim, arguments.side)
    if arguments.worker:
        form, frames = arguments.worker
        print(json.dumps(decode(form, arguments.folder, int(frames), *size)))
        return
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if not set(arguments.forms).issubset(IN_PYTORCH):
            sys.stderr.write("exporting the decoder\n")
            export(folder, *size)
        results = {form: measure(form, folder, *size, heap=arguments.heap) for form in arguments.forms}
    for form, found in results.items():
        few, many = (found[f"{frames} frames"]["bytes"] / 1e6 for frames in FRAMES)
        verdict = "within" if found["ratio"] <= GOAL else "above"
        print(
            f"{form}: {few:.0f} MB for {FRAMES[0]} frames, {many:.0f} MB for {FRAMES[1]}, "
            f"{found['ratio']:.2f} times as much: {verdict} the goal of {GOAL}"
        )
    if not arguments.no_write:
        settings = {"base_dim": size[0], "side": size[1], "heap": arguments.heap}
        print(write("video_decode", {**settings, **results}))


if __name__ == "__main__":
    main()
