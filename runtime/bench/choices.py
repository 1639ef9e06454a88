"""What a benchmark compares: the candidates (a backend in a precision) and the cases (size, batch, steps)."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ditc.runtime.bundle.manifest import Artifact, Manifest
from ditc.runtime.errors import SessionError, UsageError
from ditc.runtime.limits import MAX_STEPS
from ditc.runtime.load_options import LoadOptions
from ditc.runtime.loader import choose
from ditc.runtime.preference import why_not
from ditc.runtime.schedulers import coefficient_table
from ditc.runtime.sessions.opening import check_artifact, check_runs
from ditc.runtime.sessions.registry import AUTO, row_of
from ditc.runtime.sizes import check_size
from ditc.runtime.spec import DENOISER, VAE_DECODER, Backend, Precision
from ditc.runtime.step_contract import BATCH
from ditc.runtime.vae import check_tiles

# Every case is drawn dozens of times by every candidate: more than this is a typing error, not a plan.
MAX_CASES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is drawn: `batch` pictures of height x width pixels together, each with a prompt of its own."""

    height: int
    width: int
    batch: int
    steps: int

    def __str__(self) -> str:
        pictures = "1 picture" if self.batch == 1 else f"{self.batch} pictures"
        return f"{self.height}x{self.width}, {pictures}, {self.steps} step{'' if self.steps == 1 else 's'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One way to run the bundle.

    Attributes:
        artifacts: the artifact that runs each stage.
        options: how the bundle is loaded for it.
    """

    backend: Backend
    precision: Precision
    artifacts: dict[str, Artifact]
    options: LoadOptions

    @property
    def name(self) -> str:
        return f"{self.backend} {self.precision.value}"


def select_candidates(
    manifest: Manifest, backends: Sequence[str], precisions: Sequence[str], options: LoadOptions
) -> list[Candidate]:
    """The denoisers of the bundle that are asked for, each with the other stages that run beside it.

    Args:
        backends, precisions: those to compare; empty takes all that this machine can run.
        options: how each of them is loaded, but for backend and precision.

    Raises:
        UsageError: a name is unknown, or the bundle has no denoiser that is asked for and can run here.
        SessionError: a backend that is named cannot run here.
    """
    if options.named_backend != AUTO and not backends:  # --provider and --device belong to one backend
        backends = [options.named_backend]
    rows = [row_of(name) for name in dict.fromkeys(backends)]
    wanted = {_precision(name) for name in precisions}
    held = manifest.stages[DENOISER].artifacts
    asked = [
        artifact
        for artifact in held
        if (not rows or artifact.backend in {row.name for row in rows})
        and (not wanted or artifact.precision in wanted)
    ]
    has = ", ".join(dict.fromkeys(f"{a.backend} {a.precision.value}" for a in held))
    for kind, names in (("backend", [row.name for row in rows]), ("precision", sorted(wanted))):
        for name in names:
            if not any(getattr(artifact, kind) == name for artifact in asked):
                raise UsageError(
                    f"the bundle has no denoiser for {kind} {name} among those asked for; it has {has}",
                    hint="choose among these, or build another: ditc build CHECKPOINT -o BUNDLE --backend ... "
                    "--precision ...",
                )
    reasons = {artifact.key: _why_not_here(artifact) for artifact in asked}
    for row in rows:
        own = [artifact for artifact in asked if artifact.backend is row.name]
        if all(reasons[artifact.key] for artifact in own):
            check_artifact(own[0])
            check_runs(own[0])
            raise SessionError(reasons[own[0].key], hint=f"leave out --backend {row.name}")
    runnable = [artifact for artifact in asked if not reasons[artifact.key]]
    if not runnable:
        raise UsageError(
            f"this machine can run none of {has}: {next(iter(reasons.values()), '')}",
            hint="ditc doctor shows what is missing",
        )
    pairs = dict.fromkeys((artifact.backend, artifact.precision) for artifact in runnable)
    return [_candidate(manifest, backend, precision, options) for backend, precision in pairs]


def select_cases(
    manifest: Manifest,
    candidates: Sequence[Candidate],
    sizes: Sequence[str],
    batches: Sequence[int],
    steps: Sequence[int],
) -> list[Case]:
    """Every combination of the given sizes, batches and numbers of steps; what is not given is the bundle's default.

    Raises:
        UsageError: a value is not one, or a candidate was not built for it. The message names the value and the range.
    """
    defaults = manifest.defaults
    pairs = [_size(text) for text in dict.fromkeys(sizes)] or [(defaults.height, defaults.width)]
    counts = list(dict.fromkeys(batches)) or [1]
    numbers = list(dict.fromkeys(steps)) or [defaults.num_inference_steps]
    cases = [
        Case(height=height, width=width, batch=batch, steps=number)
        for (height, width), batch, number in itertools.product(pairs, counts, numbers)
    ]
    if len(cases) > MAX_CASES:
        raise UsageError(
            f"{len(pairs)} sizes, {len(counts)} batches and {len(numbers)} numbers of steps are {len(cases)} cases",
            hint=f"measure at most {MAX_CASES} in one run",
        )
    for case, candidate in itertools.product(cases, candidates):
        _check_case(manifest, candidate, case)
    return cases


def _candidate(manifest: Manifest, backend: Backend, precision: Precision, options: LoadOptions) -> Candidate:
    options = replace(options, backend=backend, precision=precision.value)
    artifacts, _ = choose(manifest, options)
    return Candidate(backend=backend, precision=precision, artifacts=artifacts, options=options)


def _why_not_here(artifact: Artifact) -> str:
    """Why this machine cannot run the artifact; "" if it can."""
    try:
        check_artifact(artifact)
        check_runs(artifact)
    except SessionError as e:
        return str(e)
    return why_not(artifact)


def _precision(name: str) -> Precision:
    if name not in set(Precision):
        raise UsageError(f"precision {name!r:.40} is unknown", hint=f"choose one of {', '.join(Precision)}")
    return Precision(name)


def _size(text: str) -> tuple[int, int]:
    """The height and the width in pixels that "512" or "512x768" names."""
    found = re.fullmatch(r"([0-9]{1,6})(?:x([0-9]{1,6}))?", text)
    if found is None:
        raise UsageError(
            f"size {text!r:.40} is not a size", hint="write HEIGHTxWIDTH in pixels, such as 512x768, or 512"
        )
    return int(found[1]), int(found[2] or found[1])


def _check_case(manifest: Manifest, candidate: Candidate, case: Case) -> None:
    denoiser, decoder = candidate.artifacts[DENOISER].spec, candidate.artifacts[VAE_DECODER].spec
    defaults, scale = manifest.defaults, manifest.latents.scale_factor
    check_size(case.height, case.width, manifest.latents, denoiser, defaults)
    cells = (case.height // scale, case.width // scale)
    check_tiles(*cells, decoder, defaults.tiling, scale=scale, default=defaults.tiling)
    most = denoiser.profile[BATCH].max
    if not 1 <= case.batch <= most:
        raise UsageError(
            f"batch {case.batch} is not from 1 to {most}, which the denoiser of {candidate.name} was built for",
            hint=f"use at most --batch {most}",
        )
    if not 1 <= case.steps <= MAX_STEPS:
        raise UsageError(f"steps {case.steps} is not from 1 to {MAX_STEPS}", hint="leave --steps out")
    coefficient_table(
        manifest.scheduler,
        case.steps,
        columns=manifest.step_contract(denoiser).columns,
        image_seq_len=manifest.latents.num_patches(case.height, case.width),
    )
