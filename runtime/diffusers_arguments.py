"""Arguments of diffusers' text-to-image pipelines that a Request does not have, and other names for those that it has.

diffusers' pipelines have arguments that ask for nothing with their usual values. Those values are accepted
here, so that a call written for diffusers runs as it is. Other values are refused with the reason.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from ditc.runtime.errors import UsageError


@dataclass(frozen=True, slots=True)
class Foreign:
    """An argument that only diffusers has.

    Attributes:
        reason: why no other values can be served.
        hint: what to do instead.
        nothing: the values beside None with which diffusers draws the picture that it draws without the argument.
        ignored: whether diffusers ignores every value, as the scheduler has no use for it.
    """

    reason: str
    hint: str = "leave it out"
    nothing: tuple[object, ...] = ()
    ignored: bool = False


_ATTENTION = Foreign(
    "attention layers are compiled and take no options",
    "leave it out; a LoRA's scale is set by pipe.set_adapters(NAME, SCALE) before the call",
    ({}, {"scale": 1}),
)
_IP_ADAPTER = Foreign("image adapters are not implemented")

FOREIGN = {
    "eta": Foreign("only DDIM has it", ignored=True),
    "clean_caption": Foreign(
        "texts are not cleaned", "clean the text yourself before the call", nothing=(False,)
    ),
    "attention_kwargs": _ATTENTION,
    "joint_attention_kwargs": _ATTENTION,
    "cross_attention_kwargs": _ATTENTION,
    "lora_scale": Foreign("the scale of a LoRA belongs to no request", _ATTENTION.hint, (1,)),
    "clip_skip": Foreign(
        "the text encoders' graphs return the state before the last layer, as without clip_skip",
        "leave it out, which draws the picture of clip_skip=0",
        nothing=(0,),
    ),
    "ip_adapter_image": _IP_ADAPTER,
    "ip_adapter_image_embeds": _IP_ADAPTER,
    "controlnet_pooled_projections": Foreign("a ControlNet reads the prompt's own pooled embeddings"),
    "padding_mask_crop": Foreign("pictures are not cropped", "crop image and mask_image before the call"),
    "masked_image_latents": Foreign("no network here takes them"),
    "callback": Foreign("diffusers replaced it", "pass callback_on_step_end"),
    "callback_steps": Foreign("diffusers replaced it", "callback_on_step_end is called after every step"),
}

# What other programs call an argument. A name that is merely misspelt is found by its letters.
SYNONYMS = {
    **dict.fromkeys(("num_images", "num_samples", "n", "batch_size"), "num_images_per_prompt"),
    **dict.fromkeys(("steps", "num_steps", "n_steps", "sampling_steps"), "num_inference_steps"),
    **dict.fromkeys(("cfg", "cfg_scale", "guidance", "scale", "true_cfg_scale"), "guidance_scale"),
    **dict.fromkeys(("negative", "neg_prompt", "n_prompt", "uncond"), "negative_prompt"),
    **dict.fromkeys(("text", "texts", "prompts"), "prompt"),
    **dict.fromkeys(("rng", "generators"), "generator"),
    **dict.fromkeys(("random_seed", "manual_seed", "seeds"), "seed"),
    **dict.fromkeys(("size", "resolution", "image_size"), "height and width"),
    **dict.fromkeys(("skip_layers", "slg_layers"), "skip_guidance_layers"),
    "slg_scale": "skip_layer_guidance_scale",
    **dict.fromkeys(("pag", "pag_guidance_scale", "perturbed_attention_scale"), "pag_scale"),
    **dict.fromkeys(
        ("interval_guidance", "cfg_interval", "guidance_start", "guidance_end"), "guidance_interval"
    ),
    **dict.fromkeys(("num_frames", "video_length"), "frames"),
    "prompt_mask": "prompt_attention_mask",
    "return_type": "output_type",
    **dict.fromkeys(("init_image", "images", "input_image"), "image"),
    **dict.fromkeys(("mask", "mask_images"), "mask_image"),
    **dict.fromkeys(("denoising_strength", "denoise"), "strength"),
    **dict.fromkeys(("conditioning_image", "controlnet_image", "hint"), "control_image"),
    **dict.fromkeys(("controlnet_scale", "conditioning_scale"), "controlnet_conditioning_scale"),
    "text_embeds": "prompt_embeds",
}


def without_foreign(arguments: dict[str, Any], known: Collection[str]) -> dict[str, Any]:
    """The arguments that a Request has; those that ask for nothing are left out.

    Args:
        known: the names of a Request's fields.

    Raises:
        UsageError: nobody has such an argument (the hint names the most similar one), or only diffusers has it and the
            value asks for something.
    """
    for name, value in arguments.items():
        if name in known:
            continue
        foreign = FOREIGN.get(name)
        if foreign is None:
            raise UsageError(f"there is no argument {name}", hint=_similar(name, known))
        if not (foreign.ignored or value is None or _is_one_of(value, foreign.nothing)):
            raise UsageError(f"{name} is {value!r:.80}, but {foreign.reason}", hint=foreign.hint)
    return {name: value for name, value in arguments.items() if name in known}


def _similar(name: str, known: Collection[str]) -> str:
    close = [SYNONYMS[name]] if name in SYNONYMS else get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else "ditc.runtime.Request lists them"


def _is_one_of(value: object, accepted: tuple[object, ...]) -> bool:
    """Whether the value equals one of these. An array never does, because its comparison has one result per entry."""
    return any(isinstance(value, bool | int | float | dict) and value == one for one in accepted)
