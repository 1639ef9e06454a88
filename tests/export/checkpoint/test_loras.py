"""A checkpoint with LoRAs has the weights that diffusers, with peft, makes of the same files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lora_files import fused, fused_text_encoder, make_lora
from safetensors.torch import load_file

from ditc.export.checkpoint.loras import read_choices, with_loras
from ditc.export.checkpoint.open import Checkpoint, Component, open_checkpoint
from ditc.export.families import find_family
from ditc.runtime.errors import UsageError
from ditc.runtime.lora.choice import LoraChoice
from ditc.runtime.lora.lora import ScaledLora
from ditc.runtime.lora.lora_file import read_lora

pytest.importorskip("peft", reason="diffusers reads LoRAs with peft")

# One fp32 product and one sum, for DoRA also a norm and a quotient. BLAS and torch may sum in another order.
SAME = 1e-6
CLIP_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
SD3_LAYERS = ("attn.to_q", "attn.add_k_proj", "attn.to_add_out", "ff.net.0.proj", "norm1.linear", "proj_out")


def chosen(checkpoint: Checkpoint, *choices: LoraChoice) -> tuple[ScaledLora, ...]:
    return read_choices(choices, checkpoint, find_family(checkpoint).native_names(checkpoint))


def sana() -> Any:
    from tiny_sana import make_pipeline

    return make_pipeline()


def sd3() -> Any:
    from tiny_sd3 import make_pipeline

    return make_pipeline()


FORMS: dict[str, tuple[Callable[[], Any], list[dict[str, Any]]]] = {
    "plain": (sana, [{}]),
    "alpha and rank differ": (
        sana,
        [{"lora_alpha": 2, "rank_pattern": {"attn1.to_q": 2}, "alpha_pattern": {"attn1.to_v": 7}}],
    ),
    "ranks differ, no metadata": (sana, [{"rank_pattern": {"attn1.to_q": 2}, "metadata": False}]),
    "rsLoRA": (sana, [{"use_rslora": True, "lora_alpha": 3}]),
    "DoRA": (sana, [{"use_dora": True, "lora_alpha": 8}]),
    "several": (sana, [{"seed": 1}, {"seed": 2, "lora_alpha": 1, "r": 3}]),
    "several DoRA": (sana, [{"seed": 1, "use_dora": True}, {"seed": 2, "use_dora": True}]),
    "SD3": (sd3, [{"layers": SD3_LAYERS, "lora_alpha": 8}]),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_weights_are_those_of_diffusers_with_the_same_loras_fused(name, tmp_path: Path) -> None:
    make, all_settings = FORMS[name]
    files = [
        (make_lora(make(), tmp_path / f"lora{index}", **settings), scale)
        for index, (settings, scale) in enumerate(zip(all_settings, (0.7, -1.3), strict=False))
    ]
    make().save_pretrained(tmp_path / "checkpoint")
    theirs = fused(make(), files)
    plain = open_checkpoint(tmp_path / "checkpoint")
    folded = with_loras(plain, chosen(plain, *(LoraChoice(*file) for file in files)))
    changed = chosen(plain, LoraChoice(*files[0]))[0].lora.components["transformer"]
    check(
        plain.component("transformer"),
        folded.component("transformer"),
        theirs.transformer.state_dict(),
        changed,
    )


def test_a_text_encoder_has_the_weights_that_peft_makes(tmp_path: Path) -> None:
    settings = {"r": 4, "lora_alpha": 8}
    file = make_lora(sd3(), tmp_path / "lora", layers=SD3_LAYERS, text_layers=CLIP_LAYERS, **settings)
    sd3().save_pretrained(tmp_path / "checkpoint")
    theirs = fused_text_encoder(sd3().text_encoder, file, 0.7, **settings)
    theirs.save_pretrained(tmp_path / "fused")
    plain = open_checkpoint(tmp_path / "checkpoint")
    folded = with_loras(plain, chosen(plain, LoraChoice(file, 0.7)))
    assert folded.loras[0].components == ("text_encoder", "transformer")
    changed = chosen(plain, LoraChoice(file))[0].lora.components["text_encoder"]
    expected = load_file(tmp_path / "fused" / "model.safetensors")
    check(plain.component("text_encoder"), folded.component("text_encoder"), expected, changed)


def check(plain: Component, folded: Component, expected: dict[str, Any], changed: Mapping[str, Any]) -> None:
    """Check that all tensors of a component are the expected ones, and which ones have changed."""
    moved = set()
    for name in folded.tensors:
        got, wanted, own = folded.tensors[name].numpy(), expected[name].numpy(), plain.tensors[name].numpy()
        if own.dtype.kind != "f":
            continue
        assert np.abs(got - wanted).max() <= SAME * np.abs(wanted).max(), name
        if np.abs(own - wanted).max() > 100 * SAME * np.abs(wanted).max():
            moved.add(name)
    assert moved == set(changed)


def test_a_lora_of_another_network_is_refused_before_any_weight_is_read(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    file = make_lora(sd3(), tmp_path, layers=SD3_LAYERS)
    with pytest.raises(UsageError, match=r"changes transformer\.\S+"):
        chosen(open_checkpoint(tiny_checkpoint), LoraChoice(file))


def test_a_lora_of_a_depthwise_convolution_is_refused(tmp_path: Path) -> None:
    pipeline = sana()
    groups = pipeline.transformer.transformer_blocks[0].ff.conv_depth.groups
    file = make_lora(pipeline, tmp_path, layers=["ff.conv_depth"], r=groups)
    with pytest.raises(
        UsageError, match=r"conv_depth has lora_A of shape .* and lora_B of shape .* ranks differ"
    ):
        read_lora(file)
