"""What does a scale for every token cost beside static INT8, and in which form is it fastest?

    python -m benchmarks.int8_dynamic [--layers 4] [--pixels 512] [--rounds 9] [--groups 32 64 128 256]

First, single products of ONNX Runtime in every form that it has for inputs which are quantized at run time, at the
sizes of Sana-0.6B at 512 px with guidance and of the demo. Then whole guided steps at Sana-0.6B's width with random
weights: static INT8, int8-dynamic as ditc builds it, and in OpenVINO also with the graph's own scales and with other
groups of channels. All contestants take turns within a round. Errors are relative L2 to fp32. The result is written to
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper

from benchmarks.int8_cpu import TEXT, make_stage, openvino_session, quantize
from benchmarks.machine import alternating_s, spread, write
from ditc.export.contract import StageModule
from ditc.export.example_inputs import example_feeds
from ditc.export.graph.onnx import to_model
from ditc.export.graph.passes.qdq import quantize_graph
from ditc.export.quant.layers import quantizable_layers
from ditc.export.quant.plan import make_plan
from ditc.export.quant.recipes import find_recipe
from ditc.runtime.cpu_features import cpu_features
from ditc.runtime.metrics import relative_l2
from ditc.runtime.session import Array
from ditc.runtime.sessions import openvino
from ditc.runtime.sessions.onnxruntime import CPU, OnnxRuntimeSession
from ditc.runtime.spec import Precision

SIZES = ((512, 1152, 1152), (512, 1152, 5760), (512, 2880, 1152), (32, 192, 192), (32, 480, 192))  # M, K, N
BLOCKS = (32, 128)  # of MatMulNBits
PRODUCT_ROUNDS = 31
Run = Callable[[], Array]


def main() -> None:
    """Time products and steps, and print and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--pixels", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--groups", type=int, nargs="+", default=[32, 64, 128, 256])
    arguments = parser.parse_args()
    results: dict[str, Any] = {"cpu": cpu_features(), "settings": vars(arguments)}
    for size in SIZES:
        results[f"product {size}"] = race(product_forms(*size, arguments.threads), PRODUCT_ROUNDS)
    with tempfile.TemporaryDirectory() as folder:
        results["step"] = race(steps(arguments, Path(folder)), arguments.rounds)
    print(f"wrote {write('int8_dynamic', results)}")


def race(contestants: Mapping[str, Run], rounds: int) -> dict[str, dict[str, float]]:
    """Time and error of each contestant. The first computes in fp32."""
    exact = next(iter(contestants.values()))()
    seconds = alternating_s(contestants, warmup=2, repeats=rounds)
    rows = {}
    for name, run in contestants.items():
        rows[name] = {**spread(seconds[name]), "relative_l2": float(relative_l2(run(), exact))}
        print(f"{name:<40}{rows[name]['median'] * 1e3:>9.2f} ms  {rows[name]['relative_l2']:.1e}", flush=True)
    return rows


