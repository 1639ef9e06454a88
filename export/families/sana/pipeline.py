"""SanaPipeline, the pipeline that the Sana family draws, and its relatives in diffusers 0.42.1."""

from __future__ import annotations

from ditc.export.families.common.pipeline import OtherPipeline, ServedPipeline

SPRINT = OtherPipeline(
    "it is distilled for few steps with its own sampler, SCM, which is not computed",
    "build a Sana that is not distilled: with any other sampler, this transformer draws noise",
)

PIPELINE = ServedPipeline(
    class_name="SanaPipeline",
    components={
        "tokenizer": (),
        "text_encoder": ("transformers.Gemma2Model",),
        "vae": ("diffusers.AutoencoderDC",),
        "transformer": ("diffusers.SanaTransformer2DModel",),
        "scheduler": (),
    },
    others={
        "SanaPAGPipeline": OtherPipeline("its perturbed-attention guidance is not computed"),
        "SanaControlNetPipeline": OtherPipeline("its control network is not computed"),
        "SanaSprintPipeline": SPRINT,
        "SanaSprintImg2ImgPipeline": SPRINT,
    },
)
