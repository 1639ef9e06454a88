"""An SD3.5-medium denoiser in 8 bits: the recipes' layers are quantized, and graph and simulation agree."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from quant_helpers import feeds_of, ranges_of, signal_to_noise_db

from ditc.export.checkpoint.open import open_checkpoint
from ditc.export.contract import BuildOptions, StageModule
from ditc.export.families.sd3.adapter import Sd3Adapter
from ditc.export.graph import ops
from ditc.export.graph.onnx import to_model
from ditc.export.graph.passes.qdq import quantize_graph
from ditc.export.graph.torch_session import TorchSession
from ditc.export.quant.formats import Format
from ditc.export.quant.layers import quantizable_layers
from ditc.export.quant.plan import QuantPlan, make_plan
from ditc.export.quant.ranges import Ranges
from ditc.export.quant.recipes import find_recipe
from ditc.export.quant.simulate import quantized
from ditc.runtime.bundle.manifest import load_manifest
from ditc.runtime.sessions.onnxruntime import CPU, OnnxRuntimeSession
from ditc.runtime.spec import DENOISER, Backend, Precision

# q, k, v and out of both streams; two Linears of each stream's feed-forward; the two modulations.
LINEARS_OF_A_BLOCK = 8 + 2 + 2 + 2
LINEARS_OF_DUAL = 4  # q, k, v and out of a dual block's second attention
OTHERS = 4 + 3 + 1  # time and pooled text embedding; patches, text, final modulation; final layer


@dataclass(frozen=True)
class Denoiser:
    """The whole step around the network, its graph before quantization, and its ranges."""

    stage: StageModule
    model: ir.Model
    ranges: Ranges

    def quantized(self, kind: Format, path: Path) -> QuantPlan:
        """Write the graph quantized in that format, and return its plan."""
        layers = quantizable_layers(self.stage)
        recipe = find_recipe(None, Precision(kind.value), "sd3")
        plan, model = make_plan(recipe, self.ranges, layers), self.model.clone()
        quantize_graph(model, plan, {name: layer.parameter for name, layer in layers.items()})
        ops.add_functions(model)
        ir.save(model, path, external_data=path.name + ".data")
        return plan


def load(checkpoint: Path, precision: Precision) -> StageModule:
    opened, options, adapter = open_checkpoint(checkpoint), BuildOptions(precision=precision), Sd3Adapter()
    return adapter.load(opened, adapter.plan(opened, options), DENOISER, options)


@pytest.fixture(scope="module")
def step(sd3_checkpoint: Path, sd3_bundle: Path) -> Denoiser:
    """The denoiser with the graph of the shared bundle."""
    (artifact,) = load_manifest(sd3_bundle).stages[DENOISER].artifacts
    model = ir.load(sd3_bundle / artifact.file.path)
    ir.external_data.load_to_model(model)
    stage = load(sd3_checkpoint, Precision.FP32)
    return Denoiser(stage, model, ranges_of(stage))


@pytest.mark.parametrize("kind", list(Format))
def test_the_graph_computes_what_the_simulation_computes(
    step: Denoiser, kind: Format, tmp_path: Path
) -> None:
    plan = step.quantized(kind, tmp_path / "step.onnx")
    feeds, session = feeds_of(step.stage, seed=9), TorchSession(step.stage.module, step.stage.spec)
    exact = session.run(feeds)["x0"]
    with quantized(quantizable_layers(step.stage), plan.layers):
        simulated = session.run(feeds)["x0"]
    got = np.asarray(
        OnnxRuntimeSession(
            tmp_path / "step.onnx", step.stage.spec, precision=Precision(kind.value), provider=CPU
        ).run(feeds)["x0"]
    )
    # Sums in another order move a few values over a rounding boundary, which costs less than the rounding itself.
    assert signal_to_noise_db(got, np.asarray(simulated)) > signal_to_noise_db(got, np.asarray(exact)) + 10
    assert signal_to_noise_db(got, np.asarray(exact)) > 20


def test_all_gemms_of_the_blocks_and_nothing_else_become_8_bits(step: Denoiser) -> None:
    layers = quantizable_layers(step.stage)
    plan = make_plan(find_recipe(None, Precision.INT8, "sd3"), step.ranges, layers)
    blocks, dual = 3, 2
    text_of_the_last = 3  # the last block lacks to_add_out and the two Linears of the text's feed-forward
    in_blocks = blocks * LINEARS_OF_A_BLOCK + dual * LINEARS_OF_DUAL - text_of_the_last
    assert len(layers) == in_blocks + OTHERS
    assert len(plan.layers) == in_blocks - 2 * blocks
    assert all(name.startswith("transformer_blocks.") for name in plan.layers)
    kept = [name for name in plan.kept_high_precision if name.startswith("transformer")]
    assert {name.split(".")[2] for name in kept} == {"norm1", "norm1_context"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(Format))
def test_an_engine_is_built_from_the_graph(kind: Format, sd3_checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    from ditc.export.engine.build import build_engine

    stage = load(sd3_checkpoint, Precision.FP16)
    step = Denoiser(stage, to_model(stage), ranges_of(stage))
    step.quantized(kind, tmp_path / "step.onnx")
    report = build_engine(
        tmp_path / "step.onnx",
        tmp_path / "step.engine",
        spec=step.stage.spec,
        backend=Backend.TENSORRT_RTX,
        targets=("sm89",),
    )
    assert report.size_bytes > 0
