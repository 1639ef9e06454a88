"""Loading a bundle: choose one artifact per stage, check the files, and open a session for each stage."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ditc.runtime.bundle.bench_record import BenchEntry, find_entry
from ditc.runtime.bundle.certification import Certification, check_certified, find_certification
from ditc.runtime.bundle.integrity import check_files
from ditc.runtime.bundle.manifest import Artifact, FileRef, Manifest, load_manifest
from ditc.runtime.bundle.private_copy import check_possible, private_copy
from ditc.runtime.bundle.signature import check_signature
from ditc.runtime.conditioning import Conditioning
from ditc.runtime.cores import default_threads
from ditc.runtime.errors import BundleError, SessionError, UsageError
from ditc.runtime.expected_gpu import check_cpu_is_meant
from ditc.runtime.gpu import select_gpu
from ditc.runtime.load_options import DEFAULTS, LoadOptions
from ditc.runtime.preference import in_order, why_not
from ditc.runtime.schedulers import coefficient_table
from ditc.runtime.session import ComputeDevice, Session
from ditc.runtime.sessions.device import Device, open_device
from ditc.runtime.sessions.opening import check_artifact, check_runs, open_session
from ditc.runtime.sessions.registry import AUTO, available_backends, find_row, row_of
from ditc.runtime.sessions.residency import OnDemandSession, Residency
from ditc.runtime.spec import (
    CONDITIONER,
    CONTROL_CONDITIONER,
    CONTROLNET,
    DENOISER,
    EIGHT_BITS,
    VAE_DECODER,
    VAE_DECODER_NEXT,
    VAE_ENCODER,
    Backend,
    Precision,
)
from ditc.runtime.text import Tokenizer
from ditc.runtime.text_encoder import TextEncoder

log = logging.getLogger(__name__)

REBUILD = "ditc build CHECKPOINT -o BUNDLE --backend ... --precision ..."


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts that a Pipeline is made of.

    Attributes:
        chosen: the chosen backend and precision, and the reason, in one line.
        artifacts: the artifact that each stage runs.
        certification: what the bundle's certificate says about these artifacts on this machine.
        device: the GPU that the engines share; None if no stage runs an engine.
        encoder: the VAE's encoder, which is checked and opened when the first image is encoded; None if the bundle has
            none that can run here. The certification does not cover it.
    """

    manifest: Manifest
    sessions: dict[str, Session]
    conditioning: Conditioning
    chosen: str
    artifacts: dict[str, Artifact]
    certification: Certification
    device: Device | None = None
    encoder: Session | None = None


def load_parts(bundle: Path, options: LoadOptions) -> Parts:
    """Load everything that a Pipeline is made of. The caller runs the self-test, which may be what a certificate lacks.

    Raises:
        BundleError: a file is damaged or does not belong to the bundle, or a certificate is required and parity has
            not proven the artifacts on any machine.
        UsageError: nothing in the bundle fits this machine and the options, or the GPU that they name is not used.
        SessionError: a stage cannot be opened, or CUDA has already started on another GPU.
    """
    if options.private_copy:
        check_possible()
    manifest = load_manifest(bundle)
    if options.require_signature is not None:
        check_signature(bundle, manifest, Path(options.require_signature))
    _check_golden_table(manifest)
    select_gpu(options.gpu)
    chosen, reason = choose_here(bundle, manifest, options)
    log.info("%s", reason)
    certification = find_certification(bundle, manifest, chosen, options.require_signature)
    if options.require_certificate:
        check_certified(bundle, certification.why_unproven())
    check_files(bundle, _files(manifest, chosen.values()))
    tokenizers = _read_tokenizers(bundle, manifest, private=options.private_copy)
    device = open_device() if any(row_of(a.backend).same_gpu for a in chosen.values()) else None
    sessions = _open_all(bundle, manifest, chosen, options, device)
    encoders = [
        TextEncoder(spec, tokenizer, sessions[spec.stage])
        for spec, tokenizer in zip(manifest.text, tokenizers, strict=True)
    ]
    texts = (CONDITIONER, CONTROL_CONDITIONER, *(spec.stage for spec in manifest.text))
    key = "+".join(chosen[name].key for name in texts if name in chosen)
    conditioning = Conditioning(
        encoders,
        sessions[CONDITIONER],
        key=key,
        control_conditioner=sessions.get(CONTROL_CONDITIONER),
        skips_padding=all(session.device.kind == "cpu" for session in sessions.values()),
    )
    encoder = None
    if VAE_ENCODER not in chosen:
        encoder = _encoder(bundle, manifest, chosen[DENOISER], options, device)
    return Parts(manifest, sessions, conditioning, reason, chosen, certification, device, encoder)


