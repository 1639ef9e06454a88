"""Sana (NVlabs): linear DiT, DC-AE, Gemma-2. The only file that knows the family.

Sources: arXiv 2410.10629 (Sana), 2501.18427 (SANA-1.5); diffusers 0.42.1 pipelines/sana/pipeline_sana.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer as RustTokenizer

from ditc.export.checkpoint import Checkpoint
from ditc.export.models.dc_ae import DcAeConfig, load_decoder, load_encoder
from ditc.export.models.gemma2 import load_gemma2
from ditc.export.models.loading import weight_map
from ditc.export.models.sana import load_sana
from ditc.export.models.sana_config import SanaConfig
from ditc.export.resolution_bins import resolution_bins
from ditc.export.scheduler_config import scheduler_params
from ditc.export.stages import BuildOptions, ModelPlan, StageModule, StagePlan
from ditc.export.step import STATS, wrap
from ditc.export.tokenizer import tokenizer_json
from ditc.runtime import denoise
from ditc.runtime.errors import CheckpointError, UsageError
from ditc.runtime.manifest import Defaults, LatentSpec, Tiling
from ditc.runtime.schedulers import SchedulerParams
from ditc.runtime.spec import (
    CONDITIONER,
    DENOISER,
    NETWORK,
    TEXT_ENCODER,
    VAE_DECODER,
    VAE_ENCODER,
    Backend,
    DType,
    Precision,
    Range,
    StageSpec,
    TensorSpec,
)
from ditc.runtime.text import Select, TextSpec

TORCH_DTYPES = {Precision.FP32: torch.float32, Precision.FP16: torch.float16, Precision.BF16: torch.bfloat16}
STAGE_DTYPES = {Precision.FP32: DType.FLOAT32, Precision.FP16: DType.FLOAT16, Precision.BF16: DType.BFLOAT16}

# SanaPipeline.__call__'s defaults, diffusers 0.42.1.
MAX_SEQUENCE_LENGTH = 300
NUM_INFERENCE_STEPS = 20
GUIDANCE_SCALE = 4.5
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
# The pipeline picks its table of aspect ratios by the transformer's sample_size.
BINS_BY_SAMPLE_SIZE = {16: 512, 32: 1024, 64: 2048, 128: 4096}


class SanaAdapter:
    """Plans and loads the five stages of a Sana checkpoint in diffusers layout."""

    family = "sana"

    def accepts(self, checkpoint: Checkpoint) -> bool:
        """Whether the transformer is diffusers' SanaTransformer2DModel."""
        transformer = checkpoint.components.get("transformer")
        return transformer is not None and transformer.config.get("_class_name") == "SanaTransformer2DModel"

    def plan(self, checkpoint: Checkpoint, options: BuildOptions) -> ModelPlan:
        """Everything that configs tell.

        Raises:
            CheckpointError: a config that these networks do not implement. UsageError: a precision that is refused.
        """
        transformer = SanaConfig.from_json(checkpoint.component("transformer").config)
        vae = DcAeConfig.from_json(checkpoint.component("vae").config)
        if options.base not in TORCH_DTYPES:
            raise UsageError(
                f"precision {options.base.value} is not built for Sana",
                hint=f"take one of {', '.join(p.value for p in TORCH_DTYPES)}",
            )
        text = _text_spec(checkpoint)
        scheduler = scheduler_params(checkpoint.scheduler_config, timestep_scale=transformer.timestep_scale)
        defaults = _defaults(checkpoint, transformer, vae, options)
        latents = LatentSpec(transformer.in_channels, vae.scale_factor, transformer.patch_size)
        sizes = _latent_ranges(defaults, latents)
        shapes = _Shapes(
            transformer,
            text,
            latents,
            sizes,
            options,
            history=_history_length(scheduler),
            tiled=defaults.tiling is not None,
        )
        return ModelPlan(
            family=self.family,
            stages=shapes.stages(),
            text=(text,),
            scheduler=scheduler,
            latents=latents,
            defaults=defaults,
        )

    def load(self, checkpoint: Checkpoint, plan: ModelPlan, stage: str, options: BuildOptions) -> StageModule:
        """One stage with its weights."""
        spec, precision = plan.stages[stage].spec, plan.stages[stage].precision
        dtype = TORCH_DTYPES[precision]
        integers: Mapping[str, int] = {}
        module: torch.nn.Module
        if stage == TEXT_ENCODER:
            component = checkpoint.component("text_encoder")
            module = load_gemma2(component.config, component.tensors, dtype)
            integers = {"input_ids": int(component.config["vocab_size"])}
        elif stage in (CONDITIONER, DENOISER, NETWORK):
            component = checkpoint.component("transformer")
            config = SanaConfig.from_json(component.config)
            conditioner, denoiser = load_sana(config, component.tensors, dtype)
            module = conditioner if stage == CONDITIONER else denoiser
            if stage == DENOISER:
                module = wrap(denoiser, dtype=dtype, history_length=_history_length(plan.scheduler))
        else:
            component = checkpoint.component("vae")
            vae = DcAeConfig.from_json(component.config)
            load = load_decoder if stage == VAE_DECODER else load_encoder
            module = load(vae, component.tensors, dtype)
        return StageModule(
            spec=spec,
            precision=precision,
            module=module,
            weights=tuple(weight_map({stage: module}, component.tensors)),
            integers=integers,
        )


