"""The side under test: a bundle's sessions and the graphs behind them.

16-bit stages that this machine would compute in fp32 get sessions in which the rounding is simulated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ditc.export.graph.torch_session import from_torch
from ditc.export.quant.plan import LayerPlan
from ditc.export.quant.record import QuantRecord, read_record
from ditc.parity.simulated_16bit import open_rounded
from ditc.runtime.bundle.calibration import Calibration
from ditc.runtime.bundle.manifest import Artifact, Manifest, load_manifest
from ditc.runtime.errors import UsageError
from ditc.runtime.load_options import DEFAULTS, LoadOptions
from ditc.runtime.loader import find_encoder, load_parts, open_checked
from ditc.runtime.lora.choice import LoraChoice
from ditc.runtime.lora.inputs import WithLoras
from ditc.runtime.lora.reopener import Reopener
from ditc.runtime.lora.shared import given_loras
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.session import Array, Session, Tensor, numpy_dtype, to_numpy
from ditc.runtime.sessions.registry import is_graph, row_of
from ditc.runtime.spec import DENOISER, VAE_ENCODER, DType, Precision, StageSpec


@dataclass(kw_only=True)
class Candidate:
    """What is compared with the reference.

    Attributes:
        graphs: the deployed ONNX graph of each stage.
        traced: the graph to trace modules in, for stages where it is not the deployed one.
        precisions: the precision of each stage.
        native: sessions of 16-bit stages that this machine computes in a wider type (ONNX Runtime's CPU provider runs
            fp16 in fp32, and OpenVINO bf16 on a CPU without it). They show whether the file holds the right graph. The
            pipeline's own session for the stage, which runs the same graph with the rounding written into it, shows
            what rounding costs.
        plans: of 8-bit stages, the quantization plan that the bundle records: scales and smoothing by layer.
        bases: of 8-bit stages, the precision outside their 8-bit layers.
        calibrations: of 8-bit stages, what their ranges rest on, where the bundle records it.
        budgets: of 8-bit stages, the budget that their recipe was searched for; None for other recipes.
        artifacts: the bundle's artifacts in use; empty for a candidate made in memory.
        certified: those that a certificate is about: what every picture needs, so often not the encoder of the VAE.
        bundle: the bundle's directory; None for a candidate made in memory.
        given: LoRAs that the graphs take as inputs, besides those in the bundle's weights.
    """

    pipeline: Pipeline
    graphs: dict[str, Path | ir.Model] = field(default_factory=dict)
    traced: dict[str, ir.Model] = field(default_factory=dict)
    precisions: dict[str, Precision] = field(default_factory=dict)
    native: dict[str, Session] = field(default_factory=dict)
    plans: dict[str, dict[str, LayerPlan]] = field(default_factory=dict)
    bases: dict[str, Precision] = field(default_factory=dict)
    calibrations: dict[str, Calibration] = field(default_factory=dict)
    budgets: dict[str, str | None] = field(default_factory=dict)
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    certified: dict[str, Artifact] = field(default_factory=dict)
    bundle: Path | None = None
    given: tuple[LoraChoice, ...] = ()

    @property
    def manifest(self) -> Manifest:
        return self.pipeline.manifest

    @property
    def sessions(self) -> dict[str, Session]:
        return self.pipeline.sessions

    def precision(self, stage: str) -> Precision:
        """The precision of a stage: fp32 unless `precisions` says otherwise."""
        return self.precisions.get(stage, Precision.FP32)

    def graph(self, stage: str) -> ir.Model | None:
        """The stage's deployed graph; None for an engine and for a PyTorch module."""
        graph = self.graphs.get(stage)
        return ir.load(graph) if isinstance(graph, Path) else graph

    def graph_to_trace(self, stage: str) -> ir.Model | None:
        """The graph that the stage's session runs."""
        return self.traced.get(stage) or self.graph(stage)


