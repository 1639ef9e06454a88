"""A LoRA that was added wrongly to a bundle's weights: parity finds it and says by which factor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from lora_files import make_lora
from planted import alpha_ignored, context_of, failures
from tiny_sana import make_pipeline

from ditc.export.checkpoint.loras import with_loras
from ditc.export.checkpoint.open import open_checkpoint
from ditc.parity.candidate import Candidate, open_candidate
from ditc.parity.reference.pytorch import TorchModel, scaled_loras
from ditc.parity.reference.upstream import Upstream
from ditc.runtime.load_options import LoadOptions
from ditc.runtime.lora.choice import LoraChoice
from ditc.runtime.lora.lora import ScaledLora, changed, changes_of
from ditc.runtime.spec import DENOISER
from ditc.runtime.tolerances import Level
from ditc.runtime.weight_map import apply, read_weight_map

pytest.importorskip("peft", reason="the LoRA is made with peft")


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA whose alpha is half its rank."""
    return make_lora(make_pipeline(), tmp_path_factory.mktemp("lora"), lora_alpha=2, strength=0.2)


def with_weights(bundle: Path, checkpoint: Path, loras: Sequence[ScaledLora]) -> Candidate:
    """The bundle with these LoRAs in its denoiser's graph."""
    candidate = open_candidate(bundle, LoadOptions(threads=1))
    model = candidate.graph(DENOISER)
    assert model is not None
    ir.external_data.load_to_model(model)
    weights = candidate.artifacts[DENOISER].weights
    assert weights is not None
    tensors = open_checkpoint(checkpoint).component("transformer").tensors
    changes = changes_of(loras, "transformer")
    for weight in read_weight_map(bundle / weights.path):
        if weight.checkpoint in changes:
            values = apply(weight, changed(tensors[weight.checkpoint].numpy(), changes[weight.checkpoint]))
            value = model.graph.initializers[weight.initializer]
            value.const_value = ir.tensor(np.ascontiguousarray(values), name=weight.initializer)
    candidate.graphs = {DENOISER: model}
    return candidate


def test_an_alpha_that_was_ignored_is_named_by_its_factor(lora, tiny_bundle, tiny_checkpoint) -> None:
    choice = (LoraChoice(lora),)
    loras = scaled_loras(open_checkpoint(tiny_checkpoint), choice)
    right = with_weights(tiny_bundle, tiny_checkpoint, loras)
    assert not failures(context_of(tiny_checkpoint, right, loras=choice), Level.GRAPH)
    wrong = with_weights(tiny_bundle, tiny_checkpoint, [alpha_ignored(loras[0])])
    (found,) = failures(context_of(tiny_checkpoint, wrong, loras=choice), Level.GRAPH)
    assert found.stage == DENOISER and found.culprit is not None
    assert "the LoRA's change is 2 times the reference's: its alpha" in found.causes[0]


def test_a_lora_that_was_left_out_is_named(lora, tiny_bundle, tiny_checkpoint) -> None:
    context = context_of(
        tiny_checkpoint, with_weights(tiny_bundle, tiny_checkpoint, []), loras=(LoraChoice(lora),)
    )
    (found,) = failures(context, Level.GRAPH)
    assert found.causes == ("the LoRA is not in the weights",)


def test_a_pipeline_that_reads_no_loras_gets_them_through_one_that_does(lora, pag_checkpoint) -> None:
    """diffusers' SanaPAGPipeline has no load_lora_weights."""
    checkpoint = open_checkpoint(pag_checkpoint)
    upstream = Upstream(checkpoint, loras=(LoraChoice(lora, 0.5),))
    assert type(upstream.pipeline).__name__ == "SanaPAGPipeline"
    changes = changes_of(scaled_loras(checkpoint, [LoraChoice(lora, 0.5)]), "transformer")
    own = checkpoint.component("transformer").tensors
    fused = upstream.pipeline.transformer.state_dict()
    assert changes and set(fused) == set(own)
    for name, change in changes.items():
        wanted = changed(own[name].numpy(), change)
        assert np.abs(wanted - own[name].numpy()).max() > 1e-3
        np.testing.assert_allclose(fused[name].numpy(), wanted, atol=1e-6)


def test_an_alpha_that_was_ignored_is_caught_by_the_stages_and_upstream(lora, tiny_checkpoint) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint)
    wrong = with_loras(checkpoint, [alpha_ignored(scaled_loras(checkpoint, [LoraChoice(lora)])[0])])
    candidate = Candidate(pipeline=TorchModel(wrong).pipeline)
    context = context_of(tiny_checkpoint, candidate, loras=(LoraChoice(lora),), with_upstream=True)
    found = {result.stage: result for result in failures(context, Level.STAGE)}
    assert found[DENOISER].culprit is not None
    assert found[DENOISER].culprit.module == "network.patch_embed.proj"
    shared = context_of(tiny_checkpoint, candidate, with_upstream=True)
    shared.reference_or_none = TorchModel(wrong)
    shared.reference.original = open_checkpoint(tiny_checkpoint)
    shared.reference.options = context.reference.options
    upstream = [result for result in failures(shared, Level.MODULE) if result.against == "diffusers"]
    assert upstream and upstream[0].culprit is not None, "diffusers shows what both sides share"
