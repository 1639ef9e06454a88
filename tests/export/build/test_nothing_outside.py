"""A build writes and deletes only what is its own: links are not followed, and the user's other files stay."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from ditc.export.build import previous_build
from ditc.export.build.builder import build_bundle
from ditc.export.build.journal import Journal
from ditc.export.contract import BuildOptions
from ditc.runtime.atomic import SUFFIX
from ditc.runtime.bundle.build_cost import FOLDER
from ditc.runtime.bundle.integrity import check_files
from ditc.runtime.bundle.manifest import FileRef, load_manifest, save_manifest
from ditc.runtime.errors import OutputError

pytestmark = pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """A folder outside the bundle, in which nothing may change."""
    folder = tmp_path / "canary"
    (folder / "sub").mkdir(parents=True)
    for name in ("precious", "denoiser.onnx", "sub/precious", f".x.{'0' * 16}{SUFFIX}"):
        (folder / name).write_text("precious")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["onnx", "engines", "golden", "tokenizer", "tokenizer_2", FOLDER])
@pytest.mark.parametrize("to", ["canary", "nowhere"])
def test_a_folder_that_is_a_link_is_refused_by_name(
    tiny_checkpoint: Path, bundle: Path, canary: Path, name: str, to: str
) -> None:
    shutil.rmtree(bundle / name, ignore_errors=True)
    (bundle / name).symlink_to(canary.parent / to)
    before = contents(canary)
    with pytest.raises(OutputError, match=f"/{name}: it is a link") as caught:
        build_bundle(tiny_checkpoint, bundle, BuildOptions())
    assert caught.value.hint and contents(canary) == before and not (canary.parent / "nowhere").exists()


def test_a_lock_that_is_a_link_is_refused_and_what_it_names_is_not_truncated(
    tiny_checkpoint: Path, bundle: Path, canary: Path
) -> None:
    (bundle / FOLDER / "lock").unlink(missing_ok=True)
    (bundle / FOLDER / "lock").symlink_to(canary / "precious")
    with pytest.raises(OutputError, match="lock: it is a link"):
        build_bundle(tiny_checkpoint, bundle, BuildOptions())
    assert (canary / "precious").read_text() == "precious"


def test_a_bundle_that_is_itself_a_link_is_built_where_it_leads(
    tiny_checkpoint: Path, bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(bundle)
    manifest = load_manifest(bundle)
    save_manifest(replace(manifest, checkpoint="other"), bundle)
    assert build_bundle(tiny_checkpoint, tmp_path / "link", BuildOptions()).manifest == manifest
    assert (tmp_path / "link").is_symlink() and load_manifest(bundle) == manifest


def test_links_below_the_folders_and_other_files_of_the_user_stay(
    tiny_checkpoint: Path, bundle: Path, canary: Path
) -> None:
    before = contents(canary)
    (bundle / "onnx" / "nested").symlink_to(canary)
    (bundle / "golden" / "mine").mkdir()
    theirs = ("onnx/mine.onnx", "golden/mine/notes", f"notes{SUFFIX}", f"mine/.x.{'0' * 16}{SUFFIX}")
    (bundle / "mine").mkdir()
    for name in theirs:
        (bundle / name).write_text("mine")
    build_bundle(tiny_checkpoint, bundle, BuildOptions())
    assert contents(canary) == before and (bundle / "onnx" / "nested").is_symlink()
    assert all((bundle / name).read_text() == "mine" for name in theirs)


def test_a_sweep_removes_what_the_old_manifest_or_the_journal_names(bundle: Path) -> None:
    manifest, journal = load_manifest(bundle), Journal(bundle)
    for name in ("of-the-manifest", "of-the-journal", "of-nobody"):
        (bundle / "onnx" / name).write_text("")
    journal.will_write(bundle / "onnx" / "of-the-journal")
    ref = FileRef("onnx/of-the-manifest", "0" * 64, 0)
    previous_build.sweep(bundle, replace(manifest, files=(*manifest.files, ref)), manifest, journal)
    assert sorted(path.name for path in (bundle / "onnx").glob("of-*")) == ["of-nobody"]
    assert journal.written() == {ref.path for ref in manifest.all_files()}
    check_files(bundle, manifest.all_files())


def test_a_sweep_believes_no_hostile_name(bundle: Path, canary: Path) -> None:
    """Neither a manifest nor a journal may have come from this machine."""
    manifest, before = load_manifest(bundle), contents(canary)
    (bundle / "onnx" / "nested").symlink_to(canary)
    (bundle / "engines").symlink_to(canary)
    (bundle / "mine").write_text("mine")
    graph = next(iter(manifest.stages.values())).artifacts[0].file.path
    names = [
        *(
            "../canary/precious",
            "onnx/../../canary/precious",
            f"{canary}/precious",
            "onnx/..",
            "",
            "/",
            "onnx/a\0b",
        ),
        *(
            "engines/precious",
            "onnx/nested/precious",
            "onnx/nested/sub",
            "mine",
            "manifest.json",
            FOLDER,
            "onnx/" + 300 * "x",
        ),
        *(graph.replace("/", "//"), graph.replace("/", "/./"), "onnx", "onnx/\ud800"),
    ]
    journal = Journal(bundle)
    journal.set_written(names)
    refs = tuple(FileRef(name, "0" * 64, 0) for name in names)
    previous_build.sweep(bundle, replace(manifest, files=(*manifest.files, *refs)), manifest, journal)
    assert contents(canary) == before and (bundle / "mine").exists()
    check_files(bundle, load_manifest(bundle).all_files())


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 10**5, b"{}", b"[1, null]", b"\xff"])
def test_a_damaged_list_of_files_names_none(bundle: Path, content: bytes) -> None:
    (bundle / FOLDER / "files.json").write_bytes(content)
    assert Journal(bundle).written() == set()


def test_a_killed_build_has_noted_its_files_before_it_writes_them(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ditc.export.build import graph_artifact

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(graph_artifact, "to_onnx", die)
    with pytest.raises(KeyboardInterrupt):
        build_bundle(tiny_checkpoint, tmp_path / "new", BuildOptions())
    noted = json.loads((tmp_path / "new" / FOLDER / "files.json").read_text())
    assert {Path(name).suffixes[-1] for name in noted} == {".onnx", ".data", ".json"}
