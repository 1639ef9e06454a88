"""Verbs that write into a bundle follow no link: what it names outside stays as it is."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from ditc.runtime.bundle.certificate import CERTIFICATE
from ditc.runtime.bundle.signature import SIGNATURE
from ditc.runtime.cli import main
from ditc.runtime.sessions.kernel_cache import KernelCache

pytestmark = pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    path = tmp_path / "canary"
    path.write_text("precious")
    return path


def test_sign_and_verify_replace_links_and_leave_what_they_name(
    tiny_bundle: Path, tmp_path: Path, canary: Path
) -> None:
    """Also under the names that temporary files had in earlier versions, which could be guessed."""
    serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    pem, pkcs8, plain = (
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    key = tmp_path / "key.pem"
    key.write_bytes(Ed25519PrivateKey.generate().private_bytes(pem, pkcs8, plain))
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    (bundle / CERTIFICATE).unlink(missing_ok=True)
    for name in (CERTIFICATE, SIGNATURE):
        for link in (name, f"{name}.{os.getpid()}.partial", f".{name}.{os.getpid()}.partial"):
            (bundle / link).symlink_to(canary)
    (tmp_path / "link").symlink_to(bundle)
    canary.write_text(old := '{"manifest": "", "entries": []}')  # a certificate of an earlier version of ditc
    assert main(["sign", str(tmp_path / "link"), "--key", str(key)]) == 0
    assert main(["verify", str(tmp_path / "link"), "--run"]) == 0
    assert canary.read_text() == old
    assert not (bundle / SIGNATURE).is_symlink() and not (bundle / CERTIFICATE).is_symlink()


def test_a_kernel_cache_that_is_a_link_is_replaced_or_removed_itself(tmp_path: Path, canary: Path) -> None:
    cache = KernelCache(tmp_path / "kernels.bin")
    cache.file.symlink_to(canary)
    cache.save(b"kernels")
    assert cache.load() == b"kernels" and not cache.file.is_symlink()
    cache.file.unlink()
    cache.file.symlink_to(canary)
    cache.discard()
    assert canary.read_text() == "precious" and not cache.file.is_symlink()
