"""A bundle to sessions: choose one artifact a stage, check the files, open them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ditc.runtime.bundle.integrity import check_files
from ditc.runtime.bundle.manifest import Artifact, FileRef, Manifest, load_manifest
from ditc.runtime.bundle.signature import check_signature
from ditc.runtime.conditioning import Conditioning, TextEncoder
from ditc.runtime.errors import BundleError, SessionError, UsageError
from ditc.runtime.gpu import check_engine, find_gpu, library_version
from ditc.runtime.schedulers import coefficient_table
from ditc.runtime.session import Session
from ditc.runtime.sessions import ENGINES, available_backends, missing, open_device, open_session
from ditc.runtime.sessions.residency import OnDemandSession, Residency
from ditc.runtime.spec import CONDITIONER, DENOISER, VAE_DECODER, Backend, Precision
from ditc.runtime.text import Tokenizer

if TYPE_CHECKING:
    from ditc.runtime.sessions.device import Device

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Parts:
    """What a Pipeline is made of. chosen: backend and precision, and why. artifacts: what each stage runs.

    device: the GPU that the engines share, None where there are none.
    """

    manifest: Manifest
    sessions: dict[str, Session]
    conditioning: Conditioning
    chosen: str
    artifacts: dict[str, Artifact]
    device: Device | None = None


def load_parts(
    bundle: Path,
    *,
    backend: str,
    precision: str | None,
    threads: int,
    provider: str = "auto",
    low_vram: bool = False,
    require_signature: Path | None = None,
) -> Parts:
    """Everything that a Pipeline is made of.

    Args:
        provider: of ONNX Runtime: auto, cpu, cuda or openvino.
        low_vram: load a stage when it is used and unload the one before; stream weights where the engine can.
        require_signature: refuse a bundle that the owner of this ed25519 public key (PEM) has not signed.

    Raises:
        BundleError: damaged or foreign files. UsageError: nothing in the bundle fits. SessionError: it does not open.
    """
    manifest = load_manifest(bundle)
    if require_signature is not None:
        check_signature(bundle, manifest, require_signature)
    _check_golden_table(manifest)
    if provider != "auto":
        if backend not in ("auto", Backend.ONNXRUNTIME):
            raise UsageError(
                f"provider {provider} is ONNX Runtime's, asked for with backend {backend}",
                hint="leave one of the two out",
            )
        backend = Backend.ONNXRUNTIME.value
    chosen, reason = choose(manifest, backend=backend, precision=precision)
    log.info("%s", reason)
    check_files(bundle, _files(manifest, chosen.values()))
    tokenizers = [Tokenizer(bundle / spec.tokenizer) for spec in manifest.text]
    engines = any(artifact.backend in ENGINES for artifact in chosen.values())
    device = open_device() if engines else None
    sessions = _open_all(bundle, chosen, threads, provider, device, low_vram)
    encoders = [
        TextEncoder(spec, tokenizer, sessions[spec.stage])
        for spec, tokenizer in zip(manifest.text, tokenizers, strict=True)
    ]
    key = "+".join(chosen[name].key for name in (CONDITIONER, *(spec.stage for spec in manifest.text)))
    conditioning = Conditioning(encoders, sessions[CONDITIONER], key=key)
    return Parts(manifest, sessions, conditioning, reason, chosen, device)


def choose(
    manifest: Manifest, *, backend: str = "auto", precision: str | None = None
) -> tuple[dict[str, Artifact], str]:
    """One artifact for each stage that a picture needs, and a sentence that says why.

    The denoiser decides: of the backends that can run here, in their order of preference, the first for which the
    bundle has a denoiser (in the asked precision). The other stages take the same backend, else ONNX Runtime.

    Raises:
        UsageError: an unknown backend or precision, or none that the bundle and this machine share.
        SessionError: an engine was asked for by name that is not for this machine's GPU or library.
    """
    backends = [*ENGINES, Backend.ONNXRUNTIME]  # PyTorch is the references' alone
    if backend not in ("auto", *backends):
        raise UsageError(f"backend {backend!r} is unknown", hint=f"take auto, {', '.join(backends)}")
    if precision is not None and precision not in set(Precision):
        raise UsageError(f"precision {precision!r} is unknown", hint=f"take one of {', '.join(Precision)}")
    runnable = available_backends()
    wanted = list(runnable) if backend == "auto" else [Backend(backend)]
    if DENOISER not in manifest.stages:
        raise BundleError(f"the bundle has no {DENOISER}", hint="build it again")
    denoisers = manifest.stages[DENOISER].artifacts
    for candidate in wanted:
        fitting = [
            a
            for a in denoisers
            if a.backend is candidate
            and (precision is None or a.precision == precision)
            and (backend != "auto" or _serves(a))
        ]
        if fitting and candidate in runnable:
            best = min(fitting, key=lambda a: list(Precision).index(a.precision))
            stages = (*(spec.stage for spec in manifest.text), CONDITIONER, DENOISER, VAE_DECODER)
            chosen = {name: best if name == DENOISER else _companion(manifest, name, best) for name in stages}
            return chosen, f"{candidate.value} {best.precision.value}: {runnable[candidate]}"
    for engine in denoisers:
        if engine.backend in wanted and engine.backend not in runnable:
            check_engine(engine, gpu=find_gpu(), library=library_version(engine.backend))  # says why not
            raise SessionError(
                f"{DENOISER}: {missing(engine.backend)}",
                hint="or run the ONNX Runtime artifact: --backend onnxruntime",
            )
    have = sorted({f"{a.backend.value} {a.precision.value}" for a in denoisers})
    raise UsageError(
        f"the bundle holds denoisers for {', '.join(have)}; asked for {backend} {precision or 'any precision'}; "
        f"this machine runs {', '.join(b.value for b in runnable)}",
        hint="build one that fits: ditc build CHECKPOINT -o BUNDLE --backend ... --precision ...",
    )


def _serves(artifact: Artifact) -> bool:
    """Whether an artifact is for this machine's GPU and libraries; "auto" passes over one that is not."""
    if artifact.backend not in ENGINES:
        return True
    try:
        check_engine(artifact, gpu=find_gpu(), library=library_version(artifact.backend))
    except SessionError as e:
        log.info("passed over: %s", e)
        return False
    return True


