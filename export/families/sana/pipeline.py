"""The pipelines of diffusers 0.42.1 that the Sana family draws: those of pictures, and two of videos.

A transformer fits only one of them: SANA-Sprint's (arXiv 2503.09641) embeds the guidance scale.
"""

from __future__ import annotations

from ditc.export.families.common.pipeline import OtherPipeline, ServedPipeline

_COMPONENTS = {
    "tokenizer": (),
    "text_encoder": ("transformers.Gemma2Model",),
    "vae": ("diffusers.AutoencoderDC",),
    "transformer": ("diffusers.SanaTransformer2DModel",),
    "scheduler": (),
}
_NOT_SPRINT = OtherPipeline(
    "it gives its transformer an embedded guidance, but this one takes none (guidance_embeds is false)",
    "use the transformer and the model_index.json of one release",
)
# SanaPipeline with perturbed-attention guidance.
PAG_CLASS = "SanaPAGPipeline"

PIPELINE = ServedPipeline(
    class_name="SanaPipeline",
    also=(PAG_CLASS,),
    components=_COMPONENTS,
    others={
        "SanaSprintPipeline": _NOT_SPRINT,
        "SanaSprintImg2ImgPipeline": _NOT_SPRINT,
    },
)
CONTROLNET = ServedPipeline(
    class_name="SanaControlNetPipeline",
    components={**_COMPONENTS, "controlnet": ("diffusers.SanaControlNetModel",)},
)
SPRINT = ServedPipeline(
    class_name="SanaSprintPipeline",
    components=_COMPONENTS,
    others={
        "SanaPipeline": OtherPipeline(
            "the transformer is SANA-Sprint's (guidance_embeds is true), and was distilled for its own sampler, SCM",
            "take model_index.json and scheduler/ of the Sprint release too: with any other sampler, this transformer "
            "draws noise",
        ),
        PAG_CLASS: OtherPipeline(
            "the transformer is SANA-Sprint's, whose guidance is a part of the network (guidance_embeds is true)",
            "take model_index.json and scheduler/ of the Sprint release: it draws without perturbed-attention guidance",
        ),
        "SanaSprintImg2ImgPipeline": OtherPipeline("it starts from a picture"),
    },
)
VIDEO = ServedPipeline(
    class_name="SanaVideoPipeline",
    also=("SanaImageToVideoPipeline",),
    components={
        **_COMPONENTS,
        "vae": ("diffusers.AutoencoderKLWan", "diffusers.AutoencoderKLLTX2Video"),
        "transformer": ("diffusers.SanaVideoTransformer3DModel",),
    },
)
