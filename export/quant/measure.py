"""Measure fidelity and speed of a quantized denoiser against the unquantized one of the same bundle."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np

from ditc.runtime.atomic import write_atomic
from ditc.runtime.bundle.jsondata import from_json, to_json
from ditc.runtime.bundle.manifest import Artifact, Manifest
from ditc.runtime.load_options import LoadOptions
from ditc.runtime.loader import load_parts
from ditc.runtime.machine import library_versions, this_machine
from ditc.runtime.metrics import psnr, relative_l2
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request
from ditc.runtime.session import ComputeDevice, Session, Tensor
from ditc.runtime.sessions.opening import open_session
from ditc.runtime.sessions.registry import is_graph
from ditc.runtime.spec import DENOISER, Precision, StageSpec
from ditc.runtime.step_contract import BATCH

FILE = "quantized.json"
PROMPTS = ("a red heart", "a photo of a dog", "three green apples", "a lighthouse at night")
SEED = 0
# Steps of each denoiser are timed in turn, so that both meet the same load: at most so many, but after some seconds no
# more than the quartiles need. A full-size network on a CPU takes seconds per step.
TIMED_STEPS, FEWEST_STEPS, TIMED_SECONDS = 20, 4, 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Fidelity and speed of one quantized denoiser on one machine.

    Attributes:
        manifest: digest of the bundle's manifest.
        artifact: build key of the quantized artifact.
        psnr_db, worst_db: mean and smallest PSNR of the pictures, in dB.
        latents_rel_l2: relative L2 error of the final latents.
        step_ms, base_step_ms: median time of a step of the quantized and of the unquantized denoiser.
        speedup: median over the steps of unquantized time / quantized time.
        speedup_low, speedup_high: quartiles of that ratio.
    """

    manifest: str
    artifact: str
    recipe: str
    machine: str
    versions: dict[str, str]
    prompts: int
    num_inference_steps: int
    psnr_db: float
    worst_db: float
    latents_rel_l2: float
    step_ms: float
    base_step_ms: float
    speedup: float
    speedup_low: float
    speedup_high: float


def unquantized(manifest: Manifest, quantized: Artifact) -> Artifact | None:
    """The bundle's denoiser with the same backend and inputs and without 8-bit GEMMs; None if there is none."""
    others = manifest.stages[DENOISER].artifacts
    return next(
        (
            a
            for a in others
            if a.backend is quantized.backend and a.recipe is None and a.spec.inputs == quantized.spec.inputs
        ),
        None,
    )


def measure(
    bundle: Path,
    manifest: Manifest,
    precision: Precision,
    *,
    threads: int = 0,
    on_progress: Callable[[str], None] = lambda _: None,
) -> Measurement | None:
    """Draw with both denoisers from the same noise and time their steps.

    Args:
        precision: of the quantized denoiser.
        threads: CPU threads per session; 0 leaves the number to ONNX Runtime.
        on_progress: is told what is being done, because steps of a large network take seconds on a CPU.

    Returns:
        None if the bundle has no unquantized denoiser.
    """
    candidates = manifest.stages[DENOISER].artifacts
    quantized = next(a for a in candidates if a.precision is precision and is_graph(a))
    base = unquantized(manifest, quantized)
    if base is None:
        return None
    options = LoadOptions(backend=quantized.backend, precision=precision, threads=threads)
    parts = load_parts(bundle, options)
    other = open_session(bundle / base.file.path, base, options)
    pair = {"quantized": _Timed(parts.sessions[DENOISER]), "unquantized": _Timed(other)}
    prompts = list(PROMPTS[: quantized.spec.profile[BATCH].max])
    request = Request(prompt=prompts, seed=SEED, output_type="np", allow_uniform=True)
    drawn = Pipeline(parts.manifest, parts.sessions, parts.conditioning)
    pictures, latents = {}, {}
    for name, session in pair.items():
        pipeline = drawn.with_sessions({DENOISER: session})
        plan = pipeline.plan(request)
        states = list(pipeline.start(plan))
        for step in pipeline.run(states):
            states[step.chunk] = step.state
            on_progress(f"comparing pictures: {name} denoiser, step {step.index + 1} of {step.total}")
        latents[name] = np.concatenate([np.asarray(state.latents) for state in states])
        on_progress(f"comparing pictures: decoding those of the {name} denoiser")
        pictures[name] = pipeline.decode(states, plan)
    each = [psnr(a, b) for a, b in zip(pictures["quantized"], pictures["unquantized"], strict=True)]
    on_progress("timing steps of both denoisers")
    times = _time_alternately(pair)
    ratios = np.array(times["unquantized"]) / np.array(times["quantized"])
    for opened in (*parts.sessions.values(), other):
        opened.close()
    return Measurement(
        manifest=manifest.digest,
        artifact=quantized.key,
        recipe=quantized.recipe or "",
        machine=str(this_machine()),
        versions=library_versions(),
        prompts=len(prompts),
        num_inference_steps=plan.num_inference_steps,
        psnr_db=float(np.mean(each)),
        worst_db=float(np.min(each)),
        latents_rel_l2=relative_l2(latents["quantized"], latents["unquantized"]),
        step_ms=1e3 * median(times["quantized"]),
        base_step_ms=1e3 * median(times["unquantized"]),
        speedup=float(np.median(ratios)),
        speedup_low=float(np.quantile(ratios, 0.25)),
        speedup_high=float(np.quantile(ratios, 0.75)),
    )


def known_measurement(bundle: Path, manifest: Manifest, artifact: str) -> Measurement | None:
    """The measurement of this artifact in this bundle, on this machine and with these versions, or None."""
    here = {
        "manifest": manifest.digest,
        "artifact": artifact,
        "machine": str(this_machine()),
        "versions": library_versions(),
    }
    try:
        entries = json.loads((bundle / FILE).read_bytes())
        found = [entry for entry in entries if here.items() <= entry.items()]
        return from_json(Measurement, found[0]) if found else None
    except (OSError, ValueError, AttributeError, TypeError):  # the file is missing or damaged: measure again
        return None


def save_measurement(measurement: Measurement, bundle: Path) -> Path:
    """Add it to quantized.json beside the manifest, where it replaces an older one of the same artifact and machine."""
    path = bundle / FILE
    slot = (measurement.artifact, measurement.machine)
    try:
        kept = [e for e in json.loads(path.read_bytes()) if (e["artifact"], e["machine"]) != slot]
    except (OSError, ValueError, KeyError, TypeError):  # the file is missing or damaged: it is made anew
        kept = []
    return write_atomic(path, json.dumps([*kept, to_json(measurement)], indent=1) + "\n")


class _Timed:
    """A session that remembers its last feeds, so that a real step can be run again and timed."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._feeds: Mapping[str, Tensor] = {}

    @property
    def spec(self) -> StageSpec:
        return self._session.spec

    @property
    def device(self) -> ComputeDevice:
        return self._session.device

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self._feeds = dict(feeds)
        return self._session.run(feeds)

    def close(self) -> None:
        """Do nothing: the owner of the session closes it."""

    def time(self) -> float:
        """Run the last step again, and return its time in seconds."""
        begun = perf_counter()
        self._session.run(self._feeds)
        return perf_counter() - begun


def _time_alternately(sessions: Mapping[str, _Timed]) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in sessions}
    end = perf_counter() + TIMED_SECONDS
    for index in range(TIMED_STEPS):
        if index >= FEWEST_STEPS and perf_counter() > end:
            break
        for name, session in sessions.items():
            times[name].append(session.time())
    return times
