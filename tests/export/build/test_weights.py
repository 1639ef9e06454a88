"""The weight map: names, transforms, and how a bundle's ONNX files give back the checkpoint's tensors."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from onnx_ir.tensor_adapters import TorchTensor

from ditc.export.build.weights import rebuild, weights_of
from ditc.export.checkpoint.open import open_checkpoint
from ditc.export.graph.passes import fold_transposes
from ditc.export.networks.loading import WeightSource
from ditc.runtime.bundle.manifest import load_manifest
from ditc.runtime.errors import BuildError
from ditc.runtime.weight_map import Weight, read_weight_map

COMPONENTS = {
    "text_encoder": "text_encoder",
    "conditioner": "transformer",
    "denoiser": "transformer",
    "vae_decoder": "vae",
    "vae_encoder": "vae",
}


@pytest.fixture(scope="module")
def weights(tiny_bundle) -> list[Weight]:
    """The weight maps of all stages as a bundle stores them."""
    stages = load_manifest(tiny_bundle).stages
    maps = [tiny_bundle / stage.artifacts[0].weights.path for stage in stages.values()]
    return [weight for path in maps for weight in read_weight_map(path)]


@pytest.fixture(scope="module")
def files(tiny_bundle) -> dict[str, Path]:
    """The ONNX file of every stage."""
    stages = load_manifest(tiny_bundle).stages
    return {name: tiny_bundle / stage.artifacts[0].file.path for name, stage in stages.items()}


def test_every_tensor_of_the_checkpoint_comes_back_bit_for_bit(weights, files, tiny_checkpoint) -> None:
    found: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for stage, component in COMPONENTS.items():
        found[component].update(rebuild([w for w in weights if w.stage == stage], {stage: files[stage]}))
    checkpoint = open_checkpoint(tiny_checkpoint)
    for component, tensors in found.items():
        expected = checkpoint.component(component).tensors
        assert tensors.keys() == expected.keys()
        for name, tensor in tensors.items():
            assert tensor.dtype == expected[name].dtype, name
            assert tensor.numpy().tobytes() == expected[name].contiguous().numpy().tobytes(), name


def test_every_initializer_bears_its_parameters_name_and_equal_ones_stay_apart(weights, files) -> None:
    initializers = ir.load(files["denoiser"]).graph.initializers
    mapped = {weight.initializer: weight for weight in weights if weight.stage == "denoiser"}
    assert mapped.keys() <= initializers.keys()
    block = "network.transformer_blocks.0.attn1"
    # Both are all ones in a fresh network, and an exporter that merges equal initializers would drop one of them.
    assert {f"{block}.norm_q.weight", f"{block}.norm_k.weight"} <= mapped.keys()
    assert mapped[f"{block}.to_q.weight"].transforms == ("transpose",)
    assert mapped[f"{block}.to_q.weight"].checkpoint == "transformer_blocks.0.attn1.to_q.weight"
    assert mapped["network.patch_embed.proj.weight"].transforms == ("reshape", "transpose")
    anonymous = [value for name, value in initializers.items() if name not in mapped]
    assert (
        max(value.const_value.size for value in anonymous) <= 256
    )  # the sinusoid's frequencies, axes, shapes


def stored(parameter: torch.Tensor, source: WeightSource, path: Path) -> tuple[Weight, ...]:
    """Write a graph that multiplies by the transposed parameter, and return its weight map."""
    dtype = {torch.float32: "float", torch.bfloat16: "bfloat16"}[parameter.dtype]
    text = f'<ir_version: 10, opset_import: ["": 20]> g ({dtype}[1,2] x, {dtype}[3,2] w) => ({dtype}[1,3] y) '
    model = ir.from_onnx_text(text + "{ t = Transpose (w) y = MatMul (x, t) }")
    weight = model.graph.inputs.pop()
    weight.const_value = TorchTensor(parameter, name="w")
    model.graph.register_initializer(weight)
    fold_transposes(model)
    ir.save(model, path, external_data=f"{path.name}.data")
    return weights_of([source], model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("exported_in", [torch.float32, torch.bfloat16])
def test_16_bit_tensors_come_back_in_their_own_type(dtype, exported_in, tmp_path) -> None:
    tensor = torch.randn(3, 1, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    source = WeightSource(
        checkpoint="conv", stage="s", parameter="w", transform="reshape", shape=(3, 1, 2), dtype=dtype
    )
    (weight,) = stored(tensor.to(exported_in).reshape(3, 2), source, tmp_path / "s.onnx")
    assert weight.transforms == ("reshape", "transpose")
    ((name, found),) = rebuild([weight], {"s": tmp_path / "s.onnx"})
    assert (name, found.dtype, found.shape) == ("conv", dtype, tensor.shape)
    exact = exported_in == torch.float32 or dtype == exported_in
    assert torch.equal(found, tensor if exact else tensor.to(exported_in).to(dtype))


def test_a_tensor_that_the_graph_does_not_use_is_refused_by_name(files) -> None:
    source = WeightSource(
        checkpoint="ghost", stage="denoiser", parameter="network.ghost", transform="identity", shape=(1,)
    )
    with pytest.raises(
        BuildError, match=r"denoiser: the graph does not use network\.ghost, which holds ghost"
    ):
        weights_of([source], ir.load(files["denoiser"]))
