"""The whole-step wrapper: rows, guidance, solver update and statistics, compared with the arithmetic written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ditc.export.graph.step import guide, statistics, wrap
from ditc.runtime.step_contract import StepContract, coefficient_columns


class Network(nn.Module):
    """A small seeded network that depends on every input: a 1x1 convolution, scaled by timestep and condition."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = nn.Conv2d(3, 3, 1)
        self.seen: list[torch.dtype] = []

    def forward(self, latents: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        self.seen.append(latents.dtype)
        scale = (timestep / 1000 + condition).to(latents.dtype)
        return self.mix.to(latents.dtype)(latents) * scale[:, None, None, None]


def inputs(history: int = 1, *, noise: bool = False, seed: int = 1) -> dict[str, Tensor]:
    """Two samples; the first with guidance (rows 0 and 2), the second without (row 1)."""
    torch.manual_seed(seed)
    columns = len(coefficient_columns(history, noise))
    return {
        "latents": torch.randn(2, 3, 4, 4),
        "row_of": torch.tensor([0, 1, 0]),
        "timestep": torch.tensor([900.0, 300.0]),
        "guidance_weights": torch.tensor([[-2.0, 0.0, 3.0], [0.0, 1.0, 0.0]]),
        "coefficients": torch.randn(2, columns),
        "history": torch.randn(2, history, 3, 4, 4),
        **({"noise": torch.randn(2, 3, 4, 4)} if noise else {}),
        "condition": torch.tensor([0.5, -1.0, 2.0]),
    }


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("history", [1, 2, 3])
def test_a_step_is_rows_guidance_and_update(history: int, noise: bool) -> None:
    network, feeds = Network(), inputs(history, noise=noise)
    step = wrap(network, dtype=torch.float32, contract=StepContract(history_length=history, noise=noise))
    following, x0, next_history, stats = step(*feeds.values())
    latents, past = feeds["latents"].double(), feeds["history"].double()
    for b in range(2):
        column = dict(
            zip(coefficient_columns(history, noise), feeds["coefficients"][b].double(), strict=True)
        )
        pred = torch.zeros(3, 4, 4, dtype=torch.float64)
        for r in (0, 1, 2):
            if feeds["row_of"][r] == b:
                row = (column["c_in"] * latents[b]).float()[None]
                out = network(row, feeds["timestep"][b : b + 1], feeds["condition"][r : r + 1])[0]
                pred += feeds["guidance_weights"][b, r].double() * out.double()
        wanted_x0 = column["a"] * latents[b] + column["b"] * pred
        wanted = column["cx"] * latents[b] + column["c0"] * wanted_x0
        for k in range(history):
            wanted = wanted + column[f"h{k + 1}"] * past[b, k]
        if noise:
            wanted = wanted + column["cn"] * feeds["noise"][b].double()
        # fp32 against fp64 over a dozen operations on values near 1.
        torch.testing.assert_close(x0[b].double(), wanted_x0, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(following[b].double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(next_history[:, 0], x0, rtol=0, atol=0)
    torch.testing.assert_close(next_history[:, 1:], feeds["history"][:, :-1], rtol=0, atol=0)
    assert stats.shape == (2, 2)


def test_the_latents_of_a_video_are_stepped_like_a_tall_picture() -> None:
    """The network here treats every pixel alone, so frames below each other give the same values."""
    step = wrap(Network(), dtype=torch.float32, contract=StepContract(history_length=2, noise=True))
    network = step.network.mix
    video = inputs(2, noise=True)
    for name in ("latents", "history", "noise"):
        video[name] = torch.stack([video[name], video[name].flip(-1)], dim=-3)  # two frames of 4x4
    tall = {
        name: value.flatten(-3, -2) if name in ("latents", "history", "noise") else value
        for name, value in video.items()
    }
    pictures = step(*tall.values())

    def mix(latents: Tensor) -> Tensor:
        return torch.nn.functional.conv3d(latents, network.weight[..., None], network.bias)

    step.network.forward = lambda x, t, c: mix(x) * (t / 1000 + c)[:, None, None, None, None]
    frames = step(*video.values())
    for got, expected in zip(frames[:3], pictures[:3], strict=True):
        torch.testing.assert_close(got.flatten(-3, -2), expected)
    torch.testing.assert_close(frames[3], pictures[3])


class FrameNetwork(nn.Module):
    """Adds the timestep of a frame to its latents (R,C,F,H,W)."""

    def forward(self, latents: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        assert timestep.shape == latents.shape[::2][:2]
        return latents + timestep[:, None, :, None, None] / 1000 + condition[:, None, None, None, None]


def test_held_frames_stay_and_have_the_timestep_0() -> None:
    contract = StepContract(history_length=2, noise=True, holds_frames=True)
    step = wrap(FrameNetwork(), dtype=torch.float32, contract=contract)
    feeds = inputs(2, noise=True)
    for name in ("latents", "history", "noise"):
        feeds[name] = torch.stack([feeds[name], feeds[name].flip(-1), -feeds[name]], dim=-3)  # three frames
    condition = feeds.pop("condition")
    held = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    following, x0, history, _ = step(*feeds.values(), held, condition)
    free = step(*feeds.values(), torch.zeros(2, 3), condition)
    latents = feeds["latents"]
    for changed in (following, x0, history[:, 0]):
        torch.testing.assert_close(changed[0, :, 0], latents[0, :, 0], rtol=0, atol=0)
    # No value of the network here reaches another frame, so all others are as without a held frame.
    for changed, other in zip((following, x0, history), free[:3], strict=True):
        torch.testing.assert_close(changed[1], other[1], rtol=0, atol=0)
        torch.testing.assert_close(changed[0, ..., 1:, :, :], other[0, ..., 1:, :, :], rtol=0, atol=0)
    seen: list[Tensor] = []
    step.network.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    step(*feeds.values(), held, condition)
    expected = torch.tensor([[0.0, 900.0, 900.0], [300.0] * 3, [0.0, 900.0, 900.0]])
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=0)


def test_only_the_network_sees_the_deployment_type() -> None:
    network = Network()
    step = wrap(network, dtype=torch.float16, contract=StepContract())
    results = step(*inputs().values())
    assert network.seen == [torch.float16]
    assert all(tensor.dtype == torch.float32 for tensor in results)


def test_a_sample_is_the_same_whatever_shares_its_batch() -> None:
    feeds = inputs()
    step = wrap(Network(), dtype=torch.float32, contract=StepContract())
    together = step(*feeds.values())
    alone = step(
        feeds["latents"][1:],
        torch.tensor([0]),
        feeds["timestep"][1:],
        torch.tensor([[1.0]]),
        feeds["coefficients"][1:],
        feeds["history"][1:],
        feeds["condition"][1:2],
    )
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a[1:], b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_of_weight_zero_cannot_spoil_a_sample(value: float) -> None:
    rows = torch.randn(2, 3, 4, 4)
    clean = guide(torch.tensor([[1.0, 0.0]]), rows)
    rows[1] = value
    torch.testing.assert_close(guide(torch.tensor([[1.0, 0.0]]), rows), clean, rtol=0, atol=0)
    assert not torch.isfinite(guide(torch.tensor([[1.0, 1e-6]]), rows)).any()


def test_guidance_stays_fp32_where_16_bits_would_cancel() -> None:
    """In (1 - g) * u + g * c, u and c are so close that bf16 would lose their difference."""
    unconditional = torch.full((1, 1, 1, 1), 100.0)
    conditional = unconditional + 0.01
    guided = guide(torch.tensor([[-6.5, 7.5]]), torch.cat([unconditional, conditional]))
    assert abs(float(guided) - 100.075) < 1e-3


def test_statistics_count_values_that_are_not_finite_and_keep_the_largest_finite_one() -> None:
    x0 = torch.zeros(3, 1, 2, 2)
    x0[0, 0] = torch.tensor([[1.0, -3.0], [2.0, 0.0]])
    x0[1, 0] = torch.tensor([[float("nan"), -4.0], [float("inf"), float("-inf")]])
    x0[2] = float("nan")
    np.testing.assert_array_equal(statistics(x0).numpy(), [[0, 3], [3, 4], [4, 0]])
