"""How long does a switch to another LoRA take, and how much memory? At the widths of Sana 1.6B, with random weights.

    python -m benchmarks.lora_switch --layers 20

The LoRA has rank 32 and changes all eight matrices of both attentions in every layer. The text encoder and the VAE are
those of the tests' small checkpoint: a switch does not touch them. The goal is at most 1 s. With `--layers 2`, a tenth
of the weights, the result also holds what 20 layers would take if all of it grew with the layers.

ONNX Runtime and OpenVINO get LoRAs in their weights, and graphs of `ditc build --lora-inputs` get them as inputs. For
both libraries, runs of the denoiser at 1,024 tokens are measured too, in turn: of the graph without inputs, of the
graph with inputs without a LoRA, and with one of rank 32. At most four layers are open for that, so that all fit into
memory. The ratio of two times is the median of the ratios of the turns.

Memory is anonymous (what the process has allocated) and that of files (weights that are mapped from the bundle, which
the system can drop at any time). Only their sum has a peak.
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
from ditc.runtime.bench.memory import STATUS
from ditc.runtime.bundle.manifest import MANIFEST
from ditc.runtime.lora.adapters import Adapters
from ditc.runtime.lora.choice import LoraChoice
from ditc.runtime.lora.inputs import WithLoras
from ditc.runtime.metrics import relative_l2
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.spec import DENOISER, Backend

# What is read of /proc/self/status. The two kinds of memory, and the peak of their sum.
MEMORY = {"RssAnon": "allocated", "RssFile": "of_files", "VmHWM": "peak"}
GOAL_S, RANK, HEADS, CROSS_HEADS, LAYERS = 1.0, 32, 70, 20, 20
TARGETS = [f"attn{n}.{name}" for n in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")]
ROUNDS = 3
LIBRARIES = ("onnxruntime", "openvino")
# The latents of a picture of 1024 x 1024 pixels, and the tokens of a prompt.
SIDE, TEXT, STEP_ROUNDS = 32, 300, 8
# Layers of which the runs are measured: three sessions of a library have about twice the weights in memory each.
STEP_LAYERS = 4
PLAIN, EMPTY, GIVEN = "without inputs", "with inputs, no LoRA", "with inputs and a LoRA"


def main() -> None:
    """Build the bundle, measure both backends, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=LAYERS, metavar="LAYERS")
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="where to keep the bundle (default: nowhere)"
    )
    parser.add_argument(
        "--library", choices=LIBRARIES, action="append", help="measure this one alone (default: both)"
    )
    arguments = parser.parse_args()
    libraries, layers = arguments.library or LIBRARIES, arguments.layers
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        results: dict[str, dict[str, Any]] = {}
        for way, lora_inputs in (("in the weights", False), ("as inputs", True)):
            bundle = make_bundle(folder, layers, lora_inputs=lora_inputs)
            files = [make_lora(folder, layers, seed) for seed in range(2)]
            for library in libraries:
                results[f"{library}, LoRAs {way}"] = in_process(measure, bundle, files, library)
        few = min(layers, STEP_LAYERS)
        bundles = [make_bundle(folder, few, lora_inputs=lora_inputs) for lora_inputs in (False, True)]
        file = make_lora(folder, few, 0)
        steps = {library: in_process(step_times, *bundles, file, library) for library in libraries}
    for result in results.values():
        for kind in ("switch_s", "switch_cpu_s"):
            result[f"{kind}_of_20_layers"] = result[kind]["median"] * LAYERS / layers
        result["goal_met"] = result["switch_s_of_20_layers"] <= GOAL_S
    facts = {"layers": layers, "rank": RANK, "goal_s": GOAL_S, "runs": steps, "layers_of_runs": few}
    print(write("lora_switch", {**facts, **results}))


def memory() -> dict[str, int]:
    """Bytes of this process now, and at most so far; empty where the system does not say."""
    try:
        lines = STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return {}
    parts = (line.partition(":") for line in lines)
    return {MEMORY[name]: int(rest.split()[0]) * 1024 for name, _, rest in parts if name in MEMORY}


