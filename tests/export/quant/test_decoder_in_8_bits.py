"""A VAE's decoder in 8 bits: its convolutions are measured, quantized, checked, judged and drawn with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import numpy as np
import onnx_ir as ir
import pytest
from conftest import need_openvino
from quant_helpers import feeds_of, ranges_of, signal_to_noise_db

from ditc.calib.collect import Settings, collect
from ditc.calib.decoder_trial import DecoderTrial
from ditc.calib.search import Budget, search
from ditc.calib.sensitivity import base_recipe, candidate_plans, flops_shares, measure_effects
from ditc.export.build.builder import build_bundle
from ditc.export.checkpoint.open import open_checkpoint
from ditc.export.contract import StageModule
from ditc.export.families import find_adapter
from ditc.export.graph.onnx import to_model
from ditc.export.graph.passes.qdq import quantize_graph
from ditc.export.graph.torch_session import TorchSession
from ditc.export.options import BuildOptions
from ditc.export.quant.apply import prepare, with_base_precisions
from ditc.export.quant.coverage import measure_coverage
from ditc.export.quant.formats import Format
from ditc.export.quant.layers import quantizable_layers
from ditc.export.quant.plan import QuantPlan, make_plan
from ditc.export.quant.ranges import load_ranges, merge_ranges
from ditc.export.quant.recipes import Recipe, Rule
from ditc.export.quant.record import read_record
from ditc.export.quant.simulate import quantized
from ditc.export.quant.stage_recipes import NETWORK_RECIPES
from ditc.export.quant.verify import check_scales
from ditc.parity.candidate import open_candidate
from ditc.parity.cases import Case
from ditc.parity.cases import Settings as Cases
from ditc.parity.context import Context
from ditc.parity.levels import LEVELS
from ditc.parity.reference.pytorch import TorchModel
from ditc.parity.results import Verdict
from ditc.runtime.bundle.manifest import Artifact, load_manifest
from ditc.runtime.errors import BuildError, UsageError
from ditc.runtime.load_options import LoadOptions
from ditc.runtime.sessions.onnxruntime import CPU, OnnxRuntimeSession
from ditc.runtime.spec import VAE_DECODER, Backend, Precision
from ditc.runtime.tolerances import Level

PROMPTS = ["a red heart", "blue cat", "green dog"]
SETTINGS = Settings(num_inference_steps=2, stage=VAE_DECODER)
CHECKPOINTS = {"dc-ae": "tiny_checkpoint", "autoencoder-kl": "sd3_checkpoint"}
CONVOLUTION = "decoder.up_blocks.0.1.conv1"


class Decoder:
    """A checkpoint's decoder, its fp32 graph and its ranges on random latents."""

    def __init__(self, checkpoint: Path) -> None:
        self.stage: StageModule = TorchModel(checkpoint).load(VAE_DECODER)
        self.layers, self.ranges = quantizable_layers(self.stage), ranges_of(self.stage)
        self.model = to_model(self.stage)

    def quantize(self, recipe: Recipe) -> tuple[QuantPlan, ir.Model]:
        plan, model = make_plan(recipe, self.ranges, self.layers), self.model.clone()
        quantize_graph(model, plan, {name: layer.parameter for name, layer in self.layers.items()})
        return plan, model


@pytest.fixture(scope="module")
def decoder(request: pytest.FixtureRequest) -> Callable[[str], Decoder]:
    made: dict[str, Decoder] = {}

    def of(name: str) -> Decoder:
        if name not in made:
            made[name] = Decoder(request.getfixturevalue(CHECKPOINTS[name]))
        return made[name]

    return of


@pytest.mark.parametrize("kind", Format)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_graph_computes_what_the_simulation_computes(name, kind, decoder, tmp_path) -> None:
    it = decoder(name)
    plan, model = it.quantize(NETWORK_RECIPES[f"{name}-{kind.value}"])
    ir.save(model, tmp_path / "m.onnx")
    check_scales(ir.load(tmp_path / "m.onnx"), plan.layers, it.layers)
    feeds = feeds_of(it.stage, seed=9)
    torch_session = TorchSession(it.stage.module, it.stage.spec)
    exact = torch_session.run(feeds)["image"]
    with quantized(it.layers, plan.layers):
        simulated = torch_session.run(feeds)["image"]
    session = OnnxRuntimeSession(
        tmp_path / "m.onnx", it.stage.spec, precision=Precision(kind.value), provider=CPU, threads=1
    )
    got = np.asarray(session.run(feeds)["image"])
    loss = signal_to_noise_db(simulated, exact)
    assert loss > 10, "8 bits have little error, even in FP8 with random weights"
    assert signal_to_noise_db(got, simulated) > loss + 12, (
        "a quarter of it at most comes from the order of sums"
    )


