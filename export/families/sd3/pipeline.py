"""StableDiffusion3Pipeline, the pipeline that the SD3 family draws, and its relatives in diffusers 0.42.1."""

from __future__ import annotations

from ditc.export.families.common.pipeline import OtherPipeline, ServedPipeline

_CLIP = ("transformers.CLIPTextModelWithProjection",)
_PICTURE = OtherPipeline("it begins with a picture, and ditc begins with noise")
_CONTROL = OtherPipeline("its control network for inpainting is not computed")
_PAG = OtherPipeline("its perturbed-attention guidance is not computed")
_ADAPTER = "which IP-Adapter uses for prompts that are pictures"

_COMPONENTS = {
    "transformer": ("diffusers.SD3Transformer2DModel",),
    "scheduler": (),
    "vae": ("diffusers.AutoencoderKL",),
    "text_encoder": _CLIP,
    "tokenizer": (),
    "text_encoder_2": _CLIP,
    "tokenizer_2": (),
    "text_encoder_3": ("transformers.T5EncoderModel",),
    "tokenizer_3": (),
}
_OPTIONAL = frozenset({"text_encoder_3", "tokenizer_3"})
_UNUSED = {"image_encoder": _ADAPTER, "feature_extractor": _ADAPTER}

PIPELINE = ServedPipeline(
    class_name="StableDiffusion3Pipeline",
    components=_COMPONENTS,
    optional=_OPTIONAL,
    others={
        "StableDiffusion3Img2ImgPipeline": _PICTURE,
        "StableDiffusion3InpaintPipeline": _PICTURE,
        "StableDiffusion3ControlNetInpaintingPipeline": _CONTROL,
        "StableDiffusion3PAGPipeline": _PAG,
        "StableDiffusion3PAGImg2ImgPipeline": _PAG,
    },
    unused=_UNUSED,
)
CONTROLNET = ServedPipeline(
    class_name="StableDiffusion3ControlNetPipeline",
    components={**_COMPONENTS, "controlnet": ("diffusers.SD3ControlNetModel",)},
    optional=_OPTIONAL,
    unused=_UNUSED,
)
