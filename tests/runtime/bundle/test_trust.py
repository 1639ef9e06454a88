"""Bundles that must be refused: damaged or forged ones, links to the outside, engines for other machines."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from records import make_keys

from ditc.runtime import loader
from ditc.runtime.bundle.integrity import check_files
from ditc.runtime.bundle.manifest import Artifact, FileRef, load_manifest, save_manifest
from ditc.runtime.bundle.signature import SIGNATURE, check_signature, sign
from ditc.runtime.cli import USAGE, main
from ditc.runtime.errors import BundleError, DitcError, MissingExtra, SessionError, UsageError
from ditc.runtime.gpu import Gpu
from ditc.runtime.load_options import LoadOptions
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.sessions import opening
from ditc.runtime.sessions.opening import check_engine
from ditc.runtime.spec import DENOISER, Backend

MUTATIONS = 1000


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def verify(bundle: Path) -> None:
    check_files(bundle, load_manifest(bundle).all_files())


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The error line of a command, which must end with exit code 2, one error line and one hint."""
    assert main(list(arguments)) == USAGE
    out, err = capsys.readouterr()
    assert not out
    error, hint = err.splitlines()[-2:]
    assert error.startswith("error: ") and hint.startswith("hint: ") and len(hint) > 10
    return error


# Damage


def test_any_changed_byte_of_any_file_is_refused_by_name(copy: Path) -> None:
    """Bytes are changed in place and restored. The manifest is among the files, and each file has its turn as often."""
    refs = list(load_manifest(copy).all_files())
    names = ["manifest.json", *(ref.path for ref in refs)]
    rng = random.Random(0)
    verify(copy)
    for index in range(MUTATIONS):
        name = names[index % len(names)]
        with (copy / name).open("r+b") as file:
            offset = rng.randrange(file.seek(0, os.SEEK_END))
            file.seek(offset)
            (byte,) = file.read(1)
            file.seek(offset)
            file.write(bytes([byte ^ rng.randrange(1, 256)]))
            file.flush()
            with pytest.raises(BundleError) as caught:
                verify(copy) if name == "manifest.json" else check_files(copy, refs)
            file.seek(offset)
            file.write(bytes([byte]))
        assert name in str(caught.value) and caught.value.hint, (name, offset)
    verify(copy)


@pytest.mark.parametrize("kept", [0, 1, -1])
def test_a_truncated_file_is_refused_by_name(copy: Path, kept: int) -> None:
    for ref in load_manifest(copy).all_files():
        content = (copy / ref.path).read_bytes()
        (copy / ref.path).write_bytes(content[:kept])
        with pytest.raises(BundleError, match=ref.path):
            verify(copy)
        (copy / ref.path).write_bytes(content)


