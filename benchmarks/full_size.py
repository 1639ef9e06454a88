"""Models of released size with random weights: their configs, and checkpoints around one of their components.

Weights are written in diffusers layout, shard by shard, in the element type of the release.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ditc.export.checkpoint.open import Checkpoint, Component

SHARD_BYTES = 10**9
TOKENIZER = Path(__file__).parents[1] / "demo" / "checkpoint" / "tokenizer"
# Each bundle of pictures is for square, landscape and portrait ones at 1024 px.
BINS = [[1024, 1024], [832, 1216], [1216, 832]]


def transformer(layers: int, heads: int, cross_heads: int, *, qk_norm: bool) -> dict[str, Any]:
    """The config of a released Sana, from NVlabs/Sana's configs and diffusers' conversion script."""
    width = heads * 32
    return {
        "_class_name": "SanaTransformer2DModel",
        **{"in_channels": 32, "out_channels": 32, "num_attention_heads": heads, "attention_head_dim": 32},
        **{"num_layers": layers, "num_cross_attention_heads": cross_heads, "cross_attention_dim": width},
        **{"cross_attention_head_dim": width // cross_heads, "caption_channels": 2304, "mlp_ratio": 2.5},
        **{"sample_size": 32, "patch_size": 1, "qk_norm": "rms_norm_across_heads" if qk_norm else None},
    }


# mit-han-lab/dc-ae-f32c32-sana-1.0: arXiv 2410.10733, and diffusers' conversion script.
BLOCKS = ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3
DC_AE = {
    "_class_name": "AutoencoderDC",
    **{"latent_channels": 32, "attention_head_dim": 32, "scaling_factor": 0.41407},
    **{"encoder_block_types": BLOCKS, "decoder_block_types": BLOCKS},
    **{"encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024]},
    **{"decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024]},
    **{"encoder_layers_per_block": [2, 2, 2, 3, 3, 3], "decoder_layers_per_block": [3] * 6},
    **{"encoder_qkv_multiscales": [[], [], [], [5], [5], [5]]},
    **{"decoder_qkv_multiscales": [[], [], [], [5], [5], [5]]},
    **{"upsample_block_type": "interpolate", "downsample_block_type": "Conv"},
}
# google/gemma-2-2b-it's config.json.
GEMMA = {
    "model_type": "gemma2",
    **{"vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26},
    **{"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256},
    **{"sliding_window": 4096},
}
SANA_1600M = transformer(20, 70, 20, qk_norm=False)
# Efficient-Large-Model/SANA-Video_2B_480p_diffusers: NVlabs/Sana's config, and diffusers' conversion script.
SANA_VIDEO_2B = {
    "_class_name": "SanaVideoTransformer3DModel",
    **{"in_channels": 16, "out_channels": 16, "num_attention_heads": 20, "attention_head_dim": 112},
    **{"num_layers": 20, "num_cross_attention_heads": 20, "cross_attention_head_dim": 112},
    **{"cross_attention_dim": 2240, "caption_channels": 2304, "mlp_ratio": 3.0, "sample_size": 30},
    **{"patch_size": [1, 2, 2], "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024},
}
# Wan 2.1's autoencoder: the defaults of diffusers' AutoencoderKLWan.
WAN_VAE = {
    "_class_name": "AutoencoderKLWan",
    **{"base_dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2},
    **{"temperal_downsample": [False, True, True]},
}
# stabilityai/stable-diffusion-3.5-medium: Stability-AI/sd3.5, and diffusers' conversion script.
SD35_MEDIUM = {
    "_class_name": "SD3Transformer2DModel",
    **{"sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24},
    **{"attention_head_dim": 64, "num_attention_heads": 24, "caption_projection_dim": 1536},
    **{"joint_attention_dim": 4096, "pooled_projection_dim": 2048, "pos_embed_max_size": 384},
    **{"dual_attention_layers": list(range(13)), "qk_norm": "rms_norm"},
}
KL_VAE = {
    "_class_name": "AutoencoderKL",
    **{"latent_channels": 16, "layers_per_block": 2, "block_out_channels": [128, 256, 512, 512]},
    **{"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4},
    **{"scaling_factor": 1.5305, "shift_factor": 0.0609, "sample_size": 1024},
    **{"use_quant_conv": False, "use_post_quant_conv": False},
}
# The text encoders of stabilityai/stable-diffusion-3-medium-diffusers, from their config.json.
CLIP = {
    "model_type": "clip_text_model",
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "eos_token_id": 2,
}
CLIP_L = {
    **CLIP,
    **{"hidden_size": 768, "intermediate_size": 3072, "projection_dim": 768, "hidden_act": "quick_gelu"},
    **{"num_hidden_layers": 12, "num_attention_heads": 12},
}
CLIP_G = {
    **CLIP,
    **{"hidden_size": 1280, "intermediate_size": 5120, "projection_dim": 1280, "hidden_act": "gelu"},
    **{"num_hidden_layers": 32, "num_attention_heads": 20},
}
T5_XXL = {
    "model_type": "t5",
    **{"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64},
    **{"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}
# Configs of all components, because a plan reads also those that are not built. An SD3 checkpoint may lack T5.
OTHERS = {
    "sana": {"transformer": SANA_1600M, "vae": DC_AE, "text_encoder": GEMMA},
    "sana-video": {"transformer": SANA_VIDEO_2B, "vae": WAN_VAE, "text_encoder": GEMMA},
    "sd3": {"transformer": SD35_MEDIUM, "vae": KL_VAE, "text_encoder": CLIP_L, "text_encoder_2": CLIP_G},
}
_CLIP = ["transformers", "CLIPTextModelWithProjection"]
INDEXES: dict[str, dict[str, Any]] = {
    "sana": {
        "_class_name": "SanaPipeline",
        "transformer": ["diffusers", "SanaTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderDC"],
        "text_encoder": ["transformers", "Gemma2Model"],
        "tokenizer": ["transformers", "GemmaTokenizer"],
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
    },
    "sana-video": {
        "_class_name": "SanaVideoPipeline",
        "transformer": ["diffusers", "SanaVideoTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
        "text_encoder": ["transformers", "Gemma2Model"],
        "tokenizer": ["transformers", "GemmaTokenizer"],
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
    },
    "sd3": {
        "_class_name": "StableDiffusion3Pipeline",
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        **{"text_encoder": _CLIP, "text_encoder_2": _CLIP},
        **{name: ["transformers", "CLIPTokenizer"] for name in ("tokenizer", "tokenizer_2")},
        **{name: [None, None] for name in ("text_encoder_3", "tokenizer_3")},
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    },
}
# What replaces that where T5 is the case.
T5 = {"text_encoder_3": ["transformers", "T5EncoderModel"], "tokenizer_3": ["transformers", "T5Tokenizer"]}
SCHEDULERS: dict[str, dict[str, Any]] = {
    "sana": {
        "_class_name": "DPMSolverMultistepScheduler",
        **{"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
    },
    "sana-video": {
        "_class_name": "DPMSolverMultistepScheduler",
        **{"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 8.0},
    },
    "sd3": {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0},
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "sana": {"resolution_bins": BINS, "complex_human_instruction": None},
    # The bins, the 480x832 pixels and the 81 frames are the pipeline's own.
    "sana-video": {"height": 480, "width": 832, "complex_human_instruction": None},
    "sd3": {"skip_guidance_layers": [7, 8, 9]},
}


@dataclass(frozen=True)
class Case:
    """One stage to build, and the component whose weights it needs.

    Attributes:
        dtype: the element type of the release, in which a denoiser is also built.
    """

    stage: str
    component: str
    config: dict[str, Any]
    dtype: str
    family: str = "sana"


CASES = {
    "sana-0.6b": Case("denoiser", "transformer", transformer(28, 36, 16, qk_norm=False), "fp16"),
    "sana-1.6b": Case("denoiser", "transformer", SANA_1600M, "fp16"),
    "dc-ae": Case("vae_decoder", "vae", DC_AE, "bf16"),
    "gemma-2-2b": Case("text_encoder", "text_encoder", GEMMA, "bf16"),
    "dc-ae-encoder": Case("vae_encoder", "vae", DC_AE, "bf16"),
    "sana-4.8b": Case("denoiser", "transformer", transformer(60, 70, 20, qk_norm=True), "bf16"),
    "sana-video-2b": Case("denoiser", "transformer", SANA_VIDEO_2B, "bf16", "sana-video"),
    "wan-vae": Case("vae_decoder", "vae", WAN_VAE, "bf16", "sana-video"),
    "wan-vae-next": Case("vae_decoder_next", "vae", WAN_VAE, "bf16", "sana-video"),
    "wan-vae-encoder": Case("vae_encoder", "vae", WAN_VAE, "bf16", "sana-video"),
    "sd3.5-medium": Case("denoiser", "transformer", SD35_MEDIUM, "fp16", "sd3"),
    "clip-l": Case("text_encoder", "text_encoder", CLIP_L, "fp16", "sd3"),
    "clip-g": Case("text_encoder_2", "text_encoder_2", CLIP_G, "fp16", "sd3"),
    "t5-xxl": Case("text_encoder_3", "text_encoder_3", T5_XXL, "fp16", "sd3"),
    "kl-vae": Case("vae_decoder", "vae", KL_VAE, "fp16", "sd3"),
    "kl-vae-encoder": Case("vae_encoder", "vae", KL_VAE, "fp16", "sd3"),
}


def make(name: str, directory: Path) -> None:
    """Write random weights for the component, with at most one shard in memory."""
    import torch
    from safetensors.torch import save_file

    case = CASES[name]
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[case.dtype]
    shapes = tensor_shapes(case)
    # Every tensor is the same block of normal numbers at another offset, because equal tensors would be stored once.
    block = (torch.randn(2**22 + 1, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    shard: dict[str, Any] = {}
    index: dict[str, str] = {}
    size, count = 0, itertools.count(1)

    def flush() -> None:
        nonlocal shard, size
        file = f"{_stem(case)}-{next(count):05d}.safetensors"
        save_file(shard, directory / file)
        index.update(dict.fromkeys(shard, file))
        shard, size = {}, 0

    for number, (key, shape) in enumerate(shapes.items()):
        length = math.prod(shape)
        values = block.roll(number * 104_729).repeat(-(-length // len(block)))[:length]
        shard[key] = values.reshape(shape).clone()
        size += length * dtype.itemsize
        if size >= SHARD_BYTES:
            flush()
    flush()
    record = {"metadata": {}, "weight_map": index}
    (directory / f"{_stem(case)}.safetensors.index.json").write_text(json.dumps(record))
    (directory / "config.json").write_text(json.dumps(case.config))


def tensor_shapes(case: Case) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the checkpoint's tensors: those of the upstream network."""
    import torch

    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in _upstream(case.config).state_dict().items()}


