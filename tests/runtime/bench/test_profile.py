"""Executed nodes are told by the module of the graph's nodes that they were made of."""

from __future__ import annotations

import pytest

from ditc.runtime.bench import graph
from ditc.runtime.bench.graph import Graph, Node
from ditc.runtime.bench.profile import ExecutedNode, by_module, by_pattern, common_module, modules_of, pattern
from ditc.runtime.bench.profilers.onnxruntime import read_events
from ditc.runtime.bench.profilers.tensorrt import Layers, layer_kind


def node(name: str, op: str, module: str) -> Node:
    return Node(name=name, op=op, inputs=(), outputs=(f"{name}_result",), scopes=("", module))


GRAPH = Graph(
    nodes=(
        node("q", "MatMul", "net.blocks.0.attn.to_q"),
        node("relu", "Relu", "net.blocks.0.attn"),
        node("out", "MatMul", "net.blocks.0.attn.to_out"),
        node("add", "Add", "net.blocks.0"),
        node("norm", "Mul", "net.blocks.1.norm"),
    ),
    shapes={},
    functions={},
)


def executed(name: str, *origins: str, kind: str = "K") -> ExecutedNode:
    return ExecutedNode(name=name, kind=kind, type="f32", seconds=1.0, origins=origins)


def test_a_fused_node_belongs_to_its_product() -> None:
    """A residual that is added by the product's kernel counts with the product."""
    assert modules_of([executed("add", "out", "add")], GRAPH) == ["net.blocks.0.attn.to_out"]
    assert modules_of([executed("q/WithoutBiases")], GRAPH) == ["net.blocks.0.attn.to_q"]


def test_a_product_whose_bias_alone_is_known_belongs_to_that() -> None:
    (module,) = modules_of([executed("norm", "relu", "norm", kind="FullyConnected")], GRAPH)
    assert module == "net.blocks.0.attn"


@pytest.mark.parametrize("name", ["q_result_nchwc", "q_token_12", "q/MatmulTransposeFusion/", "q_result"])
def test_names_that_libraries_change_are_recognised(name: str) -> None:
    assert (
        modules_of([executed("out"), executed(name), executed("norm")], GRAPH)[1] == "net.blocks.0.attn.to_q"
    )


def test_a_fusion_of_others_belongs_to_the_module_that_holds_them_all() -> None:
    assert modules_of([executed("x", "relu", "add")], GRAPH) == ["net.blocks.0"]
    assert modules_of([executed("x", "add", "norm")], GRAPH) == ["net.blocks"]


def test_a_node_of_a_function_belongs_between_its_neighbours() -> None:
    nodes = [executed("q"), executed("Pad_7"), executed("Transpose_8"), executed("out"), executed("Cast_9")]
    attention = "net.blocks.0.attn"
    assert modules_of(nodes, GRAPH) == [
        *(f"{attention}.to_q", attention, attention),
        *(f"{attention}.to_out", f"{attention}.to_out"),
    ]
    assert modules_of([executed("Pad_7")], GRAPH) == [""]


def test_no_time_is_lost() -> None:
    modules = by_module([executed("q"), executed("Pad_7"), executed("out"), executed("norm")], GRAPH)
    assert sum(each.seconds for each in modules) == 4
    assert by_pattern(modules) == {
        "net.blocks.*.attn.to_q": 1,
        "net.blocks.*.attn": 1,
        "net.blocks.*.attn.to_out": 1,
        "net.blocks.*.norm": 1,
    }
    assert modules[0].kinds == {"K f32": 1}


@pytest.mark.parametrize(
    ("paths", "shared"),
    [
        (["a.b.c", "a.b.d"], "a.b"),
        (["a.b", "a.b.c"], "a.b"),
        (["a1.b", "a.b"], ""),
        ([], ""),
        (["", "a"], ""),
    ],
)
def test_the_module_that_holds_others(paths: list[str], shared: str) -> None:
    assert common_module(paths) == shared


def test_only_whole_numbers_become_stars() -> None:
    assert pattern("0.conv2.10.to_out.0") == "*.conv2.*.to_out.*"


def test_onnxruntimes_first_run_is_left_out() -> None:
    def event(name: str, ts: int, dur: int, cat: str = "Node") -> dict:
        arguments = {"op_name": "MatMul", "output_type_shape": [{"float": [1]}]}
        return {"cat": cat, "name": name, "ts": ts, "dur": dur, "args": arguments}

    runs = [event("model_run", start, 90, "Session") for start in (0, 100, 200)]
    nodes = [event("q_kernel_time", start + 5, dur) for start, dur in ((0, 80), (100, 4), (200, 6))]
    (found,) = read_events([event("session_initialization", 0, 1, "Session"), *nodes, *runs])
    assert (found.name, found.kind, found.type) == ("q", "MatMul", "float")
    assert found.seconds == pytest.approx(5e-6)


def test_tensorrts_layers_keep_the_names_that_they_fuse() -> None:
    class Library:
        class IProfiler:
            def __init__(self) -> None:
                self.made = True

    layers = Layers(Library)
    for name, ms in (("q + relu", 2.0), ("__myl_MulSum_0x12", 1.0), ("q + relu", 4.0)):
        layers.profiler.report_layer_time(name, ms)
    layers.runs = 2
    first, second = layers.nodes()
    assert first.origins == ("q", "relu") and first.seconds == pytest.approx(3e-3)
    assert modules_of([first], GRAPH) == ["net.blocks.0.attn.to_q"]
    assert second.kind == layer_kind("__myl_MulSum_0x12") == "MulSum"


def test_what_the_exporter_added_outside_of_all_modules_names_none() -> None:
    assert graph._modules("['', 'decoder', 'decoder.conv', 'conv2d']") == ("", "decoder", "decoder.conv")
    assert graph._modules(f"['{graph.NO_MODULE}', 'sym_size_int_49']") == ()
