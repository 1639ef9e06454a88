"""Sana-1.6B's full width with random weights: compare ditc's modules with diffusers', and the graph's with ditc's."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from diffusers import SanaTransformer2DModel
from torch import Tensor, nn

from ditc.export.contract import StageModule
from ditc.export.families.sana.network import SanaConfig, load_sana
from ditc.export.graph.onnx import to_model
from ditc.parity.bisect import PlaceError, errors_by_place
from ditc.parity.trace import OnnxTracer, TorchTracer
from ditc.runtime.spec import NETWORK, DType, Precision, Range, StageSpec, TensorSpec

LAYERS = 2  # every layer has the same shapes, and all 20 layers would need 13 GB for both sides
BOUND = 1e-5  # that of the module level in fp32, in runtime/tolerances.py
DIMS = {
    "rows": Range(1, 2, 4),
    "height": Range(8, 16, 32),
    "width": Range(8, 16, 32),
    "text_length": Range(1, 300, 300),
}


@pytest.fixture(scope="module")
def sides() -> tuple[nn.Module, nn.Module, dict[str, Tensor], dict[str, Tensor]]:
    """Upstream's network and ditc's with the same weights, and the inputs of each."""
    torch.manual_seed(0)
    upstream = SanaTransformer2DModel(num_layers=LAYERS, qk_norm="rms_norm_across_heads").eval()
    conditioner, denoiser = load_sana(
        SanaConfig.from_json(upstream.config), upstream.state_dict(), torch.float32
    )
    theirs = {
        "hidden_states": torch.randn(2, 32, 16, 16),
        "encoder_hidden_states": torch.randn(2, 300, 2304),
        "encoder_attention_mask": (torch.arange(300)[None] < torch.tensor([[20], [300]])).long(),
        "timestep": torch.tensor([999.0, 37.0]),
    }
    with torch.no_grad():
        cross_kv, text_bias = conditioner(theirs["encoder_hidden_states"], theirs["encoder_attention_mask"])
    ours = {
        "latents": theirs["hidden_states"],
        "timestep": theirs["timestep"],
        "cross_kv": cross_kv,
        "text_bias": text_bias,
    }
    return upstream, denoiser, theirs, ours


@pytest.mark.slow
def test_every_module_at_full_width_equals_diffusers(sides, record_property) -> None:
    upstream, denoiser, theirs, ours = sides
    reference = TorchTracer(upstream, lambda: upstream(**theirs), deltas=True)
    candidate = TorchTracer(denoiser, lambda: denoiser(*ours.values()))
    _check((e for e in errors_by_place(reference, candidate) if e.same_form), record_property)


@pytest.mark.slow
def test_every_module_of_the_graph_at_full_width_equals_pytorchs(sides, record_property) -> None:
    _, denoiser, _, ours = sides
    reference = TorchTracer(denoiser, lambda: denoiser(*ours.values()))
    candidate = OnnxTracer(to_model(_stage(denoiser, ours)), {n: t.numpy() for n, t in ours.items()})
    _check(errors_by_place(reference, candidate), record_property)
    candidate.close()


def _check(found: Iterable[PlaceError], record_property) -> None:
    errors = list(found)
    worst = max(errors, key=lambda error: error.error)
    record_property("worst", f"{worst.place} {worst.error:.2e} of {len(errors)} places")
    assert len(errors) > 20 * LAYERS
    assert worst.error <= BOUND, str(worst.place)


def _stage(denoiser: nn.Module, feeds: dict[str, Tensor]) -> StageModule:
    """The network as a stage whose rows, sizes and text length are dynamic."""
    latents = ("rows", 32, "height", "width")
    shapes = {
        "latents": latents,
        "timestep": ("rows",),
        "cross_kv": ("rows", *feeds["cross_kv"].shape[1:3], "text_length", feeds["cross_kv"].shape[4]),
        "text_bias": ("rows", "text_length"),
    }
    spec = StageSpec(
        name=NETWORK,
        inputs=tuple(TensorSpec(name, DType.FLOAT32, shape) for name, shape in shapes.items()),
        outputs=(TensorSpec("out", DType.FLOAT32, latents),),
        profile=DIMS,
    )
    return StageModule(spec=spec, precision=Precision.FP32, module=denoiser, weights=())