def _stem(case: Case) -> str:
    return "model" if case.component.startswith("text_encoder") else "diffusion_pytorch_model"


def _upstream(config: dict[str, Any]) -> Any:
    if "_class_name" in config:
        import diffusers

        arguments = {key: value for key, value in config.items() if key != "_class_name"}
        return getattr(diffusers, config["_class_name"])(**arguments)
    import transformers

    model, settings = {
        "gemma2": (transformers.Gemma2Model, transformers.Gemma2Config),
        "clip_text_model": (transformers.CLIPTextModelWithProjection, transformers.CLIPTextConfig),
        "t5": (transformers.T5EncoderModel, transformers.T5Config),
    }[config["model_type"]]
    return model(settings(**config))


def checkpoint_around(
    case: Case, directory: Path, tokenizers: dict[str, Path], defaults: dict[str, Any]
) -> Checkpoint:
    """A whole checkpoint around the component in `directory`. The other components have a config but no weights."""
    from ditc.export.checkpoint.open import open_component

    return _around(case, open_component(directory), directory, tokenizers, defaults)


def headers_around(case: Case, tokenizers: dict[str, Path], defaults: dict[str, Any]) -> Checkpoint:
    """The same without files: the component's tensors have only names, shapes and an element type."""
    import torch

    from ditc.export.checkpoint.open import Component
    from ditc.export.checkpoint.tensors import TensorEntry, TensorSource

    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[case.dtype]
    entries = {
        name: TensorEntry(shape, dtype, partial(torch.empty, shape, dtype=dtype, device="meta"))
        for name, shape in tensor_shapes(case).items()
    }
    component = Component(case.component, case.config, TensorSource(entries), ())
    return _around(case, component, Path(), tokenizers, defaults)


