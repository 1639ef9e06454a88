"""The weight map: names, transforms and the way back, on a checkpoint in fp16 with every stage exported in fp32."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny_sana import make_checkpoint

from ditc.export.adapters.sana import SanaAdapter
from ditc.export.checkpoint import Checkpoint, open_checkpoint
from ditc.export.models.loading import WeightSource
from ditc.export.onnx import OnnxFiles, to_onnx
from ditc.export.stages import BuildOptions
from ditc.export.weights import Weight, rebuild, weights_of
from ditc.runtime.errors import BuildError
from ditc.runtime.jsondata import from_json, to_json

COMPONENTS = ("transformer", "vae", "text_encoder")


def halve(path: Path) -> None:
    """Rewrite every component in fp16, with one norm in fp32 and a bias of zeros, as real checkpoints mix them."""
    for component in COMPONENTS:
        for file in (path / component).glob("*.safetensors"):
            tensors = {name: tensor.half() for name, tensor in load_file(file).items()}
            tensors = {
                name: t.float() if name.endswith("norm_q.weight") else t for name, t in tensors.items()
            }
            tensors = {name: t * 0 if name.endswith("to_out.0.bias") else t for name, t in tensors.items()}
            save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Checkpoint:
    path = make_checkpoint(tmp_path_factory.mktemp("tiny"))
    halve(path)
    return open_checkpoint(path)


@pytest.fixture(scope="module")
def stages(checkpoint, tmp_path_factory) -> dict[str, tuple[tuple[str, ...], OnnxFiles]]:
    """Every stage's components and files."""
    adapter, options = SanaAdapter(), BuildOptions()
    plan, out = adapter.plan(checkpoint, options), tmp_path_factory.mktemp("onnx")
    return {
        name: (
            stage.components,
            to_onnx(adapter.load(checkpoint, plan, name, options), out / f"{name}.onnx", check=False),
        )
        for name, stage in plan.stages.items()
    }


def test_every_checkpoint_tensor_comes_back_bit_for_bit(checkpoint, stages) -> None:
    found: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, ((component,), files) in stages.items():
        weights = [from_json(Weight, json.loads(json.dumps(to_json(w)))) for w in files.weight_map]
        found[component].update(rebuild(weights, {name: files.model}))
    for component in COMPONENTS:
        expected = checkpoint.component(component).tensors
        assert found[component].keys() == expected.keys()
        for name, tensor in found[component].items():
            assert tensor.dtype == expected[name].dtype, name
            assert tensor.numpy().tobytes() == expected[name].contiguous().numpy().tobytes(), name


def test_every_initializer_bears_its_parameters_name_and_equal_ones_stay_apart(stages) -> None:
    files = stages["denoiser"][1]
    initializers = ir.load(files.model).graph.initializers
    mapped = {weight.initializer: weight for weight in files.weight_map}
    assert mapped.keys() <= initializers.keys()
    block = "network.transformer_blocks.0.attn1"
    # Both are ones in a fresh network: an exporter that merges equal initializers leaves one of them out.
    assert {f"{block}.norm_q.weight", f"{block}.norm_k.weight", f"{block}.to_out.0.bias"} <= mapped.keys()
    assert mapped[f"{block}.to_q.weight"].transforms == ("transpose",)
    assert mapped[f"{block}.to_q.weight"].checkpoint == "transformer_blocks.0.attn1.to_q.weight"
    assert mapped["network.patch_embed.proj.weight"].transforms == ("reshape", "transpose")
    anonymous = [value for name, value in initializers.items() if name not in mapped]
    assert (
        max(value.const_value.size for value in anonymous) <= 256
    )  # the sinusoid's frequencies, axes, shapes


def test_a_tensor_that_the_graph_does_not_use_is_refused_by_name(stages) -> None:
    model = ir.load(stages["denoiser"][1].model)
    source = WeightSource(
        checkpoint="ghost.weight",
        stage="denoiser",
        parameter="network.ghost.weight",
        transform="identity",
        shape=(1,),
    )
    with pytest.raises(BuildError, match=r"denoiser: the graph does not use network\.ghost\.weight"):
        weights_of([source], model)