def choose_here(bundle: Path, manifest: Manifest, options: LoadOptions) -> tuple[dict[str, Artifact], str]:
    """`choose`, with what the bundle's record says about machines of this kind."""
    automatic = options.named_backend == AUTO
    entry = find_entry(bundle, manifest, options.threads or default_threads()) if automatic else None
    return choose(manifest, options, entry)


def choose(
    manifest: Manifest, options: LoadOptions = DEFAULTS, entry: BenchEntry | None = None
) -> tuple[dict[str, Artifact], str]:
    """Choose one artifact for each stage that a picture needs; the second result says in one line which and why.

    The denoiser decides. The backend is the first one, in order of preference (preference.py), that can run on this
    machine and for which the bundle has a denoiser in the requested precision. The other stages take the same backend
    if they can, else another one that can run; in 8 bits only where the options name the stage. Artifacts of backends
    that this version of ditc does not know are skipped.

    Args:
        entry: times that were measured on a machine of this kind.

    Raises:
        UsageError: the bundle has no denoiser that can run on this machine and fits the options, or lacks another stage
            in the precision that they name for it, or holds it in 8 bits alone and they do not name it.
        BundleError: a stage is missing, or has no artifact that fits the denoiser.
        SessionError: the options name a backend whose engine was not built for this machine's GPU or library.
    """
    runnable, backend, precision = available_backends(), options.named_backend, options.precision
    if DENOISER not in manifest.stages:
        raise BundleError(f"the bundle has no {DENOISER}", hint="build it again")
    control: tuple[str, ...] = ()
    if CONTROLNET in manifest.stages:  # what a ControlNet reads is encoded by the VAE
        names = (CONTROL_CONDITIONER, CONTROLNET, VAE_ENCODER)
        control = tuple(name for name in names if name in manifest.stages)
    in_parts = VAE_DECODER_NEXT in manifest.stages
    decoder = (VAE_DECODER, VAE_DECODER_NEXT) if in_parts else (VAE_DECODER,)
    stages = (*(spec.stage for spec in manifest.text), CONDITIONER, *control, DENOISER, *decoder)
    _check_named_stages(options, stages)
    denoisers = manifest.stages[DENOISER].artifacts
    unknown = sorted({a.backend for a in denoisers if find_row(a.backend) is None})
    if unknown:
        log.info("skipped: this version of ditc does not know the backend %s", ", ".join(unknown))
    asked = [a for a in denoisers if precision is None or a.precision == precision]
    wanted, later = in_order(runnable, asked, entry) if backend == AUTO else ([Backend(backend)], {})
    for candidate in wanted:
        fitting = [
            a for a in asked if a.backend is candidate and (backend != AUTO or _is_for_this_machine(a))
        ]
        if fitting and candidate in runnable:
            best = min(fitting, key=lambda a: (bool(why_not(a)), list(Precision).index(a.precision)))
            chosen = {
                name: best if name == DENOISER else _companion(manifest, name, best, options)
                for name in stages
            }
            if CONTROL_CONDITIONER in chosen:  # its outputs are inputs of the ControlNet
                chosen[CONTROL_CONDITIONER] = _companion(
                    manifest, CONTROL_CONDITIONER, chosen[CONTROLNET], options
                )
            if VAE_DECODER_NEXT in chosen:  # it takes what the other one hands on
                chosen[VAE_DECODER] = _companion(manifest, VAE_DECODER, chosen[VAE_DECODER_NEXT], options)
            eight = [f"{n} {a.precision.value}" for n, a in chosen.items() if a.recipe and n != DENOISER]
            reason = f"{candidate} {', '.join((best.precision.value, *eight))}: {runnable[candidate]}"
            passed = [f"not {name}: {why}" for name, why in later.items() if name is not candidate]
            return chosen, "; ".join((reason, *passed))
    for artifact in denoisers:
        if artifact.backend in wanted and artifact.backend not in runnable:
            # One of these raises an error that says why the named backend cannot run.
            check_artifact(artifact)
            check_runs(artifact)
    have = sorted({f"{a.backend} {a.precision.value}" for a in denoisers})
    choices = {"backend": "" if backend == AUTO else backend, "precision": precision}
    named = [f"--{name} {choice}" for name, choice in choices.items() if choice]
    rebuild = f"build one that fits: {' '.join(('ditc build CHECKPOINT -o BUNDLE', *named))}"
    raise UsageError(
        f"the bundle holds denoisers for {', '.join(have)}; requested: {backend}, {precision or 'any precision'}; "
        f"this machine runs {', '.join(runnable)}",
        hint=f"update ditc, which does not know {', '.join(unknown)}, or {rebuild}" if unknown else rebuild,
    )