def open_candidate(
    bundle: Path, options: LoadOptions = DEFAULTS, loras: Sequence[LoraChoice] = ()
) -> Candidate:
    """Open a bundle. Every file is hashed first; 16-bit stages on a CPU get their rounding written into the graph.

    Args:
        loras: are given to the graphs as inputs.

    Raises:
        BundleError: the bundle is damaged.
        SessionError: a stage cannot be opened on this machine.
        UsageError: the bundle has no such backend or precision, or a LoRA does not fit it or cannot be an input.
    """
    parts = load_parts(bundle, options)
    sessions, chosen = dict(parts.sessions), dict(parts.artifacts)
    encoder = find_encoder(parts.manifest, chosen[DENOISER], options)
    if parts.encoder is not None and encoder is not None:
        on_gpu = row_of(encoder.backend).same_gpu
        chosen[VAE_ENCODER] = encoder
        # On a CPU it is opened at once, because only an open session tells whether it computes in a wider type.
        sessions[VAE_ENCODER] = (
            parts.encoder if on_gpu else open_checked(bundle, encoder, options, parts.device)
        )
    native: dict[str, Session] = {}
    traced: dict[str, ir.Model] = {}
    for name, artifact in chosen.items():
        graph = graph_of(parts.manifest, name, artifact)
        if graph is not None and sessions[name].device.widens(artifact.precision):
            native[name] = sessions[name]
            sessions[name], traced[name] = open_rounded(
                bundle / graph.file.path, graph, threads=options.threads
            )
    how = f"{parts.chosen}; rounding to 16 bits is written into the graph" if native else parts.chosen
    if loras:
        reopener = Reopener(bundle, parts.manifest, chosen, options, parts.device)
        for opened in (sessions, native):
            opened.update(_with_loras(reopener, opened, loras))
        how = f"{how}; LoRAs as inputs: {', '.join(f'{c.file.name}:{c.scale:g}' for c in loras)}"
    conditioning = parts.conditioning.with_sessions(sessions)
    records = _records(bundle, chosen)
    return Candidate(
        pipeline=Pipeline(parts.manifest, sessions, conditioning, chosen=how),
        graphs={n: bundle / a.file.path for n, a in chosen.items() if is_graph(a)},
        traced=traced,
        precisions={name: artifact.precision for name, artifact in chosen.items()},
        native=native,
        plans={stage: record.plans() for stage, record in records.items()},
        bases={stage: record.base for stage, record in records.items() if record.base is not None},
        calibrations={stage: r.calibration for stage, r in records.items() if r.calibration is not None},
        budgets={stage: record.recipe.budget for stage, record in records.items()},
        artifacts=chosen,
        certified=parts.artifacts,
        bundle=bundle,
        given=tuple(loras),
    )


def _with_loras(
    reopener: Reopener, sessions: Mapping[str, Session], choices: Sequence[LoraChoice]
) -> dict[str, Session]:
    """Those of the sessions whose graphs the LoRAs change, with them. Raises UsageError as `given_loras`."""
    given, feeds, _ = given_loras(reopener, sessions, choices)
    return {stage: WithLoras(base, partial(dict, feeds[stage])) for stage, base in given.sessions.items()}


def graph_of(manifest: Manifest, stage: str, artifact: Artifact) -> Artifact | None:
    """The graph that an artifact was made from, which may be the artifact itself; None if the bundle has none."""
    of_stage = (artifact, *manifest.stages[stage].artifacts)
    return next((a for a in of_stage if is_graph(a) and a.precision is artifact.precision), None)


def _records(bundle: Path, artifacts: Mapping[str, Artifact]) -> dict[str, QuantRecord]:
    return {
        stage: read_record(bundle / artifact.quantization.path)
        for stage, artifact in artifacts.items()
        if artifact.quantization is not None
    }


def check_bundle(bundle: Path) -> Manifest:
    """Read the manifest, before any expensive work begins.

    Raises:
        BundleError: the manifest is missing or damaged. UsageError: the bundle has no stages.
    """
    manifest = load_manifest(bundle)
    if not manifest.stages:
        raise UsageError(f"{bundle} has no stages", hint="build the bundle again")
    return manifest


def fit_feeds(feeds: Mapping[str, Tensor], spec: StageSpec) -> dict[str, Array]:
    """The feeds in the element types that a side takes. Values that a type cannot hold exactly are rounded."""
    return {tensor.name: cast(to_numpy(feeds[tensor.name]), tensor.dtype) for tensor in spec.inputs}


def cast(array: Array, dtype: DType) -> Array:
    """The array in another element type. bf16 arrays are uint16 arrays with the same bits."""
    if dtype is DType.BFLOAT16:
        import torch

        if array.dtype == np.uint16:
            return array
        return from_torch(torch.from_numpy(np.ascontiguousarray(array, np.float32)).to(torch.bfloat16))
    if array.dtype == np.uint16 and dtype in (DType.FLOAT32, DType.FLOAT16):
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(numpy_dtype(dtype), copy=False)
