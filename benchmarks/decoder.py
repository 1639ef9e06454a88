"""How fast is a VAE's decoder in INT8, and how close are its pictures?

    python -m benchmarks.decoder prepare FOLDER           # DC-AE f32c32 at full width, random weights: graphs and IR
    python -m benchmarks.decoder speed FOLDER [--repeats 3] [--only "openvino int8" ...]
    python -m benchmarks.decoder quality BUNDLE [--pictures 32] [--backend openvino]

"speed" decodes one 512 px picture with each contestant in turn: diffusers eager in bf16 and ditc's decoders. With
random weights, the error says little about trained ones. "quality" draws pictures of a bundle that holds an 8-bit
decoder beside the fp32 one, with both, from the same noise. Results are added to benchmarks/results/decoder-DATE.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import Any

import numpy as np

from benchmarks.full_size import DC_AE
from benchmarks.machine import RESULTS, facts
from ditc.runtime.atomic import write_atomic
from ditc.runtime.cpu_features import cpu_features
from ditc.runtime.metrics import psnr, relative_l2
from ditc.runtime.spec import VAE_DECODER, DType, Precision, Range, StageSpec, TensorSpec

PIXELS, FACTOR = 512, 32
SEED = 0
DIFFUSERS = "diffusers bf16 eager"
GAP_S = 0.2  # threads of one contestant that still spin must not slow the next one
SPEC = StageSpec(
    VAE_DECODER,
    inputs=(TensorSpec("latents", DType.FLOAT32, ("batch", 32, "height", "width")),),
    outputs=(TensorSpec("image", DType.FLOAT32, ("batch", 3, "image_height", "image_width")),),
    profile={"batch": Range(1, 1, 2), "height": Range(8, 16, 32), "width": Range(8, 16, 32)},
)
PROMPTS = Path(__file__).parents[1] / "calib" / "prompts" / "demo.txt"


def main() -> None:
    """Run one of the three parts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["prepare", "speed", "quality"])
    parser.add_argument("path", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="Names of the contestants to run (default: all).")
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--backend", default="openvino")
    arguments = parser.parse_args()
    if arguments.part == "prepare":
        prepare(arguments.path)
        return
    results = (
        speed(arguments.path, arguments.repeats, arguments.only)
        if arguments.part == "speed"
        else quality(arguments.path, arguments.pictures, arguments.backend)
    )
    print(json.dumps(results, indent=1))
    path = RESULTS / f"decoder-{date.today()}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    entry = {"machine": {**facts(), "cpu_features": sorted(cpu_features())}, **results}
    write_atomic(path, json.dumps({**known, arguments.part: entry}, indent=1) + "\n")


def upstream() -> Any:
    """diffusers' autoencoder with its own random initialisation."""
    import torch
    from diffusers import AutoencoderDC

    torch.manual_seed(SEED)
    return AutoencoderDC(**{key: value for key, value in DC_AE.items() if key != "_class_name"}).eval()


def prepare(folder: Path) -> None:
    """Write the decoder's fp32 and INT8 graphs, as ONNX and as OpenVINO's files."""
    import onnx_ir as ir
    import torch

    from ditc.calib.observe import Observer, watching
    from ditc.export.contract import StageModule
    from ditc.export.engine.ir import write_ir
    from ditc.export.graph.onnx import to_model
    from ditc.export.graph.passes.qdq import quantize_graph
    from ditc.export.networks.dc_ae import DcAeConfig, load_decoder
    from ditc.export.networks.loading import weight_map
    from ditc.export.quant.layers import quantizable_layers
    from ditc.export.quant.plan import make_plan
    from ditc.export.quant.ranges import Origin, Ranges
    from ditc.export.quant.stage_recipes import NETWORK_RECIPES

    folder.mkdir(parents=True, exist_ok=True)
    tensors = upstream().state_dict()
    module = load_decoder(DcAeConfig.from_json(DC_AE), tensors, torch.float32)
    sources = tuple(weight_map({VAE_DECODER: module}, tensors))
    stage = StageModule(spec=SPEC, precision=Precision.FP32, module=module, weights=sources)
    layers, observer = quantizable_layers(stage), Observer(buckets=1)
    with watching(layers, observer.see), torch.no_grad():
        module(torch.from_numpy(latents(side=8)))
    origin = Origin(
        **{
            "identity": "",
            "network": "vae",
            "dtype": "fp32",
            "num_inference_steps": 1,
            "guidance_scale": 1.0,
        },
        **{"seed": SEED, "usual_steps": 1, "buckets": 1, "stage": VAE_DECODER},
    )
    ranges = Ranges(origin=origin, sites=observer.sites, site_of=observer.site_of, prompts=())
    plan = make_plan(NETWORK_RECIPES["dc-ae-int8"], ranges, layers)
    model = to_model(stage)
    for name in ("fp32", "int8"):
        if name == "int8":
            quantize_graph(model, plan, {key: layer.parameter for key, layer in layers.items()})
        graph = folder / f"{name}.onnx"
        ir.save(model, graph, external_data=f"{name}.onnx.data")
        write_ir(graph, folder / f"{name}.xml", spec=SPEC)
        print(f"{graph}: {len(plan.layers)} layers in 8 bits" if name == "int8" else str(graph))


