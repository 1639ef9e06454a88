"""CLIP's text model against transformers' unmodified CLIPTextModelWithProjection."""

from __future__ import annotations

import pytest
import torch
from tiny_sd3 import TOKENS, make_clip, make_clip_tokenizer
from torch import Tensor

from ditc.export.networks.clip import end_of_text, load_clip
from ditc.runtime.errors import CheckpointError

# The same fp32 operations, except for the order of one sum. Measured 3e-7 of the largest value.
BOUND = 1e-5
SHAPES = {
    "quick_gelu": {"hidden_size": 16, "projection": 8, "layers": 2},
    "gelu": {"hidden_size": 20, "projection": 12, "layers": 3},
}
EOS = 517


def reference(activation: str, eos_token_id: int = EOS):
    torch.manual_seed(0)
    model = make_clip(make_clip_tokenizer(), activation=activation, **SHAPES[activation])
    model.config.eos_token_id = model.text_model.eos_token_id = eos_token_id
    return model


def prompts(pad: int) -> Tensor:
    """Padded texts of 4, 30 and 77 tokens, counting the end-of-text token."""
    ids = torch.randint(1, EOS - 1, (3, TOKENS), generator=torch.Generator().manual_seed(1))
    for row, end in enumerate((3, 29, TOKENS - 1)):
        ids[row, end] = EOS
        ids[row, end + 1 :] = pad
    return ids


@pytest.mark.parametrize("eos_token_id", [EOS, 2], ids=["end of text", "old config"])
@pytest.mark.parametrize("pad", [EOS, 0], ids=["padded with eos", "padded with !"])
@pytest.mark.parametrize("activation", SHAPES)
def test_states_and_pooled_text_match_transformers(activation, pad, eos_token_id) -> None:
    model = reference(activation, eos_token_id)
    encoder = load_clip(model.config.to_dict(), model.state_dict(), torch.float32)
    ids = prompts(pad)
    with torch.inference_mode():
        states, pooled = encoder(ids)
        wanted = model(ids, output_hidden_states=True)
    for got, expected in ((states, wanted.hidden_states[-2]), (pooled, wanted.text_embeds)):
        assert (got - expected).abs().max() <= BOUND * expected.abs().max()


def test_the_end_of_text_is_the_first_match_whatever_the_ties() -> None:
    ids = torch.tensor([[9, 5, 9, 9], [1, 2, 3, 9], [1, 2, 3, 4]])
    assert end_of_text(ids, 9).tolist() == [0, 3, 0]
    assert end_of_text(ids, 2).tolist() == [0, 3, 3], "with old configs it is the first of the largest ids"


def test_another_model_type_is_refused() -> None:
    config = reference("gelu").config.to_dict() | {"model_type": "t5"}
    with pytest.raises(CheckpointError, match="model_type is 't5'"):
        load_clip(config, {}, torch.float32)


def test_a_clip_without_a_projection_is_refused_by_name() -> None:
    model = reference("gelu")
    tensors = {name: t for name, t in model.state_dict().items() if name != "text_projection.weight"}
    with pytest.raises(CheckpointError, match=r"text_projection\.weight"):
        load_clip(model.config.to_dict(), tensors, torch.float32)
