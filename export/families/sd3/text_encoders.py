"""SD3's text encoders: which of the three a checkpoint has, what they read, and what they give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ditc.export.checkpoint.open import Checkpoint
from ditc.export.checkpoint.tokenizer import tokenizer_facts
from ditc.runtime.errors import CheckpointError
from ditc.runtime.spec import TEXT_ENCODER, DType, Range, StageSpec, TensorSpec
from ditc.runtime.step_contract import BATCH, TEXT_LENGTH
from ditc.runtime.text import TextSpec

CLIP_L, CLIP_G, T5 = TEXT_ENCODER, f"{TEXT_ENCODER}_2", f"{TEXT_ENCODER}_3"
TOKENIZERS = {CLIP_L: "tokenizer", CLIP_G: "tokenizer_2", T5: "tokenizer_3"}
CLASSES = {
    CLIP_L: "CLIPTextModelWithProjection",
    CLIP_G: "CLIPTextModelWithProjection",
    T5: "T5EncoderModel",
}
# Of T5's texts: StableDiffusion3Pipeline.__call__'s default and limit, diffusers 0.42.1.
MAX_SEQUENCE_LENGTH = 256
LONGEST_SEQUENCE = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEncoders:
    """What the configs of a checkpoint's text encoders say.

    Attributes:
        configs: by stage; without T5, which users leave out for its size.
        text: how each stage's prompt becomes tokens, in the same order.
        sequence_length: tokens of a T5 text, zeros where there is no T5.
    """

    configs: Mapping[str, Mapping[str, Any]]
    text: tuple[TextSpec, ...]
    sequence_length: int

    @property
    def has_t5(self) -> bool:
        """Whether the third encoder is there."""
        return T5 in self.configs

    def tokens_of(self, stage: str) -> int:
        """Tokens of the stage's text."""
        return next(text.length for text in self.text if text.stage == stage)

    def t5_range(self) -> Range:
        """Of T5's tokens: it is dynamic, so that a build with another max_sequence_length reuses the stage."""
        return Range(1, self.sequence_length, max(self.sequence_length, LONGEST_SEQUENCE))

    def spec(self, stage: str, max_batch: int) -> StageSpec:
        """One encoder as a stage. CLIP's number of tokens is its own."""
        tokens: str | int = "length" if stage == T5 else self.tokens_of(stage)
        profile = {BATCH: Range(1, 1, max_batch)}
        if stage == T5:
            profile["length"] = self.t5_range()
        return StageSpec(
            stage,
            inputs=(TensorSpec("input_ids", DType.INT64, (BATCH, tokens)),),
            outputs=self.states(stage, BATCH),
            profile=profile,
        )

    def states(self, stage: str, rows: str) -> tuple[TensorSpec, ...]:
        """What an encoder gives, which the conditioner takes under the same names."""
        config, name = self.configs[stage], stage.removeprefix(TEXT_ENCODER)
        if stage == T5:
            return (TensorSpec(f"states{name}", DType.FLOAT32, (rows, "length", int(config["d_model"]))),)
        shape = (rows, self.tokens_of(stage), int(config["hidden_size"]))
        return (
            TensorSpec(f"states{name}", DType.FLOAT32, shape),
            TensorSpec(f"pooled{name}", DType.FLOAT32, (rows, int(config["projection_dim"]))),
        )

    def text_range(self) -> dict[str, Range]:
        """From embeddings of one token that users bring, to CLIP's tokens and the longest T5 text."""
        clip = self.tokens_of(CLIP_L)
        usual = clip + self.sequence_length
        return {TEXT_LENGTH: Range(1, usual, max(usual, clip + LONGEST_SEQUENCE))}


def read_text_encoders(checkpoint: Checkpoint) -> TextEncoders:
    """The checkpoint's text encoders.

    Raises:
        CheckpointError: one is missing or of another class, or reads fewer tokens than its text has.
    """
    configs = _configs(checkpoint)
    length = _sequence_length(checkpoint.defaults)
    text = tuple(_text(checkpoint, stage, config, length) for stage, config in configs.items())
    return TextEncoders(configs=configs, text=text, sequence_length=length)


def _configs(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    found = {}
    for stage, wanted in CLASSES.items():
        component = checkpoint.components.get(stage)
        if component is None and stage == T5:
            continue
        if component is None or TOKENIZERS[stage] not in checkpoint.tokenizers:
            missing = stage if component is None else TOKENIZERS[stage]
            raise CheckpointError(
                f"{checkpoint.path} has no {missing}, a {wanted if component is None else 'tokenizer'}",
                hint=f"of the three text encoders only {T5} (T5) can be left out: null in model_index.json",
            )
        classes = component.config.get("architectures") or [wanted]
        if wanted not in classes:
            raise CheckpointError(
                f"{checkpoint.path / stage} is a {classes[0]}, not a {wanted}",
                hint="take the text encoders that the checkpoint was published with",
            )
        found[stage] = component.config
    return found


def _sequence_length(given: Mapping[str, Any]) -> int:
    length = int(given.get("max_sequence_length", MAX_SEQUENCE_LENGTH))
    if length > LONGEST_SEQUENCE:
        raise CheckpointError(
            f"ditc.json: max_sequence_length is {length}",
            hint=f"T5 reads up to {LONGEST_SEQUENCE} tokens here",
        )
    return length


def _text(checkpoint: Checkpoint, stage: str, config: Mapping[str, Any], sequence_length: int) -> TextSpec:
    """CLIP's tokens are 77 (the first tokenizer's limit), T5's max_sequence_length; there is no mask anywhere."""
    facts, length = tokenizer_facts(checkpoint.tokenizers[TOKENIZERS[stage]]), sequence_length
    if stage != T5:
        length = tokenizer_facts(checkpoint.tokenizers[TOKENIZERS[CLIP_L]]).model_max_length
        longest = int(config["max_position_embeddings"])
        if length > longest:
            raise CheckpointError(
                f"{TOKENIZERS[CLIP_L]} gives {length} tokens, {stage} has positions for {longest}",
                hint="set model_max_length in tokenizer_config.json: CLIP's is 77",
            )
    return TextSpec(
        stage=stage,
        tokenizer=f"{TOKENIZERS[stage]}/tokenizer.json",
        length=length,
        max_length=length,
        negative_max_length=length,
        pad_token_id=facts.pad_token_id,
    )
