"""LoRAs that a server offers: names of an allow-list, each with a scheduler of its own."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ditc.runtime.commands.serve_arguments import add_serve_arguments, named_loras
from ditc.runtime.errors import UsageError
from ditc.runtime.load_options import LoadOptions
from ditc.runtime.lora.choice import LoraChoice
from ditc.runtime.request import Request
from ditc.runtime.serving.lora_variants import ServedLora, lora_variants
from ditc.runtime.serving.models import Models
from ditc.runtime.serving.refusals import Refusal
from ditc.runtime.serving.scheduling.admission import Admission
from ditc.runtime.serving.settings import Bounds

LOAD = LoadOptions(backend="onnxruntime", threads=1)
REQUEST = Request(prompt="red", seed=1, num_inference_steps=1, height=64, width=64, output_type="latent")


def lora(path: Path, wide: int = 32) -> Path:
    torch.manual_seed(0)
    name = "transformer.transformer_blocks.0.attn1.to_q.lora_"
    save_file({f"{name}A.weight": torch.randn(2, wide), f"{name}B.weight": torch.randn(wide, 2)}, path)
    return path


def test_a_variant_draws_with_the_lora_and_the_bundle_without(tiny_bundle: Path, tmp_path: Path) -> None:
    choice = LoraChoice(lora(tmp_path / "style.safetensors"), 0.5)
    variants = lora_variants({"tiny": tiny_bundle}, {"style": choice}, LOAD)
    assert variants == {"tiny@style": ServedLora("tiny", choice, shares=False)}
    models = Models(
        {"tiny": tiny_bundle, "tiny@style": tiny_bundle},
        admission=Admission(Bounds()),
        load=LOAD,
        warm_up_seconds=0,
        loras={"tiny@style": choice},
    )
    try:
        with models.using("tiny") as plain, models.using("tiny@style") as styled:
            assert plain.scheduler is not styled.scheduler, "they could share runs"
            assert styled.pipeline.get_active_adapters() == ["default_0"]
            pictures = [np.asarray(model.pipeline.draw(REQUEST).images) for model in (plain, styled)]
        assert np.abs(pictures[0] - pictures[1]).max() > 1e-4
        with pytest.raises(Refusal) as refused, models.using(f"tiny@{choice.file}"):
            pass
        assert refused.value.status == 404, "a client names a LoRA of the list, never a file"
    finally:
        models.close()


def test_a_lora_that_fits_no_bundle_ends_the_start(tiny_bundle: Path, tmp_path: Path) -> None:
    wrong = LoraChoice(lora(tmp_path / "wide.safetensors", wide=5))
    with pytest.raises(UsageError, match=r"a weight of shape \(5, 5\)"):
        lora_variants({"tiny": tiny_bundle}, {"style": wrong}, LOAD)


@pytest.mark.parametrize("text", ["style", "=a", "style=", "a/b=c", "a@b=c"])
def test_a_lora_needs_a_plain_name_and_a_file(text) -> None:
    with pytest.raises(UsageError, match="names no LoRA"):
        named_loras(parsed(text))


def test_names_are_unique_and_scales_are_read() -> None:
    assert named_loras(parsed("a=x.safetensors:0.5")) == {"a": LoraChoice(Path("x.safetensors"), 0.5)}
    with pytest.raises(UsageError, match="two LoRAs are named a"):
        named_loras(parsed("a=x", "a=y"))


def parsed(*loras: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_serve_arguments(parser)
    return parser.parse_args(["bundle", *(word for text in loras for word in ("--lora", text))])