def _is_for_this_machine(artifact: Artifact) -> bool:
    """Whether an artifact was built for this machine's GPU and libraries. "auto" skips the others."""
    try:
        check_artifact(artifact)
    except SessionError as e:
        log.info("skipped: %s", e)
        return False
    return True


def _open_all(
    bundle: Path,
    manifest: Manifest,
    chosen: Mapping[str, Artifact],
    options: LoadOptions,
    device: Device | None,
) -> dict[str, Session]:
    """Open a session for each stage. If one cannot be opened, those before it are closed again."""
    sessions: dict[str, Session] = {}
    residency = Residency()
    if device is not None:
        device.enter()  # in addition to the sessions: it must stay open while no stage is loaded

    try:
        for name, artifact in chosen.items():
            open_it, row = _opener(bundle, artifact, options, device), row_of(artifact.backend)
            if options.low_vram and row.same_gpu:
                where = ComputeDevice(kind="cuda", name=row.name)
                sessions[name] = OnDemandSession(artifact.spec, open_it, residency, device=where)
            else:
                sessions[name] = open_it()
        if sessions[DENOISER].device.kind == "cpu":
            check_cpu_is_meant(manifest, options)
    except BaseException:
        for session in sessions.values():
            session.close()
        if device is not None:
            device.leave()
        raise
    return sessions


def _opener(
    bundle: Path, artifact: Artifact, options: LoadOptions, device: Device | None
) -> Callable[[], Session]:
    def open_it() -> Session:
        if not options.private_copy:
            return open_session(bundle / artifact.file.path, artifact, options, device)
        with private_copy(bundle, (artifact.file, *artifact.data)) as folder:
            return open_session(folder / artifact.file.path, artifact, options, device)

    return open_it


def _encoder(
    bundle: Path, manifest: Manifest, denoiser: Artifact, options: LoadOptions, device: Device | None
) -> Session | None:
    """The VAE's encoder. Most requests have no image, so its files are read when the first one has."""
    artifact = find_encoder(manifest, denoiser, options)
    if artifact is None:
        return None
    row = row_of(artifact.backend)
    if row.same_gpu and device is None:
        return None

    def check_and_open() -> Session:
        return open_checked(bundle, artifact, options, device)

    where = ComputeDevice(kind="cuda" if row.same_gpu else "cpu", name=row.name)
    return OnDemandSession(artifact.spec, check_and_open, Residency(), device=where)


def open_checked(bundle: Path, artifact: Artifact, options: LoadOptions, device: Device | None) -> Session:
    """Check the artifact's files and open it.

    Raises:
        BundleError: a file is damaged.
        SessionError: the artifact cannot be opened on this machine.
    """
    check_files(bundle, artifact.files)
    return _opener(bundle, artifact, options, device)()


