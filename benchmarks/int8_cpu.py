"""How fast is an INT8 denoiser step on this CPU, and what limits it?

    python -m benchmarks.int8_cpu [--layers 4] [--pixels 512] [--rounds 15] [--no-compile] [--openvino]

The network has Sana-0.6B's width (1152) and random weights, and runs a guided step (2 rows). All contestants are timed
in turn within every round, so that they meet the same load. Ratios are medians over rounds, with their quartiles. The
profile at the end shows in which kernels the INT8 graph spends its time. The result is written to
benchmarks/results/int8_cpu.json.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from ditc.calib.observe import Observer, watching
from ditc.export.contract import StageModule
from ditc.export.engine.ir import write_ir
from ditc.export.example_inputs import example_feeds
from ditc.export.families.sana.adapter import STAGE_DTYPES, TORCH_DTYPES
from ditc.export.families.sana.config import SanaConfig
from ditc.export.families.sana.network import SanaDenoiser
from ditc.export.families.sana.recipe import RECIPES
from ditc.export.graph.onnx import to_model
from ditc.export.graph.passes.qdq import quantize_graph
from ditc.export.graph.step import wrap
from ditc.export.graph.torch_session import TorchSession
from ditc.export.networks.loading import weight_map
from ditc.export.quant.layers import quantizable_layers
from ditc.export.quant.plan import QuantPlan, make_plan
from ditc.export.quant.ranges import Origin, Ranges
from ditc.runtime.machine import library_versions, this_machine
from ditc.runtime.session import Array
from ditc.runtime.sessions.openvino import OpenvinoSession
from ditc.runtime.spec import DENOISER, DType, Precision, Range, StageSpec, TensorSpec
from ditc.runtime.step_contract import ROWS, TEXT_LENGTH, StepContract

RESULTS = Path(__file__).parent / "results" / "int8_cpu.json"
TEXT, WIDTH, CHANNELS = 300, 1152, 32  # Sana-0.6B's text tokens, width and latent channels
CONFIG = {
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_attention_heads": 36,
    "attention_head_dim": 32,
    "num_cross_attention_heads": 16,
    "cross_attention_head_dim": 72,
    "cross_attention_dim": WIDTH,
    "caption_channels": 2304,
    "mlp_ratio": 2.5,
    "patch_size": 1,
}


def main() -> None:
    """Build the contestants, time them, and print and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--pixels", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes minutes")
    parser.add_argument("--openvino", action="store_true", help="needs the extra openvino")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    load_before = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        contestants, profile = make_contestants(arguments, Path(folder))
        times = race(contestants, arguments.rounds)
        kernels = profile()
    report(arguments, times, kernels, load_before)


def make_contestants(
    arguments: argparse.Namespace, folder: Path
) -> tuple[dict[str, Callable[[], object]], Callable[[], dict[str, float]]]:
    """Functions that run one step, by contestant; and a function that returns the INT8 session's kernel times."""
    cells = arguments.pixels // 32
    stage = make_stage(arguments.layers, cells, Precision.FP32)
    sizes = {"batch": 1, "rows": 2, "height": cells, "width": cells, "text_length": TEXT}
    feeds = example_feeds(stage.spec, sizes)
    feeds["row_of"] = np.zeros(2, np.int64)
    model = to_model(stage)
    ir.save(model, folder / "fp32.onnx", external_data="fp32.data")
    quantize(stage, model, feeds)
    ir.save(model, folder / "int8.onnx", external_data="int8.data")
    del model
    int8 = ort_session(folder / "int8.onnx", arguments.threads, profile_prefix=str(folder / "profile"))
    fp32 = ort_session(folder / "fp32.onnx", arguments.threads)
    contestants: dict[str, Callable[[], object]] = {
        "onnxruntime fp32": lambda: fp32.run(None, feeds),
        "onnxruntime int8": lambda: int8.run(None, feeds),
    }
    if arguments.openvino:
        for name, file in (("fp32", "fp32.onnx"), ("int8", "int8.onnx")):
            session = openvino_session(folder / file, stage.spec, arguments.threads)
            contestants[f"openvino {name}"] = lambda s=session: s.run(feeds)  # type: ignore[misc]
    contestants |= diffusers_steps(arguments, cells)
    return contestants, lambda: kernel_times(int8)


def make_stage(layers: int, cells: int, precision: Precision) -> StageModule:
    """The step around a network with random weights, in the form that an adapter returns."""
    torch.manual_seed(0)
    contract = StepContract()
    network = SanaDenoiser(SanaConfig.from_json({**CONFIG, "num_layers": layers, "sample_size": cells}))
    step = wrap(network.to(TORCH_DTYPES[precision]), dtype=TORCH_DTYPES[precision], contract=contract)
    step.requires_grad_(False)
    conditioning = (
        TensorSpec("cross_kv", STAGE_DTYPES[precision], (ROWS, layers, 2, TEXT_LENGTH, WIDTH)),
        TensorSpec("text_bias", DType.FLOAT32, (ROWS, TEXT_LENGTH)),
    )
    spec = StageSpec(
        DENOISER,
        contract.inputs(CHANNELS, conditioning),
        contract.outputs(CHANNELS),
        {
            "batch": Range(1, 1, 4),
            "rows": Range(1, 2, 8),
            "height": Range(1, cells, 2 * cells),
            "width": Range(1, cells, 2 * cells),
            "text_length": Range(1, TEXT, TEXT),
        },
    )
    return StageModule(
        spec=spec, precision=precision, module=step, weights=tuple(weight_map({DENOISER: step}))
    )


