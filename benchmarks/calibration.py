"""Compare the signal-to-noise ratio of each quantized layer with nvidia-modelopt's, on the same inputs and weights.

    python -m benchmarks.calibration demo/checkpoint --ranges build/demo/ranges.safetensors [--modelopt PYTHON]

PYTHON is the interpreter of a separate environment, because modelopt's extras conflict with ours:
    python3 -m venv build/modelopt && build/modelopt/bin/pip install torch==2.13.0 nvidia-modelopt==0.47.0 requests
Both sides calibrate on the same prompts: --num-prompts must be the number that the ranges were measured with. Both are
judged on inputs from other prompts, by 10 log10(|y|^2 / |y - yq|^2) of every layer's output y = x W^T, with y and yq in
fp32. modelopt gets a sample of the calibration's rows that includes the largest ones. The result is written to
benchmarks/results/calibration.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

RESULTS = Path(__file__).parent / "results" / "calibration.json"
OURS = {"int8": "sana-int8", "fp8": "sana-fp8"}
THEIRS = {"int8": "INT8_SMOOTHQUANT_CFG", "fp8": "FP8_DEFAULT_CFG"}
MODELOPT = "0.47"
ROWS = 4096  # rows of each layer's inputs that are kept for calibration and for judging
JUDGED = 4  # the number of prompts to judge on, taken from the end of the file


def main() -> None:
    """Collect inputs, quantize with ditc and with modelopt, and print and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--ranges", type=Path)
    parser.add_argument("--modelopt", type=Path, metavar="PYTHON")
    parser.add_argument("--prompts", type=Path, help="the file of prompts that was given to ditc calibrate")
    parser.add_argument("--num-prompts", type=int, default=8)
    parser.add_argument("--inside-modelopt", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside_modelopt is not None:
        modelopt_side(arguments.inside_modelopt)
        return
    if arguments.checkpoint is None or arguments.ranges is None:
        parser.error("checkpoint and --ranges are required")
    with tempfile.TemporaryDirectory() as folder:
        samples = Path(folder) / "samples.safetensors"
        table = our_side(arguments, samples)
        if arguments.modelopt is not None:
            command = [arguments.modelopt, Path(__file__).resolve(), "--inside-modelopt", samples]
            subprocess.run([str(part) for part in command], check=True)
            theirs = json.loads(samples.with_suffix(".json").read_text())
            for layer, row in table.items():
                row.update({f"modelopt {kind}": theirs[kind][layer] for kind in THEIRS})
    report(table, arguments)


def our_side(arguments: argparse.Namespace, samples: Path) -> dict[str, dict[str, float]]:
    """Our SNRs in dB by layer and format. Writes the weights and inputs that modelopt gets."""
    from ditc.calib.observe import watching
    from ditc.calib.prompts import GENERAL, read_prompts
    from ditc.export.families.sana.recipe import RECIPES
    from ditc.export.graph.torch_session import TorchSession
    from ditc.export.quant.layers import quantizable_layers
    from ditc.export.quant.plan import make_plan
    from ditc.export.quant.ranges import load_ranges
    from ditc.export.quant.simulate import quantized
    from ditc.parity.reference.pytorch import TorchModel
    from ditc.runtime import Request
    from ditc.runtime.spec import DENOISER

    reference, ranges = TorchModel(arguments.checkpoint), load_ranges(arguments.ranges)
    stage = reference.load(DENOISER)
    layers = quantizable_layers(stage)
    session = TorchSession(stage.module, stage.spec)
    pipeline = reference.pipeline.with_sessions({DENOISER: session})
    plans = {kind: make_plan(RECIPES[name], ranges, layers) for kind, name in OURS.items()}
    wanted = {name: layers[name] for name in plans["int8"].layers}
    prompts = read_prompts(arguments.prompts or GENERAL)

    if ranges.origin.seed or len(ranges.prompts) != arguments.num_prompts:
        measured = f"{len(ranges.prompts)} prompts and seed {ranges.origin.seed}"
        raise SystemExit(
            f"the ranges have {measured}: give --num-prompts that number, and use ranges of seed 0"
        )

    def inputs(chosen: list[str], seed: int, *, largest: int) -> dict[str, Tensor]:
        seen: dict[str, list[Tensor]] = {}
        with watching(wanted, lambda name, x: seen.setdefault(name, []).append(x.flatten(0, -2).clone())):
            for i, prompt in enumerate(chosen):
                for _ in pipeline.steps(Request(prompt=prompt, seed=seed + i)):
                    pass
        generator = torch.Generator().manual_seed(0)
        kept = {}
        for name, parts in seen.items():
            rows = torch.cat(parts)
            others = torch.randperm(len(rows), generator=generator)[: ROWS - largest]
            top = rows.abs().amax(dim=1).topk(largest).indices
            channels = rows.abs().argmax(dim=0)[: ROWS // 4 if largest else 0]
            kept[name] = rows[torch.cat([top, channels, others])[:ROWS]]
        return kept

    # Rows and channels with the largest values are kept: a calibrator that never saw them would be judged unfairly.
    calibration = inputs(prompts[: arguments.num_prompts], ranges.origin.seed, largest=64)
    judged = inputs(prompts[-JUDGED:], 10_000, largest=0)
    tensors = {f"weight/{n}": layer.linear.weight.detach().clone() for n, layer in wanted.items()}
    tensors |= {f"calibration/{n}": x for n, x in calibration.items()}
    tensors |= {f"judged/{n}": x for n, x in judged.items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, samples)
    table: dict[str, dict[str, float]] = {name: {} for name in wanted}
    for name, layer in wanted.items():
        x = judged[name]
        exact = x @ layer.linear.weight.T
        bias = 0 if layer.linear.bias is None else layer.linear.bias
        for kind, plan in plans.items():
            with quantized(layers, {name: plan.layers[name]}):
                table[name][f"ditc {kind}"] = snr_db(layer.linear(x) - bias, exact)
    return table


def modelopt_side(samples: Path) -> None:
    """Put the same weights and inputs through modelopt's quantizers. This runs in modelopt's environment."""
    import modelopt.torch.quantization as mtq

    tensors = load_file(samples)
    names = [name.removeprefix("weight/") for name in tensors if name.startswith("weight/")]
    results: dict[str, dict[str, float]] = {}
    for kind, config in THEIRS.items():
        results[kind] = {}
        for name in names:
            weight, x = tensors[f"weight/{name}"], tensors[f"judged/{name}"]
            linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
            model = torch.nn.Sequential(linear)
            calibration = tensors[f"calibration/{name}"]
            mtq.quantize(model, getattr(mtq, config), lambda m, data=calibration: m(data))
            with torch.inference_mode():
                results[kind][name] = snr_db(model(x), x @ weight.T)
    samples.with_suffix(".json").write_text(json.dumps(results))


def snr_db(value: Tensor, reference: Tensor) -> float:
    """10 log10(|reference|^2 / |value - reference|^2)."""
    noise = (value.double() - reference.double()).square().sum()
    return float(10 * torch.log10(reference.double().square().sum() / noise))


def report(table: Mapping[str, Mapping[str, float]], arguments: argparse.Namespace) -> None:
    """Print every layer, the means and the comparison per format, and write the file."""
    from benchmarks.machine import facts

    columns = list(next(iter(table.values())))
    print(f"{'SNR dB':<42}" + "".join(f"{column:>16}" for column in columns))
    for layer, row in table.items():
        print(f"{layer:<42}" + "".join(f"{row[column]:>16.2f}" for column in columns))
    means = {column: float(np.mean([row[column] for row in table.values()])) for column in columns}
    print(f"{'mean':<42}" + "".join(f"{means[column]:>16.2f}" for column in columns))
    ahead = {}
    for kind in OURS:
        if f"modelopt {kind}" in columns:
            gains = [row[f"ditc {kind}"] - row[f"modelopt {kind}"] for row in table.values()]
            ahead[kind] = {
                "layers_at_least_as_good": sum(gain >= -0.01 for gain in gains),
                "layers": len(gains),
                "worst_gain_db": min(gains),
            }
            print(f"{kind}: {ahead[kind]}")
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    result = {
        **facts(),
        "modelopt": MODELOPT,
        "configs": THEIRS,
        "calibrated_on": arguments.num_prompts,
        "judged_on": JUDGED,
        "mean": means,
        "ahead": ahead,
        "layers": table,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {RESULTS}", file=sys.stderr)


if __name__ == "__main__":
    main()
