"""GET /v1/models: what is served, and what each model draws by default. Nothing is loaded for it."""

from __future__ import annotations

from fastapi import APIRouter, Request

from ditc.runtime.bundle.manifest import Manifest, load_manifest
from ditc.runtime.errors import DitcError
from ditc.runtime.serving.api.answers import ModelAnswer, ModelDetails, ModelsAnswer
from ditc.runtime.serving.api.api import api_of
from ditc.runtime.serving.api.kinds import takes_first_frame
from ditc.runtime.serving.api.openapi import ERRORS
from ditc.runtime.serving.model import Model
from ditc.runtime.serving.models import Models
from ditc.runtime.serving.refusals import Invalid
from ditc.runtime.spec import CONTROLNET, DENOISER
from ditc.runtime.step_contract import GuidanceMode

router = APIRouter(prefix="/v1/models")


@router.get("", response_model=ModelsAnswer, responses=ERRORS)
async def list_models(http: Request) -> ModelsAnswer:
    """All models. The first is the default."""
    api = api_of(http)
    return ModelsAnswer(
        data=[await api.encoder.run(_described, api.models, name) for name in api.models.names]
    )


@router.get("/{name:path}", response_model=ModelAnswer, responses=ERRORS)
async def retrieve(http: Request, name: str) -> ModelAnswer:
    """One model."""
    api = api_of(http)
    if name not in api.models.names:
        raise Invalid(
            f"the model {name!r:.80} does not exist",
            hint=f"this server has {', '.join(api.models.names)}",
            param="model",
            status=404,
            code="model_not_found",
        )
    return await api.encoder.run(_described, api.models, name)


def _described(models: Models, name: str) -> ModelAnswer:
    """A model from its manifest. Reads files, unless the model is open."""
    model, created = models.opened(name), 0
    try:
        created = int((models.bundles[name] / "manifest.json").stat().st_mtime)
        manifest = model.pipeline.manifest if model is not None else load_manifest(models.bundles[name])
    except (DitcError, OSError):  # it is being built again
        return ModelAnswer(id=name, created=created, ditc=None)
    return ModelAnswer(id=name, created=created, ditc=_details(manifest, model))


def _details(manifest: Manifest, model: Model | None) -> ModelDetails:
    defaults, pipeline = manifest.defaults, None if model is None else model.pipeline
    return ModelDetails(
        kind="video" if manifest.latents.has_frames else "image",
        loaded=model is not None,
        bundle=manifest.digest,
        family=manifest.family,
        width=defaults.width,
        height=defaults.height,
        bins=list(defaults.bins),
        num_inference_steps=defaults.num_inference_steps,
        guidance_scale=defaults.guidance_scale,
        frames=defaults.frames,
        fps=defaults.fps,
        capabilities=_capabilities(manifest),
        precisions=sorted({artifact.precision.value for artifact in manifest.stages[DENOISER].artifacts}),
        max_batch=None if model is None else model.scheduler.max_batch,
        backend=None if pipeline is None else pipeline.backend,
        precision=None if pipeline is None else pipeline.precision,
        certified=None if pipeline is None else not pipeline.uncertified,
    )


def _capabilities(manifest: Manifest) -> list[str]:
    """What requests may ask of a model."""
    videos = manifest.latents.has_frames
    found = {
        "text-to-image": not videos,
        "text-to-video": videos,
        "image-to-video": takes_first_frame(manifest),
        "partial_images": bool(manifest.latents.rgb) and not videos,
        "motion_score": any(spec.motion is not None for spec in manifest.text),
        "negative_prompt": manifest.guidance is GuidanceMode.CFG,
        "skip_layer_guidance": manifest.defaults.skip_layer_guidance is not None,
        "perturbed_attention_guidance": manifest.defaults.perturbed_attention_guidance is not None,
        "control_image": CONTROLNET in manifest.stages,
        "resolution_binning": bool(manifest.defaults.bins),
    }
    return [name for name, has in found.items() if has]
