"""A bundle that gets a LoRA when it is open computes what PyTorch and diffusers compute with the same LoRA fused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from lora_files import make_lora
from planted import context_of
from tiny_sana import make_pipeline

from ditc.parity.candidate import Candidate
from ditc.parity.levels import LEVELS
from ditc.parity.results import Verdict
from ditc.runtime.lora.choice import LoraChoice
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.spec import CONDITIONER, DENOISER
from ditc.runtime.tolerances import Level

pytest.importorskip("peft", reason="diffusers reads LoRAs with peft")

FORMS = {
    "alpha and rank differ": {"lora_alpha": 8, "rank_pattern": {"attn1.to_q": 2}},
    "DoRA": {"use_dora": True, "lora_alpha": 8},
}


@pytest.fixture(params=["onnxruntime", "openvino"])
def pipeline(request: pytest.FixtureRequest) -> Iterator[Pipeline]:
    bundle = request.getfixturevalue("tiny_bundle" if request.param == "onnxruntime" else "openvino_bundle")
    with Pipeline.load(bundle, backend=request.param, threads=1) as loaded:
        yield loaded


@pytest.mark.parametrize("form", FORMS)
def test_stages_steps_and_pictures_are_those_of_the_same_loras_fused(
    form, pipeline, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    file = make_lora(make_pipeline(), tmp_path, strength=0.2, **FORMS[form])
    other = make_lora(make_pipeline(), tmp_path / "other", strength=0.2, seed=1)
    loras = (LoraChoice(file, 0.5), LoraChoice(other, -1.0))
    pipeline.load_loras(loras)
    context = context_of(tiny_checkpoint, Candidate(pipeline=pipeline), loras=loras, with_upstream=True)
    results = [r for level in (Level.STAGE, Level.PICTURE) for r in LEVELS[level](context)]
    assert not [r for r in results if r.verdict is Verdict.FAIL]
    errors = [r.value for r in results if r.stage in (CONDITIONER, DENOISER) and r.value is not None]
    assert errors and max(errors) <= 1e-5
    assert any(r.against == "diffusers" and r.verdict is Verdict.PASS for r in results)
    plain = context_of(tiny_checkpoint, Candidate(pipeline=pipeline))
    assert any(r.verdict is Verdict.FAIL for r in LEVELS[Level.STAGE](plain)), "the LoRAs change nothing"