class _Shapes:
    """The specs of the five stages: names, element types and ranges."""

    def __init__(
        self,
        transformer: SanaConfig,
        text: TextSpec,
        latents: LatentSpec,
        sizes: dict[str, Range],
        options: BuildOptions,
        *,
        history: int,
        tiled: bool,
    ) -> None:
        self.transformer, self.text, self.latents = transformer, text, latents
        self.sizes, self.options, self.history, self.tiled = sizes, options, history, tiled

    def stages(self) -> dict[str, StagePlan]:
        """All plans, in the order in which a picture needs them."""
        denoiser = self.options.base
        # Gemma overflows in fp16 (NVlabs' README: bf16 or fp32), and so does DC-AE; ONNX Runtime's CPU provider
        # has no bf16, so beside a 16-bit ONNX denoiser both stay fp32.
        others = Precision.BF16 if self._engines() and denoiser is not Precision.FP32 else Precision.FP32
        plans = {
            TEXT_ENCODER: StagePlan(
                spec=self._text_encoder(), precision=others, components=("text_encoder",)
            ),
            CONDITIONER: StagePlan(spec=self._conditioner(), precision=denoiser, components=("transformer",)),
            DENOISER: StagePlan(spec=self._denoiser(), precision=denoiser, components=("transformer",)),
            VAE_DECODER: StagePlan(spec=self._vae_decoder(), precision=others, components=("vae",)),
            VAE_ENCODER: StagePlan(spec=self._vae_encoder(), precision=others, components=("vae",)),
        }
        if self.options.raw:
            plans[NETWORK] = StagePlan(spec=self._network(), precision=denoiser, components=("transformer",))
        return plans

    def _engines(self) -> bool:
        return self.options.backend is not Backend.ONNXRUNTIME

    def _text_encoder(self) -> StageSpec:
        length = max(self.text.max_length, self.text.negative_max_length)
        return StageSpec(
            TEXT_ENCODER,
            inputs=(
                TensorSpec("input_ids", DType.INT64, ("batch", "length")),
                TensorSpec("attention_mask", DType.INT64, ("batch", "length")),
            ),
            outputs=(
                TensorSpec(
                    "text_embeds", DType.FLOAT32, ("batch", "length", self.transformer.caption_channels)
                ),
            ),
            profile={
                "batch": Range(1, 1, self.options.max_batch),
                "length": Range(1, self.text.max_length, length),
            },
        )

    def _conditioner(self) -> StageSpec:
        rows, text = "rows", "text_length"
        return StageSpec(
            CONDITIONER,
            inputs=(
                TensorSpec("text_embeds", DType.FLOAT32, (rows, text, self.transformer.caption_channels)),
                TensorSpec("text_mask", DType.INT64, (rows, text)),
            ),
            outputs=self._conditioning(),
            profile={rows: Range(1, 1, 2 * self.options.max_batch), text: self._text_range()},
        )

    def _conditioning(self) -> tuple[TensorSpec, ...]:
        config = self.transformer
        kv = ("rows", config.num_layers, 2, "text_length", config.cross_width)
        return (
            TensorSpec("cross_kv", STAGE_DTYPES[self.options.base], kv),
            TensorSpec("text_bias", DType.FLOAT32, ("rows", "text_length")),
        )

    def _denoiser(self) -> StageSpec:
        image = ("batch", self.transformer.in_channels, "height", "width")
        past = ("batch", self.history, self.transformer.in_channels, "height", "width")
        columns = len(denoise.coefficient_columns(self.history, noise=False))
        return StageSpec(
            DENOISER,
            inputs=(
                TensorSpec(denoise.LATENTS, DType.FLOAT32, image),
                TensorSpec(denoise.ROW_OF, DType.INT64, ("rows",)),
                TensorSpec(denoise.TIMESTEP, DType.FLOAT32, ("batch",)),
                TensorSpec(denoise.GUIDANCE_WEIGHTS, DType.FLOAT32, ("batch", "rows")),
                TensorSpec(denoise.COEFFICIENTS, DType.FLOAT32, ("batch", columns)),
                TensorSpec(denoise.HISTORY, DType.FLOAT32, past),
                *self._conditioning(),
            ),
            outputs=(
                TensorSpec(denoise.NEXT_LATENTS, DType.FLOAT32, image),
                TensorSpec(denoise.X0, DType.FLOAT32, image),
                TensorSpec(denoise.NEXT_HISTORY, DType.FLOAT32, past),
                TensorSpec(denoise.STATS, DType.FLOAT32, ("batch", STATS)),
            ),
            profile={
                "batch": Range(1, 1, self.options.max_batch),
                "rows": Range(1, 2, 2 * self.options.max_batch),
                **self.sizes,
                "text_length": self._text_range(),
            },
        )

    def _network(self) -> StageSpec:
        """The denoiser without the step around it: for parity, and for guidance that is not a weighted sum."""
        dtype, config = STAGE_DTYPES[self.options.base], self.transformer
        return StageSpec(
            NETWORK,
            inputs=(
                TensorSpec(denoise.LATENTS, dtype, ("rows", config.in_channels, "height", "width")),
                TensorSpec(denoise.TIMESTEP, DType.FLOAT32, ("rows",)),
                *self._conditioning(),
            ),
            outputs=(TensorSpec("prediction", dtype, ("rows", config.out_channels, "height", "width")),),
            profile={
                "rows": Range(1, 2, 2 * self.options.max_batch),
                **self.sizes,
                "text_length": self._text_range(),
            },
        )

    def _vae_decoder(self) -> StageSpec:
        latents = TensorSpec("latents", DType.FLOAT32, ("batch", self.latents.channels, "height", "width"))
        image = TensorSpec("image", DType.FLOAT32, ("batch", 3, "image_height", "image_width"))
        return StageSpec(VAE_DECODER, (latents,), (image,), {"batch": self._pictures(), **self._free_sizes()})

    def _vae_encoder(self) -> StageSpec:
        scale = self.latents.scale_factor
        pixels = {
            f"image_{name}": Range(r.min * scale, r.opt * scale, r.max * scale, scale)
            for name, r in self._free_sizes().items()
        }
        image = TensorSpec("image", DType.FLOAT32, ("batch", 3, "image_height", "image_width"))
        latents = TensorSpec("latents", DType.FLOAT32, ("batch", self.latents.channels, "height", "width"))
        return StageSpec(VAE_ENCODER, (image,), (latents,), {"batch": self._pictures(), **pixels})

    def _text_range(self) -> Range:
        return Range(1, self.text.length, self.text.length)

    def _pictures(self) -> Range:
        return Range(1, 1, self.options.max_batch)

    def _free_sizes(self) -> dict[str, Range]:
        """The VAE knows no patches: any whole number of cells; of a tiled picture also the smaller last tiles."""
        return {name: Range(1 if self.tiled else r.min, r.opt, r.max) for name, r in self.sizes.items()}


