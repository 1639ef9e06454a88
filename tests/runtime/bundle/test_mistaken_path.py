"""Whoever names something else than a bundle is told what it is, and where a bundle is."""

from __future__ import annotations

from pathlib import Path

import pytest

from ditc.runtime.bundle.manifest import load_manifest
from ditc.runtime.errors import BundleError


def hint_for(path: Path) -> str:
    with pytest.raises(BundleError, match="is not a bundle") as caught:
        load_manifest(path)
    assert caught.value.hint
    return caught.value.hint


def test_a_checkpoint_is_never_named_as_the_place_to_build_into(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    assert hint_for(tmp_path).endswith(f"ditc build {tmp_path} -o BUNDLE")


def test_a_bundle_inside_or_around_the_folder_is_named(tmp_path: Path) -> None:
    bundle = tmp_path / "demo" / "bundle"
    (bundle / "onnx").mkdir(parents=True)
    (bundle / "manifest.json").write_text("{}")
    assert hint_for(bundle.parent) == hint_for(bundle / "onnx") == f"{bundle} is a bundle"


def test_a_bundle_without_its_manifest_is_built_again_and_one_that_is_nowhere_is_built(
    tmp_path: Path,
) -> None:
    (tmp_path / "onnx").mkdir()
    assert hint_for(tmp_path) == f"rebuild with: ditc build CHECKPOINT -o {tmp_path}"
    nowhere = tmp_path / "nowhere"
    assert hint_for(nowhere).endswith(f"or build one: ditc build CHECKPOINT -o {nowhere}")