def _around(
    case: Case, component: Component, path: Path, tokenizers: dict[str, Path], defaults: dict[str, Any]
) -> Checkpoint:
    from ditc.export.checkpoint.open import Checkpoint, Component
    from ditc.export.checkpoint.tensors import TensorSource

    classes = INDEXES[case.family] | (T5 if case.component in T5 else {})
    components = {
        key: Component(key, config, TensorSource({}), (), classes[key][1])
        for key, config in OTHERS[case.family].items()
    }
    components[case.component] = replace(component, class_name=classes[case.component][1])
    return Checkpoint(
        path=path,
        model_index=classes,
        components=components,
        scheduler_config=SCHEDULERS[case.family],
        tokenizers={key: folder for key, folder in tokenizers.items() if classes[key][1]},
        defaults=defaults,
    )


def tokenizers_of(family: str, folder: Path) -> dict[str, Path]:
    """The tokenizers' folders, by name. Their tokens are letters: only their number and the padding matter here."""
    if family in ("sana", "sana-video"):
        return {"tokenizer": gemma_tokenizer(folder / "tokenizer")}
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer, T5Tokenizer

    letters = [f"{letter}{end}" for end in ("", "</w>") for letter in sorted(ByteLevel.alphabet())]
    unused = [f"<unused{i}>" for i in range(CLIP["vocab_size"] - len(letters) - 2)]
    tokens = [*letters, *unused, "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizers = {}
    for name, padding in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], pad_token=padding, model_max_length=77)
        tokenizers[name] = folder / name
        tokenizer.save_pretrained(folder / name)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(letter, -3.0) for letter in (*"abcdefghijklmnopqrstuvwxyz", "\u2581")]
    pieces += [(f"<unused{i}>", -9.0) for i in range(T5_XXL["vocab_size"] - len(pieces) - 128)]
    tokenizers["tokenizer_3"] = folder / "tokenizer_3"
    T5Tokenizer(vocab=pieces).save_pretrained(folder / "tokenizer_3")
    return tokenizers


def gemma_tokenizer(folder: Path) -> Path:
    """Write the demo's tokenizer with unused tokens up to the size of Gemma's vocabulary."""
    shutil.copytree(TOKENIZER, folder, dirs_exist_ok=True)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary |= {f"<filler{i}>": i for i in range(len(vocabulary), GEMMA["vocab_size"])}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder
