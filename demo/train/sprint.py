"""Distil the demo transformer to one to four steps, in SANA-Sprint's form (Chen et al. 2025, arXiv 2503.09641).

The student reads the time ``s`` in [0, 1] and the guidance scale, and needs no second evaluation for guidance. It is
taught by regression on whole trajectories: from the noise in which the teacher's guided sampling began, the student
must predict in one evaluation where that sampling ended. Its own prediction is then mixed with fresh noise, as
SCMScheduler does between two steps, and from that mixture it must predict the same end. So it learns to correct itself.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import SanaTransformer2DModel
from torch import Tensor, nn

from demo.concepts import CHECKPOINT_DIR, load_split
from demo.train.guided import Guided, guided_pictures
from demo.train.loop import Job, train
from demo.train.muon import optimizers_for
from demo.train.transformer import NOT_HIDDEN

NAME = "sprint"
PARTS = 48
_BATCH = 16  # each picture is predicted twice
_EVALUATED = 64
_MIDDLE = 1.3  # SanaSprintPipeline's time (an angle) of the second of two steps
_MIDDLE_SHARE = 0.6  # the other second predictions begin anywhere in this range, for three and four steps
_OTHER_TIMES = (0.3, 1.5)
_TRUE_SHARE = (
    0.25  # of the second predictions begin at the teacher's end in place of the student's own prediction
)
_HINGES_PER_UNIT = 30.0


def run(cache: Path, log: Path, steps: int, lr: float = 6e-4, checkpoint: Path = CHECKPOINT_DIR) -> nn.Module:
    """Draw the teacher's pictures and distil the checkpoint's transformer, or resume."""
    guided = guided_pictures(load_split().trained, PARTS, checkpoint, cache)
    known, unseen = guided[_EVALUATED:], guided[:_EVALUATED]
    torch.manual_seed(0)
    teacher = SanaTransformer2DModel.from_pretrained(checkpoint / "transformer", torch_dtype=torch.float32)
    model = student_of(teacher).train()

    def evaluate(averaged: nn.Module) -> dict[str, float]:
        with torch.inference_mode():
            first, second = two_steps(averaged, unseen, torch.Generator().manual_seed(7))
        errors = {"one_step_error": first, "two_steps_error": second}
        return {k: float((x - unseen.latents).square().mean()) for k, x in errors.items()}

    return train(
        Job(
            name=NAME,
            cache=cache,
            log=log,
            model=model,
            optimizers=optimizers_for(model, lr, 1e-2, plain=NOT_HIDDEN),
            loss=lambda generator: distillation_loss(model, _batch(known, generator), generator),
            evaluate=evaluate,
            steps=steps,
            warmup=50,
            decay=0.75,
            average=0.99,
            evaluate_every=100,
        )
    )


def student_of(teacher: SanaTransformer2DModel) -> SanaTransformer2DModel:
    """The teacher with embedded guidance, and with times in [0, 1]. At first, guidance has no effect."""
    student = SanaTransformer2DModel.from_config({**teacher.config, "guidance_embeds": True})
    weights = teacher.state_dict()
    student.load_state_dict(
        {k: v for k, v in weights.items() if not k.startswith("time_embed.")}, strict=False
    )
    embed = student.time_embed
    embed.linear.load_state_dict(teacher.time_embed.linear.state_dict())
    with torch.no_grad():
        s = torch.linspace(0, 1, 1001)
        wanted = teacher.time_embed.emb.timestep_embedder(embed.time_proj(s * 1000))
        _as_hinges(embed.timestep_embedder, embed.time_proj)
        _fit_last_layer(embed.timestep_embedder, embed.time_proj(s), wanted)
        _as_hinges(embed.guidance_embedder, embed.guidance_condition_proj)
        embed.guidance_embedder.linear_2.weight.zero_()
        embed.guidance_embedder.linear_2.bias.zero_()
    return student


def _as_hinges(embedder: nn.Module, features: nn.Module) -> None:
    """Make each hidden unit bend at its own input, so that a linear layer behind them can form any smooth curve.

    The sinusoidal features of inputs in [0, 1] are almost linear in them, and random units of these are almost all
    alike. The feature used is ``sin(x)``, the first of the second half.
    """
    weight, bias = embedder.linear_1.weight, embedder.linear_1.bias
    centres = torch.linspace(-0.05, 1.05, len(bias))
    sine = weight.shape[1] // 2
    weight.zero_()
    weight[:, sine] = _HINGES_PER_UNIT
    bias.copy_(-_HINGES_PER_UNIT * features(centres)[:, sine])


def _fit_last_layer(embedder: nn.Module, inputs: Tensor, wanted: Tensor) -> None:
    """Fit ``linear_2`` by ridge regression, so that the embedder gives ``wanted`` (N, D) for ``inputs`` (N, C)."""
    hidden = torch.nn.functional.silu(embedder.linear_1(inputs)).double()
    columns = torch.cat([hidden, torch.ones(len(hidden), 1, dtype=torch.float64)], 1)
    ridge = 1e-4 * len(columns) * torch.eye(columns.shape[1], dtype=torch.float64)
    solved = torch.linalg.solve(columns.T @ columns + ridge, columns.T @ wanted.double())
    embedder.linear_2.weight.copy_(solved[:-1].T)
    embedder.linear_2.bias.copy_(solved[-1])


def flow_time(angle: Tensor) -> Tensor:
    """The flow-matching time of a TrigFlow angle, ``sin / (sin + cos)``, as in SanaSprintPipeline."""
    return angle.sin() / (angle.sin() + angle.cos())


def distillation_loss(model: nn.Module, guided: Guided, generator: torch.Generator) -> Tensor:
    """Mean squared error of the flow that leads to the teacher's end, at noise and at a later time."""
    n = len(guided)
    first = _flow(model, guided.noise, torch.ones(n), guided)
    wanted = guided.noise - guided.latents
    start = torch.where(
        torch.rand(n, 1, 1, 1, generator=generator) < _TRUE_SHARE,
        guided.latents,
        guided.noise - first.detach(),
    )
    s = flow_time(_later_angles(n, generator)).view(-1, 1, 1, 1)
    x_s = (1 - s) * start + s * torch.randn(start.shape, generator=generator)
    second = _flow(model, x_s, s.flatten(), guided)
    # The flow's error is the prediction's error divided by s. Its square is weighted by s, because a start that is
    # itself in error makes it too large at small s.
    error = second - (x_s - guided.latents) / s
    return (first - wanted).square().mean() + (s * error.square()).mean()


