"""How long does a switch to another LoRA take, and how much memory? At the widths of Sana 1.6B, with random weights.

    python -m benchmarks.lora_switch --layers 20

The LoRA has rank 32 and changes all eight matrices of both attentions in every layer. The text encoder and the VAE are
those of the tests' small checkpoint: a switch does not touch them. The goal is at most 1 s. With `--layers 2`, a tenth
of the weights, the result also holds what 20 layers would take if all of it grew with the layers.

ONNX Runtime and OpenVINO get LoRAs in their weights, and graphs of `ditc build --lora-inputs` get them as inputs. For
these, the time of a denoiser's run at 1,024 tokens is measured too: without a LoRA, and with one of rank 32, beside the
run of a graph with the same LoRA in its weights.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch

from benchmarks.machine import spread, write
from ditc.export.example_inputs import example_feeds
from ditc.runtime.bench.memory import peak_bytes
from ditc.runtime.bundle.manifest import MANIFEST
from ditc.runtime.lora.adapters import Adapters
from ditc.runtime.lora.stage_weights import changed_initializers
from ditc.runtime.metrics import relative_l2
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.spec import DENOISER, Backend

GOAL_S, RANK, HEADS, CROSS_HEADS, LAYERS = 1.0, 32, 70, 20, 20
TARGETS = [f"attn{n}.{name}" for n in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")]
ROUNDS = 3
INPUTS = "onnxruntime with LoRAs as inputs"
# The latents of a picture of 1024 x 1024 pixels, and the tokens of a prompt.
SIDE, TEXT, STEP_ROUNDS = 32, 300, 6


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
        with_inputs = make_bundle(folder, arguments.layers, lora_inputs=True)
        files = [make_lora(folder / f"style{seed}.safetensors", arguments.layers, seed) for seed in range(2)]
        results = {
            INPUTS: in_process(measure, with_inputs, files, "onnxruntime"),
            "onnxruntime": in_process(measure, bundle, files, "onnxruntime"),
            "openvino": in_process(measure, bundle, files, "openvino"),
        }
        steps = in_process(step_times, bundle, with_inputs, files[0])
    for result in results.values():
        for kind in ("switch_s", "switch_cpu_s"):
            result[f"{kind}_of_20_layers"] = result[kind]["median"] * LAYERS / arguments.layers
        result["goal_met"] = result["switch_s_of_20_layers"] <= GOAL_S
    facts = {"layers": arguments.layers, "rank": RANK, "goal_s": GOAL_S, "step": steps}
    print(write("lora_switch", {**facts, **results}))


def in_process(function: Callable[..., dict[str, Any]], *arguments: object) -> dict[str, Any]:
    """What the function returns in a new process, whose peak memory is its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def make_bundle(folder: Path, layers: int, *, lora_inputs: bool = False) -> Path:
    """A bundle in fp32: for ONNX Runtime and OpenVINO, or for ONNX Runtime with LoRAs as inputs."""
    bundle = folder / ("bundle-inputs" if lora_inputs else "bundle")
    if (bundle / MANIFEST).exists():
        return bundle
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from diffusers import SanaTransformer2DModel
    from tiny_sana import make_checkpoint

    from ditc.export.build.builder import build_bundle
    from ditc.export.options import BuildOptions

    options = BuildOptions(lora_inputs=True) if lora_inputs else BuildOptions(backend=Backend.OPENVINO)
    checkpoint = folder / "checkpoint"
    if lora_inputs:  # the other bundle's checkpoint
        build_bundle(checkpoint, bundle, options)
        return bundle
    make_checkpoint(checkpoint)
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
    build_bundle(checkpoint, bundle, options)
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
        after = peak_bytes()
        reopener = adapters._reopener
        changes = reopener.stages_of(adapters._scaled({names[0]: 1.0}))[DENOISER]
        graph = reopener._stored(bundle, reopener._graph(DENOISER))
        cpu, changed_bytes = process_time(), 0
        for _, array in changed_initializers(graph, changes):
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
            "peak_after_bytes": after,
        }


def step_times(bundle: Path, with_inputs: Path, file: Path) -> dict[str, Any]:
    """CPU seconds of a run of the denoiser in ONNX Runtime, of the graphs in turn, and how far their results differ."""
    options = {"backend": "onnxruntime", "threads": 1}
    with ExitStack() as stack:
        opened = {
            name: stack.enter_context(Pipeline.load(path, **options))
            for name, path in {
                "plain": bundle,
                "in weights": bundle,
                "inputs, no LoRA": with_inputs,
                "inputs": with_inputs,
            }.items()
        }
        for name in ("in weights", "inputs"):
            opened[name].load_lora_weights(file)
        spec = opened["plain"].sessions[DENOISER].spec
        sizes = dict.fromkeys(spec.profile, 1) | {"height": SIDE, "width": SIDE, "text_length": TEXT}
        feeds = example_feeds(spec, sizes)
        seconds: dict[str, list[float]] = {name: [] for name in opened}
        results = {}
        for _ in range(STEP_ROUNDS):
            for name, pipeline in opened.items():
                began = process_time()
                results[name] = pipeline.sessions[DENOISER].run(feeds)
                seconds[name].append(process_time() - began)
        differ = {
            f"{name} and {other}": max(
                relative_l2(np.asarray(results[name][output]), np.asarray(value))
                for output, value in results[other].items()
            )
            for name, other in (("inputs, no LoRA", "plain"), ("inputs", "in weights"), ("inputs", "plain"))
        }
        return {
            "tokens": SIDE * SIDE,
            "cpu_s": {n: spread(s[1:]) for n, s in seconds.items()},
            "differ": differ,
        }


if __name__ == "__main__":
    main()
