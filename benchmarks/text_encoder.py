"""How fast and how large is Gemma-2-2b as a text encoder with weights in 8 bits, and how close is it to fp32?

    python -m benchmarks.text_encoder FOLDER [--layers 4] [--rounds 7]

The encoder has the released width, random weights, some of its 26 layers and a small vocabulary. It encodes one text of
300 tokens, as Sana does. All forms run in turn in every round. Graphs that FOLDER holds are used again; the result goes
to benchmarks/results/text_encoder-DATE.json. With random weights, the error says little about trained ones: on the demo
checkpoint it is in docs/calibration.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from transformers import Gemma2Config, Gemma2Model

from benchmarks.full_size import GEMMA
from benchmarks.machine import alternating_s, spread, write
from ditc.export.contract import StageModule
from ditc.export.engine.ir import write_ir
from ditc.export.graph.onnx import to_model
from ditc.export.graph.passes.qdq import quantize_graph
from ditc.export.networks.gemma2 import load_gemma2
from ditc.export.networks.loading import weight_map
from ditc.export.quant.layers import quantizable_layers
from ditc.export.quant.plan import make_plan
from ditc.export.quant.stage_recipes import NETWORK_RECIPES
from ditc.runtime.cores import default_threads
from ditc.runtime.cpu_features import cpu_features
from ditc.runtime.metrics import relative_l2
from ditc.runtime.sessions.onnxruntime import CPU, OnnxRuntimeSession
from ditc.runtime.sessions.openvino import OpenvinoSession
from ditc.runtime.spec import TEXT_ENCODER, DType, Precision, Range, StageSpec, TensorSpec

TOKENS = 300
VOCABULARY = 4096
SPEC = StageSpec(
    TEXT_ENCODER,
    inputs=(
        TensorSpec("input_ids", DType.INT64, ("batch", "length")),
        TensorSpec("attention_mask", DType.INT64, ("batch", "length")),
    ),
    outputs=(TensorSpec("text_embeds", DType.FLOAT32, ("batch", "length", GEMMA["hidden_size"])),),
    profile={"batch": Range(1, 1, 2), "length": Range(1, TOKENS, TOKENS)},
)
# By name: the type of everything that is not in 8 bits, and the recipe.
FORMS: dict[str, tuple[Precision, str | None]] = {
    "fp32": (Precision.FP32, None),
    "bf16": (Precision.BF16, None),
    "int8-weights, fp32": (Precision.FP32, "gemma2-int8-weights"),
    "int8-weights, bf16": (Precision.BF16, "gemma2-int8-weights"),
    "int8-dynamic": (Precision.FP32, "gemma2-int8-dynamic"),
}


def main() -> None:
    """Make what is missing, time all forms, print and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    for name, (base, recipe) in FORMS.items():
        prepare(arguments.folder, name, base, recipe, arguments.layers)
    rng = np.random.default_rng(0)
    feeds = {
        "input_ids": rng.integers(3, VOCABULARY, (1, TOKENS)),
        "attention_mask": np.ones((1, TOKENS), np.int64),
    }
    runs = contestants(arguments.folder, feeds)
    outputs = {name: run() for name, run in runs.items()}
    exact = outputs["onnxruntime fp32"]
    seconds = alternating_s(runs, warmup=1, repeats=arguments.rounds)
    results = {
        name: {
            "seconds": spread(times),
            "times_fp32_of_its_library": spread(
                [a / b for a, b in zip(seconds[f"{name.split()[0]} fp32"], times, strict=True)]
            ),
            "relative_l2_to_fp32": relative_l2(outputs[name], exact),
            "megabytes": megabytes(arguments.folder, name.split(" ", 1)[1]),
        }
        for name, times in seconds.items()
    }
    results |= {"settings": {"layers": arguments.layers, "tokens": TOKENS, "cpu": sorted(cpu_features())}}
    print(json.dumps(results, indent=1))
    print(write("text_encoder", results))


def prepare(folder: Path, name: str, base: Precision, recipe: str | None, layers: int) -> None:
    """Write the graph of one form as ONNX and as OpenVINO's files, unless they are there."""
    graph = folder / f"{name}.onnx"
    if graph.with_suffix(".bin").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = {**GEMMA, "num_hidden_layers": layers, "vocab_size": VOCABULARY}
    torch.manual_seed(0)
    tensors = Gemma2Model(Gemma2Config(**config)).state_dict()
    dtype = torch.bfloat16 if base is Precision.BF16 else torch.float32
    module = load_gemma2(config, tensors, dtype)
    sources = tuple(weight_map({TEXT_ENCODER: module}, tensors))
    stage = StageModule(spec=SPEC, precision=base, module=module, weights=sources)
    model = to_model(stage)
    if recipe is not None:
        found = quantizable_layers(stage)
        plan = make_plan(NETWORK_RECIPES[recipe], None, found)
        quantize_graph(model, plan, {key: layer.parameter for key, layer in found.items()})
    ir.save(model, graph, external_data=f"{name}.onnx.data")
    write_ir(graph, graph.with_suffix(".xml"), spec=SPEC, precision=precision_of(recipe, base))


def precision_of(recipe: str | None, base: Precision) -> Precision:
    """The precision that an artifact of this form has in a bundle."""
    return base if recipe is None else NETWORK_RECIPES[recipe].precision


def contestants(folder: Path, feeds: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """What is timed: the forms that each library has."""
    threads = default_threads()
    runs: dict[str, Callable[[], Any]] = {}
    for name, (base, recipe) in FORMS.items():
        precision, graph = precision_of(recipe, base), folder / f"{name}.onnx"
        sessions: dict[str, Any] = {
            "openvino": OpenvinoSession(graph.with_suffix(".xml"), SPEC, threads=threads, precision=precision)
        }
        if base is Precision.FP32:
            sessions["onnxruntime"] = OnnxRuntimeSession(
                graph, SPEC, precision=precision, provider=CPU, threads=threads
            )
        for library, session in sessions.items():
            runs[f"{library} {name}"] = lambda s=session: np.asarray(s.run(feeds)["text_embeds"])  # type: ignore[misc]
    return runs


def megabytes(folder: Path, name: str) -> float:
    """The size of the form's weights as ONNX."""
    return round((folder / f"{name}.onnx.data").stat().st_size / 1e6, 1)


if __name__ == "__main__":
    main()
