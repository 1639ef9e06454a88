"""SD3's text encoders: which of the three a checkpoint has, which tokens they take, and which states they return."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import CLIPTextConfig, PreTrainedConfig

from ditc.export.checkpoint.naming import naming
from ditc.export.checkpoint.open import Checkpoint
from ditc.export.checkpoint.tokenizer import CheckpointTokenizer, read_tokenizer
from ditc.export.checkpoint.tokenizer_fit import OWN_TOKENIZER, check_fits, ids_of
from ditc.export.networks.clip import LEGACY_EOS, clip_config
from ditc.export.networks.t5 import t5_config
from ditc.runtime.errors import CheckpointError
from ditc.runtime.spec import TEXT_ENCODER, DType, Range, StageSpec, TensorSpec
from ditc.runtime.step_contract import BATCH, TEXT_LENGTH
from ditc.runtime.text import TextSpec

CLIP_L, CLIP_G, T5 = TEXT_ENCODER, f"{TEXT_ENCODER}_2", f"{TEXT_ENCODER}_3"
TOKENIZERS = {CLIP_L: "tokenizer", CLIP_G: "tokenizer_2", T5: "tokenizer_3"}
# Number of T5's tokens: the default and the limit of StableDiffusion3Pipeline.__call__, diffusers 0.42.1.
MAX_SEQUENCE_LENGTH = 256
LONGEST_SEQUENCE = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEncoders:
    """The text encoders of a checkpoint, as its configs describe them.

    Attributes:
        configs: each encoder's config as transformers reads it, by stage. T5 may be missing, because users leave it
            out for its size.
        text: how each stage's prompt becomes tokens, in the same order.
        sequence_length: number of T5's tokens. Without T5, the conditioner puts as many zeros in their place.
    """

    configs: Mapping[str, PreTrainedConfig]
    text: tuple[TextSpec, ...]
    sequence_length: int

    @property
    def has_t5(self) -> bool:
        """Whether the checkpoint has the third encoder."""
        return T5 in self.configs

    def tokens_of(self, stage: str) -> int:
        """Number of tokens of the stage's text."""
        return next(text.length for text in self.text if text.stage == stage)

    def t5_range(self) -> Range:
        """Range of T5's number of tokens.

        It is dynamic, so that a build with another max_sequence_length reuses the stage.
        """
        return Range(1, self.sequence_length, max(self.sequence_length, LONGEST_SEQUENCE))

    def spec(self, stage: str, max_batch: int) -> StageSpec:
        """Spec of one encoder. CLIP's number of tokens is fixed, T5's is dynamic."""
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
        """Specs of an encoder's outputs, which the conditioner takes under the same names."""
        config, name = self.configs[stage], stage.removeprefix(TEXT_ENCODER)
        if stage == T5:
            return (TensorSpec(f"states{name}", DType.FLOAT32, (rows, "length", int(config.d_model))),)
        shape = (rows, self.tokens_of(stage), int(config.hidden_size))
        return (
            TensorSpec(f"states{name}", DType.FLOAT32, shape),
            TensorSpec(f"pooled{name}", DType.FLOAT32, (rows, int(config.projection_dim))),
        )

    def text_range(self) -> dict[str, Range]:
        """Range of the joined text's number of tokens.

        It starts at 1, because callers may bring embeddings of any length. It ends at CLIP's tokens plus the longest
        T5 text.
        """
        clip = self.tokens_of(CLIP_L)
        usual = clip + self.sequence_length
        return {TEXT_LENGTH: Range(1, usual, max(usual, clip + LONGEST_SEQUENCE))}


def read_text_encoders(checkpoint: Checkpoint) -> TextEncoders:
    """Read the configs of the checkpoint's text encoders.

    Raises:
        CheckpointError: T5 has no tokenizer, or a text has more tokens than its encoder can read.
    """
    configs = _configs(checkpoint)
    with naming(checkpoint.path / "ditc.json"):
        length = _sequence_length(checkpoint.defaults)
    text = tuple(_text(checkpoint, stage, config, length) for stage, config in configs.items())
    return TextEncoders(configs=configs, text=text, sequence_length=length)