def _open_all(
    bundle: Path,
    chosen: Mapping[str, Artifact],
    threads: int,
    provider: str,
    device: Device | None,
    low_vram: bool,
) -> dict[str, Session]:
    """A session for each stage; when one does not open, those before it are closed again."""
    sessions: dict[str, Session] = {}
    residency = Residency()
    if device is not None:
        device.enter()  # the device outlives every stage, loaded or not

    def opener(artifact: Artifact) -> Callable[[], Session]:
        path, engine = bundle / artifact.file.path, artifact.backend in ENGINES
        shared: dict[str, Any] = {"device": device, "stream_weights": low_vram} if engine else {}
        return lambda: open_session(path, artifact, threads=threads, provider=provider, **shared)

    try:
        for name, artifact in chosen.items():
            open_it = opener(artifact)
            if low_vram and artifact.backend in ENGINES:
                sessions[name] = OnDemandSession(
                    artifact.spec, open_it, residency, provider=artifact.backend.value
                )
            else:
                sessions[name] = open_it()
    except BaseException:
        for session in sessions.values():
            session.close()
        if device is not None:
            device.leave()
        raise
    return sessions


def _companion(manifest: Manifest, stage: str, denoiser: Artifact) -> Artifact:
    """The stage's artifact that goes with the denoiser: same backend if there is one; the conditioner's outputs are
    the denoiser's inputs, so its precision must agree in element types."""
    needed = {spec.name: spec.dtype for spec in denoiser.spec.inputs}

    def fits(artifact: Artifact) -> bool:
        return all(needed.get(out.name, out.dtype) == out.dtype for out in artifact.spec.outputs)

    def rank(artifact: Artifact) -> tuple[bool, bool, int]:
        return (
            artifact.backend is not denoiser.backend,
            artifact.precision is not denoiser.precision,
            list(Precision).index(artifact.precision),
        )

    runnable = available_backends()
    if stage not in manifest.stages:
        raise BundleError(f"the bundle has no {stage}", hint="build it again")
    usable = [a for a in manifest.stages[stage].artifacts if a.backend in runnable and fits(a)]
    if not usable:
        raise BundleError(
            f"no artifact of {stage} goes with the {denoiser.backend.value} {denoiser.precision.value} denoiser",
            hint="build all stages together: ditc build CHECKPOINT -o BUNDLE",
        )
    return min(usable, key=rank)


def _files(manifest: Manifest, artifacts: Iterable[Artifact]) -> list[FileRef]:
    tokenizers = {spec.tokenizer for spec in manifest.text}
    return [
        *(ref for artifact in artifacts for ref in artifact.files),
        *(ref for ref in manifest.files if ref.path in tokenizers),
    ]


def _check_golden_table(manifest: Manifest) -> None:
    """Refuse to run a bundle whose schedule this runtime would compute differently."""
    golden = manifest.golden_table
    table = coefficient_table(manifest.scheduler, golden.num_inference_steps)
    timesteps = np.asarray(golden.timesteps, np.float32)
    coefficients = np.asarray(golden.coefficients, np.float32)
    same = np.array_equal(table.timesteps, timesteps) and table.coefficients.shape == coefficients.shape
    # The tolerance is the last bits of libm's log and exp.
    if not same or not np.allclose(table.coefficients, coefficients, rtol=1e-6, atol=1e-7):
        raise BundleError(
            f"this ditc computes other scheduler coefficients than the one that built the bundle "
            f"({manifest.tools.get('ditc', 'unknown version')})",
            hint="build the bundle again with this version",
        )
