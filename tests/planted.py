"""Both sides of a parity run in memory, and ways to plant a defect in one of them."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ditc.export.options import BuildOptions
from ditc.parity.candidate import Candidate
from ditc.parity.cases import Case, Settings
from ditc.parity.context import Context
from ditc.parity.levels import LEVELS
from ditc.parity.reference.pytorch import TorchModel
from ditc.parity.results import Result, Verdict
from ditc.runtime.conditioning import Conditioning
from ditc.runtime.lora.choice import LoraChoice
from ditc.runtime.lora.lora import ScaledLora
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.session import Session, to_numpy
from ditc.runtime.session import Tensor as StageTensor
from ditc.runtime.spec import StageSpec
from ditc.runtime.state import DenoiseState, Rows
from ditc.runtime.step_contract import SKIP_GATE
from ditc.runtime.text import Tokenizer
from ditc.runtime.tolerances import Level

PROMPTS = ("a red heart", "blue")  # of different lengths, so that text masks matter
SETTINGS = Settings(
    cases=(Case(PROMPTS[0], 0),), num_inference_steps=3, guidance_scale=3.0, height=64, width=64
)
TWO_CASES = replace(SETTINGS, cases=(Case(PROMPTS[0], 0), Case(PROMPTS[1], 1)))


def torch_candidate(
    checkpoint: Path, plant: Callable[[TorchModel], object] = lambda model: None
) -> Candidate:
    """A candidate in PyTorch, independent of the reference, with a defect planted in it."""
    model = TorchModel(checkpoint)
    plant(model)
    return Candidate(pipeline=model.pipeline)


def context_of(
    checkpoint: Path,
    candidate: Candidate,
    settings: Settings = SETTINGS,
    *,
    with_upstream: bool = False,
    loras: tuple[LoraChoice, ...] = (),
) -> Context:
    """The context of a parity run of the candidate against the checkpoint, with LoRAs in the checkpoint's weights."""
    return Context(
        reference_or_none=TorchModel(checkpoint, options=BuildOptions(loras=loras)),
        candidate=candidate,
        settings=settings,
        with_upstream=with_upstream,
    )


def failures(context: Context, level: Level) -> list[Result]:
    """The failed results of a level, in the order of checking."""
    return [result for result in LEVELS[level](context) if result.verdict is Verdict.FAIL]


def module_of(model: TorchModel, stage: str, path: str = "") -> nn.Module:
    """One module of a stage, to be patched."""
    return model.sessions[stage].module.get_submodule(path)


def patch_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Replace the forward of one module. The new `forward` takes the module as its first argument."""
    module.forward = types.MethodType(forward, module)  # type: ignore[method-assign]


def patch_pipeline(model: TorchModel, kind: type[Pipeline]) -> None:
    """Run the model's sessions in another kind of pipeline."""
    old = model.pipeline
    model.pipeline = kind(old.manifest, old.sessions, old.conditioning)


def replace_tokenizers(model: TorchModel, path: Path) -> None:
    """Read the prompts of all text encoders with the tokenizer.json at the path."""
    old = model.pipeline
    encoders = [replace(encoder, tokenizer=Tokenizer(path)) for encoder in old.conditioning.encoders]
    conditioning = Conditioning(encoders, old.conditioning.conditioner, key=path.name)
    model.pipeline = Pipeline(old.manifest, old.sessions, conditioning)


def sentencepiece_model(pieces: list[str]) -> bytes:
    """A SentencePiece file of these pieces: three control tokens, an unknown token, and text."""
    model = b""
    for index, piece in enumerate(pieces):
        text, kind = piece.encode(), 3 if index < 3 else 2 if index == 3 else 1
        message = b"\x0a" + bytes([len(text)]) + text + b"\x15" + bytes(4) + bytes([0x18, kind])
        model += b"\x0a" + bytes([len(message)]) + message
    return model


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
    """A pipeline with conditional rows where diffusers has the unconditional ones, and the reverse."""

    def states(self, plan: Any) -> Iterator[DenoiseState]:
        for state in super().states(plan):
            yield replace(state, rows=_swapped(state.rows))


def _swapped(rows: Rows) -> Rows:
    arrays = {name: to_numpy(array) for name, array in rows.conditioning.items()}
    return replace(rows, conditioning={n: np.roll(a, len(a) // 2, axis=0) for n, a in arrays.items()})


class StrongerGuidance(Pipeline):
    """A pipeline whose guidance scale is one more than was requested."""

    def plan(self, request: Any) -> Any:
        plan = super().plan(request)
        return replace(plan, guidance_scale=plan.guidance_scale + 1)


class InvertedGate(Pipeline):
    """A pipeline whose gate marks all rows but the gated ones."""

    def states(self, plan: Any) -> Iterator[DenoiseState]:
        for state in super().states(plan):
            inverted = ({**step, SKIP_GATE: 1 - step[SKIP_GATE]} for step in state.schedule)
            yield replace(state, schedule=tuple(inverted))


class StrongerPerturbation(Pipeline):
    """A pipeline whose pag_scale is one more than was requested."""

    def plan(self, request: Any) -> Any:
        plan = super().plan(request)
        pag = plan.perturbed_attention_guidance
        return replace(plan, perturbed_attention_guidance=replace(pag, scale=pag.scale + 1))


class LateTable(Pipeline):
    """A pipeline in which every step takes the sigmas of the next step."""

    def states(self, plan: Any) -> Iterator[DenoiseState]:
        for state in super().states(plan):
            yield replace(state, schedule=(*state.schedule[1:], state.schedule[-1]))


class ActiveHistory(Pipeline):
    """A pipeline whose first step reads the history, as multistep solvers do after a warm start."""

    def states(self, plan: Any) -> Iterator[DenoiseState]:
        for state in super().states(plan):
            yield replace(state, schedule=_reading_history(state))


class StaleHistory(ActiveHistory):
    """A pipeline in which the history of one request is left over for the next one."""

    left_over: Any = None

    def states(self, plan: Any) -> Iterator[DenoiseState]:
        for state in super().states(plan):
            stale = StaleHistory.left_over
            yield state if stale is None else replace(state, history=stale)

    def decode(self, states: Any, plan: Any) -> Any:
        StaleHistory.left_over = states[0].history
        return super().decode(states, plan)


class NanAt:
    """A session that puts one NaN into the latents in its second run."""

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


def alpha_ignored(scaled: ScaledLora) -> ScaledLora:
    """A LoRA as somebody reads it who forgets its alpha."""
    components = {
        component: {name: replace(layer, scaling=1.0) for name, layer in layers.items()}
        for component, layers in scaled.lora.components.items()
    }
    return replace(scaled, lora=replace(scaled.lora, components=components))


def without_padding(self: Any, x: Tensor) -> Tensor:
    """The forward of a 3x3 depthwise convolution that pads with repeated border values instead of zeros."""
    padded = nn.functional.pad(x, (1, 1, 1, 1), mode="replicate")
    return nn.functional.conv2d(padded, self.weight, self.bias, groups=self.groups)


def permuted_channels(module: nn.Module, inputs: Any, prediction_RCHW: Tensor) -> Tensor:
    """A forward hook that exchanges two channels of the prediction."""
    return prediction_RCHW[:, [1, 0, *range(2, prediction_RCHW.shape[1])]]


def reorder_ffn(ff: nn.Module) -> None:
    """Reorder the hidden channels of a feed-forward module. It stays the same function; only rounding changes."""
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
