"""Convert a native SD3 file of Stability to a diffusers directory, and back."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from ditc.export.checkpoint.naming import naming
from ditc.export.checkpoint.open import Checkpoint
from ditc.export.checkpoint.tensors import TensorEntry, TensorSource
from ditc.export.convert import kl_keys
from ditc.export.convert.layout import DTYPES, NativeLayout, NativeOptions
from ditc.export.convert.new_directory import copy_others, write_json
from ditc.export.convert.writer import write_weights
from ditc.export.families.sd3 import keys as sd3_keys
from ditc.export.families.sd3 import native as stability
from ditc.export.families.sd3.pipeline import PIPELINE
from ditc.runtime.errors import CheckpointError, UsageError

CLASSES = {
    "transformer": ("diffusers", "SD3Transformer2DModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
    "text_encoder_3": ("transformers", "T5EncoderModel"),
}
REQUIRED = ("resolution", "flow_shift")
Part = tuple[dict[str, Any], TensorSource]


class StabilityLayout:
    """The layout of Stability's files, which hold the transformer and, in most cases, the VAE and text encoders."""

    needed: Collection[str] = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae")

    def recognises(self, names: Collection[str]) -> bool:
        """Whether the names are those of an SD3 network."""
        return stability.is_stability(names)

    def write_directory(
        self,
        native: TensorSource,
        directory: Path,
        *,
        options: NativeOptions,
        base: Checkpoint | None,
        max_shard_bytes: int,
    ) -> None:
        """Write every network of the file and a scheduler, and copy the components that the file lacks from base."""
        resolution, flow_shift = _check_options(options)
        parts = _parts(stability.sections(native), resolution)
        dtype = DTYPES[options.dtype] if options.dtype is not None else None
        for name, (config, tensors) in parts.items():
            stem = "model" if name.startswith("text_encoder") else "diffusion_pytorch_model"
            write_weights(tensors, directory / name, stem=stem, dtype=dtype, max_shard_bytes=max_shard_bytes)
            write_json(directory / name / "config.json", config)
        scheduler = {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "shift": flow_shift,
        }
        write_json(directory / "scheduler" / "scheduler_config.json", scheduler)
        index = {
            "_class_name": "StableDiffusion3Pipeline",
            **{name: [None, None] for name in sorted(PIPELINE.optional)},  # unless one of the next two has it
            **copy_others(base, directory, parts),
            **{name: list(CLASSES[name]) for name in parts},
            "scheduler": ["diffusers", scheduler["_class_name"]],
        }
        write_json(directory / "model_index.json", index)

    def to_native(self, checkpoint: Checkpoint) -> TensorSource:
        """The transformer, and the VAE if there is one, under Stability's names and prefixes."""
        transformer = checkpoint.component("transformer")
        tensors = transformer.tensors
        with naming(transformer.place):
            parts = {stability.TRANSFORMER: sd3_keys.to_native(tensors, sd3_keys.keys_of(tensors))}
        if "vae" in checkpoint.components:
            vae = checkpoint.component("vae")
            with naming(vae.place):
                names = kl_keys.kl_keys_of_diffusers(vae.tensors)
                parts[stability.VAE] = kl_keys.to_native(vae.tensors, names)
        entries: dict[str, TensorEntry] = {
            prefix + name: source.entry(name) for prefix, source in parts.items() for name in source
        }
        return TensorSource(entries)


LAYOUT: NativeLayout = StabilityLayout()


def _check_options(options: NativeOptions) -> tuple[int, float]:
    """Check the options, and return the resolution and the flow shift. Raises UsageError."""
    missing = [f"--{name.replace('_', '-')}" for name in REQUIRED if getattr(options, name) is None]
    if missing:
        raise UsageError(
            f"the file's tensors do not show every setting; also give {', '.join(missing)}",
            hint="for released SD3 and SD3.5 networks: --resolution 1024 --flow-shift 3 (diffusers' schedulers; "
            "Stability's own code uses 1 for SD3-medium)",
        )
    foreign = [name for name in NativeOptions.__slots__ if name not in (*REQUIRED, "dtype")]
    given = [f"--{name.replace('_', '-')}" for name in foreign if getattr(options, name) is not None]
    if given:
        raise UsageError(
            f"{', '.join(given)} cannot be given: an SD3 file's tensors show these settings",
            hint="leave the option out",
        )
    resolution, flow_shift = int(options.resolution or 0), float(options.flow_shift or 0)
    step = 2 * stability.PIXELS_PER_LATENT
    if resolution <= 0 or resolution % step:
        raise UsageError(
            f"--resolution {resolution} is not a positive multiple of {step}",
            hint="give the resolution that the network was trained for, such as 1024",
        )
    if not 0 < flow_shift < float("inf"):
        raise UsageError(
            f"--flow-shift {flow_shift} is not a positive number",
            hint="give the shift of the model's scheduler, such as 3.0",
        )
    if options.dtype is not None and options.dtype not in DTYPES:
        raise UsageError(
            f"--dtype {options.dtype} is not one of {', '.join(DTYPES)}",
            hint="give one of them, or leave --dtype out",
        )
    return resolution, flow_shift


def _parts(sections: dict[str, TensorSource], resolution: int) -> dict[str, Part]:
    """For each component, its config and its tensors under the names of diffusers and transformers."""
    if "transformer" not in sections:
        raise CheckpointError("the file holds no transformer", hint=sd3_keys.FOREIGN)
    parts: dict[str, Part] = {}
    for name, section in sections.items():
        with naming(name):
            parts[name] = _part(name, section, resolution)
    return parts


def _part(name: str, section: TensorSource, resolution: int) -> Part:
    if name == "transformer":
        keys = stability.detect_keys(section)
        config = stability.transformer_config(section, keys, resolution)
        part = config, sd3_keys.to_diffusers(section, keys)
    elif name == "vae":
        part = (
            stability.vae_config(section, resolution),
            kl_keys.to_diffusers(section, kl_keys.kl_keys(section)),
        )
    elif name == "text_encoder_3":
        part = stability.t5_config(section), section
    else:
        part = stability.clip_config(name, section), stability.with_projection(section)
    _check_shapes(name, *part)
    return part


def _check_shapes(component: str, config: dict[str, Any], tensors: TensorSource) -> None:
    """Compare every tensor's shape with upstream's own network, which is built without allocating its weights."""
    with torch.device("meta"):
        network = _upstream(component, config)
    wanted = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    if component == "text_encoder_3":
        wanted.pop("encoder.embed_tokens.weight", None)  # a second name of the shared embedding
    for name in sorted(wanted.keys() ^ set(tensors)):
        what = "lacks" if name in wanted else "has an unknown tensor"
        raise CheckpointError(f"{component} {what} {name}", hint=sd3_keys.FOREIGN)
    for name, shape in wanted.items():
        if tensors.shape(name) != shape:
            raise CheckpointError(
                f"{component}: {name} has the shape {list(tensors.shape(name))}, but needs {list(shape)}",
                hint=sd3_keys.FOREIGN,
            )


def _upstream(component: str, config: dict[str, Any]) -> torch.nn.Module:
    import diffusers
    import transformers

    library, class_name = CLASSES[component]
    settings = {key: value for key, value in config.items() if not key.startswith("_")}
    network: torch.nn.Module
    if library == "diffusers":
        network = getattr(diffusers, class_name)(**settings)
    else:
        kind = transformers.T5Config if component == "text_encoder_3" else transformers.CLIPTextConfig
        network = getattr(transformers, class_name)(kind(**settings))
    return network
