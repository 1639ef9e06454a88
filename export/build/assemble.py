"""Put together the manifest of a build: its artifacts, those that stay from earlier builds, and all other facts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ditc.export.build import previous_build
from ditc.export.build.build_key import tool_versions
from ditc.export.build.context import BuildContext
from ditc.export.build.default_request import golden_table
from ditc.export.build.golden_artifact import golden_artifact
from ditc.export.build.records import StageRecord
from ditc.export.checkpoint.tokenizer import write_tokenizer
from ditc.runtime.bundle.manifest import SCHEMA_VERSION, Artifact, Manifest, Stage
from ditc.runtime.spec import VAE_ENCODER


def assemble(
    build: BuildContext, graphs: Mapping[str, StageRecord], engines: Mapping[str, Artifact]
) -> Manifest:
    """The manifest without its digest. Writes the tokenizers and the golden files, which the manifest names.

    Args:
        graphs: the record of every stage's graph, by the stage's name.
        engines: the engine of every stage that has one, by the stage's name.
    """
    plan = build.plan
    rgb = graphs[VAE_ENCODER].latent_rgb if VAE_ENCODER in graphs else None
    tokenizers = [write_tokenizer(build.checkpoint, spec, build.out) for spec in plan.text]
    build.journal.will_write(
        *(build.out / ref.path for ref in tokenizers)
    )  # before the golden files take their time
    kept = {name: _kept(build, name, graph.artifact, engines.get(name)) for name, graph in graphs.items()}
    return Manifest(
        schema_version=SCHEMA_VERSION,
        family=plan.family,
        checkpoint=build.checkpoint.path.name,
        stages={
            name: Stage(artifacts=kept[name], golden=golden_artifact(build, graph, kept[name]))
            for name, graph in graphs.items()
        },
        text=tuple(
            replace(spec, tokenizer=ref.path) for spec, ref in zip(plan.text, tokenizers, strict=True)
        ),
        scheduler=plan.scheduler,
        latents=replace(plan.latents, rgb=rgb) if rgb else plan.latents,
        defaults=plan.defaults,
        guidance=plan.step.guidance,
        golden_table=golden_table(plan),
        files=tuple(tokenizers),
        tools=tool_versions(),
        loras=build.checkpoint.loras,
    )


def _kept(build: BuildContext, name: str, graph: Artifact, engine: Artifact | None) -> tuple[Artifact, ...]:
    """The stage's new artifacts, and those that stay from earlier builds."""
    new = (graph,) if engine is None else (graph, engine)
    stay = previous_build.artifacts_that_stay(build.old, build.checkpoint.path.name, name, new, build.journal)
    return previous_build.in_order((*new, *stay))