def test_a_file_of_another_bundle_is_refused(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One stage's graph has the content of another's: a sound graph, but not the one in the manifest."""
    manifest = load_manifest(copy)
    first, second = (
        copy / manifest.stages[name].artifacts[0].file.path for name in ("vae_encoder", DENOISER)
    )
    shutil.copyfile(first, second)
    assert second.name in refused(capsys, "run", str(copy), "cat", "-o", str(copy / "x.png"))
    assert second.name in refused(capsys, "verify", str(copy))


@pytest.mark.parametrize(
    "path", ["/etc/hostname", "../outside", "onnx/../../outside", "C:\\x", "a\\b", "x\0y", ""]
)
def test_a_sealed_manifest_cannot_name_a_path_outside(
    copy: Path, capsys: pytest.CaptureFixture[str], path: str
) -> None:
    manifest = load_manifest(copy)
    save_manifest(replace(manifest, files=(*manifest.files, FileRef(path, "0" * 64, 1))), copy)
    assert "not a plain path" in refused(capsys, "verify", str(copy))


def test_a_newer_schema_asks_for_a_newer_ditc(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**data, "schema_version": 99}))
    assert main(["verify", str(copy)]) == USAGE
    assert "hint: update ditc" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_the_content_behind_a_link_counts_and_a_link_to_anything_but_a_file_is_refused(
    copy: Path, tmp_path: Path
) -> None:
    path = copy / next(iter(load_manifest(copy).all_files())).path
    outside = tmp_path / "outside"
    path.rename(outside)
    path.symlink_to(outside)
    verify(copy)
    content = outside.read_bytes()
    outside.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(BundleError, match="has been changed"):
        verify(copy)
    outside.unlink()
    with pytest.raises(BundleError, match="is a link to nothing"):
        verify(copy)
    for make in (os.mkfifo, os.mkdir):
        make(tmp_path / make.__name__)
        path.unlink()
        path.symlink_to(tmp_path / make.__name__)
        with pytest.raises(BundleError, match="is not a regular file"):
            verify(copy)


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_a_file_that_everybody_may_change_is_warned_about(
    copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = copy / load_manifest(copy).stages[DENOISER].artifacts[0].file.path
    path.chmod(0o666)
    with caplog.at_level(logging.WARNING, "ditc"):
        verify(copy)
    assert [path.name in record.getMessage() for record in caplog.records] == [True]


# Signatures


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """A private and a public ed25519 key in PEM."""
    return make_keys(tmp_path)


def test_a_signed_bundle_is_run_and_an_unsigned_one_is_not(
    copy: Path, keys: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    private, public = keys
    draw = ["run", str(copy), "cat", "-o", str(tmp_path / "x.png"), "--require-signature", str(public)]
    draw += ["--seed", "1", "--allow-uniform"]
    assert "is not signed" in refused(capsys, *draw)
    assert main(["sign", str(copy), "--key", str(private)]) == 0
    assert main(["verify", str(copy), "--require-signature", str(public)]) == 0
    assert main(draw) == 0 and (tmp_path / "x.png").is_file()
    Pipeline.load(str(copy), require_signature=str(public)).close()


def test_a_signature_that_cannot_be_made_is_refused_before_the_bundle_is_hashed(
    copy: Path, keys: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ditc.runtime.bundle.integrity.check_files", lambda *_: pytest.fail("it was hashed"))
    assert "cannot be read as a PEM key" in refused(
        capsys, "sign", str(copy), "--key", str(copy / "none.pem")
    )
    (copy / SIGNATURE).mkdir()
    assert "manifest.sig: it is a directory" in refused(capsys, "sign", str(copy), "--key", str(keys[0]))


def test_a_forged_manifest_does_not_fit_the_signature(copy: Path, keys: tuple[Path, Path]) -> None:
    """A forger can seal a manifest anew, but cannot sign it."""
    private, public = keys
    sign(copy, private)
    check_signature(copy, load_manifest(copy), public)
    save_manifest(replace(load_manifest(copy), checkpoint="another"), copy)
    with pytest.raises(BundleError, match=r"does not match public\.pem"):
        check_signature(copy, load_manifest(copy), public)


@pytest.mark.parametrize(
    "content", ["", "[]", '{"signature": "xyz"}', '{"signature": 1}', '{"signature": "00"}']
)
def test_a_file_that_is_not_a_signature_is_refused(copy: Path, keys: tuple[Path, Path], content: str) -> None:
    (copy / SIGNATURE).write_text(content)
    with pytest.raises(BundleError, match=r"manifest\.sig"):
        check_signature(copy, load_manifest(copy), keys[1])


def test_a_key_of_another_kind_and_a_missing_one_are_refused(copy: Path, keys: tuple[Path, Path]) -> None:
    private, public = keys
    for path in (public, copy / "manifest.json", copy / "nothing.pem"):
        with pytest.raises(UsageError):
            sign(copy, path)
    sign(copy, private)
    with pytest.raises(UsageError):
        check_signature(copy, load_manifest(copy), private)


def test_without_cryptography_the_pip_line_is_named(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cryptography.hazmat.primitives", None)
    with pytest.raises(MissingExtra) as caught:
        sign(copy, copy / "key.pem")
    assert caught.value.hint == 'pip install "ditc[sign]"'


# Engines for other machines


def engine(bundle: Path, **changes: Any) -> Artifact:
    artifact = load_manifest(bundle).stages[DENOISER].artifacts[0]
    facts = {"backend": Backend.TENSORRT_RTX, "targets": ("sm86", "sm89"), "library": "1.7.1.116", **changes}
    return replace(artifact, **facts)


ADA = Gpu("NVIDIA RTX 6000 Ada", "sm89")


@pytest.mark.parametrize(
    ("changes", "gpu", "library", "message"),
    [
        (
            {},
            Gpu("NVIDIA H100", "sm90"),
            "1.7.1.116",
            "is for sm86, sm89, but this GPU .NVIDIA H100. is sm90",
        ),
        ({}, ADA, "1.8.0.1", "built with tensorrt-rtx 1.7.1.116, but this machine has 1.8.0.1"),
        ({}, None, "1.7.1.116", "no NVIDIA GPU"),
        ({}, ADA, None, "tensorrt-rtx is not installed"),
        (
            {"backend": Backend.TENSORRT, "targets": ("this-gpu",), "gpu": "NVIDIA H200"},
            Gpu("NVIDIA H100", "sm90"),
            "1.7.1.116",
            "built on and for NVIDIA H200, but this GPU is NVIDIA H100",
        ),
    ],
)
def test_an_engine_for_another_machine_is_refused_before_it_is_opened(
    tiny_bundle: Path, changes: dict[str, Any], gpu: Gpu | None, library: str | None, message: str
) -> None:
    with pytest.raises(SessionError, match=message) as caught:
        check_engine(engine(tiny_bundle, **changes), gpu=gpu, library=library)
    assert caught.value.hint


@pytest.mark.parametrize(("sm", "hint"), [("sm120", "--targets sm120"), ("sm90", "--backend onnxruntime")])
def test_the_hint_never_names_a_target_that_cannot_be_built(tiny_bundle: Path, sm: str, hint: str) -> None:
    with pytest.raises(SessionError) as caught:
        check_engine(engine(tiny_bundle), gpu=Gpu("a GPU", sm), library="1.7.1.116")
    assert hint in str(caught.value.hint) and "--targets sm90" not in str(caught.value.hint)


def test_an_engine_for_this_machine_passes(tiny_bundle: Path) -> None:
    check_engine(engine(tiny_bundle), gpu=ADA, library="1.7.1.116")


def test_asking_for_an_engine_says_why_it_cannot_run_here(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = load_manifest(copy)
    stage = replace(manifest.stages[DENOISER], artifacts=(engine(copy, library="0.9"),))
    save_manifest(replace(manifest, stages={**manifest.stages, DENOISER: stage}), copy)
    monkeypatch.setattr(opening, "library_version", lambda backend: "1.7.1.116")
    with pytest.raises(DitcError, match=r"built with tensorrt-rtx 0\.9"):
        loader.choose(load_manifest(copy), LoadOptions(backend="tensorrt-rtx"))
