"""The model card of a bundle: the README.md that the hub shows, made from the manifest and the certificate alone."""

from __future__ import annotations

from ditc.runtime.bundle.certificate import Certificate, Record
from ditc.runtime.bundle.certification import why_weak
from ditc.runtime.bundle.manifest import Manifest
from ditc.runtime.hub import HubId


def model_card(manifest: Manifest, certificate: Certificate, hub_id: HubId) -> str:
    """The card as Markdown. It names no licence, which is the checkpoint's and not known here."""
    defaults = manifest.defaults
    videos = manifest.latents.has_frames
    drawn = f"{defaults.frames} frames of " if videos else ""
    lines = [
        "---",
        "library_name: ditc",
        f"pipeline_tag: {'text-to-video' if videos else 'text-to-image'}",
        "tags:",
        "- ditc",
        "- onnx",
        "---",
        "",
        f"# {hub_id.repo.split('/')[1]}",
        "",
        f"A bundle of ditc, built from the {_text(manifest.family)} checkpoint "
        f"`{_text(manifest.checkpoint)}`. The licence is that of the checkpoint.",
        "",
        f'    ditc run {hub_id.repo} "a red heart" -o heart.{"webp" if videos else "png"}',
        "",
        f"It draws {drawn}{defaults.width}x{defaults.height} pixels in {defaults.num_inference_steps} steps unless "
        f"asked otherwise. The digest of its manifest is `{manifest.digest}`; `ditc verify` compares every file "
        "with it.",
        "",
        "| stage | precision | backend | MB |",
        "|---|---|---|---|",
    ]
    for name, stage in manifest.stages.items():
        for artifact in stage.artifacts:
            size = sum(ref.size_bytes for ref in artifact.files) / 1e6
            lines.append(
                f"| {_text(name)} | {artifact.precision.value} | {artifact.backend.value} | {size:.1f} |"
            )
    results = [
        f"- {kind} {_verdict(found)} on {found.date}: {_text(str(entry.machine))}{_but(found, manifest)}"
        for entry in certificate.entries
        for kind, found in (("parity with the checkpoint", entry.parity), ("the self-test", entry.self_test))
        if found is not None
    ]
    return "\n".join([*lines, "", *(results or ["Parity with the checkpoint has not been measured."]), ""])


def _verdict(found: Record) -> str:
    return "FAILED" if found.failed else "passed" if found.passed else "checked nothing"


def _but(found: Record, manifest: Manifest) -> str:
    """What keeps a result of parity from being a proof."""
    weak = why_weak(found, manifest) if found.settings is not None and not found.failed else ""
    return f" ({_text(weak)})" if weak else ""


def _text(value: str) -> str:
    """A value of the manifest in a line of Markdown or a cell of a table."""
    return " ".join(value.split()).replace("|", "/").replace("`", "'")
