"""ditc's networks against the installed mmdit 0.3.0. Each of its defects has a test that fails once it is fixed."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from tiny_mmdit import seeded
from torch import Tensor

from ditc.export.families.lucidrains.attention import AdaptiveAttention, JointAttention
from ditc.export.families.lucidrains.generalized import GeneralizedMMDiT
from ditc.export.families.lucidrains.layers import FeedForward, MultiHeadRMSNorm
from ditc.export.families.lucidrains.trunk import MMDiT, MMDiTBlock
from ditc.runtime.errors import CheckpointError

pytest.importorskip("mmdit", reason="the reference is the mmdit package: pip install ditc[dev]")
import mmdit.adaptive_attention as adaptive
import mmdit.mmdit_generalized_pytorch as generalized
import mmdit.mmdit_pytorch as two
from x_transformers.x_transformers import FeedForward as UpstreamFeedForward

# fp32 with other orders of products, up to 4 streams and 40 Sinkhorn divisions per branch. Measured 3e-8 to 1e-6.
FP32_BOUND = 1e-5
TEXT, IMAGE, AUDIO, COND = 48, 64, 32, 24
HEADS = {"dim_head": 16, "heads": 4}
PAIR = {"dim_text": TEXT, "dim_image": IMAGE, **HEADS}
TRIO = {"dim_modalities": (TEXT, IMAGE, AUDIO), **HEADS}
MMDITS: dict[str, dict[str, Any]] = {
    "one stream": {"num_residual_streams": 1, "dim_cond": COND},
    "one stream, registers, no condition": {"num_residual_streams": 1, "num_register_tokens": 4},
    "four streams": {"dim_cond": COND},
    "four streams, registers, no final norm": {
        "dim_cond": COND,
        "num_register_tokens": 4,
        "final_norm": False,
    },
    "two streams, gated feedforward": {
        "num_residual_streams": 2,
        "dim_cond": COND,
        "ff_kwargs": {"glu": True, "swish": True},
    },
}
GENERALIZED: dict[str, dict[str, Any]] = {
    "one stream": {"num_residual_streams": 1, "dim_cond": COND},
    "one stream, soft clamp, no condition": {
        "num_residual_streams": 1,
        "softclamp": True,
        "softclamp_value": 2.0,
    },
    "four streams": {"dim_cond": COND},
    "four streams, soft clamp": {"dim_cond": COND, "softclamp": True, "softclamp_value": 2.0},
}


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def mask(batch: int, length: int) -> Tensor:
    """A mask that keeps the first row, half of the second, and no token of the others."""
    lengths = torch.tensor([length, length // 2, *(0,) * (batch - 2)])[:batch]
    return torch.arange(length)[None] < lengths[:, None]


def same(ours: Any, theirs: Any, relative_l2) -> None:
    for value, reference in zip(ours, theirs, strict=True):
        assert value.shape == reference.shape
        assert relative_l2(value, reference) <= FP32_BOUND


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", MMDITS)
def test_text_and_image_match_upstream(name: str, masked: bool, relative_l2) -> None:
    arguments = {"depth": 2, **PAIR, **MMDITS[name]}
    upstream = seeded(two.MMDiT(**arguments))
    text, image, key_mask = tokens(3, 7, TEXT), tokens(3, 16, IMAGE), mask(3, 7) if masked else None
    cond = tokens(3, COND) if "dim_cond" in arguments else None
    for skip in (True, False):
        ours = MMDiT(**arguments, should_skip_last_feedforward=skip).eval()
        loaded = ours.load_state_dict(upstream.state_dict(), strict=False)
        dead = {k for k in loaded.unexpected_keys if not k.startswith("blocks.1.text_ff")}
        assert not loaded.missing_keys
        assert dead <= {"register_tokens"} and (skip or len(loaded.unexpected_keys) == len(dead))
        theirs = upstream(
            text_tokens=text,
            image_tokens=image,
            text_mask=key_mask,
            time_cond=cond,
            should_skip_last_feedforward=skip,
        )
        same(ours(text, image, key_mask, cond), theirs, relative_l2)


@pytest.mark.parametrize("name", GENERALIZED)
def test_three_modalities_match_upstream(name: str, relative_l2) -> None:
    arguments = {"depth": 2, **TRIO, **GENERALIZED[name]}
    upstream, ours = seeded(generalized.MMDiT(**arguments)), GeneralizedMMDiT(**arguments).eval()
    ours.load_state_dict(upstream.state_dict())
    given = (tokens(3, 7, TEXT), tokens(3, 16, IMAGE), tokens(3, 5, AUDIO))
    cond = tokens(3, COND) if "dim_cond" in arguments else None
    for masks in (None, (mask(3, 7), None, mask(3, 5)), (mask(3, 7), mask(3, 16), mask(3, 5))):
        theirs = upstream(modality_tokens=given, modality_masks=masks, time_cond=cond)
        same(ours(given, masks, cond), theirs, relative_l2)


def test_an_embedding_and_an_attention_pool_of_the_streams_match_upstream(relative_l2) -> None:
    arguments = {"depth": 1, "dim_modalities": (TEXT, TEXT), "dim_cond": COND, **HEADS}
    arguments["mhc_kwargs"] = {"add_stream_embed": True, "add_attn_pool_reduce_stream": True, "dim": TEXT}
    upstream, ours = seeded(generalized.MMDiT(**arguments)), GeneralizedMMDiT(**arguments).eval()
    ours.load_state_dict(upstream.state_dict())
    given, cond = (tokens(2, 7, TEXT), tokens(2, 16, TEXT)), tokens(2, COND)
    same(ours(given, None, cond), upstream(modality_tokens=given, time_cond=cond), relative_l2)


def test_leaving_out_what_a_denoiser_does_not_use_changes_nothing_that_it_uses(relative_l2) -> None:
    text, image, cond = tokens(2, 7, TEXT), tokens(2, 16, IMAGE), tokens(2, COND)
    upstream = seeded(two.MMDiT(depth=2, dim_cond=COND, **PAIR))
    pruned = MMDiT(depth=2, dim_cond=COND, **PAIR, return_text=False).eval()
    pruned.load_state_dict(upstream.state_dict(), strict=False)
    _, wanted = upstream(text_tokens=text, image_tokens=image, time_cond=cond)
    assert relative_l2(pruned(text, image, None, cond)[1], wanted) <= FP32_BOUND
    upstream = seeded(generalized.MMDiT(depth=2, dim_cond=COND, **TRIO))
    pruned = GeneralizedMMDiT(depth=2, dim_cond=COND, **TRIO, read=(False, True, False)).eval()
    pruned.load_state_dict(upstream.state_dict(), strict=False)
    given = (text, image, tokens(2, 5, AUDIO))
    _, wanted, _ = upstream(modality_tokens=given, time_cond=cond)
    (got,) = pruned(given, None, cond)
    assert relative_l2(got, wanted) <= FP32_BOUND


@pytest.mark.parametrize("arguments", [{}, {"qk_rmsnorm": True}, {"softclamp": True, "softclamp_value": 2.0}])
def test_joint_attention_matches_upstream_and_rows_without_a_key_are_zeros(arguments, relative_l2) -> None:
    dims = (TEXT, IMAGE, AUDIO)
    upstream = seeded(two.JointAttention(dim_inputs=dims, **HEADS, **arguments))
    clamp = arguments.get("softclamp_value")
    norm = arguments.get("qk_rmsnorm", False)
    ours = JointAttention(dims, **HEADS, qk_rmsnorm=norm, softclamp=clamp).eval()
    ours.load_state_dict(upstream.state_dict())
    given = (tokens(3, 7, TEXT), tokens(3, 16, IMAGE), tokens(3, 5, AUDIO))
    masks = tuple(mask(3, x.shape[1]) for x in given)
    for chosen in (None, (masks[0], None, None), masks):
        same(ours(given, chosen), upstream(given, chosen), relative_l2)
    assert all(out[2].count_nonzero() == 0 for out in ours(given, masks))


def test_flash_attention_computes_the_same_function(relative_l2) -> None:
    upstream = seeded(two.JointAttention(dim_inputs=(TEXT, IMAGE), **HEADS, flash=True))
    ours = JointAttention((TEXT, IMAGE), **HEADS).eval()
    ours.load_state_dict(upstream.state_dict())
    given, masks = (tokens(3, 7, TEXT), tokens(3, 16, IMAGE)), (mask(3, 7), mask(3, 16))
    same(ours(given, masks), upstream(given, masks), relative_l2)


@pytest.mark.parametrize("arguments", [{}, {"num_adaptive_weights": 4}, {"softclamp": True}])
def test_adaptive_attention_matches_upstream(arguments: dict[str, Any], relative_l2) -> None:
    upstream = seeded(adaptive.AdaptiveAttention(dim=TEXT, **HEADS, **arguments))
    ours = AdaptiveAttention(dim=TEXT, **HEADS, **arguments).eval()
    ours.load_state_dict(upstream.state_dict())
    x = tokens(3, 9, TEXT)
    for key_mask in (None, mask(3, 9)):
        same((ours(x, key_mask),), (upstream(x, key_mask),), relative_l2)


@pytest.mark.parametrize(
    "arguments",
    [
        {"mult": 2, "no_bias": True, "relu_squared": True},
        {"glu": True, "glu_mult_bias": True, "post_act_ln": True},
        {"softclamp_value": 3.0, "dropout": 0.1},
    ],
)
def test_feedforwards_match_upstream(arguments: dict[str, Any], relative_l2) -> None:
    upstream, ours = seeded(UpstreamFeedForward(TEXT, **arguments)), FeedForward(TEXT, **arguments).eval()
    ours.load_state_dict(upstream.state_dict())
    x = tokens(2, 5, TEXT)
    assert relative_l2(ours(x), upstream(x)) <= FP32_BOUND


def test_a_feedforward_that_is_not_implemented_is_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match="solu"):
        FeedForward(TEXT, solu=True)


@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_the_norm_of_heads_bounds_the_norm_and_adds_nothing_to_the_mean(scale: float, relative_l2) -> None:
    upstream = seeded(two.MultiHeadRMSNorm(16, heads=4))
    ours = MultiHeadRMSNorm(16, heads=4)
    ours.load_state_dict(upstream.state_dict())
    x = scale * tokens(2, 9, 4, 16)
    assert relative_l2(ours(x), upstream(x.transpose(1, 2)).transpose(1, 2)) <= FP32_BOUND


# Upstream's defects. Each test states what upstream does today, and fails once upstream changes.


def test_upstream_never_forwards_qk_rmsnorm_to_the_attention_of_a_block(relative_l2) -> None:
    upstream = seeded(two.MMDiTBlock(**PAIR, qk_rmsnorm=True))
    assert not any("rmsnorm" in name for name in upstream.state_dict())
    ours = MMDiTBlock(**PAIR, qk_rmsnorm=True, skip_feedforward_text_tokens=False).eval()
    ours.load_state_dict(upstream.state_dict())
    given = tokens(2, 7, TEXT), tokens(2, 16, IMAGE)
    theirs = upstream(text_tokens=given[0], image_tokens=given[1], skip_feedforward_text_tokens=False)
    same(ours(*given), theirs, relative_l2)
    trio = generalized.MMDiTBlock(**TRIO, qk_rmsnorm=True)
    assert not any("rmsnorm" in name for name in trio.state_dict())


def test_upstream_skips_the_text_feedforward_of_a_block_used_alone(relative_l2) -> None:
    upstream = seeded(two.MMDiTBlock(**PAIR))
    ours = MMDiTBlock(**PAIR).eval()
    loaded = ours.load_state_dict(upstream.state_dict(), strict=False)
    assert {name.split(".")[0] for name in loaded.unexpected_keys} == {"text_ff", "text_ff_layernorm"}
    given = tokens(2, 7, TEXT), tokens(2, 16, IMAGE)
    same(ours(*given), upstream(text_tokens=given[0], image_tokens=given[1]), relative_l2)


def test_upstream_never_sums_adaptive_attention_over_heads() -> None:
    x = tokens(2, 9, TEXT)
    one = adaptive.AdaptiveAttention(dim=TEXT, **HEADS)(x)
    gated = adaptive.AdaptiveAttention(dim=TEXT, **HEADS, num_adaptive_weights=4)(x)
    assert one.shape == (2, 9, 4 * TEXT) and gated.shape == (2, 4, 9, TEXT)


def test_upstream_norms_every_modality_whatever_final_norms_says() -> None:
    upstream = generalized.MMDiT(depth=1, **TRIO, final_norms=False)
    names = set(GeneralizedMMDiT(depth=1, **TRIO, final_norms=False).state_dict())
    assert {"norms.0.g", "norms.1.g", "norms.2.g"} <= set(upstream.state_dict()) == names


def test_upstream_accepts_a_soft_clamp_in_the_generalized_block_only() -> None:
    generalized.MMDiTBlock(**TRIO, softclamp=True)
    with pytest.raises(TypeError):
        two.MMDiTBlock(**PAIR, softclamp=True)
    with pytest.raises(AssertionError):
        generalized.MMDiTBlock(**TRIO, softclamp=True, flash_attn=True)


def test_upstream_does_not_pass_mhc_kwargs_to_its_blocks() -> None:
    with pytest.raises(TypeError):
        generalized.MMDiT(depth=1, **TRIO, mhc_kwargs={"sinkhorn_iters": 5})


def test_upstream_chooses_the_first_stream_without_torchs_generator(relative_l2) -> None:
    def made(state: int) -> Any:
        random.seed(state)
        torch.manual_seed(0)
        return two.MMDiT(depth=1, **PAIR).eval()

    networks = [made(state) for state in range(8)]
    alphas = [network.state_dict()["blocks.0.image_ff_residual_fn.static_alpha"] for network in networks]
    assert any(not torch.equal(alphas[0], other) for other in alphas[1:])
    given = tokens(2, 7, TEXT), tokens(2, 16, IMAGE)
    for network in networks[:2]:
        ours = MMDiT(depth=1, **PAIR).eval()
        ours.load_state_dict(network.state_dict(), strict=False)
        same(ours(*given), network(text_tokens=given[0], image_tokens=given[1]), relative_l2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_16_bits_the_error_is_at_most_that_of_upstream(dtype, relative_l2) -> None:
    arguments = {"depth": 2, "dim_cond": COND, **PAIR}
    upstream, ours = seeded(two.MMDiT(**arguments)), MMDiT(**arguments).eval()
    ours.load_state_dict(upstream.state_dict(), strict=False)
    given = [x.to(dtype) for x in (tokens(2, 7, TEXT), tokens(2, 16, IMAGE), tokens(2, COND))]
    wide = [x.float() for x in given]
    exact = upstream(text_tokens=wide[0], image_tokens=wide[1], time_cond=wide[2])[1]
    theirs = upstream.to(dtype)(text_tokens=given[0], image_tokens=given[1], time_cond=given[2])[1]
    got = ours.to(dtype)(given[0], given[1], None, given[2])[1]
    assert relative_l2(got, exact) <= relative_l2(theirs, exact)