def test_first_last_and_depthwise_convolutions_stay_high_and_coverage_counts_convolutions(decoder) -> None:
    it = decoder("dc-ae")
    plan, model = it.quantize(NETWORK_RECIPES["dc-ae-int8"])
    kept = set(plan.kept_high_precision)
    assert {"decoder.conv_in", "decoder.conv_out"} <= kept and CONVOLUTION in plan.layers
    assert all(name in kept for name in it.layers if name.endswith(("conv_depth", "proj_in", "proj_out")))
    coverage = measure_coverage(model, plan, it.stage.spec)
    assert coverage.gemm_share > 0.5
    assert sum(layer.share for layer in coverage.high) == pytest.approx(1 - coverage.gemm_share)


def test_a_wrong_scale_of_a_convolution_is_found(decoder, tmp_path) -> None:
    it = decoder("dc-ae")
    plan, model = it.quantize(NETWORK_RECIPES["dc-ae-int8"])
    scale = model.graph.initializers[f"{it.layers[CONVOLUTION].parameter}_scale"]
    scale.const_value = ir.Tensor(scale.const_value.numpy() * 3, name=scale.name)
    with pytest.raises(BuildError, match=CONVOLUTION):
        check_scales(model, plan.layers, it.layers)


def test_a_convolution_has_no_scales_of_tokens(decoder) -> None:
    recipe = replace(
        NETWORK_RECIPES["dc-ae-int8"], rules=(Rule(layers="*.conv1", kind=Format.INT8, per_token=True),)
    )
    with pytest.raises(UsageError, match=r"gives every token of .*conv1 a scale, but it is a convolution"):
        decoder("dc-ae").quantize(recipe)


def test_openvino_computes_the_convolutions_in_8_bits(decoder, tmp_path) -> None:
    need_openvino()
    from ditc.export.engine.ir import write_ir
    from ditc.runtime.cpu_features import int8_products_saturate
    from ditc.runtime.sessions.openvino import OpenvinoSession, executed_types

    it = decoder("dc-ae")
    plan, model = it.quantize(NETWORK_RECIPES["dc-ae-int8"])
    ir.save(model, tmp_path / "m.onnx")
    write_ir(tmp_path / "m.onnx", tmp_path / "m.xml", spec=it.stage.spec)
    session = OpenvinoSession(tmp_path / "m.xml", it.stage.spec, threads=1)
    feeds = feeds_of(it.stage, seed=9)
    got = np.asarray(session.run(feeds)["image"])
    types = executed_types(session)
    convolutions = sum(it.layers[name].is_convolution for name in plan.layers)
    in_8_bits = sum(kind in ("i8", "u8") for kind in types["Convolution"])
    assert in_8_bits == (0 if int8_products_saturate() else convolutions)
    torch_session = TorchSession(it.stage.module, it.stage.spec)
    exact = torch_session.run(feeds)["image"]
    with quantized(it.layers, plan.layers):
        loss = signal_to_noise_db(torch_session.run(feeds)["image"], exact)
    assert abs(signal_to_noise_db(got, exact) - loss) < 1


