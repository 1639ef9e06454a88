"""Write the result of a parity run into the bundle's certificate, with the settings that decide what it proves."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ditc.parity.context import Context
from ditc.parity.report.text import certificate_lines
from ditc.parity.results import Report
from ditc.runtime.bundle.certificate import ParitySettings, Record, add_record, load_certificate, record
from ditc.runtime.bundle.certification import sign_record, why_weak
from ditc.runtime.bundle.manifest import Manifest
from ditc.runtime.machine import this_machine
from ditc.runtime.tolerances import Level

log = logging.getLogger(__name__)


def certify(bundle: Path, context: Context, report: Report, private_key: Any = None) -> None:
    """Write the result of a run of all levels into certificate.json.

    A result that passed stays where the new one passed too, but shows less: because it compared less, as with a
    reference file, had weaker settings, or has no signature.

    Args:
        private_key: signs the result; None for no signature.
    """
    manifest, artifacts = context.candidate.manifest, context.candidate.certified
    subject = report.subject
    source = "a checkpoint" if context.saved_reference is None else "a reference file"
    names = {"checkpoint", "weights"} & subject.keys()
    reference = {"source": source, **{name: str(subject[name]) for name in sorted(names)}}
    made = record(certificate_lines(report), reference, settings_of(context))
    if private_key is not None:
        made = sign_record(made, private_key, manifest, artifacts, "parity")
    if not made.failed and (why := why_weak(made, manifest)):
        log.warning("this result does not certify the bundle: %s", why)
    entries = load_certificate(bundle, manifest).of(artifacts)
    known = next((entry.parity for entry in entries if entry.machine == this_machine()), None)
    if (
        known is not None
        and known.passed
        and made.passed
        and _worth(known, manifest) > _worth(made, manifest)
    ):
        log.warning("certificate.json keeps the result of %s, which shows more", known.date)
        return
    add_record(bundle, manifest, artifacts, parity=made)


def settings_of(context: Context) -> ParitySettings:
    """What the run drew and how it judged."""
    settings = context.settings
    saved, upstream = context.saved_reference, context.upstream_name
    used = bool(saved.upstream) if saved is not None else not context.why_no_upstream
    return ParitySettings(
        levels=tuple(Level),
        prompts=tuple(dict.fromkeys(case.prompt for case in settings.cases)),
        seeds=tuple(dict.fromkeys(case.seed for case in settings.cases)),
        upstream=upstream if used else "",
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=float(settings.guidance_scale),
        height=settings.height,
        width=settings.width,
        budget=context.eight_bit_budget,
        loosened=context.loosened,
    )


def _worth(made: Record, manifest: Manifest) -> tuple[bool, bool, int]:
    return not why_weak(made, manifest), bool(made.signature), made.checked
