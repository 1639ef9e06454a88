"""8-bit TensorRT-RTX engines of a bundle that draws videos, from calibrated ranges: which weights they hold in 8 bits.

An engine cannot be opened without a GPU, but its file holds each weight as it is multiplied with: in codes of 8 bits,
or in the type of the layer. So the file says what the library made of the graph.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from ditc.export.engine.graph_files import inlined
from ditc.export.engine.tensorrt import load_library
from ditc.export.quant.record import quant_record_path, read_record
from ditc.runtime.bundle.integrity import check_bundle
from ditc.runtime.bundle.manifest import Artifact, load_manifest
from ditc.runtime.cli import main
from ditc.runtime.session import Array
from ditc.runtime.spec import CONDITIONER, DENOISER, Backend, Precision

BLOCKS = (0, 1)  # of the checkpoint
KEPT_HIGH = ("ff.conv_temp", "ff.conv_depth")  # of each block
CROSS = ("attn2.to_k", "attn2.to_v")  # of each block, in the conditioner
FORMATS = {Precision.INT8: onnx.TensorProto.INT8, Precision.FP8: onnx.TensorProto.FLOAT8E4M3FN}
# A shorter row of a weight could be in a file of some megabytes by chance.
FEWEST_BYTES = 16


@pytest.fixture(scope="module")
def bundle(video_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with engines in INT8 and in FP8, made as a user makes it. It exports every stage, for a minute."""
    pytest.importorskip("tensorrt_rtx")
    folder = tmp_path_factory.mktemp("video-8-bits")
    prompts, ranges, out = folder / "prompts.txt", folder / "ranges.safetensors", folder / "bundle"
    prompts.write_text("a red cat\ndogs run\na bird\nthe sea\n")
    given = ("--prompts", str(prompts), "--steps", "2")
    assert main(["calibrate", str(video_checkpoint), "-o", str(ranges), *given]) == 0
    for precision in FORMATS:
        options = ("--backend", "tensorrt-rtx", "--precision", precision.value, "--ranges", str(ranges))
        assert main(["build", str(video_checkpoint), "-o", str(out), *options]) == 0
    return out


def of_backend(bundle: Path, stage: str, backend: Backend, precision: Precision) -> Artifact:
    found = load_manifest(bundle).stages[stage].artifacts
    return next(one for one in found if one.backend is backend and one.precision is precision)


def weights_of(graph: Path) -> dict[str, tuple[int, Array]]:
    """Element type and stored bytes of each weight of a graph, as an array of the bits of each element."""
    model = onnx.load(graph)
    found = {}
    for tensor in model.graph.initializer:
        if tensor.name.endswith(".weight") and len(tensor.dims) > 1:
            width = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
            bits = np.frombuffer(tensor.raw_data, f"u{width}").reshape(tensor.dims)
            name = tensor.name.removeprefix("network.").removesuffix(".weight")
            found[name] = tensor.data_type, bits
    return found


def holds(engine: bytes, weight: Array) -> bool:
    """Whether the file holds the weight, in any order of its axes, whole or row by row.

    The library joins layers that read the same tensor, and then the rows of one weight lie between those of others.
    """
    for order in itertools.permutations(range(weight.ndim)):
        turned = np.ascontiguousarray(weight.transpose(order))
        rows = turned.reshape(-1, turned.shape[-1])
        by_row = rows.nbytes >= FEWEST_BYTES * len(rows) and all(row.tobytes() in engine for row in rows)
        if by_row or turned.tobytes() in engine:
            return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("precision", list(FORMATS))
def test_the_engine_holds_8_bits_but_for_convolutions_over_frames_and_pixels(
    bundle: Path, precision: Precision
) -> None:
    check_bundle(bundle, load_manifest(bundle))
    engine = of_backend(bundle, DENOISER, Backend.TENSORRT_RTX, precision)
    assert engine.recipe == f"sana-video-{precision.value}" and engine.quantization is not None
    graph = bundle / of_backend(bundle, DENOISER, Backend.ONNXRUNTIME, precision).file.path
    quantized = set(read_record(quant_record_path(graph)).layers)
    assert len(quantized) == 8 * len(BLOCKS)
    weights = weights_of(graph)
    high = {f"transformer_blocks.{block}.{name}" for block in BLOCKS for name in KEPT_HIGH}
    assert high < set(weights) and not high & quantized
    assert {name for name, (kind, _) in weights.items() if kind == FORMATS[precision]} == quantized
    assert {kind for name, (kind, _) in weights.items() if name not in quantized} == {
        onnx.TensorProto.FLOAT16
    }
    content = (bundle / engine.file.path).read_bytes()
    assert [name for name, (_, weight) in weights.items() if not holds(content, weight)] == []
    other = {name: np.roll(weight, 1) for name, (_, weight) in weights.items()}
    assert not any(holds(content, weight) for weight in other.values()), "any weight would be found"


@pytest.mark.slow
def test_keys_and_values_of_cross_attention_stay_in_16_bits(bundle: Path) -> None:
    """They are computed once per text, by the conditioner."""
    (engine,) = (
        one
        for one in load_manifest(bundle).stages[CONDITIONER].artifacts
        if one.backend is Backend.TENSORRT_RTX
    )
    assert engine.precision is Precision.FP16 and engine.recipe is None
    weights = weights_of(
        bundle / of_backend(bundle, CONDITIONER, Backend.ONNXRUNTIME, Precision.FP16).file.path
    )
    content = (bundle / engine.file.path).read_bytes()
    for name in (f"transformer_blocks.{block}.{name}" for block in BLOCKS for name in CROSS):
        kind, weight = weights[name]
        assert kind == onnx.TensorProto.FLOAT16 and holds(content, weight), name


@pytest.mark.slow
@pytest.mark.parametrize("precision", list(FORMATS))
def test_the_parser_reads_both_inputs_of_a_product_in_8_bits_or_none(
    bundle: Path, precision: Precision
) -> None:
    """Convolutions, linear attention, and the products with the text's keys and values read no codes."""
    trt = load_library(Backend.TENSORRT_RTX)
    graph = of_backend(bundle, DENOISER, Backend.ONNXRUNTIME, precision)
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(0)
    parser = trt.OnnxParser(network, logger)
    with inlined(bundle / graph.file.path) as path:
        assert parser.parse_from_file(str(path)), parser.get_error(0)
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    made = {layer.get_output(i).name: layer for layer in layers for i in range(layer.num_outputs)}

    def codes(layer: Any) -> int:
        """How many of the layer's inputs come from codes, perhaps broadcast."""
        count = 0
        for tensor in filter(None, (layer.get_input(index) for index in range(layer.num_inputs))):
            source = made.get(tensor.name)
            while source is not None and source.type == trt.LayerType.SHUFFLE:
                source = made.get(source.get_input(0).name)
            count += source is not None and source.type == trt.LayerType.DEQUANTIZE
        return count

    products = [codes(layer) for layer in layers if layer.type == trt.LayerType.MATRIX_MULTIPLY]
    assert products.count(2) == 8 * len(BLOCKS) and products.count(1) == 0
    assert products.count(0) >= 4 * len(BLOCKS)
    convolutions = [layer for layer in layers if layer.type == trt.LayerType.CONVOLUTION]
    assert len(convolutions) == 2 * len(BLOCKS) and not any(map(codes, convolutions))
    assert {layer.get_output(0).dtype for layer in convolutions} == {trt.float16}
