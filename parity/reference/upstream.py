"""The second reference: the checkpoint in unmodified upstream code, which draws the same cases from the same noise.

Upstream is diffusers, or the family's module in this folder if diffusers has no pipeline for the family.
"""

# N steps, B samples, C latent channels, H/W latent size

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ditc.export.checkpoint.open import Checkpoint
from ditc.export.checkpoint.weights import has_variant
from ditc.parity.cases import Case, CaseRun, Settings, step_noise_seed
from ditc.parity.edits import OF_PICTURES, OF_VIDEOS, STEPS, Edit
from ditc.parity.folded_loras import in_diffusers_form
from ditc.parity.reference import find_pipeline, upstream_name
from ditc.parity.reference.edits import described, draw_edit
from ditc.parity.reference.perturbed_attention import with_perturbed_attention
from ditc.parity.reference.rewritten import rewritten_networks
from ditc.parity.reference.videos import from_picture, from_text, one_timestep_for_all_frames
from ditc.runtime.control import example_picture
from ditc.runtime.errors import CheckpointError
from ditc.runtime.lora.choice import LoraChoice
from ditc.runtime.session import Array

# The components that a pipeline calls in every step: once, or again for another guidance (skip-layer guidance).
DENOISERS = ("transformer", "controlnet", "unet")


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a component with its arguments, so that it can be repeated.

    Attributes:
        processors: the attention processors that the component had, by module; a pipeline may set others only while it
            draws, as for perturbed-attention guidance. Empty for a component that has none.
    """

    module: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    processors: dict[str, Any] = field(default_factory=dict)

    def __call__(self) -> object:
        """Repeat the call."""
        # A list may be what a decoder of videos keeps between its calls. It changes in each of them.
        kwargs = {name: [*value] if isinstance(value, list) else value for name, value in self.kwargs.items()}
        if not self.processors:
            return self.module(*self.args, **kwargs)
        before = self.module.attn_processors
        self.module.set_attn_processor({**self.processors})  # it empties the dict that it is given
        try:
            return self.module(*self.args, **kwargs)
        finally:
            self.module.set_attn_processor(before)


class Upstream:
    """The checkpoint's upstream pipeline on the CPU, in fp32 unless `dtype` says otherwise.

    Args:
        checkpoint: without LoRAs.
        loras: files of LoRAs, which upstream itself reads and fuses into its weights.

    Raises:
        CheckpointError: upstream cannot load the checkpoint.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype = torch.float32,
        loras: Sequence[LoraChoice] = (),
    ) -> None:
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging

        self.checkpoint = checkpoint
        for library in (diffusers_logging, transformers_logging):
            library.disable_progress_bar()
            library.set_verbosity_error()  # their warnings, on missing extras and truncated texts, are not findings
        open_pipeline = find_pipeline(checkpoint) or _diffusers_pipeline
        try:
            self.pipeline: Any = from_text(open_pipeline(checkpoint, dtype))
            _fuse(self.pipeline, loras, checkpoint)
        except (OSError, ValueError, TypeError, RuntimeError) as e:
            name = upstream_name(checkpoint)
            raise CheckpointError(
                f"{name} cannot load {checkpoint.path}: {e}",
                hint=f"check the checkpoint, or leave out the levels that need {name}: --level op --level stage",
            ) from e
        _decode_in_tiles(self.pipeline, checkpoint.defaults.get("tiling"))
        self.pipeline.set_progress_bar_config(disable=True)
        self._takes = set(inspect.signature(self.pipeline.__call__).parameters)

    def draw(
        self,
        case: Case,
        settings: Settings,
        noise: Array,
        *,
        output_type: str = "np",
        on_step: Callable[[], None] = lambda: None,
    ) -> CaseRun:
        """Draw one case from noise (B,C,H,W), and keep the latents after every step."""
        if case.edit in OF_PICTURES:
            with torch.random.fork_rng(devices=[]):
                return draw_edit(self.pipeline, case, self._given(settings), noise, on_step=on_step)
        pipeline, arguments = self.pipeline, self._arguments(settings)
        if case.edit in OF_VIDEOS:
            pipeline = from_picture(pipeline)
            arguments |= {"image": example_picture(), "num_inference_steps": STEPS}
        latents = [noise]

        def keep(_: Any, index: int, timestep: Any, given: dict[str, torch.Tensor]) -> dict[str, Any]:
            latents.append(given["latents"].float().numpy().copy())
            on_step()
            return {}

        with torch.inference_mode(), torch.random.fork_rng(devices=[]), _mean_of_posteriors():
            # The noise of samplers that add some in each step: not every pipeline hands its generator to the scheduler.
            torch.manual_seed(step_noise_seed(case))
            drawn = pipeline(
                **arguments,
                prompt=case.prompt,
                latents=torch.from_numpy(noise.copy()),
                output_type=output_type,
                callback_on_step_end=keep,
            )
        images = drawn.images if hasattr(drawn, "images") else drawn.frames
        picture = None if output_type == "latent" else np.asarray(images[0], np.float32)
        return CaseRun(case=case, noise=noise, latents=np.stack(latents), picture=picture)

    def draw_with_one_timestep(self, case: Case, settings: Settings, noise: Array) -> Array:
        """The last latents of a case with a held frame, if the network saw that with the timestep of the others."""
        with one_timestep_for_all_frames(self.pipeline.transformer):
            return self.draw(case, settings, noise, output_type="latent").latents[-1]

    def name_of(self, edit: Edit | None) -> str:
        """What draws a case with this edit, for reports."""
        name = upstream_name(self.checkpoint)
        return name if edit is None else described(self.pipeline, edit, name)

    def calls(self, case: Case, settings: Settings, noise: Array, step: int) -> dict[str, Call]:
        """The calls that one drawn case makes, by component name.

        For the denoising network, this is its first call after `step` steps. For every other component, it is the
        first call of the run. "vae" is the call of the VAE's decoder.
        """
        found: dict[str, Call] = {}
        done = 0

        def count() -> None:
            nonlocal done
            done += 1

        def keep(name: str, after: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if name not in found and done >= after:
                    copies = {key: _copied(value) for key, value in kwargs.items()}
                    processors = dict(getattr(module, "attn_processors", {}))
                    found[name] = Call(module, tuple(map(_copied, args)), copies, processors)

            return hook

        watched = {
            name: (module, step if name in DENOISERS else 0) for name, module in self.networks().items()
        }
        decoder = getattr(getattr(self.pipeline, "vae", None), "decoder", None)
        if decoder is not None:
            watched["vae"] = (decoder, 0)
        handles = [
            module.register_forward_pre_hook(keep(name, after), with_kwargs=True)
            for name, (module, after) in watched.items()
        ]
        try:
            self.draw(case, settings, noise, on_step=count)
        finally:
            for handle in handles:
                handle.remove()
        return found

    def networks(self) -> dict[str, nn.Module]:
        """The components that the pipeline calls as modules. It calls the VAE through methods, so that is left out."""
        parts = self.pipeline.components
        return {n: m for n, m in parts.items() if isinstance(m, nn.Module) and n != "vae"}

    def _arguments(self, settings: Settings) -> dict[str, Any]:
        """The settings and the checkpoint's own defaults, as far as this pipeline has such arguments."""
        return {name: value for name, value in self._given(settings).items() if name in self._takes}

    def _given(self, settings: Settings) -> dict[str, Any]:
        """The settings and the checkpoint's own defaults, as arguments of diffusers."""
        given = dict(self.checkpoint.defaults)
        given["use_resolution_binning"] = bool(given.get("resolution_bins", True))
        if given.get("resolution_bins") is None and "resolution_bins" in given:
            given["use_resolution_binning"] = False
        given |= {
            "num_inference_steps": settings.num_inference_steps,
            "guidance_scale": settings.guidance_scale,
            "height": settings.height,
            "width": settings.width,
        }
        if "control_image" in self._takes:
            given["control_image"] = example_picture()
        if settings.num_inference_steps != 2:  # diffusers refuses its own default then
            given["intermediate_timesteps"] = None
        return given


def _decode_in_tiles(pipeline: Any, tiling: dict[str, int] | None) -> None:
    """Turn on the tiles that ditc.json asks for. VAEs that have no such tiles never get them here either."""
    if tiling and hasattr(pipeline.vae, "tile_sample_stride_height"):
        tile, stride = tiling["tile"], tiling["stride"]
        pipeline.vae.enable_tiling(
            tile_sample_min_height=tile,
            tile_sample_min_width=tile,
            tile_sample_stride_height=stride,
            tile_sample_stride_width=stride,
        )


def _fuse(pipeline: Any, loras: Sequence[LoraChoice], checkpoint: Checkpoint) -> None:
    """Let diffusers, with peft, read the LoRAs and add them to the weights. The modules keep their names."""
    if not loras:
        return
    if not hasattr(pipeline, "load_lora_weights"):  # SanaPAGPipeline of diffusers 0.42.1
        pipeline = _loader_of(pipeline)
    names = [f"lora{index}" for index in range(len(loras))]
    with tempfile.TemporaryDirectory() as folder:
        for name, choice in zip(names, loras, strict=True):
            file = in_diffusers_form(choice, checkpoint, Path(folder))
            pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
    pipeline.set_adapters(names, [choice.scale for choice in loras])
    pipeline.fuse_lora(adapter_names=names)
    pipeline.unload_lora_weights()


def _loader_of(pipeline: Any) -> Any:
    """Upstream's pipeline without perturbed attention, over the same networks, which can read LoRAs.

    Raises:
        ValueError: there is none.
    """
    from diffusers import AutoPipelineForText2Image

    plain = AutoPipelineForText2Image.from_pipe(pipeline, enable_pag=False)
    if not hasattr(plain, "load_lora_weights"):
        raise ValueError(f"neither {type(pipeline).__name__} nor {type(plain).__name__} reads LoRAs")
    return plain


@contextmanager
def _mean_of_posteriors() -> Iterator[None]:
    """Let diffusers take the mean where it draws a sample of a VAE's posterior, as ditc does for control pictures.

    diffusers draws it from torch's global generator, so two of its own runs from one seed differ.
    """
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution as Posterior

    sample = Posterior.sample
    Posterior.sample = lambda self, generator=None: self.mode()
    try:
        yield
    finally:
        Posterior.sample = sample


def _diffusers_pipeline(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    import diffusers

    pipeline_class, given = diffusers.DiffusionPipeline, rewritten_networks(checkpoint, dtype)
    if checkpoint.controlnet is not None:
        pipeline_class = getattr(diffusers, checkpoint.model_index["_class_name"])
        if "controlnet" not in given:
            given["controlnet"] = _controlnet(checkpoint, dtype)
    # Components that a checkpoint leaves out are null in model_index.json; from_pretrained still needs them as None.
    left_out = {name: None for name, value in checkpoint.model_index.items() if value == [None, None]}
    pipeline = pipeline_class.from_pretrained(
        str(checkpoint.path),
        dtype=dtype,
        variant=checkpoint.variant,
        local_files_only=True,
        trust_remote_code=False,
        **left_out,
        **given,
    )
    return with_perturbed_attention(pipeline, checkpoint)


def _controlnet(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """diffusers' ControlNet from a folder that is not the checkpoint's own."""
    import diffusers

    folder, variant = checkpoint.controlnet, checkpoint.variant
    assert folder is not None
    network_class = getattr(diffusers, checkpoint.component("controlnet").class_name)
    return network_class.from_pretrained(
        str(folder),
        torch_dtype=dtype,
        variant=variant if variant and has_variant(folder, variant) else None,
        local_files_only=True,
    )


def _copied(value: Any) -> Any:
    if isinstance(value, list):
        return [*value]
    return value.clone() if isinstance(value, torch.Tensor) else value