def quantize(stage: StageModule, model: ir.Model, feeds: Mapping[str, Array]) -> None:
    """Quantize the graph to INT8 in place."""
    quantize_graph(model, plan_of(stage, feeds), parameters_of(stage))


def parameters_of(stage: StageModule) -> dict[str, str]:
    """The name of the initializer that holds each layer's weight."""
    return {name: layer.parameter for name, layer in quantizable_layers(stage).items()}


def plan_of(stage: StageModule, feeds: Mapping[str, Array]) -> QuantPlan:
    """The plan of Sana's recipe. The ranges are from one run, because speed does not depend on them."""
    layers, observer = quantizable_layers(stage), Observer(buckets=1)
    with watching(layers, observer.see):
        TorchSession(stage.module, stage.spec).run(feeds)
    observer.forget_tensor()
    origin = Origin(
        identity="",
        network="",
        dtype="fp32",
        num_inference_steps=1,
        guidance_scale=1.0,
        seed=0,
        buckets=1,
        usual_steps=1,
    )
    ranges = Ranges(origin=origin, sites=observer.sites, site_of=observer.site_of, prompts=())
    return make_plan(RECIPES["sana-int8"], ranges, layers)


def ort_session(path: Path, threads: int, profile_prefix: str | None = None) -> Any:
    """A session of ONNX Runtime's CPU provider."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    if profile_prefix is not None:
        options.enable_profiling, options.profile_file_prefix = True, profile_prefix
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def openvino_session(
    onnx: Path, spec: StageSpec, threads: int, precision: Precision = Precision.FP32
) -> OpenvinoSession:
    """A session of the graph in OpenVINO's form."""
    report = write_ir(onnx, onnx.with_suffix(f".{precision}.xml"), spec=spec, precision=precision)
    return OpenvinoSession(report.model, spec, threads=threads, precision=precision)


def diffusers_steps(arguments: argparse.Namespace, cells: int) -> dict[str, Callable[[], object]]:
    """Functions that run diffusers' own transformer.

    They run the network alone, without guidance and solver, which favours diffusers a little.
    """
    from diffusers import SanaTransformer2DModel

    torch.manual_seed(0)
    network = SanaTransformer2DModel(**CONFIG, num_layers=arguments.layers, sample_size=cells).eval()
    network = network.to(torch.bfloat16).requires_grad_(False)
    latents = torch.randn(2, CHANNELS, cells, cells, dtype=torch.bfloat16)
    text = torch.randn(2, TEXT, 2304, dtype=torch.bfloat16)
    timestep = torch.tensor([500, 500])
    mask = torch.ones(2, TEXT, dtype=torch.int64)

    def step(module: Any) -> Callable[[], object]:
        def run() -> object:
            with torch.inference_mode():
                return module(latents, text, timestep, encoder_attention_mask=mask, return_dict=False)

        return run

    steps = {"diffusers eager bf16": step(network)}
    if not arguments.no_compile:
        steps["torch.compile bf16"] = step(torch.compile(network))
    return steps


def race(contestants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contestant in each round, after two warm-up runs."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for name, step in contestants.items():
        print(f"warming up {name}", flush=True)
        step()
        step()
    for _ in range(rounds):
        for name, step in contestants.items():
            begun = perf_counter()
            step()
            times[name].append(perf_counter() - begun)
    return times


def kernel_times(session: Any) -> dict[str, float]:
    """The share of the INT8 session's time that each kernel takes, largest first."""
    events = json.loads(Path(session.end_profiling()).read_text())
    kernels: dict[str, float] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            op = event["args"].get("op_name", "?")
            kernels[op] = kernels.get(op, 0.0) + event["dur"]
    total = sum(kernels.values()) or 1.0
    return {op: t / total for op, t in sorted(kernels.items(), key=lambda item: -item[1])}


def report(
    arguments: argparse.Namespace,
    times: Mapping[str, list[float]],
    kernels: Mapping[str, float],
    load_before: tuple[float, float, float],
) -> None:
    """Print the table and write it with the machine and the settings."""
    int8 = np.array(times["onnxruntime int8"])
    rows = {}
    for name, seconds in times.items():
        ratios = np.array(seconds) / int8
        low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
        rows[name] = {
            "median_s": float(np.median(seconds)),
            "min_s": min(seconds),
            "over_int8": float(middle),
            "over_int8_quartiles": [float(low), float(high)],
        }
        print(
            f"{name:<24}{np.median(seconds) * 1e3:>9.1f} ms  min {min(seconds) * 1e3:>8.1f}  "
            f"{middle:>5.2f} x int8's ({low:.2f} to {high:.2f})"
        )
    print("INT8 time by kernel: " + ", ".join(f"{op} {share:.0%}" for op, share in list(kernels.items())[:8]))
    result = {
        "machine": str(this_machine()),
        "versions": library_versions(),
        "load_average_before": load_before,
        "settings": vars(arguments),
        "times": rows,
        "int8_kernels": {op: round(share, 4) for op, share in kernels.items()},
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(f"load average before: {load_before[0]:.1f}; wrote {RESULTS}")


if __name__ == "__main__":
    main()