def _configs(checkpoint: Checkpoint) -> dict[str, PreTrainedConfig]:
    """The encoders' configs. T5 may be missing; the check of the pipeline has found the others and their tokenizers."""
    if T5 in checkpoint.components and TOKENIZERS[T5] not in checkpoint.tokenizers:
        raise CheckpointError(
            f"{checkpoint.path} has {T5} but no {TOKENIZERS[T5]}, without which it cannot read a prompt",
            hint=f"fetch {TOKENIZERS[T5]}/ again, or leave out {T5} too: [null, null] in model_index.json for both",
        )
    return {
        stage: checkpoint.component(stage).read_config(t5_config if stage == T5 else clip_config)
        for stage in TOKENIZERS
        if stage in checkpoint.components
    }


def _sequence_length(given: Mapping[str, Any]) -> int:
    length = int(given.get("max_sequence_length", MAX_SEQUENCE_LENGTH))
    if length > LONGEST_SEQUENCE:
        raise CheckpointError(
            f"max_sequence_length is {length}, but a T5 text has at most {LONGEST_SEQUENCE} tokens",
            hint=f"set at most {LONGEST_SEQUENCE}, or leave it out for {MAX_SEQUENCE_LENGTH}",
        )
    return length


def _text(checkpoint: Checkpoint, stage: str, config: PreTrainedConfig, sequence_length: int) -> TextSpec:
    """How a stage's prompt becomes tokens, without a mask.

    Both CLIPs have 77 tokens (the first tokenizer's limit), and T5 has max_sequence_length.
    """
    tokenizer, length = read_tokenizer(checkpoint, TOKENIZERS[stage]), sequence_length
    vocab_size = check_fits(tokenizer, checkpoint.component(stage), legacy_ids=_is_legacy(config))
    if stage != T5:
        _check_end_of_text(tokenizer, stage, config)
        length = read_tokenizer(checkpoint, TOKENIZERS[CLIP_L]).model_max_length
        longest = int(config.max_position_embeddings)
        if length > longest:
            raise CheckpointError(
                f"{checkpoint.tokenizers[TOKENIZERS[CLIP_L]]} gives {length} tokens, but {stage} has only {longest} "
                "positions",
                hint="set model_max_length in tokenizer_config.json: CLIP's is 77",
            )
    return TextSpec(
        stage=stage,
        tokenizer=f"{TOKENIZERS[stage]}/tokenizer.json",
        length=length,
        max_length=length,
        negative_max_length=length,
        pad_token_id=tokenizer.pad_token_id,
        padding_side=tokenizer.padding_side,
        vocab_size=vocab_size,
    )


def _check_end_of_text(tokenizer: CheckpointTokenizer, stage: str, config: PreTrainedConfig) -> None:
    """Check that CLIP finds the end of a text, whose state it pools. Where it finds none, it pools the first state."""
    found = tokenizer.special_ids.get("eos")
    legacy = _is_legacy(config)
    wanted = (
        (max(tokenizer.vocabulary.values()),)
        if legacy
        else ids_of({"eos_token_id": config.eos_token_id}, "eos")
    )
    if wanted and found not in wanted:
        where = "the largest id" if legacy else f"{stage}/config.json's eos_token_id"
        raise CheckpointError(
            f"{tokenizer.directory.name} ends a text with the token {found}, but {stage} looks for {wanted[0]}, "
            f"{where}",
            hint=f"the two belong to different models: {OWN_TOKENIZER}",
        )


def _is_legacy(config: PreTrainedConfig) -> bool:
    """Whether the config states the ids of transformers before 4.31, which are not CLIP's."""
    return isinstance(config, CLIPTextConfig) and config.eos_token_id == LEGACY_EOS
