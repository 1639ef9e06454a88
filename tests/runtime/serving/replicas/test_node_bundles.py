"""Bundles that a node gets from the front: complete, checked, once, and only what the node lacks."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_cluster import LocalSource

from ditc.runtime.bundle.integrity import check_bundle
from ditc.runtime.bundle.manifest import MANIFEST, load_manifest, save_manifest
from ditc.runtime.errors import BundleError, OutputError
from ditc.runtime.serving.replicas import node_bundles
from ditc.runtime.serving.replicas.messages import Version
from ditc.runtime.serving.replicas.node_bundles import fetched, place_of, store


class Counting(LocalSource):
    """Notes what is read, and can stop in the middle of it."""

    read_of: list[str]
    left = 10**9

    def read(self, path: str, offset: int) -> bytes | None:
        self.read_of.append(path)
        if len(self.read_of) > self.left:
            raise BundleError("the node is gone", hint="wait")
        return super().read(path, offset)


def counting(bundle: Path, left: int = 10**9) -> Counting:
    source = Counting(str(bundle))
    object.__setattr__(source, "read_of", [])
    object.__setattr__(source, "left", left)
    return source


def version_of(bundle: Path) -> Version:
    return Version("tiny", load_manifest(bundle).digest)


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "front"))


def test_what_is_fetched_is_the_whole_bundle_and_is_fetched_once(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_bundles, "PART_BYTES", 1000)  # so that files have many parts
    (bundle / "certificate.json").write_bytes(bytes(2500))
    source = counting(bundle)
    place = fetched(tmp_path / "store", version_of(bundle), source)
    check_bundle(place, load_manifest(place))
    assert {path.name for path in place.iterdir()} <= {path.name for path in bundle.iterdir()}
    assert (place / "certificate.json").read_bytes() == bytes(2500)
    assert max(source.read_of.count(name) for name in source.read_of) > 3
    again = counting(bundle)
    assert fetched(tmp_path / "store", version_of(bundle), again) == place and again.read_of == []


def test_only_the_owner_may_enter_the_store(bundle: Path, tmp_path: Path) -> None:
    fetched(tmp_path / "store", version_of(bundle), LocalSource(str(bundle)))
    assert (tmp_path / "store").stat().st_mode & 0o077 == 0 or os.name != "posix"


def test_a_rebuilt_bundle_shares_the_files_that_have_not_changed(bundle: Path, tmp_path: Path) -> None:
    first = fetched(tmp_path / "store", version_of(bundle), LocalSource(str(bundle)))
    manifest = load_manifest(bundle)
    save_manifest(replace(manifest, defaults=replace(manifest.defaults, num_inference_steps=7)), bundle)
    source = counting(bundle)
    second = fetched(tmp_path / "store", version_of(bundle), source)
    assert second != first and load_manifest(second).defaults.num_inference_steps == 7
    assert set(source.read_of) - {MANIFEST} <= {"manifest.sig", "certificate.json", "benchmark.json"}
    check_bundle(second, load_manifest(second))


def test_after_an_interruption_only_the_rest_is_fetched(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="the node is gone"):
        fetched(tmp_path / "store", version_of(bundle), counting(bundle, left=4))
    source = counting(bundle)
    place = fetched(tmp_path / "store", version_of(bundle), source)
    check_bundle(place, load_manifest(place))
    files = {ref.sha256 for ref in load_manifest(bundle).all_files()}
    assert 0 < len({name for name in source.read_of if (bundle / name).is_file()}) < len(files) + 1


@pytest.mark.parametrize("how", ["changed", "truncated", "longer", "removed"])
def test_a_file_that_is_not_what_the_manifest_says_is_refused_and_not_kept(
    bundle: Path, tmp_path: Path, how: str
) -> None:
    version = version_of(bundle)
    ref = max(load_manifest(bundle).all_files(), key=lambda ref: ref.size_bytes)
    content = (bundle / ref.path).read_bytes()
    changed = bytes([content[0] ^ 1]) + content[1:]
    (bundle / ref.path).unlink()
    if how != "removed":
        (bundle / ref.path).write_bytes(
            {"changed": changed, "truncated": content[:-1], "longer": content + b"x"}[how]
        )
    with pytest.raises(BundleError, match=f"{Path(ref.path).name} of the front's bundle is not what"):
        fetched(tmp_path / "store", version, LocalSource(str(bundle)))
    assert not (tmp_path / "store" / version.digest).exists()
    assert not (tmp_path / "store" / "files" / ref.sha256).exists()
    assert not list((tmp_path / "store" / "files").glob(".*"))


def test_another_version_or_none_at_the_front_is_refused(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="the front's bundle is at version"):
        fetched(tmp_path / "store", Version("tiny", "0" * 64), LocalSource(str(bundle)))
    with pytest.raises(BundleError, match="is not there any more"):
        fetched(tmp_path / "store", Version("tiny", "0" * 64), LocalSource(str(tmp_path / "nothing")))
    assert [path.name for path in (tmp_path / "store").iterdir()] == [f"{'0' * 64}.lock"]


def test_what_is_beside_the_manifest_is_bounded(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_bundles, "MAX_BESIDE_BYTES", (bundle / MANIFEST).stat().st_size - 1)
    monkeypatch.setattr(node_bundles, "PART_BYTES", 1000)
    with pytest.raises(BundleError, match=r"manifest\.json of the bundle is larger than"):
        fetched(tmp_path / "store", version_of(bundle), LocalSource(str(bundle)))


def test_too_little_room_is_said_before_anything_is_fetched(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_bundles.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(OutputError, match=r"takes .* GB, and .* has 0\.0 GB free") as raised:
        fetched(tmp_path / "store", version_of(bundle), LocalSource(str(bundle)))
    assert "XDG_CACHE_HOME" in raised.value.hint and not (tmp_path / "store" / "files").exists()


def test_of_several_replicas_of_a_node_one_fetches(bundle: Path, tmp_path: Path) -> None:
    source = counting(bundle)
    with ThreadPoolExecutor(4) as pool:
        places = {
            each.result()
            for each in [
                pool.submit(fetched, tmp_path / "store", version_of(bundle), source) for _ in range(4)
            ]
        }
    assert len(places) == 1 and source.read_of.count(MANIFEST) == 1


def test_the_path_is_used_where_it_has_this_very_version(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = counting(bundle)
    assert place_of(bundle, version_of(bundle), source) == bundle and source.read_of == []
    older = Path(shutil.copytree(bundle, tmp_path / "older"))
    manifest = load_manifest(older)
    save_manifest(replace(manifest, defaults=replace(manifest.defaults, num_inference_steps=7)), older)
    place = place_of(older, version_of(bundle), source)
    assert place.parent == store() == tmp_path / "cache" / "ditc" / "bundles"


def test_a_user_without_a_folder_for_caches_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_bundles, "cache_folder", lambda: None)
    with pytest.raises(OutputError, match="no folder for caches"):
        store()