@pytest.fixture(scope="module")
def ranges(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranges") / "vae.safetensors"
    collect(tiny_checkpoint, PROMPTS, path, SETTINGS)
    return path


def test_ranges_of_the_decoder_merge_and_name_their_stage(
    ranges: Path, tiny_checkpoint: Path, tmp_path
) -> None:
    whole = load_ranges(ranges)
    assert (whole.origin.stage, whole.origin.network, whole.origin.buckets) == (VAE_DECODER, "vae", 1)
    assert CONVOLUTION in whole.site_of
    parts = [
        collect(tiny_checkpoint, PROMPTS, tmp_path / f"{i}.safetensors", replace(SETTINGS, shard=(i, 2)))
        for i in range(2)
    ]
    merged = merge_ranges(parts)
    for site, statistics in whole.sites.items():
        np.testing.assert_array_equal(merged.sites[site].histogram, statistics.histogram)


@pytest.fixture(scope="module")
def bundle(
    tiny_checkpoint: Path, tiny_bundle: Path, ranges: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny bundle with the decoder in INT8 beside the one in fp32."""
    path = copytree(tiny_bundle, tmp_path_factory.mktemp("decoder") / "bundle")
    build_bundle(tiny_checkpoint, path, BuildOptions(recipes=("dc-ae-int8",), ranges=(ranges,)))
    return path


def test_onnx_runtime_computes_them_in_fp32_and_a_build_for_it_warns(
    tiny_checkpoint: Path, ranges: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint)
    for backend, warned in ((Backend.ONNXRUNTIME, True), (Backend.OPENVINO, False)):
        caplog.clear()
        options = BuildOptions(recipes=("dc-ae-int8",), ranges=(ranges,), backend=backend)
        found = prepare(options, checkpoint, find_adapter(checkpoint).plan(checkpoint, options))
        assert found[VAE_DECODER].precision is Precision.INT8
        assert ("8-bit convolutions in fp32" in caplog.text) is warned


def test_the_rest_of_the_decoder_is_bf16_in_engines_and_fp32_elsewhere(
    tiny_checkpoint: Path, ranges: Path
) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint)
    adapter = find_adapter(checkpoint)
    expected = {Backend.ONNXRUNTIME: "fp32", Backend.OPENVINO: "fp32", Backend.TENSORRT_RTX: "bf16"}
    for backend, precision in expected.items():
        options = BuildOptions(recipes=("dc-ae-int8",), ranges=(ranges,), backend=backend)
        plan = adapter.plan(checkpoint, options)
        found = prepare(options, checkpoint, plan)
        based = with_base_precisions(plan, found, adapter, checkpoint, options)
        assert based.stages[VAE_DECODER].precision.value == precision
        assert based.stages["vae_encoder"] == plan.stages["vae_encoder"]


def int8_of(bundle: Path) -> Artifact:
    return next(
        a for a in load_manifest(bundle).stages[VAE_DECODER].artifacts if a.precision is Precision.INT8
    )


def test_a_build_records_recipe_ranges_and_coverage(bundle: Path) -> None:
    artifact = int8_of(bundle)
    assert artifact.recipe == "dc-ae-int8" and artifact.quantization is not None
    record = read_record(bundle / artifact.quantization.path)
    assert record.base is Precision.FP32 and record.calibration is not None
    assert record.calibration.prompts == len(PROMPTS) and record.coverage.gemm_share > 0.5


def test_parity_judges_the_8_bit_decoder_by_simulation(bundle: Path, tiny_checkpoint: Path) -> None:
    candidate = open_candidate(bundle, LoadOptions(stage_precision="vae_decoder=int8", threads=1))
    defaults = candidate.manifest.defaults
    settings = Cases(
        cases=(Case("a red heart", 0),),
        num_inference_steps=2,
        guidance_scale=defaults.guidance_scale,
        height=defaults.height,
        width=defaults.width,
    )
    context = Context(
        reference_or_none=TorchModel(tiny_checkpoint, like=candidate.manifest),
        candidate=candidate,
        settings=settings,
        with_upstream=False,
    )
    for level in (Level.GRAPH, Level.MODULE, Level.STAGE, Level.STEP, Level.PICTURE):
        found = [r for r in LEVELS[level](context) if level is not Level.MODULE or r.stage == VAE_DECODER]
        assert found and not [r for r in found if r.verdict is Verdict.FAIL], level
        decided = [r for r in found if r.stage == VAE_DECODER and r.verdict is Verdict.PASS]
        assert decided or level is Level.STEP, level
        if level is Level.STAGE:
            assert all(r.value > 1e-4 for r in decided), "beside fp32, the loss of 8 bits shows"


def test_a_recipe_of_another_vae_is_refused_and_the_fitting_ones_are_named(
    tiny_checkpoint: Path, ranges: Path, tmp_path: Path
) -> None:
    options = BuildOptions(recipes=("autoencoder-kl-int8",), ranges=(ranges,))
    with pytest.raises(
        UsageError, match="is for AutoencoderKL, but this checkpoint's vae is AutoencoderDC"
    ) as e:
        build_bundle(tiny_checkpoint, tmp_path / "bundle", options)
    assert e.value.hint == "use dc-ae-int8 or dc-ae-fp8"
    assert not (tmp_path / "bundle").exists()


def test_ranges_of_a_stage_without_a_recipe_are_refused(
    tiny_checkpoint: Path, ranges: Path, tmp_path: Path
) -> None:
    options = BuildOptions(precision=Precision.INT8, ranges=(ranges,))
    with pytest.raises(UsageError, match="holds ranges of vae_decoder, but this build quantizes denoiser"):
        build_bundle(tiny_checkpoint, tmp_path / "bundle", options)


def test_the_search_keeps_the_layers_high_that_the_budget_does_not_allow(
    tiny_checkpoint: Path, ranges: Path
) -> None:
    trial = DecoderTrial(TorchModel(tiny_checkpoint), PROMPTS, seed=0)
    loaded = load_ranges(ranges)
    plans = candidate_plans(trial, loaded, [Format.INT8])
    effects = measure_effects(trial, plans, flops_shares(trial.layers, loaded), picture_seconds=0)
    assert effects[0].step_error >= effects[-1].step_error > 0
    everything = trial.fidelity(plans[Format.INT8]).psnr_db
    base = base_recipe(Format.INT8, trial.family, trial.network)
    result = search(trial, plans, effects, Budget(psnr=everything + 1), base)
    assert result.chosen.fidelity.psnr_db >= everything + 1
    assert 0 < result.chosen.layers < len(plans[Format.INT8])
    assert (result.recipe.stage, result.recipe.network) == (VAE_DECODER, "AutoencoderDC")
