"""Writes a bundle as a model repository of Triton Inference Server.

    repository/
      NAME/                        what clients call: texts to a picture
        config.pbtxt
        VERSION/model.py           the Python backend's entry point; the code is in ditc.runtime.triton_server.model
        VERSION/bundle/            manifest.json and the tokenizers
      NAME_denoiser/               one model per stage
        config.pbtxt
        VERSION/model.onnx         or model.plan, or model.xml with model.bin

VERSION comes from the bundle's digest, so a rebuilt bundle is another version. Every configuration names the only
version that is served: digests have no order, and Triton's default would take the largest number.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ditc.runtime.atomic import atomic_folder
from ditc.runtime.bundle.integrity import check_files
from ditc.runtime.bundle.manifest import MANIFEST, Artifact, Manifest, load_manifest
from ditc.runtime.bundle.references import check_references
from ditc.runtime.errors import UsageError
from ditc.runtime.sessions.registry import GRAPH_BACKEND, TritonForm, is_graph, row_of, rows
from ditc.runtime.spec import CONDITIONER, DENOISER, VAE_DECODER, Backend, Precision
from ditc.runtime.step_contract import BATCH
from ditc.runtime.triton_server.config import as_text, parameters, serving, stage_config
from ditc.runtime.triton_server.fields import tensors
from ditc.runtime.video import refuse_videos
from ditc.runtime.weight_map import read_weight_map

ENTRY = '''"""The entry point for Triton's Python backend. Its environment needs the package ditc, without extras."""

from ditc.runtime.triton_server.model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''
BUNDLE, STAGES = "bundle", "stages"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What the user chooses.

    Attributes:
        name: of the pipeline's model; those of the stages begin with it.
        backend: of the stages.
        precision: of the denoiser; None takes the highest.
        instances: of every stage.
        kind: where stages of ONNX Runtime run: AUTO, CPU or GPU. Engines run on GPUs, and OpenVINO on CPUs.
        threads: of ONNX Runtime, per instance; 0 leaves it to the library.

    Raises:
        UsageError: a value is not possible.
    """

    name: str
    backend: Backend = GRAPH_BACKEND
    precision: Precision | None = None
    instances: int = 1
    kind: str = "AUTO"
    threads: int = 0

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise UsageError(
                f"{self.name!r:.80} cannot be the name of a model",
                hint="choose another --name, of letters, digits, '_', '.' and '-'",
            )
        form_of(self.backend)
        if not 1 <= self.instances <= 1024 or not 0 <= self.threads <= 1024:
            raise UsageError(
                f"{self.instances} instances with {self.threads} threads are not possible",
                hint="choose 1 to 1024 --instances, and 0 to 1024 --threads",
            )


def form_of(backend: Backend) -> TritonForm:
    """How Triton opens artifacts of a backend. Raises UsageError if it cannot."""
    form = row_of(backend).triton
    if form is None:
        names = " or ".join(row.name for row in rows() if row.triton is not None)
        raise UsageError(f"Triton has no backend for {backend}", hint=f"build the bundle for {names}")
    return form


def version_of(manifest: Manifest) -> int:
    """The version's number: the first 32 bits of the digest. Triton needs a number without a leading 0."""
    return int(manifest.digest[:8], 16) or 1


def write_repository(bundle: Path, out: Path, choices: Choices) -> list[str]:
    """Write the repository. It appears whole or not at all.

    Returns:
        the names of its models, the pipeline's first.

    Raises:
        UsageError: the bundle has no artifacts that Triton's backend could open, or the folder exists.
        BundleError: the bundle is damaged.
    """
    manifest = load_manifest(bundle)
    refuse_videos(manifest, "ditc export-triton")
    chosen = choose_artifacts(manifest, choices)
    check_files(bundle, [ref for artifact in chosen.values() for ref in artifact.files])
    tokenizers = [ref for ref in manifest.files if ref.path in {spec.tokenizer for spec in manifest.text}]
    check_files(bundle, tokenizers)
    for stage, artifact in chosen.items():
        check_references(bundle / artifact.file.path, artifact)
        _check_operators(bundle, stage, artifact)
        _check_inputs(bundle, manifest, stage, artifact)
    version = version_of(manifest)
    configs = {stage: _stage_config(stage, artifact, version, choices) for stage, artifact in chosen.items()}
    with atomic_folder(out, hint="choose another -o") as folder:
        for stage, artifact in chosen.items():
            model = folder / f"{choices.name}_{stage}"
            _copy_stage(bundle, artifact, model / str(version))
            (model / "config.pbtxt").write_text(configs[stage], encoding="utf-8")
        pipeline = folder / choices.name
        place = pipeline / str(version)
        for path in (MANIFEST, *(ref.path for ref in tokenizers)):
            target = place / BUNDLE / path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle / path, target)
        (place / "model.py").write_text(ENTRY, encoding="utf-8")
        (pipeline / "config.pbtxt").write_text(
            _pipeline_config(manifest, chosen, version, choices), encoding="utf-8"
        )
    return [choices.name, *(f"{choices.name}_{stage}" for stage in chosen)]


