"""A text encoder of a bundle, and what a request changes about its texts: the instruction and the number of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ditc.runtime.errors import UsageError
from ditc.runtime.request import Request
from ditc.runtime.session import Session
from ditc.runtime.spec import Range, StageSpec
from ditc.runtime.step_contract import TEXT_LENGTH
from ditc.runtime.text import TextSpec, Tokenizer, with_instruction, with_length, with_motion


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """One text encoder: how texts are prepared for it, its tokenizer and its session."""

    spec: TextSpec
    tokenizer: Tokenizer
    session: Session


def encoders_for(
    request: Request, encoders: Sequence[TextEncoder], conditioner: StageSpec
) -> tuple[TextEncoder, ...]:
    """The encoders, with the instruction, the motion score and the number of tokens that the request asks for.

    Raises:
        UsageError: the bundle's graphs do not take so many tokens, or it has no place for an instruction or a score.
    """
    lines, length = request.complex_human_instruction, request.max_sequence_length
    own = tuple(encoders)
    if lines is not None and (lines or any(encoder.spec.prefix for encoder in own)):
        own = (_instructed(own, lines),)
    if request.motion_score is not None:
        own = tuple(replace(each, spec=with_motion(each.spec, request.motion_score)) for each in own)
    if length is not None:
        own = _resized(own, length, conditioner)
    for encoder in own:
        longest = _longest(encoder)
        if longest is not None and encoder.spec.max_length > longest:
            raise UsageError(
                f"instruction and text have {encoder.spec.max_length} tokens, but this bundle's {encoder.spec.stage} "
                f"takes at most {longest}",
                hint="build with this complex_human_instruction and max_sequence_length in the checkpoint's ditc.json",
            )
    return own


def _instructed(encoders: Sequence[TextEncoder], lines: Sequence[str]) -> TextEncoder:
    if len(encoders) != 1:
        raise UsageError(
            f"complex_human_instruction is given, but this bundle has {len(encoders)} text encoders",
            hint="leave it out: it is for models whose only text encoder is a language model",
        )
    if lines and not "".join(lines):
        raise UsageError(
            f"complex_human_instruction is {list(lines)!r:.80}, which is empty", hint="pass None for none"
        )
    (encoder,) = encoders
    return replace(encoder, spec=with_instruction(encoder.spec, lines, encoder.tokenizer))


def _resized(encoders: Sequence[TextEncoder], length: int, conditioner: StageSpec) -> tuple[TextEncoder, ...]:
    """The encoders with `length` tokens, where the conditioner takes different numbers of an encoder's tokens."""
    bounds = [_lengths(encoder, conditioner) for encoder in encoders]
    for encoder, taken in zip(encoders, bounds, strict=True):
        if taken is not None and length not in taken:
            raise UsageError(
                f"max_sequence_length is {length}, but this bundle takes {taken.min} to {taken.max} tokens of "
                f"{encoder.spec.stage}",
                hint=f"pass at most {taken.max}; a build with a larger max_sequence_length in ditc.json may take more"
                if length > taken.max
                else f"pass at least {taken.min}",
            )
    if bounds.count(None) == len(bounds) and length != (fixed := _fixed_length(encoders, conditioner)):
        raise UsageError(
            f"max_sequence_length is {length}, but this bundle was built for {fixed}, and none of its text encoders "
            "takes another number of tokens",
            hint=f"leave it out, or build with {length} in the checkpoint's ditc.json",
        )
    return tuple(
        encoder if taken is None else replace(encoder, spec=with_length(encoder.spec, length))
        for encoder, taken in zip(encoders, bounds, strict=True)
    )


def _lengths(encoder: TextEncoder, conditioner: StageSpec) -> Range | None:
    """The numbers of an encoder's tokens that the conditioner takes; None if there is only one."""
    states = {tensor.name for tensor in encoder.session.spec.outputs}
    for tensor in conditioner.inputs:
        if tensor.name in states and len(tensor.shape) > 2:
            return conditioner.profile.get(str(tensor.shape[1]))
    return None


def _fixed_length(encoders: Sequence[TextEncoder], conditioner: StageSpec) -> int:
    """The max_sequence_length of a build without an encoder whose number of tokens may change.

    If the conditioner makes more tokens than its encoders, the others stand for an encoder that was left out.
    """
    tokens = max(encoder.spec.length for encoder in encoders)
    joined = conditioner.profile[TEXT_LENGTH].opt if TEXT_LENGTH in conditioner.profile else tokens
    return joined - tokens or tokens


def _longest(encoder: TextEncoder) -> int | None:
    """The largest number of tokens that the encoder takes; None if it takes only one number."""
    spec = encoder.session.spec
    bounds = spec.profile.get(str(spec.input("input_ids").shape[1]))
    return None if bounds is None else bounds.max
