"""Bundles on the hub, here a server on this machine: fetched by their manifest, checked, run from links, and pushed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants as constants
import numpy as np
import pytest
from hub_server import FakeHub

from ditc.runtime.bundle.card import model_card
from ditc.runtime.bundle.certificate import Certificate
from ditc.runtime.bundle.manifest import load_manifest
from ditc.runtime.cli import USAGE, main
from ditc.runtime.errors import BundleError
from ditc.runtime.hub import HubId, find_hub_id
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A hub on a free port without repositories, an empty cache, and a working directory without folders."""
    server = FakeHub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield server
    server.shutdown()
    server.server_close()


def files_of(bundle: Path) -> dict[str, bytes]:
    """What a push uploads of a bundle without signature and certificate."""
    names = ["manifest.json", *(ref.path for ref in load_manifest(bundle).all_files())]
    return {name: (bundle / name).read_bytes() for name in names}


def error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == USAGE
    return capsys.readouterr().err


def test_a_bundle_on_the_hub_draws_the_same_picture_from_the_links_of_the_cache(
    hub: FakeHub, tiny_bundle: Path, pipeline: Pipeline
) -> None:
    extra = {"README.md": b"#", "onnx/other.onnx": b"never fetched", "run.py": b"never fetched"}
    commit = hub.add_commit("org/net", {**files_of(tiny_bundle), **extra})
    request = Request(prompt="cat", seed=1, num_inference_steps=1, height=32, width=32, output_type="np")
    with Pipeline.load("org/net", threads=1) as fetched:
        np.testing.assert_array_equal(fetched.draw(request).images, pipeline.draw(request).images)
    assert sorted(hub.fetched) == sorted(files_of(tiny_bundle))
    folder = Path(constants.HF_HUB_CACHE) / "models--org--net" / "snapshots" / commit
    assert os.name == "nt" or (folder / "manifest.json").is_symlink()
    hub.fetched.clear()
    for name in (str(folder), "org/net", f"hf://org/net@{commit}"):
        assert main(["verify", name, "--json"]) == 0
    assert not hub.fetched


