"""manifest.json: it is read strictly, sealed by its digest, and names no path outside of the bundle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ditc.runtime.bundle.jsondata import from_json, to_json
from ditc.runtime.bundle.manifest import Manifest, check_inside, load_manifest, save_manifest, sealed
from ditc.runtime.errors import BundleError

Data = dict[str, Any]


def resealed(bundle: Path, out: Path, change: Callable[[Data], None]) -> Path:
    """A directory with the bundle's manifest, which is changed and sealed again, as a forger would do."""
    data = json.loads((bundle / "manifest.json").read_text())
    change(data)
    out.mkdir(exist_ok=True)
    save_manifest(from_json(Manifest, data), out)
    return out


def test_a_saved_manifest_is_read_back_unchanged(tiny_bundle: Path, tmp_path: Path) -> None:
    manifest = load_manifest(tiny_bundle)
    save_manifest(manifest, tmp_path)
    assert load_manifest(tmp_path) == manifest
    assert sealed(manifest) == manifest
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"], "no temporary file is left"


def test_the_digest_covers_every_field(tiny_bundle: Path, tmp_path: Path) -> None:
    data = json.loads((tiny_bundle / "manifest.json").read_text())
    for name in data.keys() - {"digest", "schema_version"}:
        changed = {**data, name: {"x": 1}}
        (tmp_path / "manifest.json").write_text(json.dumps(changed))
        with pytest.raises(BundleError, match="digest"):
            load_manifest(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not JSON"),
        ('{"schema_version": 1', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "schema version None"),
        ('{"schema_version": "1"}', "schema version '1'"),
        ('{"schema_version": 0}', "schema version 0"),
        ('{"schema_version": 999}', "schema version 999"),
        ('{"schema_version": 1}', "digest"),
    ],
)
def test_a_file_that_is_not_a_manifest_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(BundleError, match=message) as caught:
        load_manifest(tmp_path)
    assert caught.value.hint


def test_a_newer_schema_hints_at_an_update(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"schema_version": 2}')
    with pytest.raises(BundleError) as caught:
        load_manifest(tmp_path)
    assert caught.value.hint == "update ditc"


def test_a_path_that_does_not_exist_is_named_as_such(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="nowhere is not a bundle: the path does not exist") as caught:
        load_manifest(tmp_path / "nowhere")
    assert "check the path" in str(caught.value.hint)


def test_a_directory_without_a_manifest_is_not_a_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a bundle"):
        load_manifest(tmp_path)
    with pytest.raises(BundleError, match="is not a bundle"):
        load_manifest(tmp_path / "missing")


PATHS = ["/etc/passwd", "../secret", "onnx/../../x", "", ".", "C:/x", "a\\b", "\\\\host\\x", "a\0b"]


@pytest.mark.parametrize("path", PATHS)
def test_paths_that_leave_the_bundle_are_refused(path: str) -> None:
    with pytest.raises(BundleError, match="not a plain path"):
        check_inside(path)


def test_a_sealed_manifest_with_such_a_path_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    def to_outside(data: Data) -> None:
        data["stages"]["denoiser"]["artifacts"][0]["data"][0]["path"] = "../weights"

    with pytest.raises(BundleError, match=r"'\.\./weights'"):
        load_manifest(resealed(tiny_bundle, tmp_path, to_outside))


@pytest.mark.parametrize("path", ["../tokenizer.json", "/tmp/tokenizer.json", "onnx/other.json"])
def test_a_tokenizer_that_is_not_among_the_hashed_files_is_refused(
    tiny_bundle: Path, tmp_path: Path, path: str
) -> None:
    def elsewhere(data: Data) -> None:
        data["text"][0]["tokenizer"] = path

    with pytest.raises(BundleError, match="not among the bundle's files"):
        load_manifest(resealed(tiny_bundle, tmp_path, elsewhere))


def test_every_file_is_listed_once_and_exists(tiny_bundle: Path) -> None:
    refs = list(load_manifest(tiny_bundle).all_files())
    assert len({ref.path for ref in refs}) == len(refs)
    assert all((tiny_bundle / ref.path).stat().st_size == ref.size_bytes for ref in refs)
    on_disk = {
        path.relative_to(tiny_bundle).as_posix()
        for path in tiny_bundle.rglob("*")
        if path.is_file() and ".build" not in path.parts
    }
    assert on_disk == {ref.path for ref in refs} | {"manifest.json"}, "nothing else lies in a fresh bundle"


def test_the_manifest_tells_the_tools_that_built_it(tiny_bundle: Path) -> None:
    manifest = load_manifest(tiny_bundle)
    assert {"ditc", "torch", "onnx", "onnxruntime"} <= manifest.tools.keys()
    assert to_json(manifest)["family"] == "sana"


def test_a_file_is_not_a_bundle_and_the_hint_asks_for_a_directory(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(b"")
    with pytest.raises(BundleError, match="is not a bundle") as e:
        load_manifest(path)
    assert e.value.hint == "name the bundle's directory"