def product_forms(m: int, k: int, n: int, threads: int) -> dict[str, Run]:
    """x (M,K) times W (K,N) in ONNX Runtime, by form."""
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((m, k), np.float32), 0.03 * rng.standard_normal((k, n), np.float32)
    scale = np.abs(weight).max(axis=0) / np.float32(127)
    codes = np.rint(weight / scale).astype(np.int8)

    def run(text: str, tensors: Mapping[str, Array]) -> Run:
        session = _session(text.format(m=m, k=k, n=n), tensors, threads)
        return lambda: np.asarray(session.run(None, {"x": x})[0])

    forms = {
        f"{(m, k, n)} fp32": run("y = MatMul (x, w)", {"w": weight}),
        "per tensor, DynamicQuantizeMatMul": run(
            "y = com.microsoft.DynamicQuantizeMatMul (x, w, s)", {"w": codes, "s": scale}
        ),
        "per token, Q/DQ": run(
            """a = Abs (x) m = ReduceMax <keepdims=1> (a, axis) d = Div (x, m) q = QuantizeLinear (d, one, zero)
            e = DequantizeLinear (q, one, zero) v = DequantizeLinear <axis=1> (w, s) p = MatMul (e, v)
            y = Mul (p, m)""",
            {
                "w": codes,
                "s": scale,
                "axis": np.array([-1], np.int64),
                "one": np.float32(1 / 127),
                "zero": np.int8(0),
            },
        ),
        "per token, MatMulInteger": run(
            """a = Abs (x) m = ReduceMax <keepdims=1> (a, axis) d = Div (x, m) q = QuantizeLinear (d, one, zero)
            i = MatMulInteger (q, w, zero) f = Cast <to=1> (i) g = Mul (f, s) y = Mul (g, m)""",
            {
                "w": codes,
                "s": scale / np.float32(127),
                "axis": np.array([-1], np.int64),
                "one": np.float32(1 / 127),
                "zero": np.uint8(128),
            },
        ),
    }
    for block in BLOCKS:
        blocks = -(-k // block)
        padded = np.pad(codes.astype(np.int16) + 128, ((0, blocks * block - k), (0, 0)), constant_values=128)
        forms[f"per {block} channels, MatMulNBits"] = run(
            f"y = com.microsoft.MatMulNBits <K={k}, N={n}, bits=8, block_size={block}, accuracy_level=4> (x, w, s)",
            {
                "w": np.ascontiguousarray(padded.T.reshape(n, blocks, block).astype(np.uint8)),
                "s": np.repeat(scale[:, None], blocks, axis=1),
            },
        )
    return forms


def _session(nodes: str, tensors: Mapping[str, Array], threads: int) -> Any:
    import onnxruntime as ort

    header = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>'
    model = onnx.parser.parse_model(f"{header} g (float[M,K] x) => (float[M,N] y) {{ {nodes} }}")
    model.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(v), name) for name, v in tensors.items()
    )
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=[CPU])


def steps(arguments: argparse.Namespace, folder: Path) -> dict[str, Run]:
    """Guided steps, by contestant. Every function returns the predicted x0."""
    cells, threads = arguments.pixels // 32, arguments.threads
    stage = make_stage(arguments.layers, cells, Precision.FP32)
    sizes = {"batch": 1, "rows": 2, "height": cells, "width": cells, "text_length": TEXT}
    feeds = {**example_feeds(stage.spec, sizes), "row_of": np.zeros(2, np.int64)}
    for name in ("fp32", "int8", "int8-dynamic"):
        model = to_model(stage)
        if name == "int8":
            quantize(stage, model, feeds)
        elif name == "int8-dynamic":
            _quantize_tokens(stage, model)
        ir.save(model, folder / f"{name}.onnx", external_data=f"{name}.data")
    contestants = {}
    for name in ("fp32", "int8", "int8-dynamic"):
        session = OnnxRuntimeSession(
            folder / f"{name}.onnx", stage.spec, precision=Precision(name), provider=CPU, threads=threads
        )
        contestants[f"onnxruntime {name}"] = _x0(session, feeds)
    for name in ("fp32", "int8"):
        session = openvino_session(folder / f"{name}.onnx", stage.spec, threads)
        contestants[f"openvino {name}"] = _x0(session, feeds)
    session = openvino_session(folder / "int8-dynamic.onnx", stage.spec, threads)
    contestants["openvino int8-dynamic, the graph's scales"] = _x0(session, feeds)
    for group in arguments.groups:
        openvino.DYNAMIC_GROUP = group
        session = openvino_session(
            folder / "int8-dynamic.onnx", stage.spec, threads, precision=Precision.INT8_DYNAMIC
        )
        contestants[f"openvino int8-dynamic, groups of {group}"] = _x0(session, feeds)
    return contestants


def _quantize_tokens(stage: StageModule, model: ir.Model) -> None:
    layers = quantizable_layers(stage)
    plan = make_plan(find_recipe(None, Precision.INT8_DYNAMIC, "sana"), None, layers)
    quantize_graph(model, plan, {name: layer.parameter for name, layer in layers.items()})


def _x0(session: Any, feeds: Mapping[str, Array]) -> Run:
    return lambda: np.asarray(session.run(feeds)["x0"])


if __name__ == "__main__":
    main()