def find_encoder(manifest: Manifest, denoiser: Artifact, options: LoadOptions) -> Artifact | None:
    """The artifact of the VAE's encoder beside this denoiser; None if the bundle has none that can run here."""
    if VAE_ENCODER not in manifest.stages:
        return None
    try:
        return _companion(manifest, VAE_ENCODER, denoiser, options)
    except BundleError:
        return None


def _read_tokenizers(bundle: Path, manifest: Manifest, *, private: bool) -> list[Tokenizer]:
    paths = [spec.tokenizer for spec in manifest.text]
    if not private:
        return [Tokenizer(bundle / path) for path in paths]
    with private_copy(bundle, [ref for ref in manifest.files if ref.path in paths]) as folder:
        return [Tokenizer(folder / path) for path in paths]


def _check_named_stages(options: LoadOptions, stages: Sequence[str]) -> None:
    for name in options.stage_precisions:
        if name not in stages or name == DENOISER:
            raise UsageError(
                f"--stage-precision names {name}, but a picture needs {', '.join(stages)}",
                hint="--precision sets the denoiser's",
            )


def _companion(manifest: Manifest, stage: str, denoiser: Artifact, options: LoadOptions) -> Artifact:
    """The stage's artifact that fits the chosen denoiser best: if possible, of the same backend and precision.

    The conditioner's outputs are inputs of the denoiser, so the element types of tensors with the same name must agree.
    An artifact in 8 bits is taken only where the options say so.

    Raises:
        BundleError: the stage is missing, or has no artifact that fits and can run here.
        UsageError: it has none in the precision that the options name, or only in 8 bits, which they do not name.
    """
    asked = options.stage_precisions.get(stage)
    needed = {spec.name: spec.dtype for spec in denoiser.spec.inputs}

    def fits(artifact: Artifact) -> bool:
        return all(needed.get(out.name, out.dtype) == out.dtype for out in artifact.spec.outputs)

    def rank(artifact: Artifact) -> tuple[bool, bool, bool, int]:
        return (
            bool(why_not(artifact)),
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
            f"no artifact of {stage} fits the {denoiser.backend} {denoiser.precision.value} denoiser",
            hint="build all stages together: ditc build CHECKPOINT -o BUNDLE",
        )
    wanted = [a for a in usable if (a.precision not in EIGHT_BITS if asked is None else a.precision is asked)]
    if not wanted:
        have = sorted({f"{a.backend} {a.precision.value}" for a in usable})
        eight = f"{stage}={usable[0].precision.value}"
        raise UsageError(
            f"the bundle holds {stage} for {', '.join(have)}; requested: "
            + (
                f"{asked.value}"
                if asked is not None
                else "not 8 bits, because --stage-precision does not name it"
            ),
            hint=f"--stage-precision {eight}" if asked is None else f"build one that fits: {REBUILD}",
        )
    return min(wanted, key=rank)


def _files(manifest: Manifest, artifacts: Iterable[Artifact]) -> list[FileRef]:
    tokenizers = {spec.tokenizer for spec in manifest.text}
    return [
        *(ref for artifact in artifacts for ref in artifact.files),
        *(ref for ref in manifest.files if ref.path in tokenizers),
    ]


def _check_golden_table(manifest: Manifest) -> None:
    """Refuse a bundle if this runtime computes a different schedule from the one that it was built with."""
    golden = manifest.golden_table
    table = coefficient_table(
        manifest.scheduler,
        golden.num_inference_steps,
        image_seq_len=manifest.latents.num_patches(manifest.defaults.height, manifest.defaults.width),
    )
    timesteps = np.asarray(golden.timesteps, np.float32)
    coefficients = np.asarray(golden.coefficients, np.float32)
    same = np.array_equal(table.timesteps, timesteps) and table.coefficients.shape == coefficients.shape
    # The C libraries of different systems differ in the last bits of log and exp.
    if not same or not np.allclose(table.coefficients, coefficients, rtol=1e-6, atol=1e-7):
        raise BundleError(
            f"this version of ditc computes different scheduler coefficients from the version that built the bundle "
            f"({manifest.tools.get('ditc', 'unknown version')})",
            hint="build the bundle again with this version",
        )
