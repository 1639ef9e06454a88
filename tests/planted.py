"""Both sides of a parity run in memory, and ways to plant a defect into one of them."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ditc.parity.candidate import Candidate
from ditc.parity.cases import Case, Settings
from ditc.parity.context import Context
from ditc.parity.levels import LEVELS
from ditc.parity.reference.pytorch import Twin
from ditc.parity.results import Result, Verdict
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.session import Session, to_numpy
from ditc.runtime.session import Tensor as StageTensor
from ditc.runtime.spec import StageSpec
from ditc.runtime.state import DenoiseState, Rows
from ditc.runtime.tolerances import Level

PROMPTS = ("a red heart", "blue")  # of different lengths, so that masks matter
SETTINGS = Settings(
    cases=(Case(PROMPTS[0], 0),), num_inference_steps=3, guidance_scale=3.0, height=64, width=64
)
TWO_CASES = replace(SETTINGS, cases=(Case(PROMPTS[0], 0), Case(PROMPTS[1], 1)))


def torch_candidate(checkpoint: Path, plant: Callable[[Twin], object] = lambda twin: None) -> Candidate:
    """A second, independent twin as the candidate, with a defect planted into it."""
    twin = Twin(checkpoint)
    plant(twin)
    return Candidate(pipeline=twin.pipeline)


def context_of(
    checkpoint: Path, candidate: Candidate, settings: Settings = SETTINGS, *, with_upstream: bool = False
) -> Context:
    """A parity run of the candidate against the checkpoint."""
    return Context(
        twin_or_none=Twin(checkpoint), candidate=candidate, settings=settings, with_upstream=with_upstream
    )


def failures(context: Context, level: Level) -> list[Result]:
    """What a level finds broken, in the order of checking."""
    return [result for result in LEVELS[level](context) if result.verdict is Verdict.FAIL]


def module_of(twin: Twin, stage: str, path: str = "") -> nn.Module:
    """A module of the candidate, to patch."""
    return twin.sessions[stage].module.get_submodule(path)


def patch_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Replace one module's forward; `forward` takes the module first."""
    module.forward = types.MethodType(forward, module)  # type: ignore[method-assign]


def patch_pipeline(twin: Twin, kind: type[Pipeline]) -> None:
    """Run the twin's sessions in another pipeline."""
    old = twin.pipeline
    twin.pipeline = kind(old.manifest, old.sessions, old.conditioning)


def modulated(change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """DenoiserBlock.forward with another modulation (R,6,D): shift, scale, gate of attention, then of the FFN."""

    def forward(self: Any, x: Tensor, modulation: Tensor, *rest: Any) -> Tensor:
        wanted = change(self.scale_shift_table + modulation)
        return type(self).forward(self, x, wanted - self.scale_shift_table, *rest)

    return forward


def swapped_scale_and_shift(modulation_R6D: Tensor) -> Tensor:
    """Of the attention."""
    return modulation_R6D[:, [1, 0, 2, 3, 4, 5]]


def without_gate(modulation_R6D: Tensor) -> Tensor:
    """The attention's is one."""
    ungated = modulation_R6D.clone()
    ungated[:, 2] = 1
    return ungated


class SwappedRows(Pipeline):
    """Conditional rows where diffusers has the unconditional ones."""

    def start(self, plan: Any) -> tuple[DenoiseState, ...]:
        return tuple(replace(state, rows=_swapped(state.rows)) for state in super().start(plan))


def _swapped(rows: Rows) -> Rows:
    arrays = {name: to_numpy(array) for name, array in rows.conditioning.items()}
    return replace(rows, conditioning={n: np.roll(a, len(a) // 2, axis=0) for n, a in arrays.items()})


class StrongerGuidance(Pipeline):
    """One more than was asked for."""

    def plan(self, request: Any) -> Any:
        plan = super().plan(request)
        return replace(plan, guidance_scale=plan.guidance_scale + 1)


class LateTable(Pipeline):
    """Every step takes the next step's sigmas."""

    def start(self, plan: Any) -> tuple[DenoiseState, ...]:
        return tuple(
            replace(state, schedule=(*state.schedule[1:], state.schedule[-1]))
            for state in super().start(plan)
        )


class ActiveHistory(Pipeline):
    """A first step that reads the history, as multistep solvers do after a warm start."""

    def start(self, plan: Any) -> tuple[DenoiseState, ...]:
        return tuple(replace(state, schedule=_reading_history(state)) for state in super().start(plan))


class StaleHistory(ActiveHistory):
    """The x0 of one request is the next one's history."""

    left_over: Any = None

    def start(self, plan: Any) -> tuple[DenoiseState, ...]:
        states = super().start(plan)
        if StaleHistory.left_over is not None:
            states = tuple(replace(state, history=StaleHistory.left_over) for state in states)
        return states

    def decode(self, states: Any, plan: Any) -> Any:
        StaleHistory.left_over = states[0].history
        return super().decode(states, plan)


class NanAt:
    """A session that leaves one NaN in one latent, on its second run."""

    def __init__(self, session: Session, index: tuple[int, ...]) -> None:
        self.session, self.index, self.runs = session, index, 0
        self.spec: StageSpec = session.spec
        self.device = session.device

    def run(self, feeds: Mapping[str, StageTensor]) -> dict[str, StageTensor]:
        outputs = self.session.run(feeds)
        self.runs += 1
        if self.runs == 2:
            outputs["next_latents"] = np.array(outputs["next_latents"])
            outputs["next_latents"][self.index] = np.nan
        return outputs

    def close(self) -> None:
        self.session.close()


def without_padding(self: Any, x: Tensor) -> Tensor:
    """A 3x3 depthwise convolution that sees no zeros around the picture: its border is repeated instead."""
    padded = nn.functional.pad(x, (1, 1, 1, 1), mode="replicate")
    return nn.functional.conv2d(padded, self.weight, self.bias, groups=self.groups)


def permuted_channels(module: nn.Module, inputs: Any, prediction_RCHW: Tensor) -> Tensor:
    """A forward hook: unpatchify with two channels exchanged."""
    return prediction_RCHW[:, [1, 0, *range(2, prediction_RCHW.shape[1])]]


def reorder_ffn(ff: nn.Module) -> None:
    """The same function with its hidden channels in another order: only the rounding changes."""
    hidden = ff.conv_point.weight.shape[1]
    order = torch.randperm(hidden, generator=torch.Generator().manual_seed(0))
    both = torch.cat([order, order + hidden])
    with torch.no_grad():
        for layer in (ff.conv_inverted, ff.conv_depth):
            layer.weight.copy_(layer.weight[both].clone())
            layer.bias.copy_(layer.bias[both].clone())
        ff.conv_point.weight.copy_(ff.conv_point.weight[:, order].clone())


def _reading_history(state: DenoiseState) -> tuple[Mapping[str, Any], ...]:
    first = dict(state.schedule[0])
    coefficients = first["coefficients"].copy()
    coefficients[:, -1] = 0.2
    first["coefficients"] = coefficients
    return (first, *state.schedule[1:])
