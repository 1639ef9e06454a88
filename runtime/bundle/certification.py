"""What a certificate proves: whether parity has shown, for these artifacts and this machine, what a bundle computes.

Artifacts are certified if

  1. parity has passed for exactly these files on some machine, with the settings of the bundle or stricter ones, and
  2. parity or the self-test of every stage has passed for them on this machine, and
  3. none of the two has failed on this machine.

If a public key is given, only records that its owner has signed count as passed. A failure always counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ditc.runtime.bundle.certificate import (
    Certificate,
    Entry,
    Kind,
    Record,
    artifact_set,
    load_certificate,
    statement,
)
from ditc.runtime.bundle.manifest import Artifact, Manifest
from ditc.runtime.bundle.signature import RECORD_PURPOSE, is_signed, load_public_key, sign_digest
from ditc.runtime.errors import BundleError
from ditc.runtime.machine import this_machine
from ditc.runtime.tolerances import Level, table_digest

# The levels that judge what the bundle computes as a whole. The others find the place of an error: they need the
# checkpoint's weights, or an op or modules, which not every run and bundle has.
PROOF = (Level.STAGE, Level.STEP, Level.TRAJECTORY, Level.PICTURE)
PARITY = "ditc parity BUNDLE --against CHECKPOINT"
RENEWAL = f"of an earlier version of ditc, which kept no settings: renew it with {PARITY}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Certification:
    """A bundle's certificate, seen for some artifacts of the bundle on this machine.

    Attributes:
        public_key: a PEM file; only records that its owner has signed count. None if records without a signature do.
    """

    certificate: Certificate
    manifest: Manifest
    artifacts: Mapping[str, Artifact]
    public_key: Path | None = None

    def why_unproven(self) -> str:
        """Why parity has not proven these artifacts on any machine, or what failed on this one; "" if all is well."""
        if self.certificate.outdated:
            return f"its certificate is {RENEWAL}"
        entries, here = self.certificate.of(self.artifacts), this_machine()
        for entry in entries:
            if entry.machine == here and any(
                r is not None and r.failed for r in (entry.parity, entry.self_test)
            ):
                return "parity or the self-test of these artifacts failed on this machine"
        reasons = [self._why_no_proof(entry) for entry in entries if entry.parity is not None]
        if not reasons:
            return f"there is no parity result for these artifacts: run {PARITY}"
        return "" if "" in reasons else reasons[0]

    def self_test_here(self) -> Record | None:
        """The result of the self-test on this machine, if it counts."""
        here = this_machine()
        for entry in self.certificate.of(self.artifacts):
            if entry.machine == here and entry.self_test is not None and self.is_trusted(entry, "self_test"):
                return entry.self_test
        return None

    def why_uncertified(self, tested: Record | None = None) -> str:
        """Why these artifacts are not certified for this machine; "" if they are.

        Args:
            tested: the result of a self-test that this process has just run, which needs no signature.
        """
        if why := self.why_unproven():
            return why
        proven = [e for e in self.certificate.of(self.artifacts) if e.parity and not self._why_no_proof(e)]
        if any(entry.machine == this_machine() for entry in proven):
            return ""
        elsewhere = f"parity has passed only on another machine ({proven[0].machine})"
        tested = tested or self.self_test_here()
        if tested is None:
            sign = "" if self.public_key is None else " --sign KEY.pem"
            return f"{elsewhere}: run ditc verify BUNDLE --run{sign} here"
        why = why_no_self_test(tested, self.artifacts)
        return f"{elsewhere}, and the self-test here {why}: run {PARITY} here" if why else ""

    def is_trusted(self, entry: Entry, kind: Kind) -> bool:
        """Whether a record counts: if there is a key, its owner has signed the record for these files and machine."""
        if self.public_key is None:
            return True
        made = entry.parity if kind == "parity" else entry.self_test
        if made is None or not made.signature:
            return False
        said = statement(self.manifest.digest, entry.artifact_set, entry.machine, kind, made)
        return is_signed(load_public_key(self.public_key), RECORD_PURPOSE, said, made.signature)

    def _why_no_proof(self, entry: Entry) -> str:
        assert entry.parity is not None
        if weak := why_weak(entry.parity, self.manifest):
            return f"its parity result of {entry.parity.date} proves less than is required: {weak}"
        if not self.is_trusted(entry, "parity"):
            assert self.public_key is not None
            return (
                f"its parity result of {entry.parity.date} is not signed with {self.public_key.name}: "
                f"run {PARITY} --sign KEY.pem"
            )
        return ""


def find_certification(
    bundle: Path, manifest: Manifest, artifacts: Mapping[str, Artifact], public_key: str | Path | None = None
) -> Certification:
    """Read the bundle's certificate for some of its artifacts."""
    return Certification(
        certificate=load_certificate(bundle, manifest),
        manifest=manifest,
        artifacts=artifacts,
        public_key=None if public_key is None else Path(public_key),
    )


