"""T5's encoder against transformers' unmodified T5EncoderModel."""

from __future__ import annotations

import pytest
import torch
from tiny_sd3 import make_t5
from transformers import T5Config
from transformers.models.t5.modeling_t5 import T5Attention

from ditc.export.networks.t5 import distance_buckets, load_t5
from ditc.runtime.errors import CheckpointError, UsageError

# The same fp32 operations. Measured 3e-7 of the largest value.
BOUND = 1e-5


@pytest.fixture(scope="module")
def reference():
    torch.manual_seed(0)
    return make_t5()


@pytest.mark.parametrize(("batch", "length"), [(1, 5), (3, 16), (2, 60)])
def test_the_states_match_transformers_at_every_length(reference, batch, length) -> None:
    encoder = load_t5(reference.config.to_dict(), reference.state_dict(), torch.float32)
    ids = torch.randint(0, 40, (batch, length), generator=torch.Generator().manual_seed(length))
    with torch.inference_mode():
        got, wanted = encoder(ids), reference(ids)[0]
    assert (got - wanted).abs().max() <= BOUND * wanted.abs().max()


def test_with_a_mask_padding_is_not_attended_to_as_in_transformers(reference) -> None:
    encoder = load_t5(reference.config.to_dict(), reference.state_dict(), torch.float32)
    ids = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1] * 9, [1] * 4 + [0] * 5])
    with torch.inference_mode():
        got, wanted = encoder(ids, mask), reference(ids, attention_mask=mask)[0]
        unmasked = encoder(ids)
    assert (got - wanted).abs().max() <= BOUND * wanted.abs().max()
    assert (got[1, :4] - unmasked[1, :4]).abs().max() > 0.01 * wanted.abs().max()


def test_the_table_of_buckets_matches_transformers_formula_at_any_distance() -> None:
    config = T5Config()  # 32 buckets up to distance 128, as in T5-XXL
    table = distance_buckets(config)
    offset = torch.arange(-600, 601)
    wanted = T5Attention._relative_position_bucket(offset, num_buckets=32, max_distance=128)
    got = table[offset.abs().clamp(max=len(table) - 1), (offset > 0).long()]
    assert torch.equal(got, wanted)


def test_fp16_is_refused_and_the_hint_names_other_types(reference) -> None:
    with pytest.raises(UsageError, match="T5 cannot be built in fp16") as caught:
        load_t5(reference.config.to_dict(), reference.state_dict(), torch.float16)
    assert "bf16 or fp32" in str(caught.value.hint)


def test_weights_stored_in_fp16_are_read(reference) -> None:
    stored = {name: tensor.half() for name, tensor in reference.state_dict().items()}
    encoder = load_t5(reference.config.to_dict(), stored, torch.bfloat16)
    assert encoder.shared.weight.dtype == torch.bfloat16
    with torch.inference_mode():
        assert encoder(torch.ones(1, 4, dtype=torch.long)).dtype == torch.float32


def test_another_model_type_is_refused(reference) -> None:
    with pytest.raises(CheckpointError, match="model_type is 'umt5'"):
        load_t5(reference.config.to_dict() | {"model_type": "umt5"}, {}, torch.float32)