def two_steps(model: nn.Module, guided: Guided, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The predictions (N, 32, 8, 8) of both steps of SanaSprintPipeline's sampling from the given noise."""
    n = len(guided)
    first = guided.noise - _flow(model, guided.noise, torch.ones(n), guided)
    s = flow_time(torch.full((n,), _MIDDLE))
    s_b111 = s.view(-1, 1, 1, 1)
    x_s = (1 - s_b111) * first + s_b111 * torch.randn(first.shape, generator=generator)
    return first, x_s - s_b111 * _flow(model, x_s, s, guided)


def _flow(model: nn.Module, x: Tensor, s: Tensor, guided: Guided) -> Tensor:
    guidance = guided.guidance * model.config.guidance_embeds_scale
    flow: Tensor = model(
        x, guided.states, s, guidance=guidance, encoder_attention_mask=guided.mask, return_dict=False
    )[0]
    return flow


def _later_angles(n: int, generator: torch.Generator) -> Tensor:
    low, high = _OTHER_TIMES
    anywhere = low + (high - low) * torch.rand(n, generator=generator)
    middle = torch.rand(n, generator=generator) < _MIDDLE_SHARE
    return torch.where(middle, _MIDDLE, anywhere)


def _batch(known: Guided, generator: torch.Generator) -> Guided:
    return known[torch.randint(len(known), (_BATCH,), generator=generator)]