def _history_length(scheduler: SchedulerParams) -> int:
    """One even for Euler, whose column is zero: every Sana engine then takes both of the family's samplers."""
    return max(1, scheduler.history_length)


def _text_spec(checkpoint: Checkpoint) -> TextSpec:
    """SanaPipeline.encode_prompt (diffusers 0.42.1) as data.

    With the complex human instruction, 1 and length - 1 positions are kept: <bos>, and the prompt without the
    instruction before it (SANA, arXiv 2410.10629, section 3.1).
    """
    directory = checkpoint.tokenizers["tokenizer"]
    length = int(checkpoint.defaults.get("max_sequence_length", MAX_SEQUENCE_LENGTH))
    lines = checkpoint.defaults.get("complex_human_instruction", COMPLEX_HUMAN_INSTRUCTION)
    prefix = "\n".join(lines) if lines else ""
    tokenizer = RustTokenizer.from_str(tokenizer_json(directory))
    # The instruction is counted with its <bos>, hence 2 less: <bos> and one token of slack, as upstream has it.
    longest = len(tokenizer.encode(prefix).ids) + length - 2 if prefix else length
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
        pad_token_id=_pad_token(tokenizer),
        select=Select(first=1, last=length - 1) if prefix else None,
    )


def _pad_token(tokenizer: RustTokenizer) -> int:
    token: int | None = tokenizer.token_to_id("<pad>")
    if token is None:
        raise CheckpointError("tokenizer.json has no <pad> token", hint="Gemma's tokenizers have one")
    return token


