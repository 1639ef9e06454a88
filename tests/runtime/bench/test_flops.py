"""Operations are counted from the graph's own shapes, without the package `onnx`, which writes the graphs here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from ditc.runtime.bench.flops import Unknown, count_flops
from ditc.runtime.bench.graph import read_graph
from ditc.runtime.bench.matmul_graph import matmul_graph
from ditc.runtime.bundle.golden import read_golden
from ditc.runtime.bundle.manifest import load_manifest
from ditc.runtime.errors import BundleError
from ditc.runtime.sessions.registry import is_graph
from ditc.runtime.spec import DENOISER, VAE_DECODER

GRAPH = """
<ir_version: 8, opset_import: ["" : 18]>
g (float[n, 4, twice] x, float[4, 5] w, float[6, 2, 3, 3] k, int64[3] shape) => (float[n, s, 5] y)
<float[n, 6, twice] c, float[n, s, 4] r>
{
  c = Conv <group = 2> (x, k)
  r = Reshape (x, shape)
  y = MatMul (r, w)
}
"""


def save(text: str, path: Path) -> Path:
    """ONNX's text syntax has no expressions as dimensions; its files do."""
    model = onnx.parser.parse_model(text)
    for value in (*model.graph.input, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == "twice":
                dim.dim_param = "2*half"
    onnx.save(model, path)
    return path


def test_products_and_convolutions_count(tmp_path: Path) -> None:
    graph = read_graph(save(GRAPH, tmp_path / "g.onnx"))
    convolution, product = 2 * (3 * 6 * 10) * (2 * 3 * 3), 2 * (3 * 10 * 5) * 4
    assert count_flops(graph, {"x": (3, 4, 10), "w": (4, 5)}) == convolution + product


def test_a_shape_that_the_graph_does_not_say_is_an_error_and_no_guess(tmp_path: Path) -> None:
    text = GRAPH.replace("float[n, 6, twice] c, ", "")
    with pytest.raises(Unknown, match="shape of c"):
        count_flops(read_graph(save(text, tmp_path / "g.onnx")), {"x": (3, 4, 10), "w": (4, 5)})


def test_a_function_with_products_is_an_error_and_no_guess(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(GRAPH.replace('["" : 18]', '["" : 18, "other" : 1]'))
    function = onnx.parser.parse_function(
        '<domain: "other", opset_import: ["" : 18]> Twice (a) => (b) { b = MatMul (a, a) }'
    )
    model.functions.append(function)
    model.graph.node[1].op_type, model.graph.node[1].domain = "Twice", "other"
    onnx.save(model, tmp_path / "g.onnx")
    with pytest.raises(Unknown, match="Twice is a function with products"):
        count_flops(read_graph(tmp_path / "g.onnx"), {"x": (3, 4, 10), "w": (4, 5)})


def test_inputs_for_loras_that_are_left_out_do_not_count(tiny_bundle: Path, lora_inputs_bundle: Path) -> None:
    counts = []
    for bundle in (tiny_bundle, lora_inputs_bundle):
        artifact = next(a for a in load_manifest(bundle).stages[DENOISER].artifacts if is_graph(a))
        sizes = {name: bounds.min for name, bounds in artifact.spec.profile.items()}
        inputs = {
            tensor.name: [size if isinstance(size, int) else sizes[size] for size in tensor.shape]
            for tensor in artifact.spec.inputs
        }
        counts.append(count_flops(read_graph(bundle / artifact.file.path), inputs))
    assert counts[0] == counts[1] > 0


def test_the_count_agrees_with_the_exporters(tiny_bundle: Path) -> None:
    """`export/quant/coverage.py` counts the same nodes with the package onnx_ir, at the profile's usual sizes."""
    import onnx_ir as ir

    from ditc.export.quant.coverage import _products, _sizes

    manifest = load_manifest(tiny_bundle)
    for stage in (DENOISER, VAE_DECODER):
        (artifact,) = manifest.stages[stage].artifacts
        model, path = ir.load(tiny_bundle / artifact.file.path), tiny_bundle / artifact.file.path
        sizes = _sizes(model, artifact.spec)
        inputs = {
            tensor.name: [d if isinstance(d, int) else sizes[d] for d in tensor.shape]
            for tensor in artifact.spec.inputs
        }
        assert count_flops(read_graph(path), inputs) == sum(p.flops for p in _products(model, sizes))


def test_every_stage_of_a_picture_can_be_counted(sd3_bundle: Path) -> None:
    """This family's graphs have dimensions that the exporter named by itself."""
    manifest = load_manifest(sd3_bundle)
    for name in (*(spec.stage for spec in manifest.text), "conditioner", DENOISER, VAE_DECODER):
        stage = manifest.stages[name]
        graph = read_graph(sd3_bundle / stage.artifacts[0].file.path)
        assert stage.golden is not None
        golden = read_golden(sd3_bundle / stage.golden.path)
        products = any(node.op in ("MatMul", "Gemm", "Conv") for node in graph.nodes)
        assert (count_flops(graph, golden.info.inputs) > 0) == products


@pytest.mark.parametrize("content", [b"", b"\xff\xff\xff", b"{}", b"\x3a\x7f"])
def test_what_is_not_a_graph_is_refused_or_empty(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "g.onnx"
    path.write_bytes(content)
    if content:
        with pytest.raises(BundleError, match="is not an ONNX graph"):
            read_graph(path)
    else:
        assert read_graph(path).nodes == ()


@pytest.mark.parametrize("integers", [False, True])
def test_the_graph_of_the_ceilings_computes_products(integers: bool) -> None:
    data = matmul_graph(3, 8, 2, integers=integers)
    onnx.checker.check_model(onnx.load_from_string(data), full_check=True)
    weights = [onnx.numpy_helper.to_array(t) for t in onnx.load_from_string(data).graph.initializer]
    x = np.arange(24).reshape(3, 8).astype(np.uint8 if integers else np.float32)
    results = ort.InferenceSession(data).run(None, {"x": x})
    if integers:
        for result, weight in zip(results, weights, strict=True):
            np.testing.assert_array_equal(result, x.astype(np.int32) @ weight.astype(np.int32))
    else:
        np.testing.assert_allclose(
            results[0], x @ weights[0] @ weights[1], rtol=1e-4
        )  # fp32 sums of 8 values
