"""A LoRA added to an 8-bit denoiser when it is opened is as close to fp32 as one that was added before quantization."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from quant_helpers import feeds_of, ranges_of

from ditc.export.build.weights import weights_of
from ditc.export.engine.ir import write_ir
from ditc.export.graph.onnx import to_onnx
from ditc.export.graph.passes.qdq import quantize_graph
from ditc.export.quant.layers import quantizable_layers
from ditc.export.quant.plan import make_plan
from ditc.export.quant.recipes import find_recipe
from ditc.parity.reference.pytorch import TorchModel
from ditc.runtime.lora.lora import Change, LoraLayer
from ditc.runtime.lora.stage_weights import StoredWeights, changed_initializers
from ditc.runtime.session import Array, Session
from ditc.runtime.sessions.onnxruntime import CPU, OnnxRuntimeSession
from ditc.runtime.sessions.openvino import OpenvinoSession
from ditc.runtime.spec import DENOISER, Precision, StageSpec
from ditc.runtime.weight_map import is_lossless

Changes = Mapping[str, list[Change]]
# Sums of dequantized values and changes are rounded twice. Two independent errors of the same size are 1.4 times one of
# them; those of the activations are the same in both.
ROUNDED_TWICE = 1.5
# From the values before quantization, INT8 codes are those of a build, up to fp32's rounding. For FP8, a build chooses
# among eight positions of each scale within an octave, and a LoRA at run time keeps the one chosen without it.
ROUNDED_ONCE = {Precision.INT8: 1.001, Precision.INT8_DYNAMIC: 1.001, Precision.FP8: 1.25}


class Denoiser:
    """The tiny checkpoint's denoiser, its fp32 graph, and the changes of a LoRA of all layers that can be in 8 bits."""

    def __init__(self, checkpoint: Path, folder: Path) -> None:
        self.folder, self.stage = folder, TorchModel(checkpoint).load(DENOISER)
        self.spec: StageSpec = self.stage.spec
        self.layers = quantizable_layers(self.stage)
        self.ranges = ranges_of(self.stage)
        self.fp32 = self.folder / "fp32.onnx"
        to_onnx(self.stage, self.fp32, check=False)
        self.plain = self.stored(self.fp32)
        rng = np.random.default_rng(0)
        parameters = {layer.parameter for layer in self.layers.values()}
        self.changes: Changes = {
            weight.checkpoint: [(_layer(weight.shape, rng), 1.0)]
            for weight in self.plain.weights
            if weight.initializer in parameters
        }
        self.changed = dict(changed_initializers(self.plain, self.changes))

    def stored(self, graph: Path) -> StoredWeights:
        return StoredWeights(graph, weights_of(self.stage.weights, ir.load(graph)))

    def quantized(self, precision: Precision, *, folded: bool) -> Path:
        """A graph in 8 bits, of the weights with or without the changes; the scales of activations are the same."""
        path = self.folder / f"{precision.value}-{'folded' if folded else 'plain'}.onnx"
        model = ir.load(self.fp32)
        ir.external_data.load_to_model(model)
        plan = make_plan(find_recipe(None, precision, "sana"), self.ranges, self.layers)
        for name, values in self.changed.items() if folded else ():
            model.graph.initializers[name].const_value = ir.tensor(values, name=name)
        quantize_graph(model, plan, {name: layer.parameter for name, layer in self.layers.items()})
        ir.save(model, path, external_data=f"{path.name}.data")
        return path

    def error(self, session: Session, wanted: Mapping[str, Array]) -> float:
        """The relative L2 error of the session's first output."""
        name = self.spec.outputs[0].name
        found = np.asarray(session.run(feeds_of(self.stage, 7))[name])
        return float(np.linalg.norm(found - wanted[name]) / np.linalg.norm(wanted[name]))


def _layer(shape: tuple[int, ...], rng: np.random.Generator) -> LoraLayer:
    """A change of about a third of the weights' own size."""
    outputs, inputs = shape[:2]
    down = rng.normal(0, 0.2, (4, inputs, *shape[2:])).astype(np.float32)
    up = rng.normal(0, 0.2, (outputs, 4, *(1 for _ in shape[2:]))).astype(np.float32)
    return LoraLayer(key="layer", down=down, up=up, scaling=1.0)


@pytest.fixture(scope="module")
def denoiser(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Denoiser:
    return Denoiser(tiny_checkpoint, tmp_path_factory.mktemp("lora-8-bit"))


@pytest.fixture(scope="module")
def wanted(denoiser: Denoiser) -> Mapping[str, Array]:
    session = onnxruntime(denoiser, denoiser.fp32, Precision.FP32, denoiser.changed)
    return {name: np.asarray(value) for name, value in session.run(feeds_of(denoiser.stage, 7)).items()}


def onnxruntime(denoiser: Denoiser, graph: Path, precision: Precision, changed=None) -> Session:
    return OnnxRuntimeSession(
        graph, denoiser.spec, precision=precision, provider=CPU, threads=1, weights=changed
    )


def openvino(denoiser: Denoiser, graph: Path, precision: Precision, changed=None) -> Session:
    model = graph.with_suffix(".xml")
    if not model.exists():
        write_ir(graph, model, spec=denoiser.spec, precision=precision)
    return OpenvinoSession(model, denoiser.spec, threads=1, precision=precision, changed=changed)


@pytest.mark.parametrize(
    ("precision", "library"),
    [
        (Precision.INT8, onnxruntime),
        (Precision.INT8, openvino),
        (Precision.INT8_DYNAMIC, openvino),
        (Precision.FP8, onnxruntime),
    ],
)
def test_it_is_as_close_to_fp32_as_the_lora_in_the_weights_before(
    precision, library, denoiser, wanted
) -> None:
    plain, folded = (denoiser.quantized(precision, folded=side) for side in (False, True))
    in_build = denoiser.error(library(denoiser, folded, precision), wanted)
    assert denoiser.error(library(denoiser, plain, precision), wanted) > 5 * in_build, (
        "the LoRA changes nothing"
    )
    stored = denoiser.stored(plain)
    assert any(not is_lossless(weight) for weight in stored.weights)
    for originals, factor in ((None, ROUNDED_TWICE), (denoiser.plain, ROUNDED_ONCE[precision])):
        changed = dict(changed_initializers(stored, denoiser.changes, originals))
        found = denoiser.error(library(denoiser, plain, precision, changed), wanted)
        assert found <= factor * in_build


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.FP8])
def test_codes_without_a_change_stay(precision, denoiser) -> None:
    stored = denoiser.stored(denoiser.quantized(precision, folded=False))
    no_change = {name: [(layer, 0.0)] for name, ((layer, _),) in denoiser.changes.items()}
    for originals in (None, denoiser.plain):
        for name, values in changed_initializers(stored, no_change, originals):
            np.testing.assert_allclose(
                values.astype(np.float32), stored.stored(name).astype(np.float32), rtol=1e-6, err_msg=name
            )