def in_process(function: Callable[..., dict[str, Any]], *arguments: object) -> dict[str, Any]:
    """What the function returns in a new process, whose peak memory is its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def make_bundle(folder: Path, layers: int, *, lora_inputs: bool = False) -> Path:
    """A bundle in fp32 for ONNX Runtime and OpenVINO, of so many layers; with LoRAs as inputs or without."""
    bundle = folder / f"bundle-{layers}{'-inputs' if lora_inputs else ''}"
    if (bundle / MANIFEST).exists():
        return bundle
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from diffusers import SanaTransformer2DModel
    from tiny_sana import make_checkpoint

    from ditc.export.build.builder import build_bundle
    from ditc.export.options import BuildOptions

    options = BuildOptions(lora_inputs=lora_inputs, backend=Backend.OPENVINO)
    checkpoint = folder / f"checkpoint-{layers}"
    if (checkpoint / "transformer" / "config.json").exists():  # the other bundle's
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


def make_lora(folder: Path, layers: int, seed: int) -> Path:
    """A LoRA of random values."""
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    width, tensors = HEADS * 32, {}
    for layer in range(layers):
        for target in TARGETS:
            name = f"transformer.transformer_blocks.{layer}.{target}.lora_"
            tensors[f"{name}A.weight"] = 0.02 * torch.randn(RANK, width)
            tensors[f"{name}B.weight"] = 0.02 * torch.randn(width, RANK)
    file = folder / f"style{seed}-{layers}.safetensors"
    save_file(tensors, file)
    return file


def measure(bundle: Path, files: list[Path], library: str) -> dict[str, Any]:
    """Switch between two LoRAs several times, then draw once. Notes the memory after each part."""
    seen = {"before": memory()}
    began = perf_counter()
    with Pipeline.load(bundle, backend=library, self_test=False) as pipeline:
        opening, seen["opened"] = perf_counter() - began, memory()
        began = perf_counter()
        pipeline("red", num_inference_steps=1, seed=0)
        first, seen["after the first picture"] = perf_counter() - began, memory()
        names, reading = [], []
        adapters = pipeline.adapters
        assert isinstance(adapters, Adapters)
        for file in files:
            began = perf_counter()
            names.append(adapters.load(file, None))
            reading.append(perf_counter() - began)
        seen["LoRAs read"] = memory()
        switching, computing = [], []
        for turn in range(ROUNDS):
            began, cpu = perf_counter(), process_time()
            pipeline.set_adapters(names[turn % 2])
            switching.append(perf_counter() - began)
            computing.append(process_time() - cpu)
        seen["switched"] = memory()
        began = perf_counter()
        pipeline("red", num_inference_steps=1, seed=0)
        with_lora, seen["after a picture with a LoRA"] = perf_counter() - began, memory()
        stage = pipeline.sessions[DENOISER]
        given = stage.matrices().values() if isinstance(stage, WithLoras) else ()
        return {
            "open_s": opening,
            "first_picture_s": first,
            "read_s": spread(reading),
            "switch_s": spread(switching),
            "switch_cpu_s": spread(computing),
            "picture_after_s": with_lora,
            "denoiser_matrices_bytes": sum(matrix.nbytes for matrix in given),
            "memory": seen,
        }


def step_times(bundle: Path, with_inputs: Path, file: Path, library: str) -> dict[str, Any]:
    """CPU seconds of a run of the denoiser with one thread, of the graphs in turn, and how far their results differ."""
    with ExitStack() as stack:
        opened = {
            name: stack.enter_context(Pipeline.load(path, backend=library, threads=1, self_test=False))
            for name, path in {PLAIN: bundle, EMPTY: with_inputs}.items()
        }
        opened[GIVEN] = opened[EMPTY].with_loras([LoraChoice(file)])
        spec = opened[PLAIN].sessions[DENOISER].spec
        wanted = {"height": SIDE, "width": SIDE, "text_length": TEXT}
        sizes = {name: min(wanted.get(name, 1), bounds.max) for name, bounds in spec.profile.items()}
        feeds = example_feeds(spec, sizes)
        seconds: dict[str, list[float]] = {name: [] for name in opened}
        results = {}
        for _ in range(STEP_ROUNDS + 1):
            for name, pipeline in opened.items():
                began = process_time()
                results[name] = pipeline.sessions[DENOISER].run(feeds)
                seconds[name].append(process_time() - began)
        kept = {name: taken[1:] for name, taken in seconds.items()}  # the first run of each compiles
        opened[PLAIN].load_lora_weights(file)
        results["in the weights"] = opened[PLAIN].sessions[DENOISER].run(feeds)
        pairs = ((EMPTY, PLAIN), (GIVEN, "in the weights"), (GIVEN, PLAIN))
        return {
            "sizes": sizes,
            "cpu_s": {name: spread(taken) for name, taken in kept.items()},
            "cpu_ratio": {
                f"{name} / {PLAIN}": spread(
                    [one / plain for one, plain in zip(kept[name], kept[PLAIN], strict=True)]
                )
                for name in (EMPTY, GIVEN)
            },
            "differ": {
                f"{name} and {other}": max(
                    relative_l2(np.asarray(results[name][output]), np.asarray(value))
                    for output, value in results[other].items()
                )
                for name, other in pairs
            },
            "memory": memory(),
        }


if __name__ == "__main__":
    main()
