"""How far is an INT8 denoiser step on this CPU from its floor, the time of its INT8 GEMMs alone?

    python -m benchmarks.step_floor [--layers 4] [--pixels 512] [--tokens 64] [--rounds 15] [--cache DIR] [--no-compile]

The network has Sana-0.6B's width (1152) and random weights, and runs a guided step (2 rows). The step is what `ditc
build --backend openvino --precision int8` makes: INT8 GEMMs in a bf16 graph with fp32 islands. The floor is one
OpenVINO model with the same quantized GEMMs, of the same shapes, and nothing else. All contestants are timed in turn
within every round. Then a profile shows where the step's time goes, by kind of kernel and by PyTorch module.
Built models are kept in the cache folder, by the hash of the code that makes them.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch

from benchmarks.int8_cpu import TEXT, diffusers_steps, make_stage, ort_session, parameters_of, plan_of
from benchmarks.machine import alternating_s, spread, write
from ditc.export.build.source_hash import engine_source, graph_source
from ditc.export.engine.ir import write_ir
from ditc.export.example_inputs import example_feeds
from ditc.export.graph.onnx import to_model
from ditc.export.graph.passes.qdq import quantize_graph
from ditc.export.graph.passes.scopes import NAME_SCOPES
from ditc.export.graph.torch_session import TorchSession
from ditc.runtime.cores import default_threads
from ditc.runtime.metrics import relative_l2
from ditc.runtime.session import Array
from ditc.runtime.sessions.openvino import OpenvinoSession, settings
from ditc.runtime.sessions.openvino_library import core
from ditc.runtime.spec import Precision, StageSpec
from ditc.runtime.step_contract import NEXT_LATENTS

STEP, FLOOR = "openvino int8 on bf16", "INT8 GEMMs alone"
PROFILED_RUNS = 10


def main() -> None:
    """Build what is not in the cache, time all contestants, and print and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--pixels", type=int, default=512)
    parser.add_argument(
        "--tokens",
        type=int,
        default=TEXT,
        help="tokens of a text in ditc, which leaves padding out; diffusers computes 300 (default: %(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "ditc-step-floor")
    parser.add_argument(
        "--no-compile", action="store_true", help="leave torch.compile out: it takes a minute"
    )
    parser.add_argument(
        "--only-openvino", action="store_true", help="time the step and the floor alone; writes nothing"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    load_before = os.getloadavg()
    folder = built(arguments)
    contestants, outputs, profile = make_contestants(arguments, folder)
    seconds = alternating_s(contestants, warmup=2, repeats=arguments.rounds)
    results = summary(seconds) | {
        "relative_l2_to_fp32": fidelity(folder, outputs),
        "profile_ms": profile(),
        "load_average_before": load_before,
        "settings": {name: getattr(arguments, name) for name in ("layers", "pixels", "tokens", "threads")},
    }
    print(json.dumps(results, indent=1))
    if not arguments.only_openvino:
        print(write("step_floor", results))


def built(arguments: argparse.Namespace) -> Path:
    """The folder with the graphs, their IR files, one set of inputs and the fp32 outputs. Built if it is not there."""
    key = f"{arguments.layers}-{arguments.pixels}-{arguments.tokens}-{graph_source()[:12]}-{engine_source()[:12]}"
    folder = Path(arguments.cache) / key
    if (folder / "done").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    cells = arguments.pixels // 32
    sizes = {"batch": 1, "rows": 2, "height": cells, "width": cells, "text_length": arguments.tokens}
    plan = None
    for precision, name in ((Precision.FP32, "fp32"), (Precision.BF16, "bf16")):
        stage = make_stage(arguments.layers, cells, precision)
        if plan is None:
            feeds = example_feeds(stage.spec, sizes)
            feeds["row_of"] = np.zeros(2, np.int64)
            plan = plan_of(stage, feeds)
            np.savez(folder / "feeds.npz", **feeds)
            np.save(folder / "expected.npy", TorchSession(stage.module, stage.spec).run(feeds)[NEXT_LATENTS])
        model = to_model(stage)
        save(model, folder / f"{name}.onnx", stage.spec)
        quantize_graph(model, plan, parameters_of(stage))
        save(model, folder / f"int8-{name}.onnx", stage.spec)
        del model, stage
    (folder / "done").touch()
    return folder


def save(model: ir.Model, path: Path, spec: StageSpec) -> None:
    """Write the graph, and its IR files beside it."""
    ir.save(model, path, external_data=path.name + ".data")
    write_ir(path, path.with_suffix(".xml"), spec=spec)


def make_contestants(
    arguments: argparse.Namespace, folder: Path
) -> tuple[dict[str, Callable[[], object]], dict[str, Callable[[], Array]], Callable[[], dict[str, Any]]]:
    """What is timed; what gives latents to compare with fp32; and a function that profiles the step."""
    cells = arguments.pixels // 32
    feeds = dict(np.load(folder / "feeds.npz"))
    specs = {p: make_stage_spec(arguments.layers, cells, p) for p in (Precision.FP32, Precision.BF16)}
    wide = torch.from_numpy(feeds["cross_kv"])
    narrow = feeds | {"cross_kv": wide.bfloat16().view(torch.uint16).numpy()}
    contestants: dict[str, Callable[[], object]] = {}
    outputs: dict[str, Callable[[], Array]] = {}

    def openvino(label: str, file: str, precision: Precision) -> OpenvinoSession:
        session = OpenvinoSession(folder / file, specs[precision], threads=arguments.threads)
        given = feeds if precision is Precision.FP32 else narrow
        contestants[label] = lambda: session.run(given)
        outputs[label] = lambda: np.asarray(session.run(given)[NEXT_LATENTS])
        return session

    step = openvino(STEP, "int8-bf16.xml", Precision.BF16)
    contestants[FLOOR] = gemms_alone(folder / "int8-bf16.onnx", arguments.threads)
    if not arguments.only_openvino:
        openvino("openvino bf16", "bf16.xml", Precision.BF16)
        openvino("openvino fp32", "fp32.xml", Precision.FP32)
        for label, file in (("onnxruntime fp32", "fp32.onnx"), ("onnxruntime int8", "int8-fp32.onnx")):
            session = ort_session(folder / file, arguments.threads)
            contestants[label] = lambda s=session: s.run(None, feeds)  # type: ignore[misc]
            outputs[label] = lambda s=session: s.run([NEXT_LATENTS], feeds)[0]  # type: ignore[misc]
        contestants |= diffusers_steps(arguments, cells)
    return contestants, outputs, lambda: profiled(folder, step, narrow, arguments.threads)


def make_stage_spec(layers: int, cells: int, precision: Precision) -> StageSpec:
    """The stage's spec, from a network without weights."""
    with torch.device("meta"):
        return make_stage(layers, cells, precision).spec


def gemms_alone(graph: Path, threads: int) -> Callable[[], object]:
    """A function that runs the graph's quantized GEMMs and nothing else, each on an input of its own shape.

    The inputs are quantized once per width, so that next to nothing is left but the GEMMs.
    """
    model = onnx.load(graph)
    producers = {out: node for node in model.graph.node for out in node.output}
    constants = {t.name: t for t in model.graph.initializer}
    nodes, kept, inputs, outputs = [], {}, {}, []
    tokens = list(np.load(graph.parent / "feeds.npz")["latents"].shape[2:])
    for node in model.graph.node:
        weight = producers.get(node.input[1]) if node.op_type in ("MatMul", "Gemm") else None
        x = producers.get(node.input[0]) if weight is not None else None
        if weight is None or x is None or {weight.op_type, x.op_type} != {"DequantizeLinear"}:
            continue
        down = producers[x.input[0]]
        width = constants[weight.input[0]].dims[0]
        if width not in inputs:
            shape = [2, int(np.prod(tokens)), width]
            inputs[width] = onnx.helper.make_tensor_value_info(f"x{width}", onnx.TensorProto.BFLOAT16, shape)
            scale, zero = down.input[1], down.input[2]
            nodes.append(onnx.helper.make_node("QuantizeLinear", [f"x{width}", scale, zero], [f"q{width}"]))
            nodes.append(onnx.helper.make_node("DequantizeLinear", [f"q{width}", scale, zero], [f"d{width}"]))
            kept |= {name: constants[name] for name in (scale, zero)}
        nodes.append(weight)
        kept |= {name: constants[name] for name in weight.input}
        nodes.append(onnx.helper.make_node("MatMul", [f"d{width}", weight.output[0]], [node.output[0]]))
        outputs.append(onnx.helper.make_tensor_value_info(node.output[0], onnx.TensorProto.BFLOAT16, None))
    alone = onnx.helper.make_graph(nodes, "gemms", list(inputs.values()), outputs, list(kept.values()))
    opsets = [onnx.helper.make_opsetid("", model.opset_import[0].version)]
    read = core().read_model(
        onnx.helper.make_model(alone, opset_imports=opsets, ir_version=10).SerializeToString()
    )
    request = core().compile_model(read, "CPU", settings("CPU", threads)).create_infer_request()
    for tensor in request.input_tensors:
        tensor.data[:] = 1
    return lambda: request.infer(share_outputs=True)


def fidelity(folder: Path, outputs: Mapping[str, Callable[[], Array]]) -> dict[str, float]:
    """The relative L2 error of the next latents to PyTorch's in fp32."""
    expected = np.load(folder / "expected.npy")
    return {name: relative_l2(run(), expected) for name, run in outputs.items()}


def summary(seconds: Mapping[str, list[float]]) -> dict[str, Any]:
    """Times, and how often the step fits into each contestant's time, round by round."""
    step = np.array(seconds[STEP])
    ratios = {name: spread(list(np.array(values) / step)) for name, values in seconds.items() if name != STEP}
    over_floor = spread(list(step / np.array(seconds[FLOOR])))
    return {
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "step_over_floor": over_floor,
        "times_of_the_step": ratios,
    }


def profiled(folder: Path, step: OpenvinoSession, feeds: Mapping[str, Array], threads: int) -> dict[str, Any]:
    """Milliseconds of the step by kind of kernel and by module, from OpenVINO's own counters."""
    openvino = OpenvinoSession(folder / "int8-bf16.xml", step.spec, threads=threads)
    openvino._settings = {**openvino._settings, "PERF_COUNT": True}
    openvino.run(feeds)
    model = openvino.last_compiled()
    request = model.create_infer_request()
    for tensor in step.spec.inputs:
        request.set_tensor(
            tensor.name, openvino._shared(np.ascontiguousarray(feeds[tensor.name]), tensor.dtype)
        )
    kinds: dict[str, float] = defaultdict(float)
    modules: dict[str, float] = defaultdict(float)
    module_of = modules_by_node(folder / "int8-bf16.onnx", model)
    for run in range(PROFILED_RUNS + 2):
        request.infer(share_outputs=True)
        for node in request.get_profiling_info() if run >= 2 else ():
            ms = node.real_time.total_seconds() * 1e3 / PROFILED_RUNS
            kinds[f"{node.node_type} {node.exec_type}"] += ms
            modules[module_of.get(node.node_name, "?")] += ms
    return {"by_kind": largest_first(kinds), "by_module": largest_first(modules)}


def largest_first(values: Mapping[str, float]) -> dict[str, float]:
    """Values of at least 20 us, the largest first."""
    return {
        name: round(ms, 2) for name, ms in sorted(values.items(), key=lambda item: -item[1]) if ms >= 0.02
    }


def modules_by_node(graph: Path, compiled: Any) -> dict[str, str]:
    """The PyTorch module of each node that OpenVINO executes, without the blocks' numbers.

    A node that comes from the body of a function, or that OpenVINO added, belongs to the module of what it reads.
    """
    scopes = {}
    for node in onnx.load(graph, load_external_data=False).graph.node:
        text = {p.key: p.value for p in node.metadata_props}.get(NAME_SCOPES)
        path = ast.literal_eval(text)[-2] if text else ""
        scopes[node.name] = ".".join("*" if part.isdecimal() else part for part in path.split(".")) or "step"
    found: dict[str, str] = {}
    for op in compiled.get_runtime_model().get_ordered_ops():
        name, facts = op.get_friendly_name(), op.get_rt_info()
        originals = (
            facts["originalLayersNames"].astype(str).split(",") if "originalLayersNames" in facts else []
        )
        known = [
            scopes[part] for part in (original.split("/")[0] for original in originals) if part in scopes
        ]
        read = [
            found[source]
            for source in (i.get_source_output().get_node().get_friendly_name() for i in op.inputs())
            if source in found
        ]
        if known or read:
            found[name] = (known or read)[-1]
    return found


if __name__ == "__main__":
    main()
