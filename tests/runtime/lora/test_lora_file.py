"""What is read of LoRA files, and what is refused: the message names the key."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ditc.runtime.errors import UsageError
from ditc.runtime.lora.choice import LoraChoice, parse_lora, parse_loras
from ditc.runtime.lora.lora import Lora, ScaledLora, changed
from ditc.runtime.lora.lora_file import LoraFile, read_lora
from ditc.runtime.lora.names import KnownWeights, resolved

MODULE = "transformer.blocks.0.to_q"
DOWN, UP = torch.arange(6.0).view(2, 3) + 1, torch.arange(8.0).view(4, 2) + 1


def lora_of(folder: Path, metadata: dict[str, str] | None = None, **tensors: torch.Tensor):
    """The LoRA of a file with these tensors of the module, and what else their names say."""
    named = {(name if "transformer" in name else f"{MODULE}{name}"): t for name, t in tensors.items()}
    save_file(named, folder / "style.safetensors", metadata)
    return read_lora(folder / "style.safetensors")


def pair(
    a: str = ".lora_A.weight", b: str = ".lora_B.weight", **others: torch.Tensor
) -> dict[str, torch.Tensor]:
    return {a: DOWN.clone(), b: UP.clone(), **others}


def layer_of(lora):
    return lora.layers[MODULE]


def fitted(lora: LoraFile) -> Lora:
    return resolved(lora, KnownWeights({"transformer": {"blocks.0.to_q.weight": (4, 3)}}, {}))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (".lora_A.weight", ".lora_B.weight"),
        (".lora_down.weight", ".lora_up.weight"),
        (".lora.down.weight", ".lora.up.weight"),
        (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    ],
)
def test_both_matrices_are_found_under_all_names_that_diffusers_has_used(a, b, tmp_path: Path) -> None:
    layer = layer_of(lora_of(tmp_path, **pair(a, b)))
    np.testing.assert_array_equal(layer.down, DOWN)
    np.testing.assert_array_equal(layer.up, UP)
    assert layer.scaling == 1 and layer.shape == (4, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_values_are_widened(dtype, tmp_path: Path) -> None:
    layer = layer_of(lora_of(tmp_path, **{name: (t / 3).to(dtype) for name, t in pair().items()}))
    np.testing.assert_array_equal(layer.down, (DOWN / 3).to(dtype).float())


@pytest.mark.parametrize(
    ("settings", "alpha", "scaling"),
    [
        ({}, 1.0, 0.5),
        ({"lora_alpha": 6}, None, 3.0),
        ({"lora_alpha": 6}, 1.0, 0.5),
        ({"lora_alpha": 6, "use_rslora": True}, None, 6 / 2**0.5),
        ({"lora_alpha": 6, "alpha_pattern": {"to_q": 8}}, None, 4.0),
        ({"lora_alpha": 6, "alpha_pattern": {"^blocks.0.to_q": 8}}, None, 4.0),
        ({"lora_alpha": 6, "alpha_pattern": {"^to_q": 8, "o_q": 9}}, None, 3.0),
    ],
)
def test_the_factor_is_alpha_through_rank(settings, alpha, scaling, tmp_path: Path) -> None:
    metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in settings.items()})}
    others = {} if alpha is None else {".alpha": torch.tensor(alpha)}
    assert layer_of(lora_of(tmp_path, metadata, **pair(**others))).scaling == pytest.approx(scaling)


REFUSED = {
    "half a pair": ({".lora_A.weight": DOWN}, "has no lora_B for transformer.blocks.0.to_q"),
    "the other half": ({".lora_B.weight": UP}, "has no lora_A for transformer.blocks.0.to_q"),
    "alpha alone": ({".alpha": torch.tensor(1.0)}, "has no lora_A for transformer.blocks.0.to_q, only alpha"),
    "rank 0": ({".lora_A.weight": torch.ones(0, 3), ".lora_B.weight": torch.ones(4, 0)}, "the rank is 0"),
    "a rank that no LoRA has": (
        {".lora_A.weight": torch.ones(4097, 3), ".lora_B.weight": torch.ones(4, 4097)},
        "the rank is 4097",
    ),
    "other ranks": (
        {".lora_A.weight": DOWN, ".lora_B.weight": torch.ones(4, 3)},
        "lora_A of shape (2, 3) and lora_B of shape (4, 3), so their ranks differ",
    ),
    "nan": (
        pair(**{".lora_A.weight": DOWN / torch.tensor([0.0, 1, 1])}),
        "2 of 6 values that are NaN or Inf",
    ),
    "nan as alpha": (pair(**{".alpha": torch.tensor(float("nan"))}), "the part alpha"),
    "two alphas": (
        pair(**{".alpha": torch.ones(2)}),
        "the alpha of transformer.blocks.0.to_q has shape (2,)",
    ),
    "integers": (pair(**{".lora_A.weight": torch.ones(2, 3, dtype=torch.int64)}), "element type int64"),
    "wrong magnitude": (pair(**{".lora_magnitude_vector": torch.ones(3)}), "for 4 output channels"),
    "twice": (
        pair(**{".lora_down.weight": DOWN.clone()}),
        "has the part down of transformer.blocks.0.to_q twice",
    ),
    "bias of a LoRA": (pair(**{".lora_B.bias": torch.ones(4)}), "to_q.lora_B.bias, which is not applied"),
    "whole tensor": ({".weight": torch.ones(4, 3)}, "to_q.weight, which is not applied"),
    "LyCORIS": ({".hada_w1_a": torch.ones(4, 3)}, "hada_w1_a, which is not applied"),
    "other DoRA": (pair(**{".dora_scale": torch.ones(4, 1)}), "to_q.dora_scale, which is not applied"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_key_that_is_not_applied_is_named(name, tmp_path: Path) -> None:
    tensors, words = REFUSED[name]
    with pytest.raises(UsageError) as refused:
        lora_of(tmp_path, **tensors)
    assert (
        words in str(refused.value)
        and str(refused.value).count("style.safetensors") == 1
        and refused.value.hint
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lora_alpha": float("nan")}, "is nan, which is not a finite number"),
        ({"lora_alpha": 10**400}, "is 1000000"),
        ({"lora_alpha": "8"}, "is '8', which is not a finite number"),
        ({"alpha_pattern": {"(a+)+$": 1}}, "is a regular expression"),
        ({"alpha_pattern": [1]}, "the alpha_pattern of the transformer is [1]"),
        ({"init_lora_weights": "pissa_niter_4"}, "began with pissa_niter_4"),
        ({"use_bdlora": True}, "trained with use_bdlora"),
    ],
)
def test_settings_that_are_not_applied_are_named(settings, words, tmp_path: Path) -> None:
    metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in settings.items()})}
    with pytest.raises(UsageError) as refused:
        lora_of(tmp_path, metadata, **pair())
    assert words in str(refused.value) and refused.value.hint


def test_settings_for_a_component_that_no_key_names_are_refused(tmp_path: Path) -> None:
    metadata = {"lora_adapter_metadata": json.dumps({"text_encoder.lora_alpha": 8})}
    with pytest.raises(
        UsageError, match=r"is for text_encoder\., but no name begins so, such as transformer"
    ):
        lora_of(tmp_path, metadata, **pair())


@pytest.mark.parametrize("content", [b"", b"\x80\x04.", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0{}"])
def test_a_file_that_is_no_safetensors_or_empty_is_refused(content, tmp_path: Path) -> None:
    path = tmp_path / "style.pt"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"is not a safetensors file|holds no tensors"):
        read_lora(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.safetensors cannot be read: No such file"):
        read_lora(tmp_path / "nowhere.safetensors")


def test_a_lora_of_another_network_is_refused_by_key_and_both_shapes(tmp_path: Path) -> None:
    lora = lora_of(tmp_path, **pair())
    assert list(fitted(lora).components["transformer"]) == ["blocks.0.to_q.weight"]
    for shapes, words in (
        (
            {"transformer": {"blocks.0.to_q.weight": (4, 5)}},
            r"a weight of shape \(4, 3\), but .* has \(4, 5\)",
        ),
        (
            {"transformer": {"other.weight": (4, 3)}},
            r"changes transformer\.blocks\.0\.to_q, but the transformer has",
        ),
        ({"text_encoder": {}}, "there is no transformer, only text_encoder"),
    ):
        with pytest.raises(UsageError, match=words) as refused:
            resolved(lora, KnownWeights(shapes, {}))
        assert "another network" in str(refused.value.hint)


def test_several_loras_are_added_with_their_scales(tmp_path: Path) -> None:
    layer = layer_of(lora_of(tmp_path, **pair()))
    weight = np.ones((4, 3), np.float16)
    expected = 1 + (0.5 - 2) * (UP @ DOWN).numpy()
    np.testing.assert_allclose(changed(weight, [(layer, 0.5), (layer, -2.0)]), expected, rtol=1e-6)
    assert weight.dtype == np.float16 and (weight == 1).all()


def test_the_identity_tells_scales_and_files_apart(tmp_path: Path) -> None:
    lora = fitted(lora_of(tmp_path, **pair()))
    other = fitted(lora_of(tmp_path, **pair(**{".alpha": torch.tensor(1.0)})))
    found = {ScaledLora(lora).identity, ScaledLora(lora, 0.5).identity, ScaledLora(other).identity}
    assert len(found) == 3 and ScaledLora(lora, 1).identity in found


@pytest.mark.parametrize(
    ("text", "file", "scale"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a:0.5", "a", 0.5),
        ("C:/a", "C:/a", 1.0),
        ("a:b:-2", "a:b", -2.0),
    ],
)
def test_a_choice_is_a_file_and_a_scale(text, file, scale) -> None:
    assert parse_lora(text) == LoraChoice(Path(file), scale)


@pytest.mark.parametrize("text", ["a:nan", "a:inf", "a:1e9"])
def test_a_scale_that_is_not_finite_or_far_too_large_is_refused(text) -> None:
    with pytest.raises(UsageError, match="the scale of the LoRA a is"):
        parse_lora(text)


def test_far_too_many_loras_are_refused() -> None:
    with pytest.raises(UsageError, match="17 LoRAs"):
        parse_loras(["a"] * 17)