def test_pull_shows_sizes_checks_hashes_and_copies_files_not_links(
    hub: FakeHub, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add_commit("org/net", files_of(tiny_bundle))
    out = tmp_path / "copy"
    assert main(["pull", "org/net", "-o", str(out), "--json"]) == 0
    captured = capsys.readouterr()
    result, total = json.loads(captured.out), sum(map(len, files_of(tiny_bundle).values()))
    manifest_bytes = (tiny_bundle / "manifest.json").stat().st_size
    assert (
        result["bundle"] == str(out) and result["fetched_bytes"] == result["bytes"] == total - manifest_bytes
    )
    assert f"{result['bytes'] / 1e6:.1f} MB; to fetch: {result['files']} files" in captured.err
    assert {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()} == set(files_of(tiny_bundle))
    assert not any(path.is_symlink() for path in out.rglob("*"))
    hub.fetched.clear()
    assert main(["pull", "org/net"]) == 0 and not hub.fetched
    assert "it is a directory" in error(capsys, "pull", "org/net", "-o", str(out))


def test_inspect_fetches_the_manifest_alone(hub: FakeHub, tiny_bundle: Path) -> None:
    hub.add_commit("org/net", files_of(tiny_bundle))
    assert main(["inspect", "org/net"]) == 0
    assert hub.fetched == ["manifest.json"]


def test_a_changed_a_missing_and_a_larger_file_on_the_hub_are_refused_by_name(
    hub: FakeHub, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = files_of(tiny_bundle)
    name = next(name for name in files if name.endswith(".onnx"))
    changed = {**files, name: files[name][:-1] + bytes([files[name][-1] ^ 1])}
    hub.add_commit("org/changed", changed)
    hub.add_commit("org/lacking", {path: data for path, data in files.items() if path != name})
    hub.add_commit("org/larger", {**files, name: files[name] + b"more"})
    hub.add_commit("org/weights", {"model_index.json": b"{}"})
    assert f"{name} has been changed" in error(capsys, "pull", "org/changed")
    hub.fetched.clear()
    assert f"is incomplete: it has no {name}" in error(capsys, "pull", "org/lacking")
    assert f"{name} has {len(files[name]) + 4} bytes on the hub" in error(capsys, "run", "org/larger", "cat")
    assert "org/weights on the hub is not a bundle" in error(capsys, "verify", "org/weights")
    assert hub.fetched == ["manifest.json"] * 2, "nothing large is fetched of what is refused"


def test_what_the_hub_does_not_have_is_named(hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.add_commit("org/net", {})
    assert "no path org/none here, and the hub has no model" in error(capsys, "run", "org/none", "cat")
    assert "org/net has no revision v9" in error(capsys, "pull", "org/net@v9")
    assert "'net' is not a hub id" in error(capsys, "pull", "net")


def test_without_a_network_the_cache_is_used_or_the_error_says_what_it_lacks(
    hub: FakeHub, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add_commit("org/net", files_of(tiny_bundle))
    hub.add_commit("org/part", files_of(tiny_bundle))
    assert main(["pull", "org/net"]) == main(["inspect", "org/part"]) == 0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(["verify", "org/net"]) == 0
    assert "the cache lacks " in error(capsys, "verify", "org/part")
    message = error(capsys, "verify", "org/none")
    assert (
        "it is not in the cache, and the hub cannot be reached" in message and "ditc pull org/none" in message
    )


def test_a_misspelt_path_is_not_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "build").mkdir()
    for path in ("build/bundle", "/abs/path", "./org/net", "bundle", "a/b/c", "../org"):
        assert find_hub_id(path) is None
    assert find_hub_id("hf://build/bundle") == find_hub_id(Path("hf://build/bundle")) == HubId("build/bundle")
    assert find_hub_id("org/net@v1.0") == HubId("org/net", "v1.0")


def test_a_hint_for_a_damaged_bundle_in_the_cache_does_not_say_to_build_there(
    hub: FakeHub, tiny_bundle: Path
) -> None:
    hub.add_commit("org/net", files_of(tiny_bundle))
    assert main(["pull", "org/net"]) == 0
    folder = next((Path(constants.HF_HUB_CACHE) / "models--org--net" / "snapshots").iterdir())
    (folder / load_manifest(folder).text[0].tokenizer).unlink()
    with pytest.raises(BundleError, match="is missing") as caught:
        Pipeline.load(folder)
    assert "ditc pull" in str(caught.value.hint) and "ditc build" not in str(caught.value.hint)


# Push


def test_push_uploads_what_the_manifest_lists_and_a_card_and_pull_gets_it_back(
    hub: FakeHub, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    (bundle / "notes.txt").write_text("not the bundle's")
    assert main(["push", str(bundle), "org/new", "--private", "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    expected = files_of(bundle)
    assert hub.private == ["org/new"] and result["wrote_card"] and "pushing" in captured.err
    assert result["files"] == len(expected) and result["bytes"] == sum(map(len, expected.values()))
    on_hub = hub.files("org/new")
    card = on_hub.pop("README.md").decode()
    assert {name: data for name, data in on_hub.items() if name != ".gitattributes"} == expected
    assert (
        load_manifest(bundle).digest in card
        and 'ditc run org/new "' in card
        and "| denoiser | fp32 |" in card
    )
    assert main(["pull", f"org/new@{result['commit']}"]) == 0


def test_the_card_of_a_bundle_says_whether_it_draws_pictures_or_videos(tiny_bundle: Path) -> None:
    manifest = load_manifest(tiny_bundle)
    latents = replace(manifest.latents, frames_per_cell=4)
    of_videos = replace(manifest, latents=latents, defaults=replace(manifest.defaults, frames=81))
    certificate, hub_id = Certificate(manifest=manifest.digest), HubId("org/new")
    pictures, videos = (model_card(m, certificate, hub_id) for m in (manifest, of_videos))
    assert "pipeline_tag: text-to-image" in pictures and "-o heart.png" in pictures
    assert "pipeline_tag: text-to-video" in videos and "-o heart.webp" in videos
    assert f"It draws 81 frames of {manifest.defaults.width}x" in videos


def test_push_keeps_a_card_and_refuses_damage_foreign_repositories_and_lost_files(
    hub: FakeHub, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add_commit("org/mine", {"README.md": b"# my own card"})
    assert main(["push", str(tiny_bundle), "org/mine"]) == 0
    assert hub.files("org/mine")["README.md"] == b"# my own card"
    assert "the model card there is kept" in capsys.readouterr().out
    hub.add_commit("org/weights", {"model_index.json": b"{}", "README.md": b""})
    assert "holds something else than a bundle, such as model_index.json" in error(
        capsys, "push", str(tiny_bundle), "org/weights"
    )
    tokenizer = load_manifest(tiny_bundle).text[0].tokenizer
    hub.ignored = {tokenizer}
    assert f"the hub has no {tokenizer} after the upload" in error(
        capsys, "push", str(tiny_bundle), "org/ignoring"
    )
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    (bundle / "certificate.json").write_text('{"manifest": "of another"}')
    assert "certificate.json does not belong to the manifest" in error(capsys, "push", str(bundle), "org/a")
    (bundle / tokenizer).write_bytes(b"{}")
    assert "bytes, but the manifest says" in error(capsys, "push", str(bundle), "org/a")
    assert "is a commit, which cannot change" in error(capsys, "push", str(bundle), f"org/a@{'0' * 40}")
    assert "org/a" not in hub.repositories
