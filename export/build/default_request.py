"""The request that states nothing but a prompt: its schedule, and whether the planned bundle can draw it."""

from __future__ import annotations

import numpy as np

from ditc.export.contract import ModelPlan
from ditc.runtime.bundle.jsondata import Mismatch
from ditc.runtime.bundle.manifest import SCHEMA_VERSION, Artifact, FileRef, GoldenTable, Manifest, Stage
from ditc.runtime.bundle.manifest_check import check_manifest
from ditc.runtime.errors import CheckpointError, UsageError
from ditc.runtime.schedulers import coefficient_table
from ditc.runtime.sessions.registry import GRAPH_BACKEND
from ditc.runtime.sizes import check_size
from ditc.runtime.spec import DENOISER, VAE_DECODER
from ditc.runtime.vae import check_tiles

# Of one text, with the instruction before it. Tracing with so many tokens takes minutes and gigabytes.
MAX_TOKENS = 2**14
CORRECT = "correct the value in the checkpoint's ditc.json or config.json, or the option of the build"


def check_default_request(plan: ModelPlan) -> None:
    """Refuse a plan whose bundle could not draw its own defaults, or would be refused when it is loaded.

    Raises:
        UsageError, CheckpointError: the message names the value.
    """
    tokens = max(max(text.max_length, text.negative_max_length) for text in plan.text)
    if tokens > MAX_TOKENS:
        raise UsageError(
            f"a text has {tokens} tokens with the instruction before it, and {MAX_TOKENS} are the most",
            hint="correct max_sequence_length in the checkpoint's ditc.json",
        )
    try:
        check_manifest(_draft(plan))
    except Mismatch as e:
        raise CheckpointError(f"no bundle may hold the value {e}", hint=CORRECT) from e
    for height, width in ((plan.defaults.height, plan.defaults.width), *plan.defaults.bins):
        try:
            _check_picture(plan, height, width)
        except UsageError as e:
            raise UsageError(
                f"the bundle could not draw its default size or one of its resolution bins, {height}x{width}: {e}",
                hint="correct the sizes in the checkpoint's ditc.json, or choose another --resolution",
            ) from e


def golden_table(plan: ModelPlan) -> GoldenTable:
    """The schedule of a default request."""
    defaults = plan.defaults
    table = coefficient_table(
        plan.scheduler,
        defaults.num_inference_steps,
        image_seq_len=plan.latents.num_patches(defaults.height, defaults.width),
    )
    return GoldenTable(
        num_inference_steps=defaults.num_inference_steps,
        timesteps=tuple(table.timesteps.astype(np.float64).tolist()),
        coefficients=tuple(tuple(row) for row in table.coefficients.astype(np.float64).tolist()),
    )


def _check_picture(plan: ModelPlan, height: int, width: int) -> None:
    tiling, scale = plan.defaults.tiling, plan.latents.scale_factor
    check_size(height, width, plan.latents, plan.stages[DENOISER].spec, plan.defaults)
    cells = (height // scale, width // scale)
    check_tiles(*cells, plan.stages[VAE_DECODER].spec, tiling, scale=scale, default=tiling)


def _draft(plan: ModelPlan) -> Manifest:
    """The manifest as far as it is known before the export: its files are not there yet."""
    no_file = FileRef(path="draft", sha256="0" * 64, size_bytes=0)
    return Manifest(
        schema_version=SCHEMA_VERSION,
        family=plan.family,
        checkpoint="",
        stages={
            name: Stage(
                artifacts=(
                    Artifact(
                        spec=stage.spec,
                        precision=stage.precision,
                        backend=GRAPH_BACKEND,
                        file=no_file,
                        key="",
                    ),
                )
            )
            for name, stage in plan.stages.items()
        },
        text=plan.text,
        scheduler=plan.scheduler,
        latents=plan.latents,
        defaults=plan.defaults,
        guidance=plan.step.guidance,
        golden_table=golden_table(plan),
        files=(),
        tools={},
    )
