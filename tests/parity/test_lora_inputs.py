"""`ditc parity --lora` of a bundle whose graphs take LoRAs as inputs: the reference has them fused into its weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lora_files import make_lora
from planted import context_of, failures
from tiny_sana import make_pipeline

from ditc.parity.candidate import open_candidate
from ditc.runtime.bundle.certificate import load_certificate
from ditc.runtime.bundle.manifest import load_manifest
from ditc.runtime.cli import main
from ditc.runtime.load_options import LoadOptions
from ditc.runtime.lora.choice import LoraChoice
from ditc.runtime.spec import CONDITIONER, DENOISER
from ditc.runtime.tolerances import Level

pytest.importorskip("peft", reason="diffusers reads LoRAs with peft")

QUICK = ["--seeds", "0", "--steps", "2", "--threads", "1", "--no-edits"]


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of the conditioner's weights and the denoiser's, whose alpha is not its rank."""
    return make_lora(make_pipeline(), tmp_path_factory.mktemp("lora"), lora_alpha=8, strength=0.2)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_all_levels_compare_the_inputs_with_the_same_loras_fused(
    backend, lora, lora_inputs_bundle, tiny_checkpoint, tmp_path, capsys
) -> None:
    other = make_lora(make_pipeline(), tmp_path, strength=0.2, seed=1)
    loras = ["--lora", f"{lora}:0.5", "--lora", f"{other}:-1"]
    command = ["parity", str(lora_inputs_bundle), "--against", str(tiny_checkpoint), "--backend", backend]
    code = main([*command, *loras, *QUICK, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert code == 0 and report["subject"]["references"] == ["PyTorch fp32", "diffusers"]
    assert report["subject"]["loras"] == [f"{lora.name}:0.5", f"{other.name}:-1"]
    passed = {result["level"] for result in report["levels"] if result["verdict"] == "pass"}
    assert passed == {level.value for level in Level}
    manifest = load_manifest(lora_inputs_bundle)
    entries = load_certificate(lora_inputs_bundle, manifest).entries
    assert all(entry.parity is None for entry in entries), "a certificate is about the bundle without LoRAs"


def test_another_scale_than_the_references_is_found_in_the_layers_that_the_lora_changes(
    lora, lora_inputs_bundle, tiny_checkpoint
) -> None:
    candidate = open_candidate(
        lora_inputs_bundle, LoadOptions(backend="onnxruntime", threads=1), [LoraChoice(lora, 0.5)]
    )
    context = context_of(tiny_checkpoint, candidate, loras=(LoraChoice(lora, 1.0),))
    wrong = failures(context, Level.STAGE)
    assert {result.stage for result in wrong} == {CONDITIONER, DENOISER}
    modules = {result.culprit.module for result in wrong if result.culprit is not None}
    assert modules and all(
        name.endswith(("attn2.to_k", "attn2.to_v", "linear_1", "time_embed.linear", "patch_embed.proj"))
        for name in modules
    )
    assert not failures(context, Level.GRAPH), "the graph's weights are the checkpoint's without the LoRA"


@pytest.mark.parametrize(
    ("options", "form", "words"),
    [
        ([], {"use_dora": True}, "is a DoRA, which gives the rows of a weight other lengths"),
        (["--save-polygraphy", "here"], {}, "its files are those without a LoRA"),
    ],
    ids=["DoRA", "polygraphy"],
)
def test_what_cannot_be_an_input_is_refused(
    options, form, words, lora_inputs_bundle, tiny_checkpoint, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    file = make_lora(make_pipeline(), tmp_path, **form)
    command = ["parity", str(lora_inputs_bundle), "--against", str(tiny_checkpoint), "--lora", str(file)]
    assert main([*command, *options, *QUICK]) == 2
    assert words in capsys.readouterr().err
