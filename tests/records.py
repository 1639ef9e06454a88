"""Records of certificates as parity and the self-test write them, for tests that run neither, and keys to sign with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ditc.runtime.bundle.certificate import Line, ParitySettings, Record, record
from ditc.runtime.bundle.manifest import Manifest
from ditc.runtime.tolerances import Level


def line(name: str, passed: bool | None = True) -> Line:
    """A line whose value keeps the bound, unless it failed."""
    value = 1e-2 if passed is False else 1e-7
    return Line(name=name, metric="relative L2", value=value, bound=1e-5, passed=passed)


def parity_record(manifest: Manifest, passed: bool = True, **settings: Any) -> Record:
    """A run of parity with the bundle's defaults, except for the given settings."""
    defaults = manifest.defaults
    usual = ParitySettings(
        levels=tuple(Level),
        prompts=("a red heart",),
        seeds=(0,),
        upstream="diffusers",
        num_inference_steps=defaults.num_inference_steps,
        guidance_scale=defaults.guidance_scale,
        height=defaults.height,
        width=defaults.width,
    )
    return record(tuple(line(level, passed) for level in Level), {}, replace(usual, **settings))


def self_test_record(stages: Iterable[str], passed: bool = True) -> Record:
    """A self-test of all stages."""
    return record(tuple(line(stage, passed) for stage in stages))


def make_keys(folder: Path) -> tuple[Path, Path]:
    """A private ed25519 key and its public key, as PEM files in the folder."""
    form = pytest.importorskip("cryptography.hazmat.primitives.serialization")
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key, pem = Ed25519PrivateKey.generate(), form.Encoding.PEM
    private, public = folder / "key.pem", folder / "public.pem"
    private.write_bytes(key.private_bytes(pem, form.PrivateFormat.PKCS8, form.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(pem, form.PublicFormat.SubjectPublicKeyInfo))
    return private, public