def check_certified(bundle: Path, why: str) -> None:
    """Raise BundleError if there is a reason why the bundle is not certified."""
    if why:
        raise BundleError(
            f"{bundle} is not certified: {why}", hint="run it without --require-certificate to accept that"
        )


def why_weak(made: Record, manifest: Manifest) -> str:
    """What keeps a result of parity from proving artifacts of this bundle; "" if nothing does."""
    return "; ".join(_weaknesses(made, manifest))


def _weaknesses(made: Record, manifest: Manifest) -> list[str]:
    if made.failed:
        return ["it failed"]
    settings, defaults, found = made.settings, manifest.defaults, []
    passed = {line.name for line in made.lines if line.passed}
    if unchecked := [level.value for level in PROOF if level.value not in passed]:
        found.append(f"it did not check {', '.join(unchecked)}")
    if made.tolerances != table_digest():
        found.append("it was judged by other tolerances than those of this version of ditc")
    if settings is None:
        return [*found, "it does not say what it drew"]
    if settings.loosened:
        found.append(f"its bounds were loosened with --budget {settings.budget}")
    if not settings.prompts or not settings.seeds:
        found.append("it drew nothing")
    if not settings.upstream:
        found.append("it was not compared with upstream, but with ditc's own PyTorch networks alone")
    if settings.num_inference_steps < defaults.num_inference_steps:
        found.append(f"it drew in {settings.num_inference_steps} steps, not {defaults.num_inference_steps}")
    if settings.guidance_scale <= 1 < defaults.guidance_scale:
        found.append(f"it drew with guidance_scale {settings.guidance_scale}, not {defaults.guidance_scale}")
    if settings.height * settings.width < defaults.height * defaults.width:
        found.append(
            f"it drew {settings.height}x{settings.width} pixels, not {defaults.height}x{defaults.width}"
        )
    return found


def why_no_self_test(made: Record, artifacts: Mapping[str, Artifact]) -> str:
    """What keeps a self-test from extending a proof to its machine, as the end of a sentence; "" if nothing does."""
    if made.failed:
        return "failed"
    passed = {line.name for line in made.lines if line.passed}
    if unchecked := [name for name in artifacts if name not in passed]:
        return f"did not check {', '.join(unchecked)}"
    return "" if made.tolerances == table_digest() else "was judged by other tolerances"


def count_signed(certificate: Certificate, manifest: Manifest, public_key: Path) -> int:
    """How many records of the certificate the owner of the key has signed."""
    view = Certification(certificate=certificate, manifest=manifest, artifacts={}, public_key=public_key)
    kinds: tuple[Kind, ...] = ("parity", "self_test")
    return sum(view.is_trusted(entry, kind) for entry in certificate.entries for kind in kinds)


def sign_record(
    made: Record, private_key: Any, manifest: Manifest, artifacts: Mapping[str, Artifact], kind: Kind
) -> Record:
    """The record with a signature, which says that this machine has made it with these artifacts."""
    said = statement(manifest.digest, artifact_set(artifacts), this_machine(), kind, made)
    return replace(made, signature=sign_digest(private_key, RECORD_PURPOSE, said))