def choose_artifacts(manifest: Manifest, choices: Choices) -> dict[str, Artifact]:
    """One artifact per stage that a picture needs, of the chosen backend. This machine need not be able to run them.

    Raises:
        UsageError: a stage has none.
    """
    wanted = choices.precision
    denoiser = _best(manifest, DENOISER, choices.backend, wanted, {})
    needed = {spec.name: spec.dtype for spec in denoiser.spec.inputs}
    others = dict.fromkeys((*(spec.stage for spec in manifest.text), CONDITIONER, VAE_DECODER))
    return {
        **{name: _best(manifest, name, choices.backend, None, needed, denoiser.precision) for name in others},
        DENOISER: denoiser,
    }


def _best(
    manifest: Manifest,
    stage: str,
    backend: Backend,
    precision: Precision | None,
    needed: Mapping[str, object],
    like: Precision | None = None,
) -> Artifact:
    """The artifact of the highest precision, or the one like the denoiser's."""
    artifacts = manifest.stages[stage].artifacts if stage in manifest.stages else ()
    fitting = [
        artifact
        for artifact in artifacts
        if artifact.backend is backend
        and precision in (None, artifact.precision)
        and all(needed.get(out.name, out.dtype) == out.dtype for out in artifact.spec.outputs)
    ]
    if not fitting:
        have = ", ".join(f"{a.backend} {a.precision.value}" for a in artifacts) or "none"
        asked = f"{backend}{f' {precision.value}' if precision else ''}"
        raise UsageError(
            f"the bundle has no {stage} for {asked}, only: {have}",
            hint=f"build one that fits: ditc build CHECKPOINT -o BUNDLE --backend {backend}",
        )
    order = list(Precision)
    return min(fitting, key=lambda a: (a.precision is not like, order.index(a.precision)))


def _check_operators(bundle: Path, stage: str, artifact: Artifact) -> None:
    """Refuse a graph with operators that only a library of ditc's own would know."""
    find = form_of(artifact.backend).foreign
    if find is not None and (foreign := find(bundle / artifact.file.path)):
        raise UsageError(
            f"{stage} has operators that Triton's backend does not know: {', '.join(foreign)}",
            hint="build the bundle without them: ditc build CHECKPOINT -o BUNDLE --linear-attention decomposed",
        )


def _check_inputs(bundle: Path, manifest: Manifest, stage: str, artifact: Artifact) -> None:
    """Refuse what has inputs for LoRAs that cannot be left out. Those of an ONNX graph can.

    Triton's backends refuse a model with more inputs than its configuration has: "configuration expects 4 inputs, model
    provides 46".
    """
    if is_graph(artifact):
        return
    graphs = [a for a in manifest.stages[stage].artifacts if is_graph(a)]
    maps = [a.weights for a in graphs if a.precision is artifact.precision and a.weights is not None]
    if any(weight.lora is not None for ref in maps for weight in read_weight_map(bundle / ref.path)):
        raise UsageError(
            f"{stage} takes LoRAs as inputs, which cannot be left out in {row_of(artifact.backend).title}",
            hint=f"build the bundle without --lora-inputs, or choose --backend {GRAPH_BACKEND}",
        )


def _stage_config(stage: str, artifact: Artifact, version: int, choices: Choices) -> str:
    return stage_config(
        f"{choices.name}_{stage}",
        artifact.spec,
        form_of(artifact.backend),
        version,
        instances=choices.instances,
        kind=choices.kind,
        threads=choices.threads,
    )


def _pipeline_config(
    manifest: Manifest, chosen: Mapping[str, Artifact], version: int, choices: Choices
) -> str:
    stages = {
        stage: {"model": f"{choices.name}_{stage}", "key": artifact.key} for stage, artifact in chosen.items()
    }
    return as_text(
        {
            "name": choices.name,
            "backend": "python",
            "max_batch_size": chosen[DENOISER].spec.profile[BATCH].max,
            **tensors(),
            **serving(version, instances=1, kind="CPU", batched=True),
            "parameters": parameters(
                {"bundle_digest": manifest.digest, STAGES: json.dumps(stages, ensure_ascii=True)}
            ),
        }
    )


def _copy_stage(bundle: Path, artifact: Artifact, place: Path) -> None:
    """Copy a model and what it refers to, by the names that it refers to."""
    place.mkdir(parents=True)
    form = form_of(artifact.backend)
    shutil.copyfile(bundle / artifact.file.path, place / form.file)
    folder = PurePosixPath(artifact.file.path).parent
    for ref in artifact.data:
        relative = PurePosixPath(ref.path).relative_to(folder)
        target = place / (form.data or relative)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle / ref.path, target)
