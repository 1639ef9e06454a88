"""How long does a switch to another LoRA take, and how much memory? At the widths of Sana 1.6B, with random weights.

    python -m benchmarks.lora_switch --layers 20

The LoRA has rank 32 and changes all eight matrices of both attentions in every layer. The text encoder and the VAE are
those of the tests' small checkpoint: a switch does not touch them. The goal is at most 1 s. With `--layers 2`, a tenth
of the weights, the result also holds what 20 layers would take if all of it grew with the layers.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch

from benchmarks.machine import spread, write
from ditc.runtime.bench.memory import peak_bytes
from ditc.runtime.bundle.manifest import MANIFEST
from ditc.runtime.lora.adapters import Adapters
from ditc.runtime.lora.stage_weights import changed_initializers
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.spec import DENOISER, Backend

GOAL_S, RANK, HEADS, CROSS_HEADS, LAYERS = 1.0, 32, 70, 20, 20
TARGETS = [f"attn{n}.{name}" for n in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")]
ROUNDS = 3


def main() -> None:
    """Build the bundle, measure both backends, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=LAYERS, metavar="LAYERS")
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="where to keep the bundle (default: nowhere)"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        bundle = make_bundle(folder, arguments.layers)
        files = [make_lora(folder / f"style{seed}.safetensors", arguments.layers, seed) for seed in range(2)]
        results = {name: measure(bundle, files, name) for name in ("onnxruntime", "openvino")}
    for result in results.values():
        for kind in ("switch_s", "switch_cpu_s"):
            result[f"{kind}_of_20_layers"] = result[kind]["median"] * LAYERS / arguments.layers
        result["goal_met"] = result["switch_s_of_20_layers"] <= GOAL_S
    print(write("lora_switch", {"layers": arguments.layers, "rank": RANK, "goal_s": GOAL_S, **results}))


def make_bundle(folder: Path, layers: int) -> Path:
    """A bundle for ONNX Runtime and OpenVINO in fp32."""
    bundle = folder / "bundle"
    if (bundle / MANIFEST).exists():
        return bundle
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from diffusers import SanaTransformer2DModel
    from tiny_sana import make_checkpoint

    from ditc.export.build.builder import build_bundle
    from ditc.export.options import BuildOptions

    checkpoint = make_checkpoint(folder / "checkpoint")
    torch.manual_seed(0)
    SanaTransformer2DModel(
        in_channels=8,
        out_channels=8,
        num_layers=layers,
        num_attention_heads=HEADS,
        attention_head_dim=32,
        num_cross_attention_heads=CROSS_HEADS,
        cross_attention_head_dim=HEADS * 32 // CROSS_HEADS,
        cross_attention_dim=HEADS * 32,
        caption_channels=24,
        sample_size=4,
    ).save_pretrained(checkpoint / "transformer")
    build_bundle(checkpoint, bundle, BuildOptions(backend=Backend.OPENVINO))
    return bundle


def make_lora(file: Path, layers: int, seed: int) -> Path:
    """A LoRA of random values."""
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    width, tensors = HEADS * 32, {}
    for layer in range(layers):
        for target in TARGETS:
            name = f"transformer.transformer_blocks.{layer}.{target}.lora_"
            tensors[f"{name}A.weight"] = 0.02 * torch.randn(RANK, width)
            tensors[f"{name}B.weight"] = 0.02 * torch.randn(width, RANK)
    save_file(tensors, file)
    return file


def measure(bundle: Path, files: list[Path], backend: str) -> dict[str, Any]:
    """Switch between two LoRAs several times, then draw once."""
    with Pipeline.load(bundle, backend=backend) as pipeline:
        pipeline("red", num_inference_steps=1, seed=0)
        before = peak_bytes()
        names, reading = [], []
        adapters = pipeline._adapters
        assert isinstance(adapters, Adapters)
        for file in files:
            began = perf_counter()
            names.append(adapters.load(file, None))
            reading.append(perf_counter() - began)
        switching, computing = [], []
        for turn in range(ROUNDS):
            began, cpu = perf_counter(), process_time()
            pipeline.set_adapters(names[turn % 2])
            switching.append(perf_counter() - began)
            computing.append(process_time() - cpu)
        began = perf_counter()
        pipeline("red", num_inference_steps=1, seed=0)
        first_run = perf_counter() - began
        reopener = adapters._reopener
        changes = reopener.stages_of(adapters._scaled({names[0]: 1.0}))[DENOISER]
        graph = bundle / reopener._graph(DENOISER).file.path
        cpu, changed_bytes = process_time(), 0
        for _, array in changed_initializers(graph, reopener._weights(DENOISER), changes):
            changed_bytes += array.nbytes
        values = process_time() - cpu
        return {
            "read_s": spread(reading),
            "switch_s": spread(switching),
            "switch_cpu_s": spread(computing),
            "denoiser_values_cpu_s": values,
            "picture_after_s": first_run,
            "denoiser_changed_bytes": changed_bytes,
            "peak_before_bytes": before,
            "peak_after_bytes": peak_bytes(),
        }


if __name__ == "__main__":
    main()
