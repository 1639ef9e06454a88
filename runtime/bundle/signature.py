"""ed25519 signatures, which show who built or tested a bundle. A digest shows only that nothing is damaged.

`manifest.sig` beside the manifest is a signature of its digest, which covers the hashes of all files. The records of a
certificate carry signatures of their own. Signing and checking need the package `cryptography`
(`pip install "ditc[sign]"`).
"""

from __future__ import annotations

import json
import logging
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

from ditc.runtime.atomic import write_atomic
from ditc.runtime.bundle.manifest import Manifest, load_manifest
from ditc.runtime.errors import BundleError, MissingExtra, UsageError

log = logging.getLogger(__name__)

SIGNATURE = "manifest.sig"
# A signed message begins with its purpose, so that no signature that was made for one thing is valid for another.
MANIFEST_PURPOSE = "ditc bundle manifest, sha256 "
RECORD_PURPOSE = "ditc certificate record, sha256 "


def sign(bundle: Path, private_key: Path, manifest: Manifest | None = None) -> Path:
    """Sign the bundle's manifest with an ed25519 private key (a PEM file), and return the path of the signature.

    Args:
        manifest: what is signed, if the caller has checked it; the file could have been exchanged since. None reads it.

    Raises:
        BundleError: the manifest is missing or damaged.
        UsageError: the key cannot be read.
        OutputError: the signature cannot be written.
        MissingExtra: the package cryptography is not installed.
    """
    manifest, key = manifest or load_manifest(bundle), load_private_key(private_key)
    record = {
        "algorithm": "ed25519",
        "digest": manifest.digest,
        "signature": sign_digest(key, MANIFEST_PURPOSE, manifest.digest),
    }
    return write_atomic(bundle / SIGNATURE, json.dumps(record) + "\n", hint="sign a copy of the bundle")


def load_private_key(path: Path) -> Any:
    """Read an ed25519 private key from a PEM file. A build calls this first, so that it does not fail at its end.

    Raises:
        UsageError: the file cannot be read, or holds no such key.
        MissingExtra: the package cryptography is not installed.
    """
    ed25519, serialization = _library()
    key = _read(path, lambda data: serialization.load_pem_private_key(data, password=None))
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise UsageError(f"{path} is not an ed25519 private key", hint=_MAKE_KEY)
    _warn_if_shared(path)
    return key


def _warn_if_shared(private_key: Path) -> None:
    """Say so if other users of this machine can read the key, with which they could sign too."""
    with suppress(OSError):  # it was read, so it counts
        if os.name == "posix" and private_key.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
            log.warning("other users can read the private key %s; forbid it with chmod 600", private_key)


def check_signature(bundle: Path, manifest: Manifest, public_key: Path) -> None:
    """Refuse a bundle whose manifest was not signed by the owner of the key.

    Args:
        manifest: the manifest that was loaded. The file is not read again, as it could have been exchanged since.
        public_key: a PEM file with an ed25519 public key.

    Raises:
        BundleError: the bundle is not signed, is signed with another key, or was changed after it was signed.
        UsageError: the key cannot be read.
        MissingExtra: the package cryptography is not installed.
    """
    key = load_public_key(public_key)
    path = bundle / SIGNATURE
    hint = "do not run it, or sign it yourself: ditc sign BUNDLE --key KEY.pem"
    if not path.is_file():
        raise BundleError(f"{bundle} is not signed: it has no {SIGNATURE}", hint=hint)
    try:
        signature = str(json.loads(path.read_bytes())["signature"])
        bytes.fromhex(signature)
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise BundleError(f"{path} is not a signature: {type(e).__name__}", hint=hint) from e
    if not is_signed(key, MANIFEST_PURPOSE, manifest.digest, signature):
        raise BundleError(
            f"{bundle}: {SIGNATURE} does not match {public_key.name} and the manifest {manifest.digest[:12]}",
            hint=hint,
        )


def load_public_key(path: Path) -> Any:
    """Read an ed25519 public key from a PEM file.

    Raises:
        UsageError: the file cannot be read, or holds no such key.
        MissingExtra: the package cryptography is not installed.
    """
    ed25519, serialization = _library()
    key = _read(path, serialization.load_pem_public_key)
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise UsageError(f"{path} is not an ed25519 public key", hint=_MAKE_KEY)
    return key


def sign_digest(private_key: Any, purpose: str, digest: str) -> str:
    """The signature of a digest, made for one purpose, in hexadecimal digits."""
    return str(private_key.sign((purpose + digest).encode()).hex())


def is_signed(public_key: Any, purpose: str, digest: str, signature: str) -> bool:
    """Whether the owner of the key made this signature of the digest for this purpose."""
    from cryptography.exceptions import InvalidSignature

    try:
        public_key.verify(bytes.fromhex(signature), (purpose + digest).encode())
    except (InvalidSignature, ValueError):  # ValueError: no hexadecimal digits
        return False
    return True


_MAKE_KEY = (
    "openssl genpkey -algorithm ed25519 -out key.pem && openssl pkey -in key.pem -pubout -out public.pem"
)


def _library() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as e:
        raise MissingExtra("cryptography", "sign") from e
    return ed25519, serialization


def _read(path: Path, parse: Any) -> Any:
    try:
        return parse(path.read_bytes())
    except (OSError, ValueError, TypeError) as e:  # a TypeError means that the key is encrypted
        raise UsageError(f"{path} cannot be read as a PEM key: {e}", hint=_MAKE_KEY) from e
