"""The pipeline around a lucidrains/mmdit trunk, which ditc defines: upstream publishes none."""

from __future__ import annotations

from ditc.export.families.common.pipeline import ServedPipeline
from ditc.export.families.lucidrains.config import CLASS_NAME

PIPELINE_CLASS = "LucidrainsMMDiTPipeline"

PIPELINE = ServedPipeline(
    class_name=PIPELINE_CLASS,
    components={
        "transformer": (f"ditc.{CLASS_NAME}",),
        "text_encoder": (
            "transformers.Gemma2Model",
            "transformers.Gemma2ForCausalLM",
            "transformers.T5EncoderModel",
        ),
        "tokenizer": (),
        "vae": ("diffusers.AutoencoderDC", "diffusers.AutoencoderKL"),
        "scheduler": (),
    },
)
