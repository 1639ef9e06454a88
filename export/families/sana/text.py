"""How Sana's pipelines prepare prompts for Gemma-2: the instructions before them, and what is cut and kept."""

from __future__ import annotations

from collections.abc import Sequence

from ditc.export.checkpoint.open import Checkpoint
from ditc.export.checkpoint.tokenizer import read_tokenizer
from ditc.export.checkpoint.tokenizer_fit import check_fits
from ditc.runtime.spec import TEXT_ENCODER
from ditc.runtime.text import MOTION_SCORE, Select, TextSpec

# The defaults of SanaPipeline.__call__ and SanaVideoPipeline.__call__, diffusers 0.42.1.
MAX_SEQUENCE_LENGTH = 300
COMPLEX_HUMAN_INSTRUCTION = (
    "Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual descriptions suitable for image"
    " generation. Evaluate the level of detail in the user prompt:",
    "- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and spatial"
    " relationships to create vivid and concrete scenes.",
    "- If the prompt is already detailed, refine and enhance the existing details slightly without overcomplicating.",
    "Here are examples of how to transform or refine prompts:",
    "- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, sleeping"
    " peacefully on a warm sunny windowsill, surrounded by pots of blooming red flowers.",
    "- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring glowing street"
    " lamps, a diverse crowd of people in colorful clothing, and a double-decker bus passing by towering glass"
    " skyscrapers.",
    "Please generate only the enhanced description for the prompt below and avoid including any additional commentary"
    " or evaluations:",
    "User Prompt: ",
)
VIDEO_INSTRUCTION = (
    "Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual descriptions suitable for video"
    " generation. Evaluate the level of detail in the user prompt:",
    "- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, motion, and temporal"
    " relationships to create vivid and dynamic scenes.",
    "- If the prompt is already detailed, refine and enhance the existing details slightly without overcomplicating.",
    "Here are examples of how to transform or refine prompts:",
    "- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat slowly settling into a curled position,"
    " peacefully falling asleep on a warm sunny windowsill, with gentle sunlight filtering through surrounding pots of"
    " blooming red flowers.",
    "- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring glowing street"
    " lamps gradually lighting up, a diverse crowd of people in colorful clothing walking past, and a double-decker bus"
    " smoothly passing by towering glass skyscrapers.",
    "Please generate only the enhanced description for the prompt below and avoid including any additional commentary"
    " or evaluations:",
    "User Prompt: ",
)
MASK_BIAS = -10000.0  # what diffusers adds to the score of a padding token
# What the conditioners' outputs hold for a padding token. In fp32, exp(score - 10000 - highest score) is exactly 0, so
# no attention reads its K and V, which can be anything.
PADDING = (("cross_kv", 0.0), ("text_bias", MASK_BIAS))
CONTROL_PADDING = (*PADDING, ("control_kv", 0.0))
# The words that SanaVideoPipeline's example puts after a prompt (diffusers 0.42.1).
MOTION = f" motion score: {MOTION_SCORE}."


def text_spec(
    checkpoint: Checkpoint,
    instruction: Sequence[str],
    motion: str | None = None,
    padding: tuple[tuple[str, float], ...] = PADDING,
) -> TextSpec:
    """encode_prompt of SanaPipeline and SanaVideoPipeline (diffusers 0.42.1) as data.

    With the complex human instruction, the first position (<bos>) and the last `length - 1` positions are kept, which
    are the prompt without the instruction before it (SANA, arXiv 2410.10629, section 3.1).

    Args:
        instruction: the pipeline's default complex human instruction.
        motion, padding: TextSpec's.
    """
    tokenizer = read_tokenizer(checkpoint, "tokenizer")
    length = int(checkpoint.defaults.get("max_sequence_length", MAX_SEQUENCE_LENGTH))
    lines = checkpoint.defaults.get("complex_human_instruction", instruction)
    prefix = "\n".join(lines) if lines else ""
    # Upstream subtracts 2: the <bos> that is counted with the instruction, and one token of slack.
    longest = len(tokenizer.ids(prefix)) + length - 2 if prefix else length
    return TextSpec(
        stage=TEXT_ENCODER,
        tokenizer="tokenizer/tokenizer.json",
        mask="text_mask",
        max_length=longest,
        negative_max_length=length,
        prefix=prefix,
        length=length,
        lower=True,
        strip=True,
        pad_token_id=tokenizer.pad_token_id,
        vocab_size=check_fits(tokenizer, checkpoint.component("text_encoder")),
        select=Select(first=1, last=length - 1) if prefix else None,
        motion=motion,
        padding=padding,
    )