def _defaults(
    checkpoint: Checkpoint, transformer: SanaConfig, vae: DcAeConfig, options: BuildOptions
) -> Defaults:
    given: dict[str, Any] = checkpoint.defaults
    native = transformer.sample_size * vae.scale_factor
    side = options.resolution or native
    bins: Sequence[Sequence[int]] = ()
    if "resolution_bins" in given:
        bins = given["resolution_bins"] or ()
    elif side == BINS_BY_SAMPLE_SIZE.get(transformer.sample_size):
        bins = resolution_bins(side)
    return Defaults(
        height=options.resolution or int(given.get("height", side)),
        width=options.resolution or int(given.get("width", side)),
        num_inference_steps=int(given.get("num_inference_steps", NUM_INFERENCE_STEPS)),
        guidance_scale=float(given.get("guidance_scale", GUIDANCE_SCALE)),
        bins=tuple((height, width) for height, width in bins),
        # enable_tiling's defaults in AutoencoderDC, diffusers 0.42.1; needed from 2K on (upstream README: 4K).
        tiling=Tiling(tile=512, stride=448) if native >= 4096 else None,
    )


def _latent_ranges(defaults: Defaults, latents: LatentSpec) -> dict[str, Range]:
    """Latent height and width: what the bins span, else from half to twice the default."""
    cells = latents.scale_factor
    ranges = {}
    for axis, (name, default) in enumerate((("height", defaults.height), ("width", defaults.width))):
        if default % (cells * latents.patch_size):
            raise UsageError(
                f"resolution {default} is not a multiple of {cells * latents.patch_size}",
                hint="take a multiple: the VAE and the patches divide the picture",
            )
        sides = [size[axis] for size in defaults.bins] or [default // 2, default * 2]
        step = latents.patch_size
        low, high = min(sides) // cells // step * step, max(sides) // cells // step * step
        ranges[name] = Range(max(step, low), default // cells, high, step)
    return ranges
