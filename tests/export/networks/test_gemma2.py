"""The Gemma-2 text encoder against transformers' unmodified Gemma2Model."""

from __future__ import annotations

import onnxruntime
import pytest
import torch
from torch import Tensor
from torch.export import Dim
from transformers import Gemma2Config, Gemma2Model

from ditc.export.networks.gemma2 import load_gemma2
from ditc.export.networks.loading import weight_map
from ditc.runtime.errors import CheckpointError

# The same fp32 operations, except for the mask's place in the sum and ONNX Runtime's kernels. Measured 0 and 2e-6.
FP32_BOUND = 1e-5
# Measured 4e-3 and 3e-2; transformers' own model measures 4e-2 in bf16.
BOUNDS_16_BIT = {torch.float16: 1e-2, torch.bfloat16: 8e-2}

CONFIG = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,  # the first has a sliding window, the second sees all tokens
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 5,
}


@pytest.fixture(scope="module")
def reference():
    torch.manual_seed(0)
    model = Gemma2Model(Gemma2Config(**CONFIG, attn_implementation="eager")).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # The attention is sharp, so that a wrong mask changes the result.
            sharp = 3.0 if "q_proj" in name or "k_proj" in name else 1.0
            scale = 0.3 if parameter.dim() == 1 else sharp * parameter.shape[-1] ** -0.5
            parameter.copy_(scale * torch.randn_like(parameter))
    return model


def prompts(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Ids and a mask with padding on the right; the rows have all tokens, half, one and three."""
    ids = torch.randint(
        0, CONFIG["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(batch)
    )
    lengths = torch.tensor([length, length // 2, 1, 3])[:batch]
    return ids, (torch.arange(length)[None] < lengths[:, None]).long()


@pytest.mark.parametrize("size", [(2, 12), (4, 7), (1, 3)])
def test_the_encoder_matches_transformers_with_padding_and_a_sliding_window(
    size, reference, relative_l2
) -> None:
    encoder = load_gemma2(reference.config.to_dict(), reference.state_dict(), torch.float32)
    ids, mask = prompts(*size)
    expected = reference(input_ids=ids, attention_mask=mask).last_hidden_state
    assert relative_l2(encoder(ids, mask), expected) <= FP32_BOUND


def test_the_sliding_window_changes_the_result(reference, relative_l2) -> None:
    wide = reference.config.to_dict() | {"sliding_window": 100}
    ids, mask = prompts(2, 12)
    narrow, all_of_it = (
        load_gemma2(config, reference.state_dict(), torch.float32)(ids, mask)
        for config in (reference.config.to_dict(), wide)
    )
    # So the test above would fail without the window.
    assert relative_l2(narrow, all_of_it) > 1e3 * FP32_BOUND


@pytest.mark.parametrize("dtype", list(BOUNDS_16_BIT))
def test_a_16_bit_encoder_stays_close_to_fp32(dtype, reference, relative_l2) -> None:
    encoder = load_gemma2(reference.config.to_dict(), reference.state_dict(), dtype)
    ids, mask = prompts(4, 7)
    expected = reference(input_ids=ids, attention_mask=mask).last_hidden_state
    assert relative_l2(encoder(ids, mask), expected) <= BOUNDS_16_BIT[dtype]


def test_the_names_of_a_causal_language_model_are_read_and_its_head_is_ignored(reference) -> None:
    tensors = {f"model.{name}": tensor for name, tensor in reference.state_dict().items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    encoder = load_gemma2(reference.config.to_dict(), tensors, torch.float32)
    assert torch.equal(encoder.model.embed_tokens.weight, reference.embed_tokens.weight)
    claimed = {source.checkpoint for source in weight_map({"text_encoder": encoder})}
    assert claimed == tensors.keys() - {"lm_head.weight"}


def test_the_weight_map_rebuilds_every_tensor_bit_for_bit(reference) -> None:
    encoder = load_gemma2(reference.config.to_dict(), reference.state_dict(), torch.float32)
    state = encoder.state_dict()
    rebuilt = {
        s.checkpoint: state[s.parameter].reshape(s.shape) for s in weight_map({"text_encoder": encoder})
    }
    assert rebuilt.keys() == reference.state_dict().keys()
    assert all(torch.equal(rebuilt[name], tensor) for name, tensor in reference.state_dict().items())


def test_a_missing_tensor_and_another_model_are_refused_by_name(reference) -> None:
    tensors = dict(reference.state_dict())
    del tensors["layers.1.mlp.up_proj.weight"]
    with pytest.raises(CheckpointError, match=r"lacks layers\.1\.mlp\.up_proj\.weight"):
        load_gemma2(reference.config.to_dict(), tensors, torch.float32)
    with pytest.raises(CheckpointError, match="'t5', not 'gemma2'"):
        load_gemma2({"model_type": "t5"}, tensors, torch.float32)


def test_the_exported_encoder_runs_at_another_length_and_batch(reference, relative_l2) -> None:
    encoder = load_gemma2(reference.config.to_dict(), reference.state_dict(), torch.float32)
    dims = {0: Dim("batch", min=1, max=8), 1: Dim("length", min=1, max=300)}
    program = torch.onnx.export(
        encoder, prompts(2, 6), dynamo=True, dynamic_shapes=(dims, dims), verbose=False
    )
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    names = [value.name for value in session.get_inputs()]
    for size in ((3, 20), (1, 3)):
        ids, mask = prompts(*size)
        (out,) = session.run(None, dict(zip(names, (ids.numpy(), mask.numpy()), strict=True)))
        expected = reference(input_ids=ids, attention_mask=mask).last_hidden_state
        assert relative_l2(torch.from_numpy(out), expected) <= FP32_BOUND