def latents(side: int = PIXELS // FACTOR) -> Any:
    """Random latents of a square picture."""
    return np.random.default_rng(SEED).standard_normal((1, 32, side, side)).astype(np.float32)


def contestants(folder: Path, names: list[str] | None) -> dict[str, Callable[[], Any]]:
    """A call that decodes the latents, for each contestant."""
    from ditc.runtime.sessions.onnxruntime import CPU, OnnxRuntimeSession
    from ditc.runtime.sessions.openvino import OpenvinoSession

    def diffusers() -> Callable[[], Any]:
        import torch

        vae = upstream().to(torch.bfloat16)
        given = torch.from_numpy(latents()).to(torch.bfloat16) / DC_AE["scaling_factor"]

        def decode() -> Any:
            with torch.inference_mode():
                return vae.decode(given).sample.float().numpy()

        return decode

    def ours(session: Any) -> Callable[[], Any]:
        return lambda: np.asarray(session.run({"latents": latents()})["image"])

    makers: dict[str, Callable[[], Callable[[], Any]]] = {DIFFUSERS: diffusers}
    for kind in ("fp32", "int8"):
        makers[f"openvino {kind}"] = lambda kind=kind: ours(OpenvinoSession(folder / f"{kind}.xml", SPEC))
        makers[f"onnxruntime {kind}"] = lambda kind=kind: ours(
            OnnxRuntimeSession(folder / f"{kind}.onnx", SPEC, precision=Precision(kind), provider=CPU)
        )
    return {name: make() for name, make in makers.items() if names is None or name in names}


def speed(folder: Path, repeats: int, names: list[str] | None) -> dict[str, Any]:
    """Decode in turn, and compare medians."""
    calls = contestants(folder, names)
    pictures = {name: call() for name, call in calls.items()}  # warm-up
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            sleep(GAP_S)
            begun = perf_counter()
            call()
            seconds[name].append(perf_counter() - begun)
            sys.stderr.write(f"{name}: {seconds[name][-1]:.3f} s\n")
    exact = pictures.get("openvino fp32")
    return {
        name: {
            "seconds": [round(one, 3) for one in times],
            "median": round(median(times), 3),
            "times_diffusers_bf16": round(median(seconds[DIFFUSERS]) / median(times), 2)
            if DIFFUSERS in seconds
            else None,
            "rel_l2_to_fp32": None if exact is None else relative_l2(pictures[name], exact),
        }
        for name, times in seconds.items()
    }


def quality(bundle: Path, count: int, backend: str) -> dict[str, Any]:
    """Draw pictures with the fp32 and the INT8 decoder from the same noise."""
    from ditc.calib.prompts import read_prompts
    from ditc.runtime.pipeline import Pipeline

    prompts = read_prompts(PROMPTS)[2::13][
        :count
    ]  # the ranges were measured on every fifth prompt from the first on
    drawn = []
    for asked in ("", "vae_decoder=int8"):
        with Pipeline.load(bundle, backend=backend, stage_precision=asked) as pipeline:
            drawn.append(
                [
                    pipeline(prompt, seed=1000 + i, output_type="np").images[0]
                    for i, prompt in enumerate(prompts)
                ]
            )
    each = [psnr(ours, exact) for exact, ours in zip(*drawn, strict=True)]
    return {
        "backend": backend,
        "pictures": len(each),
        "psnr_db_mean": float(np.mean(each)),
        "psnr_db_worst": float(np.min(each)),
    }


if __name__ == "__main__":
    main()
