"""Weights under a wrapper's names or an FP8 scale are read as they are meant; LoRAs and other formats are named."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ditc.export.checkpoint.open import open_checkpoint, open_component
from ditc.parity.reference.upstream import Upstream
from ditc.runtime.cli import USAGE, main
from ditc.runtime.errors import CheckpointError

Tensors = dict[str, torch.Tensor]
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
LAYER = "transformer_blocks.0.attn1.to_q"


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"_fsdp_wrapped_module.{name.replace('attn1.', 'attn1._checkpoint_wrapped_module.')}",
    ],
    ids=["ddp", "compile", "both", "fsdp"],
)
def test_a_wrappers_prefix_is_removed(checkpoint: Path, wrapped: Callable[[str], str]) -> None:
    plain = load_file(checkpoint / TRANSFORMER)
    save_file({wrapped(name): tensor for name, tensor in plain.items()}, checkpoint / TRANSFORMER)
    _assert_same(open_component(checkpoint / "transformer").tensors, plain)


def test_a_name_that_is_there_with_and_without_the_prefix_is_refused(checkpoint: Path) -> None:
    _change(checkpoint, lambda t: t.update({"_orig_mod.proj_out.bias": torch.zeros(8)}))
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model.*holds proj_out.bias twice"):
        open_checkpoint(checkpoint)


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("names", [("scale_weight", "scale_input"), ("weight_scale", "input_scale")])
def test_scaled_fp8_weights_are_their_values_times_the_scale(
    checkpoint: Path, names: tuple[str, str], per_row: bool
) -> None:
    expected = _quantize(checkpoint, "transformer", names, per_row=per_row)
    component = open_component(checkpoint / "transformer")
    _assert_same(component.tensors, expected)
    assert all(
        component.tensors.dtype(name) == component.tensors[name].dtype == torch.float32 for name in expected
    )


def test_the_second_reference_computes_with_the_same_weights_of_every_component(checkpoint: Path) -> None:
    expected = {name: _quantize(checkpoint, name) for name in ("text_encoder", "vae")}
    plain = load_file(checkpoint / TRANSFORMER)
    save_file({f"_orig_mod.{name}": tensor for name, tensor in plain.items()}, checkpoint / TRANSFORMER)
    theirs = Upstream(open_checkpoint(checkpoint)).pipeline.components
    for name, tensors in {**expected, "transformer": plain}.items():
        _assert_same(theirs[name].state_dict(), tensors)


@pytest.mark.parametrize(
    ("tensors", "found"),
    [
        ({f"{LAYER}.lora_A.weight": torch.zeros(4, 4)}, "a LoRA"),
        ({f"{LAYER}.SCB": torch.zeros(4)}, "bitsandbytes 8-bit"),
        ({f"{LAYER}.weight.quant_state.bitsandbytes__nf4": torch.zeros(4)}, "bitsandbytes 4-bit"),
        ({f"{LAYER}.qweight": torch.zeros(4), f"{LAYER}.g_idx": torch.zeros(4)}, "GPTQ"),
        ({f"{LAYER}.qweight": torch.zeros(4), f"{LAYER}.qzeros": torch.zeros(4)}, "AWQ"),
        ({f"{LAYER}.weight._data": torch.zeros(4)}, "quanto"),
        ({f"{LAYER}._weight_qdata": torch.zeros(4)}, "torchao"),
        ({f"{LAYER}.qweight": torch.zeros(4), f"{LAYER}.wscales": torch.zeros(4)}, "Nunchaku"),
        ({f"{LAYER}.weight": torch.zeros(4, 4, dtype=torch.int8)}, "quantized weights"),
        ({f"{LAYER}.comfy_quant": torch.tensor([*b'{"format": "nvfp4"}'], dtype=torch.uint8)}, "nvfp4"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("component", ["transformer", "text_encoder"])
def test_other_weights_are_named_with_their_component_before_any_export(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], tensors: Tensors, found: str, component: str
) -> None:
    _change(checkpoint, lambda saved: saved.update(tensors), component)
    _refused(checkpoint, capsys, found, f"{component}/", next(iter(tensors)).rpartition(".")[0])


def test_a_scale_for_each_block_is_refused_by_name(checkpoint: Path) -> None:
    weight = torch.zeros(32, 32, dtype=torch.float8_e4m3fn)
    _change(
        checkpoint,
        lambda t: t.update({f"{LAYER}.weight": weight, f"{LAYER}.weight_scale_inv": torch.ones(2, 2)}),
    )
    with pytest.raises(CheckpointError, match=r"to_q.weight_scale_inv has shape \[2, 2\]"):
        open_checkpoint(checkpoint)


@pytest.mark.parametrize("component", ["transformer", "text_encoder"])
def test_a_quantization_config_is_refused_before_the_weights_are_read(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], component: str
) -> None:
    path = checkpoint / component / "config.json"
    quantization = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantization}))
    _refused(checkpoint, capsys, f"{component}/config.json", "bitsandbytes in 8 bits")


def test_a_gguf_file_instead_of_weights_is_named(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint / TRANSFORMER).rename(checkpoint / "transformer" / "model-Q8_0.gguf")
    _refused(checkpoint, capsys, "transformer has no safetensors weights, only model-Q8_0.gguf")


@pytest.mark.parametrize("folder", ["", "transformer"])
def test_a_lora_beside_the_weights_is_left_out_with_a_warning(
    checkpoint: Path, caplog: pytest.LogCaptureFixture, folder: str
) -> None:
    save_file({f"{LAYER}.lora_A.weight": torch.ones(4, 4)}, checkpoint / folder / "style.safetensors")
    with caplog.at_level(logging.WARNING):
        open_checkpoint(checkpoint)
    assert "style.safetensors is a LoRA and is left out" in caplog.text and "fuse_lora" in caplog.text


def test_an_adapter_that_transformers_would_apply_is_refused(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint / "text_encoder" / "adapter_config.json").write_text("{}")
    _refused(checkpoint, capsys, "text_encoder/adapter_config.json")


def _refused(checkpoint: Path, capsys: pytest.CaptureFixture[str], *texts: str) -> None:
    """`ditc build` must end with exit code 2 and one error with the texts, and write nothing."""
    out = checkpoint.parent / "bundle"
    assert main(["build", str(checkpoint), "-o", str(out)]) == USAGE
    *_, error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and hint.startswith("hint: ")
    assert all(text in error for text in texts), error
    assert not out.exists()


def _quantize(
    checkpoint: Path,
    component: str,
    names: tuple[str, str] = ("scale_weight", "scale_input"),
    *,
    per_row: bool = False,
) -> Tensors:
    """Save the component's matrices as scaled FP8, as ComfyUI does, and return the tensors that they stand for."""
    path = next((checkpoint / component).glob("*.safetensors"))
    expected = load_file(path)
    saved: Tensors = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name, tensor in expected.items():
        if tensor.dim() != 2 or not name.endswith(".weight"):
            saved[name] = tensor
            continue
        largest = tensor.abs().amax(dim=1) if per_row else tensor.abs().amax()
        scale = (largest / 448).clamp(min=1e-12)
        column = scale[:, None] if per_row else scale
        saved[name] = (tensor / column).to(torch.float8_e4m3fn)
        module = name.removesuffix(".weight")
        saved |= {f"{module}.{names[0]}": scale, f"{module}.{names[1]}": torch.ones(())}
        expected[name] = saved[name].to(torch.float32) * column
    save_file(saved, path, {"format": "pt"})
    return expected


def _change(checkpoint: Path, change: Callable[[Tensors], object], component: str = "transformer") -> None:
    path = next((checkpoint / component).glob("*.safetensors"))
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def _assert_same(found: object, expected: Tensors) -> None:
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
